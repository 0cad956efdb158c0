// Websocket frames: the protocol after its opening handshake, both ways.
// RFC 6455 5. Nothing here knows of connections or who is at their other end.

package main

import (
	"bufio"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strconv"
)

// Opcodes. RFC 6455 5.2.
const (
	opContinuation = 0x0
	opText         = 0x1
	opBinary       = 0x2
	opClose        = 0x8
	opPing         = 0x9
	opPong         = 0xa
)

const maxControl = 125 // bytes of payload in a control frame. RFC 6455 5.5

// form is how a message looks on the wire.
type form int

const (
	raw    form = iota // the payload alone: packets, for GET /ts
	bare               // an unmasked frame, from server to client. RFC 6455 5.1
	masked             // a masked frame, from client to server
)

// errProtocol is the error of bytes that the other side may not send.
var errProtocol = errors.New("not the websocket protocol")

// errTooLong is the error of a message that is longer than its reader allows.
var errTooLong = errors.New("the message is too long")

// closeError is a close frame that the other side sent.
type closeError struct {
	status int    // RFC 6455 7.4.1; 0 if it names none
	inside bool   // a message was begun and is not whole
	reason string // in printable ASCII
}

func (e closeError) Error() string {
	if e.status == 0 {
		return "closed by the other side"
	}
	text := "closed by the other side with status " + strconv.Itoa(e.status)
	if name := closeNames[e.status]; name != "" {
		text += " (" + name + ")"
	}
	if e.reason != "" {
		text += ": " + e.reason
	}
	return text
}

// closeNames are what the statuses of close frames mean. RFC 6455 7.4.1
var closeNames = map[int]string{
	1000: "normal closure",
	1001: "going away",
	1002: "protocol error",
	1003: "unsupported data",
	1007: "invalid data",
	1008: "policy violation",
	1009: "message too big",
	1010: "extension missing",
	1011: "internal error",
	1012: "service restart",
	1013: "try again later",
	1014: "bad gateway",
}

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

// appendFrame appends a whole frame in the bare or masked form. A masked one
// has a fresh key. RFC 6455 5.3.
func appendFrame(b []byte, opcode byte, payload []byte, f form) []byte {
	if f != masked {
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

// inbox reads the frames that the other side of a connection sends. One
// goroutine at a time uses it.
type inbox struct {
	source io.Reader            // may be replaced between two reads
	early  []byte               // what is read before it
	from   form                 // of the frames: masked if a client sends them
	secret []string             // what its errors may not show
	ping   func(payload []byte) // called with what each ping holds; may be nil
	pong   func(payload []byte) // the same for pongs

	r *bufio.Reader // of source

	// the frame that is begun
	final bool // the last of its message
	key   [4]byte
	left  uint64 // bytes of payload to come
	at    uint64 // bytes of payload read

	inside bool // a message is begun, and its final frame has not come
}

// newInbox returns an inbox that reads what came early and then from source, at
// least size bytes at once if they are there.
func newInbox(source io.Reader, early []byte, from form, size int) *inbox {
	in := &inbox{source: source, early: early, from: from}
	in.r = bufio.NewReaderSize(sourceReader{in}, size)
	return in
}

// sourceReader reads for the buffer of an inbox.
type sourceReader struct{ in *inbox }

func (r sourceReader) Read(p []byte) (int, error) {
	if n := copy(p, r.in.early); n > 0 {
		r.in.early = r.in.early[n:]
		return n, nil
	}
	return r.in.source.Read(p)
}

// take returns the next n bytes, until the next read.
func (in *inbox) take(n int) ([]byte, error) {
	b, err := in.r.Peek(n)
	in.r.Discard(len(b))
	return b, err
}

// next goes to the next frame, past what is left of this one, and returns its
// opcode. It handles control frames itself. The end of the connection is io.EOF,
// a close frame a closeError.
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
	opcode, size := b[0]&0xf, uint64(b[1]&0x7f)
	in.final, in.at = b[0]&0x80 != 0, 0
	if err := in.check(opcode, b[0]&0x70 != 0, b[1]&0x80 != 0, size); err != nil {
		return 0, err
	}
	switch size {
	case 126:
		if b, err = in.take(2); err == nil {
			size = uint64(binary.BigEndian.Uint16(b))
		}
	case 127:
		if b, err = in.take(8); err == nil {
			size = binary.BigEndian.Uint64(b)
		}
	}
	if err == nil && in.from == masked {
		b, err = in.take(4)
		copy(in.key[:], b)
	}
	if err != nil {
		return 0, err
	}
	if opcode >= opClose {
		return opcode, in.control(opcode, int(size))
	}
	in.left, in.inside = size, !in.final
	return opcode, nil
}

// check returns what is wrong with the first two bytes of a frame.
// RFC 6455 5.2, 5.4, 5.5
func (in *inbox) check(opcode byte, reserved, isMasked bool, size uint64) error {
	control := opcode >= opClose
	switch {
	case reserved:
		return fmt.Errorf("%w: a reserved bit is set", errProtocol)
	case opcode > opPong || opcode > opBinary && !control:
		return fmt.Errorf("%w: opcode %d", errProtocol, opcode)
	case isMasked && in.from != masked:
		return fmt.Errorf("%w: a server masks a frame", errProtocol)
	case !isMasked && in.from == masked:
		return fmt.Errorf("%w: a client does not mask a frame", errProtocol)
	case control && (size > maxControl || !in.final):
		return fmt.Errorf("%w: a control frame of more than %d bytes, or in parts", errProtocol, maxControl)
	case opcode == opContinuation && !in.inside:
		return fmt.Errorf("%w: a continuation without a message", errProtocol)
	case !control && opcode != opContinuation && in.inside:
		return fmt.Errorf("%w: a message begins inside another", errProtocol)
	}
	return nil
}

// control reads the payload of a control frame and acts on it.
func (in *inbox) control(opcode byte, size int) error {
	b, err := in.take(size)
	if err != nil {
		return err
	}
	if in.from == masked {
		mask(b, in.key, 0)
	}
	switch {
	case opcode == opClose && len(b) < 2:
		return closeError{inside: in.inside}
	case opcode == opClose:
		return closeError{int(binary.BigEndian.Uint16(b)), in.inside, printableASCII(string(b[2:]), maxControl)}
	case opcode == opPing && in.ping != nil:
		in.ping(b)
	case opcode == opPong && in.pong != nil:
		in.pong(b)
	}
	return nil
}

// Read reads the payloads of the data frames, one after the other.
func (in *inbox) Read(p []byte) (int, error) {
	for in.left == 0 {
		if _, err := in.next(); err != nil {
			return 0, err
		}
	}
	n, err := in.r.Read(p[:min(uint64(len(p)), in.left)])
	if in.from == masked {
		mask(p[:n], in.key, in.at)
	}
	in.left -= uint64(n)
	in.at += uint64(n)
	return n, err
}

// message returns the next message, assembled from its fragments. One of more
// than limit bytes is skipped, and returns errTooLong. RFC 6455 5.4.
func (in *inbox) message(limit int) (opcode byte, b []byte, err error) {
	for long := false; ; {
		op, err := in.next()
		switch {
		case err != nil:
			return 0, nil, err
		case op >= opClose:
			continue
		case op != opContinuation:
			opcode = op
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

// printableASCII returns at most n bytes of s, with a question mark for each that
// a terminal might obey.
func printableASCII(s string, n int) string {
	b := []byte(s[:min(len(s), n)])
	for i, c := range b {
		if c < ' ' || c > '~' {
			b[i] = '?'
		}
	}
	return string(b)
}
