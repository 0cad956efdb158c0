package main

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// testClock is the clock of a feed, and what waits for it.
type testClock struct {
	clock
	hasVideo bool
	held     []heldStamp
}

type heldStamp struct {
	stamp
	key bool
	at  ticks
}

// add is given the next PES as it arrives, and returns what goes out by it.
func (c *testClock) add(tr *track, pts, dts, at ticks, key, restarted bool) (out []stamp) {
	s := heldStamp{stamp{track: c.track(tr), fields: 2, pts: pts & (wrap - 1), dts: dts & (wrap - 1)}, key, at}
	c.held = append(c.held, s)
	if !c.note([]stamp{s.stamp}, at, restarted, c.hasVideo) {
		return nil
	}
	return c.flush(at)
}

// flush is what goes out when nothing can wait any longer.
func (c *testClock) flush(now ticks) (out []stamp) {
	for _, h := range c.held {
		s := []stamp{h.stamp}
		c.place(s, h.key, h.at, now)
		out = append(out, s[0])
	}
	c.held = c.held[:0]
	return out
}

var simVideo, simSound = &track{pid: 0x100, streamType: typeH264}, &track{pid: 0x101, streamType: typeMPEG1Audio}

// TestClockDrift: 50 ppm for 24 h, with 20 ms of jitter, stays within 20 ms.
func TestClockDrift(t *testing.T) {
	notUnderRace(t)
	for _, ppm := range []int64{50, -50} {
		c := testClock{hasVideo: true}
		r := rand.New(rand.NewPCG(1, 2))
		worst, start := ticks(0), ticks(0)
		for i := range int64(24 * 3600 * 25) {
			capture := ticks(i * 3600)
			pts := capture + ticks(i*3600*ppm/1_000_000) + wrap - 5*second // wraps soon, and again
			out := c.add(simVideo, pts, pts, 1000+capture+ticks(r.IntN(1800)), i%12 == 0, i == 0)
			if len(out) == 0 && i < 10 {
				continue
			}
			if len(out) != 1 && i > 10 {
				t.Fatalf("frame %d: got %d frames out", i, len(out))
			}
			off := out[len(out)-1].dts - capture
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
// or with a jump never makes the clock take a timestamp back.
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
			c := testClock{hasVideo: true}
			last := ticks(-1 << 60)
			for i := range 1000 {
				pts, at, restarted := tt.frame(i)
				at += 10 * second
				out := c.add(simVideo, pts, pts, at, true, restarted || i == 0)
				if len(c.held) == 50 {
					out = c.flush(at)
				}
				for _, s := range out {
					switch {
					case s.fate != fateGoes:
					case s.dts <= last:
						t.Fatalf("frame %d: got %d after %d", i, s.dts, last)
					default:
						last = s.dts
					}
				}
			}
		})
	}
}

// TestClockAhead: a feed that was ahead as far as it may be begins at now when it
// restarts, and not before what it has given out.
func TestClockAhead(t *testing.T) {
	c := testClock{hasVideo: true}
	for i := range ticks(3000) {
		c.add(simVideo, i*3600, i*3600, 10*second+i*1000, true, i == 0)
	}
	now := 10*second + ticks(3000*1000)
	for i := range ticks(6) {
		out := c.add(simVideo, i*3600, i*3600, now+i*3600, true, i == 0)
		if (len(out) > 0) != (i >= 4) {
			t.Errorf("frame %d: got %d out, want them from 150 ms on", i, len(out))
		}
		for j, s := range out {
			if off := s.dts - now - (i+1-ticks(len(out))+ticks(j))*3600; off < 0 || off > early {
				t.Errorf("frame %d: got %d ticks off its arrival, want %d at most", i, off, early)
			}
		}
	}
}

// TestClockStart: the late first frames of a publisher do not move the rest,
// and sound is where its end was when it arrived.
func TestClockStart(t *testing.T) {
	aac := &track{pid: 0x100, streamType: typeAAC}
	tests := []struct {
		name  string
		track *track
		step  ticks // between two PES
		late  []ticks
		want  ticks
	}{
		{"video", simVideo, 3600, []ticks{4000, 2000, 0, 900, 0, 0}, 0},
		{"sound", simSound, 2160, []ticks{4000, 0, 0, 300, 0, 0, 0, 0, 0, 0, 0}, -2160},
		{"AAC", aac, 1920, []ticks{4000, 0, 0, 300, 0, 0, 0, 0, 0, 0, 0}, -1920 - lookAhead},
		{"sound in long PES", simSound, 33300, []ticks{0, 0}, -33300},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := testClock{hasVideo: tt.track == simVideo}
			n := 0
			for i, late := range tt.late {
				dts := ticks(i) * tt.step
				for _, s := range c.add(tt.track, dts, dts, 10*second+dts+late, true, i == 0) {
					if got := s.dts - ticks(n)*tt.step; got != 10*second+tt.want {
						t.Errorf("PES %d: got offset %d, want %d", n, got-10*second, tt.want)
					}
					n++
				}
			}
			if n != len(tt.late) {
				t.Errorf("got %d PES out, want %d", n, len(tt.late))
			}
		})
	}
}

// TestClockWords: what a clock says of itself, and that it is told once an episode.
func TestClockWords(t *testing.T) {
	t.Parallel()
	type says func(c ticks) ticks
	honest := func(c ticks) ticks { return c }
	stepping := func(c ticks) ticks { return c + c/(150*second)*5*second }
	outlier := func(c ticks) ticks {
		if c == 20*second {
			return c - 9800*second
		}
		return c
	}
	tests := []struct {
		name         string
		video, sound says
		want         string // state at the end
		news         []string
		stats        clockStats
	}{
		{"honest", honest, honest, "", nil, clockStats{Rate: 1}},
		{"fast", func(c ticks) ticks { return c * 6 / 5 }, func(c ticks) ticks { return c * 6 / 5 }, "clock 20 % fast", []string{"clock 20 % fast"}, clockStats{Rate: 1.2}},
		{"slow sound", honest, func(c ticks) ticks { return c * 4 / 5 }, "audio clock 20 % slow", []string{"audio clock 20 % slow"}, clockStats{Rate: 0.8}},
		{"steps 150 s apart", honest, stepping, "", []string{"timestamps stepped", "timestamps stepped"}, clockStats{Rate: 1, Steps: 2}},
		{"one outlier", outlier, honest, "", []string{"timestamps out of place"}, clockStats{Rate: 1, Outliers: 1}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := testClock{hasVideo: true}
			var news []string
			now := 10 * second
			for i := ticks(0); i < 320*25; i++ {
				now = 10*second + i*3600
				c.add(simVideo, tt.video(i*3600), tt.video(i*3600), now, i%12 == 0, i == 0)
				c.add(simSound, tt.sound(i*3600), tt.sound(i*3600), now, true, false)
				if n := c.news(now); n != "" {
					news = append(news, n)
				}
			}
			state, _ := c.state(now)
			stats := c.stats()
			stats.Rate = math.Round(stats.Rate*100) / 100
			if state != tt.want || !slices.Equal(news, tt.news) || stats != tt.stats {
				t.Errorf("got state %q, news %q, %+v, want %q, %q, %+v", state, news, stats, tt.want, tt.news, tt.stats)
			}
		})
	}
}

// TestClockPauses: a camera that sees nothing for a while, again and again, and says
// so in its timestamps, loses no picture, and none is late.
func TestClockPauses(t *testing.T) {
	t.Parallel()
	for seed := range scaled(6, 12, 240) {
		random := rand.New(rand.NewPCG(uint64(seed), 0))
		b := newBench(t, "stream/x", "video0")
		v := newCamera()
		v.step = []ticks{1800, 3600, 9000}[seed%3]
		every := v.step.duration()
		jitter := int64(seed/3%2) * int64(20*time.Millisecond)
		start, taken, pause := b.at, 0, 0 // in frames
		for n := range 12 {
			frames := int(time.Second/2/every) + random.IntN(int(20*time.Second/every)>>random.IntN(5))
			if n == 0 {
				frames += int(5 * time.Second / every)
			}
			for i := range frames {
				at := start.Add(time.Duration(taken)*every + time.Duration(random.Int64N(jitter+1)))
				if i == 0 { // the longer it sleeps, the slower it wakes
					at = at.Add(time.Duration(random.Int64N(int64(time.Duration(pause)*every/10) + 1)))
				}
				if at.After(b.at) {
					b.at = at
				}
				v.n = taken
				b.post("video0", v.next())
				taken++
				got := pesTimes(b.got(), 0x100)
				if n == 0 {
					continue // until the clock is set
				}
				if len(got) != 1 {
					t.Fatalf("seed %d: frame %d after pause %d: %d pictures go out, want 1", seed, i, n, len(got))
				}
				if late := (b.now(b.at) - b.feeds["video0"].clock.tracks[0].out).duration(); late > 600*time.Millisecond {
					t.Fatalf("seed %d: frame %d after pause %d goes out with a DTS %v ago", seed, i, n, late)
				}
			}
			pause = random.IntN(int(5 * time.Second / every))
			taken += pause
		}
	}
}
