package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// NAL units and the like for tests, each after its start code.
const (
	avcAUD      = "\x00\x00\x00\x01\x09\xf0"
	avcSPS      = "\x00\x00\x00\x01\x67\x42\xc0\x1e\xd9\x00\xa0\x47\xfe\xc8"
	avcPPS      = "\x00\x00\x00\x01\x68\xce\x3c\x80"
	avcIDR      = "\x00\x00\x01\x65\x88\x84\x00\x33\xff\xfe\xf6\xf0"
	avcI        = "\x00\x00\x01\x41\x88\x84\x00\x33\xff\xfe\xf6\xf0" // first_mb 0, slice_type 7
	avcP        = "\x00\x00\x01\x41\x9a\x24\x6c\x41\x0f\xfe\xda\xf0" // first_mb 0, slice_type 5
	avcRecovery = "\x00\x00\x01\x06\x06\x01\xc4\x80"                 // recovery_frame_cnt 0
	avcUserSEI  = "\x00\x00\x01\x06\x05\x11\xdc\x45\xe9\xbd\xe6\xd9\x48\xb7\x96\x2c\xd8\x20\xd9\x23\xee\xef\x78\x80"

	hevcAUD   = "\x00\x00\x00\x01\x46\x01\x50"
	hevcVPS   = "\x00\x00\x00\x01\x40\x01\x0c\x01\xff\xff\x01\x60\x00\x00\x03\x00\x90\x00\x00\x03\x00\x00\x03\x00\x3c\x95\x98\x09"
	hevcSPS   = "\x00\x00\x00\x01\x42\x01\x01\x01\x60\x00\x00\x03\x00\x90\x00\x00\x03\x00\x00\x03\x00\x3c\xa0\x14\x20\x71\xf2"
	hevcPPS   = "\x00\x00\x00\x01\x44\x01\xc1\x72\xb4\x62\x40"
	hevcIDR   = "\x00\x00\x01\x26\x01\xaf\x09\x40\xf3\xb8\xd5\x39"
	hevcCRA   = "\x00\x00\x01\x2a\x01\xaf\x09\x40\xf3\xb8\xd5\x39"
	hevcTrail = "\x00\x00\x01\x02\x01\xd0\x09\x7e\x10\xc4\x9a\x3c"
	hevcRASL  = "\x00\x00\x01\x10\x01\xd0\x09\x7e\x10\xc4\x9a\x3c"

	mpegHeader = "\x00\x00\x01\xb3\x14\x00\xf0\x13\xff\xff\xe0\x18"
	mpegExt    = "\x00\x00\x01\xb5\x14\x8a\x00\x01\x00\x00"
	mpegUser   = "\x00\x00\x01\xb2vw"
	mpegGOP    = "\x00\x00\x01\xb8\x00\x08\x00\x40"
	mpegI      = "\x00\x00\x01\x00\x00\x0f\xff\xf8\x00\x00\x01\x01\x13\xf8"
	mpegP      = "\x00\x00\x01\x00\x00\x57\xff\xf9\x80\x00\x00\x01\x01\x13\xf8"

	av1TD    = "\x00\x00\x01\x12\x00"
	av1Seq   = "\x00\x00\x01\x0a\x0b\x00\x00\x00\x24\xc4\xff\xdf\x3f\xfe\xcc\x02"
	av1Key   = "\x00\x00\x01\x32\x05\x10\x00\xa8\x80\x10"
	av1Inter = "\x00\x00\x01\x32\x05\x30\x00\xa8\x80\x10"
	av1Show  = "\x00\x00\x01\x1a\x01\x98"
)

// pesOf returns a PES of video with that elementary stream.
func pesOf(es string) []byte {
	return append([]byte{0, 0, 1, 0xe0, 0, 0, 0x80, 0x80, 5, 0x21, 0, 1, 0, 1}, es...)
}

// lookAt gives a PES to a look in parts, and returns its verdict.
func lookAt(l *look, parts ...[]byte) verdict {
	l.begin()
	for _, p := range parts {
		l.add(p)
	}
	return l.end()
}

// TestLook: what a decoder can begin with, however the PES is split.
func TestLook(t *testing.T) {
	filler := strings.Repeat("\x55", 400)
	bigSEI := "\x00\x00\x01\x06\x05\xff\xff\x02" + strings.Repeat("\x41", 512) + "\x80"
	for _, tt := range []struct {
		name   string
		syntax syntax
		es     string
		want   verdict
	}{
		{"H.264 IDR", h264Syntax, avcAUD + avcSPS + avcPPS + avcIDR + filler, keyframe},
		{"H.264 IDR without parameter sets", h264Syntax, avcAUD + avcIDR + filler, keyframe},
		{"H.264 IDR without AUD", h264Syntax, avcSPS + avcPPS + avcIDR + filler, keyframe},
		{"H.264 IDR alone, start code of 3 bytes", h264Syntax, avcIDR + filler, keyframe},
		{"H.264 IDR after much SEI", h264Syntax, avcAUD + bigSEI + bigSEI + avcIDR + filler, keyframe},
		{"H.264 P", h264Syntax, avcAUD + avcP + filler, dependent},
		{"H.264 P after SEI", h264Syntax, avcAUD + avcUserSEI + bigSEI + avcP + filler, dependent},
		{"H.264 P with parameter sets", h264Syntax, avcAUD + avcSPS + avcPPS + avcP + filler, dependent},
		{"H.264 I without SPS", h264Syntax, avcAUD + avcI + filler, dependent},
		{"H.264 I with PPS", h264Syntax, avcAUD + avcPPS + avcI + filler, dependent},
		{"H.264 I with SPS: open GOP", h264Syntax, avcAUD + avcSPS + avcPPS + avcI + filler, keyframe},
		{"H.264 recovery point: intra refresh", h264Syntax, avcAUD + avcUserSEI + avcRecovery + avcP + filler, keyframe},
		{"H.264 recovery point in one SEI with others", h264Syntax, avcAUD + "\x00\x00\x01\x06\x04\x02\x11\x22\x06\x01\xc4\x80" + avcP + filler, keyframe},
		{"H.264 an SEI whose payload looks like one", h264Syntax, avcAUD + "\x00\x00\x01\x06\x05\x04\x06\x01\xc4\x80\x80" + avcP + filler, dependent},
		{"H.264 SEI with emulation prevention", h264Syntax, avcAUD + "\x00\x00\x01\x06\x04\x04\x00\x00\x03\x00\x00\x03\x06\x01\xc4\x80" + avcP + filler, keyframe},
		{"H.264 parameter sets alone", h264Syntax, avcAUD + avcSPS + avcPPS, keyframe},
		{"H.264 AUD alone", h264Syntax, avcAUD, unreadable},
		{"H.264 data partition", h264Syntax, "\x00\x00\x01\x43\x88\x84\x00\x33\xff\xfe\xf6\xf0", dependent},
		{"H.264 another slice of an IDR", h264Syntax, "\x00\x00\x01\x65\x48\x84\x00\x33\xff\xfe\xf6\xf0", dependent},
		{"H.264 short slice", h264Syntax, "\x00\x00\x01\x41\x9a", dependent},
		{"not an elementary stream", h264Syntax, filler + avcIDR, unreadable},
		{"zeros", h264Syntax, strings.Repeat("\x00", 2*maxLook), unreadable},
		{"nothing", h264Syntax, "", unreadable},
		{"SEI without end", h264Syntax, avcAUD + "\x00\x00\x01\x06\x05" + strings.Repeat("\xff", 2*maxLook), unreadable},

		{"H.265 IDR", h265Syntax, hevcAUD + hevcVPS + hevcSPS + hevcPPS + hevcIDR + filler, keyframe},
		{"H.265 IDR alone", h265Syntax, hevcIDR + filler, keyframe},
		{"H.265 CRA", h265Syntax, hevcAUD + hevcCRA + filler, keyframe},
		{"H.265 another slice of an IDR", h265Syntax, "\x00\x00\x01\x26\x01\x2f\x09\x40\xf3\xb8\xd5\x39", dependent},
		{"H.265 trailing picture", h265Syntax, hevcAUD + hevcTrail + filler, dependent},
		{"H.265 leading picture", h265Syntax, hevcRASL + filler, dependent},
		{"H.265 trailing picture with parameter sets", h265Syntax, hevcVPS + hevcSPS + hevcPPS + hevcTrail + filler, dependent},
		{"H.265 recovery point", h265Syntax, hevcAUD + "\x00\x00\x01\x4e\x01\x06\x01\xc4\x80" + hevcTrail + filler, keyframe},

		{"MPEG-2 I", mpegSyntax, mpegHeader + mpegExt + mpegGOP + mpegI + filler, keyframe},
		{"MPEG-2 I, no group", mpegSyntax, mpegHeader + mpegExt + mpegI + filler, keyframe},
		{"MPEG-1 I after a group header", mpegSyntax, mpegGOP + mpegI + filler, keyframe},
		{"MPEG-1 I alone", mpegSyntax, mpegI + filler, dependent},
		{"MPEG-1 P", mpegSyntax, mpegP + filler, dependent},
		{"MPEG-1 P after a group header", mpegSyntax, mpegGOP + mpegP + filler, dependent},
		{"MPEG-2 P after a sequence header", mpegSyntax, mpegHeader + mpegExt + mpegP + filler, dependent},
		{"MPEG sequence header alone", mpegSyntax, mpegHeader, keyframe},
		{"MPEG with user data", mpegSyntax, mpegHeader + mpegExt + mpegUser + mpegGOP + mpegUser + mpegI + filler, keyframe},
		{"MPEG slice", mpegSyntax, "\x00\x00\x01\x05" + filler, dependent},
		{"MPEG with extra zeros", mpegSyntax, "\x00\x00\x00\x00" + mpegHeader + "\x00\x00\x00" + mpegI + filler, keyframe},

		{"AV1 key frame", av1Syntax, av1TD + av1Seq + av1Key + filler, keyframe},
		{"AV1 key frame without a temporal delimiter", av1Syntax, av1Seq + av1Key + filler, keyframe},
		{"AV1 key frame shown later", av1Syntax, av1TD + av1Seq + av1Show + filler, keyframe},
		{"AV1 key frame without a sequence header", av1Syntax, av1TD + av1Key + filler, dependent},
		{"AV1 inter frame", av1Syntax, av1TD + av1Inter + filler, dependent},
		{"AV1 inter frame with a sequence header", av1Syntax, av1TD + av1Seq + av1Inter + filler, dependent},
		{"AV1 sequence header alone", av1Syntax, av1TD + av1Seq, keyframe},

		{"AV1 without start codes", av1Syntax, (av1TD + av1Seq + av1Key)[3:], unreadable},

		{"a codec that is not read", unreadSyntax, avcIDR, unreadable},
	} {
		t.Run(tt.name, func(t *testing.T) {
			pes := pesOf(tt.es)
			l := look{syntax: tt.syntax}
			if got := lookAt(&l, pes); got != tt.want {
				t.Errorf("got verdict %d, want %d", got, tt.want)
			}
			sets := fmt.Sprint(l.sets.sets)
			parts := [][][]byte{slices.Collect(slices.Chunk(pes, 1)), slices.Collect(slices.Chunk(pes, 184))}
			for at := range min(len(pes), 300) {
				parts = append(parts, [][]byte{pes[:at], pes[at:]})
			}
			for _, p := range parts {
				l := look{syntax: tt.syntax}
				if got := lookAt(&l, p...); got != tt.want {
					t.Errorf("in %d parts, the first of %d bytes: got verdict %d, want %d", len(p), len(p[0]), got, tt.want)
				}
				if got := fmt.Sprint(l.sets.sets); got != sets {
					t.Errorf("in %d parts: got parameter sets %s, want %s", len(p), got, sets)
				}
			}
		})
	}
	t.Run("scrambled", func(t *testing.T) {
		pes := pesOf(avcIDR)
		pes[6] |= 0x10
		if got := lookAt(&look{syntax: h264Syntax}, pes); got != unreadable {
			t.Errorf("got verdict %d, want %d", got, unreadable)
		}
	})
}

// TestParameterSets: what is remembered of a track, and what a picture lacks.
func TestParameterSets(t *testing.T) {
	sps := func(id, width byte) string { // seq_parameter_set_id 0 is 1, 1 is 010
		return "\x00\x00\x00\x01\x67\x42\xc0\x1e" + string([]byte{map[byte]byte{0: 0x80, 1: 0x40}[id] | 1, width})
	}
	pps := func(id, of, more byte) string {
		bits := map[[2]byte]byte{{0, 0}: 0xc0, {1, 0}: 0x50, {0, 1}: 0xa0, {1, 1}: 0x48}[[2]byte{id, of}]
		return "\x00\x00\x00\x01\x68" + string([]byte{bits | 1, more})
	}
	longSEI := "\x00\x00\x01\x06\x05" + strings.Repeat("\x41", 2*maxLook)
	for _, tt := range []struct {
		name     string
		syntax   syntax
		pictures []string
		want     string // missing from the last
		complete bool
	}{
		{"brought", h264Syntax, []string{avcAUD + avcSPS + avcPPS + avcIDR}, "", true},
		{"brought twice", h264Syntax, []string{avcSPS + avcPPS + avcIDR, avcP, avcSPS + avcPPS + avcIDR}, "", true},
		{"once at the start", h264Syntax, []string{avcSPS + avcPPS + avcIDR, avcP, avcAUD + avcIDR}, avcSPS + avcPPS, false},
		{"never", h264Syntax, []string{avcIDR}, "", false},
		{"SPS alone", h264Syntax, []string{avcSPS + avcPPS + avcIDR, avcP, avcSPS + avcIDR}, avcPPS, false},
		{"with a P picture", h264Syntax, []string{avcSPS + avcPPS + avcIDR, avcSPS + pps(0, 0, 7) + avcP, avcIDR}, avcSPS + pps(0, 0, 7), false},
		{"on their own", h264Syntax, []string{avcSPS + avcPPS, avcIDR}, avcSPS + avcPPS, false},
		{"another SPS ends its PPS", h264Syntax, []string{sps(0, 1) + pps(0, 0, 1) + avcIDR, sps(0, 2) + avcIDR, avcIDR}, sps(0, 2), false},
		{"but not those of its own picture", h264Syntax, []string{sps(0, 1) + pps(0, 0, 1) + avcIDR, sps(0, 2) + pps(0, 0, 1) + avcIDR, avcIDR}, sps(0, 2) + pps(0, 0, 1), false},
		{"nor those of another SPS", h264Syntax, []string{sps(0, 1) + sps(1, 1) + pps(0, 0, 1) + pps(1, 1, 1) + avcIDR, sps(0, 2) + pps(0, 0, 2) + avcIDR, avcIDR}, sps(1, 1) + sps(0, 2) + pps(1, 1, 1) + pps(0, 0, 2), false},
		{"cut by the bound", h264Syntax, []string{avcSPS + avcPPS + avcIDR, longSEI + pps(0, 0, 9), avcIDR}, avcSPS + avcPPS, false},
		{"H.265", h265Syntax, []string{hevcAUD + hevcVPS + hevcSPS + hevcPPS + hevcIDR, hevcTrail, hevcAUD + hevcCRA}, hevcVPS + hevcSPS + hevcPPS, false},
		{"H.265 brought", h265Syntax, []string{hevcAUD + hevcVPS + hevcSPS + hevcPPS + hevcIDR}, "", true},
		{"MPEG-2", mpegSyntax, []string{mpegHeader + mpegExt + mpegUser + mpegGOP + mpegI, mpegP, mpegGOP + mpegI}, "\x00" + mpegHeader + mpegExt, false},
		{"MPEG-1", mpegSyntax, []string{mpegHeader + mpegGOP + mpegI, mpegP, mpegGOP + mpegI}, "\x00" + mpegHeader, false},
		{"MPEG-1 on its own", mpegSyntax, []string{mpegHeader, mpegGOP + mpegI}, "\x00" + mpegHeader, false},
		{"MPEG-1 brought", mpegSyntax, []string{mpegHeader + mpegGOP + mpegI}, "", true},
		{"AV1", av1Syntax, []string{av1Seq + av1Key}, "", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := look{syntax: tt.syntax}
			for _, es := range tt.pictures {
				lookAt(&l, pesOf(es))
			}
			for range 2 { // what is joined once is kept
				if got := string(l.sets.missing()); got != tt.want {
					t.Errorf("got %q missing, want %q", got, tt.want)
				}
			}
			if got := l.complete(); got != tt.complete {
				t.Errorf("got complete %v, want %v", got, tt.complete)
			}
		})
	}
}

// TestParameterSetsBounded holds I8: a publisher that sends ever new parameter
// sets makes vw remember no more than a few.
func TestParameterSetsBounded(t *testing.T) {
	l := look{syntax: h264Syntax}
	for i := range 1000 {
		b := make([]byte, 1000)
		for j := range b {
			b[j] = byte(rand.Uint32()) | 1
		}
		lookAt(&l, pesOf("\x00\x00\x01\x68"+string(b[:i])+avcP))
		total := 0
		for _, p := range l.sets.sets {
			total += len(p.bytes)
		}
		if total > maxSetBytes || len(l.sets.sets) > maxSets {
			t.Fatalf("got %d parameter sets of %d bytes", len(l.sets.sets), total)
		}
	}
}

// TestLookAllocates: nothing in the steady state.
func TestLookAllocates(t *testing.T) {
	l := look{syntax: h264Syntax}
	key, p := pesOf(avcAUD+avcSPS+avcPPS+avcUserSEI+avcIDR), pesOf(avcAUD+avcP)
	if n := testing.AllocsPerRun(100, func() { lookAt(&l, key); lookAt(&l, p) }); n > 0 {
		t.Errorf("got %v allocations", n)
	}
}

// FuzzLook: any bytes give the same verdict and the same parameter sets
// however they are split.
func FuzzLook(f *testing.F) {
	for i, es := range []string{
		avcAUD + avcSPS + avcPPS + avcUserSEI + avcRecovery + avcP, hevcVPS + hevcSPS + hevcPPS + hevcIDR,
		mpegHeader + mpegExt + mpegGOP + mpegI, av1TD + av1Seq + av1Key, (av1TD + av1Seq + av1Key)[3:],
	} {
		f.Add(uint8(i), pesOf(es), uint16(7))
	}
	f.Fuzz(func(t *testing.T, kind uint8, pes []byte, most uint16) {
		one, parts := look{syntax: syntax(kind % 5)}, look{syntax: syntax(kind % 5)}
		for range 2 { // what is remembered of the first meets the second
			want := lookAt(&one, pes)
			var cut [][]byte
			r := splitUp(pes, 1+uint32(most%200))
			for b := make([]byte, 200); ; {
				n, err := r.Read(b)
				if err != nil {
					break
				}
				cut = append(cut, bytes.Clone(b[:n]))
			}
			if got := lookAt(&parts, cut...); got != want || got == undecided {
				t.Fatalf("got verdict %d in one part, %d in %d", want, got, len(cut))
			}
			if a, b := one.sets.missing(), parts.sets.missing(); !bytes.Equal(a, b) || one.insert != parts.insert || one.complete() != parts.complete() {
				t.Fatalf("got %q missing at %d in one part, %q at %d in %d", a, one.insert, b, parts.insert, len(cut))
			}
			if one.verdict == keyframe && one.insert > len(pes) {
				t.Fatalf("parameter sets at %d of a PES of %d bytes", one.insert, len(pes))
			}
		}
	})
}
