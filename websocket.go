// Websocket frames: the protocol after its opening handshake, both ways.
// RFC 6455 5.

package main

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Opcodes. RFC 6455 5.2.
const (
	opText   = 0x1
	opBinary = 0x2
	opClose  = 0x8
	opPing   = 0x9
	opPong   = 0xa
)

const maxControl = 125 // bytes of payload in a control frame. RFC 6455 5.5

// appendHeader appends the header of a final frame of n bytes; key is its
// masking key, nil for none. RFC 6455 5.2.
func appendHeader(b []byte, opcode byte, n int, key []byte) []byte {
	var masked byte
	if key != nil {
		masked = 0x80
	}
	b = append(b, 0x80|opcode)
	switch {
	case n <= 125:
		b = append(b, masked|byte(n))
	case n <= 0xffff:
		b = binary.BigEndian.AppendUint16(append(b, masked|126), uint16(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, masked|127), uint64(n))
	}
	return append(b, key...)
}

// appendFrame appends a whole frame, masked with a fresh key where it must be.
// RFC 6455 5.3.
func appendFrame(b []byte, opcode byte, payload []byte, masked bool) []byte {
	if !masked {
		return append(appendHeader(b, opcode, len(payload), nil), payload...)
	}
	var key [4]byte
	rand.Read(key[:])
	b = appendHeader(b, opcode, len(payload), key[:])
	b = append(b, payload...)
	mask(b[len(b)-len(payload):], key, 0)
	return b
}

// mask masks or unmasks the bytes of a payload from its byte at on.
// RFC 6455 5.3.
func mask(b []byte, key [4]byte, at uint64) {
	var turned [8]byte
	for i := range turned {
		turned[i] = key[(at+uint64(i))%4]
	}
	word := binary.NativeEndian.Uint64(turned[:])
	for ; len(b) >= 8; b = b[8:] {
		binary.NativeEndian.PutUint64(b, binary.NativeEndian.Uint64(b)^word)
	}
	for i := range b {
		b[i] ^= turned[i]
	}
}

// errFrame: what came is not a frame that the other side may send.
var errFrame = errors.New("not the websocket protocol")

// errTooLong: a message is longer than it may be, and is not kept.
var errTooLong = errors.New("the message is too long")

// inbox reads what the other side of a link sends. It answers pings, and tells
// the link of pongs. It is owned by the goroutine that reads.
type inbox struct {
	link *link
	r    *bufio.Reader

	// the frame that is begun
	final  bool // the last of its message
	masked bool
	key    [4]byte
	left   uint64 // bytes of payload to come
	at     uint64 // and that came
}

// newInbox reads what came early, while the handshake was read, and then from
// l; size bytes at once, or more.
func newInbox(l *link, early []byte, size int) *inbox {
	var r io.Reader = l
	if len(early) > 0 {
		r = io.MultiReader(bytes.NewReader(early), l)
	}
	return &inbox{link: l, r: bufio.NewReaderSize(r, size)}
}

// take returns the next n bytes, until the next read.
func (in *inbox) take(n int) ([]byte, error) {
	b, err := in.r.Peek(n)
	in.r.Discard(len(b))
	return b, err
}

// next goes to the next frame, past what is left of this one, and returns its
// opcode. Control frames have been dealt with then. The end of the connection is
// io.EOF, a close frame errPeerClosed. What else RFC 6455 5.4 says of fragments
// is not looked at.
func (in *inbox) next() (opcode byte, err error) {
	for in.left > 0 {
		n, err := in.r.Discard(int(min(in.left, 1<<30)))
		if in.left -= uint64(n); err != nil {
			return 0, err
		}
	}
	b, err := in.take(2)
	if err != nil {
		return 0, err
	}
	first, size := b[0], uint64(b[1]&0x7f)
	in.final, in.masked, in.at = first&0x80 != 0, b[1]&0x80 != 0, 0
	opcode = first & 0xf
	control := opcode >= opClose
	switch {
	case first&0x70 != 0:
		return 0, fmt.Errorf("%w: a reserved bit is set", errFrame)
	case opcode > opPong || opcode > opBinary && !control:
		return 0, fmt.Errorf("%w: opcode %d", errFrame, opcode)
	case in.masked && in.link.masks:
		return 0, fmt.Errorf("%w: a server masks a frame", errFrame)
	case !in.masked && !in.link.masks:
		return 0, fmt.Errorf("%w: a client does not mask a frame", errFrame)
	case control && (size > maxControl || !in.final):
		return 0, fmt.Errorf("%w: a control frame of more than %d bytes, or in parts", errFrame, maxControl)
	case size == 126:
		if b, err = in.take(2); err == nil {
			size = uint64(binary.BigEndian.Uint16(b))
		}
	case size == 127:
		if b, err = in.take(8); err == nil {
			size = binary.BigEndian.Uint64(b)
		}
	}
	if err == nil && in.masked {
		b, err = in.take(4)
		copy(in.key[:], b)
	}
	if err != nil || !control {
		in.left = size
		return opcode, err
	}
	if b, err = in.take(int(size)); err != nil {
		return 0, err
	}
	if in.masked {
		mask(b, in.key, 0)
	}
	switch opcode {
	case opClose:
		if len(b) < 2 {
			return 0, errPeerClosed
		}
		return 0, fmt.Errorf("%w with status %d", errPeerClosed, binary.BigEndian.Uint16(b)) // its text may hold a secret
	case opPing:
		in.link.reply(opPong, b)
	case opPong:
		in.link.hear(b)
	}
	return opcode, nil
}

// Read reads the payload of one data frame after the other.
func (in *inbox) Read(p []byte) (int, error) {
	for in.left == 0 {
		if _, err := in.next(); err != nil {
			return 0, err
		}
	}
	n, err := in.r.Read(p[:min(uint64(len(p)), in.left)])
	if in.masked {
		mask(p[:n], in.key, in.at)
	}
	in.left -= uint64(n)
	in.at += uint64(n)
	return n, err
}

// message returns the next message, put together from its fragments. One of
// more than limit bytes is skipped, and is errTooLong. RFC 6455 5.4.
func (in *inbox) message(limit int) (opcode byte, b []byte, err error) {
	for long := false; ; {
		op, err := in.next()
		switch {
		case err != nil:
			return 0, nil, err
		case op >= opClose:
			continue
		case op != 0:
			opcode, b, long = op, nil, false
		}
		n := len(b)
		if long = long || in.left > uint64(limit-n); long {
			b = nil
		} else {
			b = append(b, make([]byte, in.left)...)
			if _, err := io.ReadFull(in, b[n:]); err != nil {
				return 0, nil, err
			}
		}
		switch {
		case !in.final:
		case long:
			return opcode, nil, errTooLong
		default:
			return opcode, b, nil
		}
	}
}

// closeCode is the status of our close frame; 0 for none. RFC 6455 7.4.1.
func closeCode(why error) uint16 {
	switch {
	case errors.Is(why, errRemoved), errors.Is(why, errChanged), errors.Is(why, errTakenOver), errors.Is(why, errPeerClosed):
		return 1000
	case errors.Is(why, errShutdown):
		return 1001 // going away
	case errors.Is(why, errFrame):
		return 1002 // protocol error
	case errors.Is(why, errNotTS):
		return 1003
	case errors.Is(why, errReplaced):
		return 1008
	}
	return 0
}
