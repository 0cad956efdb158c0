package main

import (
	"bytes"
	"slices"
	"testing"
)

func TestTimestamps(t *testing.T) {
	b := []byte{0x31, 0, 0, 0, 0}
	for _, want := range []ticks{0, 1, 90000, 1 << 15, 1 << 30, wrap - 1} {
		writeTime(b, want)
		if got := readTime(b); got != want || b[0]>>4 != 3 || b[0]&b[2]&b[4]&1 != 1 {
			t.Errorf("got %d, % x, want %d and the marker bits", got, b, want)
		}
	}
}

// TestClearPCR: what follows the PCR in an adaptation field stays.
func TestClearPCR(t *testing.T) {
	p := packet(bytes.Repeat([]byte{0xee}, packetSize))
	copy(p, []byte{0x47, 0x01, 0, 0x30, 17, 0x5a, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 'p', 'r', 'i'})
	p[4] = 17
	want := []byte{17, 0x42, 3, 'p', 'r', 'i'}
	clearPCR(p)
	if got := p[4:10]; !bytes.Equal(got, want) || !slices.Equal(p[10:22], bytes.Repeat([]byte{0xff}, 12)) || p[22] != 0xee {
		t.Errorf("got % x, want % x, stuffing, then the payload", p[4:24], want)
	}
}
