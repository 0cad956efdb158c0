package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
)

// TestInbox: messages are put together from fragments; long ones are
// skipped, and the next is read.
func TestInbox(t *testing.T) {
	ten := strings.Repeat("x", 10)
	tests := []struct {
		name   string
		frames [][]byte
		want   string
	}{
		{"text, binary, pong", [][]byte{frame(0x81, "a"), frame(0x82, "b"), frame(0x8a, "c"), frame(0x81, "")}, `1"a" 2"b" 1"" EOF`},
		{"pings", [][]byte{frame(0x89, "a"), frame(0x81, "b")}, `1"b" EOF`},
		{"fragments", [][]byte{frame(0x01, "a"), frame(0x00, ""), frame(0x00, "b"), frame(0x80, "c"), frame(0x82, "d")}, `1"abc" 2"d" EOF`},
		{"ping between fragments", [][]byte{frame(0x02, "a"), frame(0x89, "p"), frame(0x80, "b")}, `2"ab" EOF`},
		{"pong between fragments", [][]byte{frame(0x02, "a"), frame(0x8a, "p"), frame(0x80, "b")}, `2"ab" EOF`},
		{"text after fragments", [][]byte{frame(0x01, "a"), frame(0x80, "b"), frame(0x81, "c")}, `1"ab" 1"c" EOF`},
		{"long, then its rest", [][]byte{frame(0x01, ten+"y"), frame(0x80, ""), frame(0x81, "c")}, `1long 1"c" EOF`},
		{"the limit", [][]byte{frame(0x81, ten)}, `1"` + ten + `" EOF`},
		{"one more", [][]byte{frame(0x81, ten+"y"), frame(0x81, "z")}, `1long 1"z" EOF`},
		{"more in fragments", [][]byte{frame(0x01, ten), frame(0x00, "y"), frame(0x00, "y"), frame(0x80, ten), frame(0x81, "z")}, `1long 1"z" EOF`},
		{"1 MB", [][]byte{frame(0x81, strings.Repeat("x", 1<<20)), frame(0x81, "z")}, `1long 1"z" EOF`},
		{"cut off", [][]byte{frame(0x81, ten)[:8]}, "unexpected EOF"},
		{"cut off when long", [][]byte{frame(0x81, strings.Repeat("x", 100))[:50]}, "1long EOF"},
		{"cut off in the header", [][]byte{frame(0x81, strings.Repeat("x", 200))[:3]}, "EOF"},
		{"closed", [][]byte{frame(0x81, "a"), frame(0x88, "\x03\xe8"), frame(0x81, "b")}, `1"a" closed by the other side with status 1000 (normal closure)`},
		{"closed for a reason", [][]byte{frame(0x88, "\x03\xf1too big")}, `closed by the other side with status 1009 (message too big): too big`},
		{"closed with a status of its own", [][]byte{frame(0x88, "\x0f\xa1\x1b[2J\u00e4 \"x\"")}, `closed by the other side with status 4001: ?[2J?? "x"`},
		{"closed without a status", [][]byte{frame(0x88, "")}, `closed by the other side`},
	}
	for _, tt := range tests {
		in := newInbox(bytes.NewReader(bytes.Join(tt.frames, nil)), nil, bare, 512)
		var got []string
		for range 10 {
			opcode, b, err := in.message(10)
			if errors.Is(err, errTooLong) {
				got = append(got, fmt.Sprintf("%dlong", opcode))
				continue
			}
			if err != nil {
				got = append(got, err.Error())
				break
			}
			got = append(got, fmt.Sprintf("%d%q", opcode, b))
		}
		if got := strings.Join(got, " "); got != tt.want {
			t.Errorf("%s: got %s, want %s", tt.name, got, tt.want)
		}
	}
}

// TestInboxRead: the payloads of masked frames of all sizes, however they come.
func TestInboxRead(t *testing.T) {
	seed := rand.Uint64()
	dice := rand.New(rand.NewPCG(seed, 0))
	var wire, want, pings []byte
	for _, n := range []int{0, 1, 7, 8, 125, 126, 127, 1000, 65535, 65536, 200_000} {
		payload := make([]byte, n)
		for i := range payload {
			payload[i] = byte(dice.Uint32())
		}
		wire = appendFrame(wire, opBinary, payload, masked)
		ping := payload[:min(n, maxControl)]
		wire = appendFrame(wire, opPing, ping, masked)
		want = append(want, payload...)
		pings = appendFrame(pings, opPong, ping, bare)
	}
	wire = appendFrame(wire, opClose, []byte{3, 0xe8}, masked)
	for name, r := range map[string]io.Reader{
		"at once":      bytes.NewReader(wire),
		"byte by byte": iotest.OneByteReader(bytes.NewReader(wire)),
		"split":        iotest.HalfReader(bytes.NewReader(wire)),
	} {
		in := newInbox(r, nil, masked, 512)
		var pongs []byte
		in.ping = func(payload []byte) { pongs = appendFrame(pongs, opPong, payload, bare) }
		var got []byte
		var err error
		for n := 0; err == nil; {
			p := make([]byte, 1+dice.IntN(3000))
			n, err = in.Read(p)
			got = append(got, p[:n]...)
		}
		if !bytes.Equal(got, want) || err != (closeError{status: 1000}) {
			t.Errorf("seed %d, %s: got %d bytes and %v, want the %d sent and %v", seed, name, len(got), err, len(want), closeError{status: 1000})
		}
		if !bytes.Equal(pongs, pings) {
			t.Errorf("seed %d, %s: got pongs of %d bytes, want %d", seed, name, len(pongs), len(pings))
		}
	}
}

// TestInboxRefuses: what the other side may not send.
func TestInboxRefuses(t *testing.T) {
	fromClient := func(opcode byte, payload string) string {
		return string(appendFrame(nil, opcode, []byte(payload), masked))
	}
	long := strings.Repeat("x", maxControl+1)
	for _, tt := range []struct {
		name, frame string
		from        form
		want        string
	}{
		{"RSV1", "\xc2\x01x", bare, "reserved bit"},
		{"RSV3", "\x92\x01x", bare, "reserved bit"},
		{"reserved data", "\x83\x01x", bare, "opcode 3"},
		{"reserved control", "\x8b\x01x", bare, "opcode 11"},
		{"masked by a server", fromClient(opBinary, "x"), bare, "a server masks"},
		{"not masked by a client", "\x82\x01x", masked, "a client does not mask"},
		{"ping in parts", "\x09\x01x", bare, "or in parts"},
		{"long ping", string(frame(0x89, long)), bare, "more than 125 bytes"},
		{"a continuation of nothing", "\x80\x01x", bare, "a continuation without a message"},
		{"a continuation after the end", "\x01\x01x\x80\x01x\x80\x01x", bare, "a continuation without a message"},
		{"a message inside another", "\x01\x01x\x82\x01x", bare, "begins inside another"},
		{"a fragment inside another message", "\x02\x01x\x00\x01x\x01\x01x", bare, "begins inside another"},
		{"long close of a client", fromClient(opClose, long), masked, "more than 125 bytes"},
	} {
		in := newInbox(strings.NewReader(tt.frame), nil, tt.from, 512)
		var err error
		for err == nil {
			_, err = in.next()
		}
		if !errors.Is(err, errProtocol) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want %q", tt.name, err, tt.want)
		}
	}
}

// FuzzInbox: whatever comes, in whatever pieces, the same is read of it, and
// no more memory is asked for than a message may have.
func FuzzInbox(f *testing.F) {
	f.Add(true, []byte("\x89\x02ab\x82\x7e\x00\x04abcd\x01\x01a\x80\x00\x88\x02\x03\xe8"))
	f.Add(true, []byte("\x81\x7f\x00\x00\x00\x00\x00\x00\x00\x02ab\x8a\x00"))
	f.Add(false, appendFrame(appendFrame(nil, opPing, []byte("a"), masked), opBinary, []byte("abcdefghi"), masked))
	f.Add(false, []byte("\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x02\x03\x04abc"))
	f.Fuzz(func(t *testing.T, server bool, b []byte) {
		from := masked
		if server {
			from = bare
		}
		read := func(r io.Reader) (all []byte, err error) {
			in := newInbox(r, nil, from, 512)
			p := make([]byte, 100)
			for n := 0; err == nil; {
				n, err = in.Read(p)
				all = append(all, p[:n]...)
			}
			return all, err
		}
		whole, err1 := read(bytes.NewReader(b))
		pieces, err2 := read(iotest.OneByteReader(bytes.NewReader(b)))
		if !bytes.Equal(whole, pieces) || err1.Error() != err2.Error() {
			t.Errorf("got %q, %v at once, and %q, %v byte by byte", whole, err1, pieces, err2)
		}
		in := newInbox(bytes.NewReader(b), nil, from, 512)
		for {
			opcode, message, err := in.message(10)
			if len(message) > 10 || cap(message) > 64 || !slices.Contains([]byte{0, opText, opBinary}, opcode) {
				t.Errorf("got opcode %d, %q", opcode, message)
			}
			if err != nil && err != errTooLong {
				return
			}
		}
	})
}
