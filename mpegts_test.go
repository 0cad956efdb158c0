package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
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

// TestInsertion: what is put into a PES is there, and nothing else changes:
// other packets, the last continuity counter, what comes after.
func TestInsertion(t *testing.T) {
	for _, size := range []int{1, 20, 150, 164, 165, 170, 184, 500, 3000} {
		for _, at := range []int{9, 14, 20, 100, 170, 171, 184, 300} {
			for _, n := range []int{1, 30, 182, 183, 184, 185, 400, 3000} {
				for _, length := range []bool{false, true} {
					var m tsMaker
					m.frame(pes{pid: testAudio, id: 0xc0, size: 300, length: true})
					m.frame(pes{pid: testVideo, id: 0xe0, size: size, key: n%2 == 0, length: length})
					m.frame(pes{pid: testAudio, id: 0xc0, size: 300, length: true})
					m.frame(pes{pid: testVideo, id: 0xe0, size: size})
					in := bytes.Clone(m.Bytes())
					what := insertion{testVideo, at, bytes.Repeat([]byte{0x99}, n)}
					got := what.into(in)
					if at > 14+size {
						if got != nil {
							t.Errorf("%d bytes at %d of a PES of %d: got a result, want none", n, at, 14+size)
						}
						continue
					}
					before, after := payloads(in, testVideo), payloads(got, testVideo)
					added := len(after) - len(before)
					want := slices.Concat(before[:at], what.bytes, make([]byte, added-n), before[at:])
					if length {
						binary.BigEndian.PutUint16(want[4:], uint16(8+size+added))
					}
					if added-n > 1 || !bytes.Equal(after, want) {
						t.Errorf("%d bytes at %d of a PES of %d: got %d bytes more, or others", n, at, 14+size, added)
					}
					if !bytes.Equal(payloads(got, testAudio), payloads(in, testAudio)) {
						t.Errorf("%d bytes at %d of a PES of %d: the other track changed", n, at, 14+size)
					}
					if !bytes.Equal(got[len(got)-packetSize:], in[len(in)-packetSize:]) {
						t.Errorf("%d bytes at %d of a PES of %d: the last packet changed", n, at, 14+size)
					}
					cc, announced := map[uint16]int{}, false
					for p := range slices.Chunk(got, packetSize) {
						p := packet(p)
						if last, ok := cc[p.pid()]; ok && p.payload() != nil && p.continuity() != (last+1)&15 {
							t.Errorf("%d bytes at %d of a PES of %d: PID %#x: counter %d after %d", n, at, 14+size, p.pid(), p.continuity(), last)
						}
						cc[p.pid()], announced = p.continuity(), announced || p.discontinuity()
					}
					if !announced {
						t.Errorf("%d bytes at %d of a PES of %d: the discontinuity is not announced", n, at, 14+size)
					}
				}
			}
		}
	}
}

// payloads joins the payloads of a PID.
func payloads(packets []byte, pid uint16) (b []byte) {
	for p := range slices.Chunk(packets, packetSize) {
		if packet(p).pid() == pid {
			b = append(b, packet(p).payload()...)
		}
	}
	return b
}

// TestPSIPrograms: every program that the PAT lists is followed, also where
// two have their maps on one PID, in one packet, or in several sections of the PAT.
func TestPSIPrograms(t *testing.T) {
	pmt := func(number, pid byte) []byte {
		return []byte{2, 0, 0, 0, number, 0xc1, 0, 0, 0xe1, pid, 0xf0, 0, 0x1b, 0xe1, pid, 0xf0, 0}
	}
	pat := func(section, last byte, programs ...byte) []byte { // pairs of a number and the low byte of a PID 0x10..
		b := []byte{0, 0, 0, 0, 1, 0xc1, section, last}
		for i := 0; i < len(programs); i += 2 {
			b = append(b, 0, programs[i], 0xf0, programs[i+1])
		}
		return b
	}
	for _, tt := range []struct {
		name string
		make func(m *tsMaker)
		want string // numbers, and the PID of the track of each
		raw  int    // packets of PSI
	}{
		{"one", func(m *tsMaker) { m.section(0, pat(0, 0, 1, 0)...); m.section(0x1000, pmt(1, 1)...) }, "1:101 ", 2},
		{"two", func(m *tsMaker) {
			m.section(0, pat(0, 0, 1, 0, 2, 1)...)
			m.section(0x1001, pmt(2, 2)...)
			m.section(0x1000, pmt(1, 1)...)
		}, "1:101 2:102 ", 3},
		{"two on one PID", func(m *tsMaker) {
			m.section(0, pat(0, 0, 1, 0, 2, 0)...)
			m.section(0x1000, pmt(1, 1)...)
			m.section(0x1000, pmt(2, 2)...)
		}, "1:101 2:102 ", 3},
		{"the network is none", func(m *tsMaker) {
			m.section(0, pat(0, 0, 0, 1, 1, 0)...)
			m.section(0x1001, pmt(0, 2)...)
			m.section(0x1000, pmt(1, 1)...)
		}, "1:101 ", 2},
		{"a PAT of two sections", func(m *tsMaker) {
			m.section(0, pat(1, 1, 2, 1)...)
			m.section(0, pat(0, 1, 1, 0)...)
			m.section(0x1001, pmt(2, 2)...)
			m.section(0x1000, pmt(1, 1)...)
		}, "1:101 2:102 ", 3},
		{"one that goes", func(m *tsMaker) {
			m.section(0, pat(0, 0, 1, 0, 2, 1)...)
			m.section(0x1001, pmt(2, 2)...)
			m.section(0x1000, pmt(1, 1)...)
			m.section(0, pat(0, 0, 2, 1)...)
		}, "2:102 ", 2},
		{"a map that changes", func(m *tsMaker) {
			m.section(0, pat(0, 0, 1, 0)...)
			m.section(0x1000, pmt(1, 1)...)
			m.section(0x1000, pmt(1, 3)...)
		}, "1:103 ", 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var m tsMaker
			tt.make(&m)
			var s psi
			for p := range slices.Chunk(m.Bytes(), packetSize) {
				s.add(packet(p))
			}
			got := ""
			for _, e := range s.programs {
				got += fmt.Sprintf("%d:", e.number)
				if e.program != nil {
					got += fmt.Sprintf("%x ", e.program.tracks[0].pid)
				}
			}
			if got != tt.want || len(s.raw())/packetSize != tt.raw {
				t.Errorf("got programs %q in %d packets, want %q in %d", got, len(s.raw())/packetSize, tt.want, tt.raw)
			}
		})
	}
}

// TestSectionsBounded: a section that is spread over packet after packet, or
// sections without end in one unit, are not kept (I8).
func TestSectionsBounded(t *testing.T) {
	for _, tt := range []struct {
		name string
		next func(i int) packet
	}{
		{"one byte a packet", func(i int) packet {
			p := append([]byte{syncByte, 0x40, 0, 0x30 | byte(i&15), packetSize - 6}, make([]byte, packetSize-5)...)
			return packet(p)
		}},
		{"full packets of one section", func(i int) packet {
			p := append([]byte{syncByte, 0, 0, 0x10 | byte(i&15)}, make([]byte, packetSize-4)...)
			return packet(p)
		}},
	} {
		var s sections
		start := append([]byte{syncByte, 0x40, 0, 0x10, 0, 0, 0xb3, 0xe8}, make([]byte, packetSize-8)...)
		s.add(start, func(_, _ []byte) {})
		for i := range 10_000 {
			s.add(tt.next(i+1), func(_, _ []byte) {})
			if most := (maxSectionPackets + 1) * packetSize; len(s.packets) > most || len(s.buf) > maxSection+packetSize {
				t.Fatalf("%s: got %d bytes of packets and %d of section after %d packets, want at most %d", tt.name, len(s.packets), len(s.buf), i, most)
			}
		}
	}
}
