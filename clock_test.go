package main

import (
	"math/rand/v2"
	"testing"
)

// onePES is one packet that begins a PES.
func onePES(pts ticks) []byte {
	var m tsMaker
	m.frame(pes{pid: 0x100, id: 0xe0, pts: pts, size: 10})
	return m.Bytes()
}

// TestClockDrift: 50 ppm for 24 h, with 20 ms of jitter, stays within 20 ms.
func TestClockDrift(t *testing.T) {
	t.Parallel()
	for _, ppm := range []int64{50, -50} {
		var c clock
		r := rand.New(rand.NewPCG(1, 2))
		chunk := onePES(0)
		field, _ := timestamps(packet(chunk).payload())
		worst, start := ticks(0), ticks(0)
		for i := range int64(24 * 3600 * 25) {
			capture := ticks(i * 3600)
			pts := (capture + ticks(i*3600*ppm/1_000_000) + wrap - 5*second) & (wrap - 1) // wraps soon, and again
			writeTime(field, pts)
			offset, jumped, ready := c.follow(chunk, chunkInfo{hasVideo: true}, 1000+capture+ticks(r.IntN(1800)), i == 0)
			if !ready && i < 10 {
				continue
			}
			if !ready || jumped && i > 10 {
				t.Fatalf("frame %d: ready is %v, jumped %v", i, ready, jumped)
			}
			off := signed33(pts + offset - capture)
			if i == 25*20 {
				start = off
			}
			if i > 25*20 {
				worst = max(worst, off-start, start-off)
			}
		}
		if worst > second/50 {
			t.Errorf("%d ppm: got %d ticks away, want %d at most", ppm, worst, second/50)
		}
	}
}

// TestClockMonotonic: what is posted faster than real time, in bursts, again
// or with a jump never makes the offset take a timestamp back.
func TestClockMonotonic(t *testing.T) {
	tests := []struct {
		name  string
		frame func(i int) (pts, at ticks, restarted bool)
	}{
		{"ten times as fast", func(i int) (ticks, ticks, bool) { return ticks(i) * 3600, ticks(i) * 360, false }},
		{"bursts of 2 s", func(i int) (ticks, ticks, bool) { return ticks(i) * 3600, ticks(i/50) * 50 * 3600, false }},
		{"a stall of 10 s, then all at once", func(i int) (ticks, ticks, bool) {
			return ticks(i) * 3600, ticks(max(i, 350)) * 3600, false
		}},
		{"restarts", func(i int) (ticks, ticks, bool) { return ticks(i%100) * 3600, ticks(i) * 3700, i%100 == 0 }},
		{"restarts of one that is ahead", func(i int) (ticks, ticks, bool) { return ticks(i%100) * 3600, ticks(i) * 3400, i%100 == 0 }},
		{"a loop in one body", func(i int) (ticks, ticks, bool) { return ticks(i%100) * 3600, ticks(i) * 3600, false }},
		{"an hour forward", func(i int) (ticks, ticks, bool) {
			return ticks(i)*3600 + ticks(i/100)*3600*second, ticks(i) * 3600, false
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var c clock
			last := ticks(-1 << 60)
			var held []ticks
			for i := range 1000 {
				pts, at, restarted := tt.frame(i)
				held = append(held, pts)
				offset, _, ready := c.follow(onePES(pts), chunkInfo{hasVideo: true}, 10*second+at, restarted || i == 0)
				if !ready && len(held) < 50 {
					continue
				}
				if !ready {
					offset, _ = c.hurry(chunkInfo{hasVideo: true}, 10*second+at)
				}
				for _, pts := range held {
					if out := pts + offset; out <= last { // near enough to now: not wrapped
						t.Fatalf("frame %d: got %d after %d", i, out, last)
					} else {
						last = out
					}
				}
				held = held[:0]
			}
		})
	}
}

// TestClockAhead: a feed that was more than 2 s ahead begins at now when it
// restarts.
func TestClockAhead(t *testing.T) {
	var c clock
	for i := range 200 {
		c.follow(onePES(ticks(i)*3600), chunkInfo{hasVideo: true}, 10*second+ticks(i)*1000, i == 0)
	}
	now := 10*second + ticks(200*1000)
	for i := range ticks(6) {
		offset, jumped, ready := c.follow(onePES(i*3600), chunkInfo{hasVideo: true}, now+i*3600, i == 0)
		if ready != (i >= 4) || ready && (offset != now || jumped != (i == 4)) {
			t.Errorf("frame %d: got offset %d, jumped %v, ready %v, want %d from 150 ms on", i, offset, jumped, ready, now)
		}
	}
}

// TestClockStart: the late first frames of a publisher do not move the rest,
// and sound is where its end was when it arrived.
func TestClockStart(t *testing.T) {
	tests := []struct {
		name string
		info chunkInfo
		step ticks // between two PES
		late []ticks
		want ticks
	}{
		{"video", chunkInfo{hasVideo: true}, 3600, []ticks{4000, 2000, 0, 900, 0, 0}, 0},
		{"sound", chunkInfo{}, 2160, []ticks{4000, 0, 0, 300, 0, 0, 0, 0, 0, 0, 0}, -2160},
		{"AAC", chunkInfo{program: &program{tracks: []track{{pid: 0x100, streamType: 0x0f}}}}, 1920, []ticks{4000, 0, 0, 300, 0, 0, 0, 0, 0, 0, 0}, -1920 - lookAhead},
		{"sound in long PES", chunkInfo{}, 33300, []ticks{0, 0}, -33300},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var c clock
			for i, late := range tt.late {
				dts := ticks(i) * tt.step
				offset, _, ready := c.follow(onePES(dts), tt.info, 10*second+dts+late, i == 0)
				if ready && offset != 10*second+tt.want {
					t.Errorf("PES %d: got offset %d, want %d", i, offset-10*second, tt.want)
				}
				if i == len(tt.late)-1 && !ready {
					t.Error("never ready")
				}
			}
		})
	}
}
