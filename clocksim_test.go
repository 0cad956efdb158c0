package main

import (
	"bytes"
	"cmp"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
)

// The simulation of the clock: models of how PES arrive, times models of what
// clocks say. Times are in seconds, as in the models; the clock gets ticks.

// simFrame is one PES of a simulated feed.
type simFrame struct {
	made     float64 // when it was captured
	at       float64 // when it arrived
	pts, dts float64 // what its publisher says
	track    *track
	key      bool
}

// simResult is what became of it.
type simResult struct {
	simFrame
	out  float64 // its DTS on vw's clock
	fate fate
}

// simulation runs frames through a clock, and holds what goes out to the rules.
type simulation struct {
	testClock
	results  []simResult
	problems []string // rules that were broken
	last     map[*trackClock]ticks
}

func toTick(s float64) ticks { return ticks(math.Round(s * float64(second))) }

func (sim *simulation) run(frames []simFrame) {
	frames = slices.Clone(frames)
	slices.SortStableFunc(frames, func(a, b simFrame) int { return cmp.Compare(a.at, b.at) })
	sim.hasVideo = slices.ContainsFunc(frames, func(f simFrame) bool { return f.track == simVideo })
	sim.last = map[*trackClock]ticks{}
	for i, f := range frames {
		for _, s := range sim.add(f.track, toTick(f.pts), toTick(f.dts), toTick(f.at), f.key, i == 0) {
			f := frames[len(sim.results)]
			sim.results = append(sim.results, simResult{f, float64(s.dts) / float64(second), s.fate})
			if s.fate == fateGoes {
				sim.check(s, toTick(frames[i].at))
			}
		}
	}
}

// check holds what goes out now to the rules.
func (sim *simulation) check(s stamp, now ticks) {
	problem := func(format string, args ...any) { sim.problems = append(sim.problems, fmt.Sprintf(format, args...)) }
	if last, ok := sim.last[s.track]; ok && s.dts < last+leastApart {
		problem("DTS %d after %d", s.dts, last)
	}
	sim.last[s.track] = s.dts
	ahead := float64(s.dts+lead-now) / float64(second)
	if ahead < -2.5 || ahead+0.05 > 2 { // the PCR may be 50 ms old
		problem("DTS %.2f s from the PCR", ahead)
	}
	if s.pts < s.dts {
		problem("PTS %d before DTS %d", s.pts, s.dts)
	}
}

// arrivalModels say when what was captured at made arrives. A model never lets
// a frame arrive before it was made; it is called in the order of capture.
var arrivalModels = []struct {
	name   string
	even   bool       // a wrong rate shows within 5 s
	harsh  bool       // only honest clocks have to be right
	late   bool       // it starts so late that it is slewed for long: only the rules are held
	calm   [2]float64 // nothing is asked of the time between
	arrive func(made float64, i int, all []float64, r *rand.Rand) float64
}{
	{name: "steady", even: true, arrive: func(c float64, _ int, _ []float64, _ *rand.Rand) float64 { return c }},
	{name: "jitter 20 ms", even: true, arrive: func(c float64, _ int, _ []float64, r *rand.Rand) float64 { return c + r.Float64()*0.02 }},
	{name: "pairs", even: true, arrive: func(c float64, i int, all []float64, _ *rand.Rand) float64 { return all[min(i|1, len(all)-1)] }},
	{name: "bursts 0.3 s", arrive: func(c float64, _ int, _ []float64, _ *rand.Rand) float64 { return math.Ceil(c/0.3-1e-9) * 0.3 }},
	{name: "bursts 2 s", arrive: func(c float64, _ int, _ []float64, _ *rand.Rand) float64 { return math.Ceil(c/2-1e-9) * 2 }},
	{name: "stall 10 s", calm: [2]float64{30, 42}, arrive: func(c float64, _ int, _ []float64, r *rand.Rand) float64 {
		if 30 < c && c < 40 {
			return 40 + (c-30)*0.001
		}
		return c + r.Float64()*0.01
	}},
	{name: "hiccups 2 s", harsh: true, arrive: func(c float64, _ int, _ []float64, r *rand.Rand) float64 {
		if k := math.Mod(c, 10); 7 < k && k < 9 {
			return c - k + 9
		}
		return c + r.Float64()*0.02
	}},
	{name: "stall 1.5x", harsh: true, calm: [2]float64{30, 62}, arrive: func(c float64, _ int, _ []float64, _ *rand.Rand) float64 {
		if c < 30 {
			return c
		}
		return max(c, 40+(c-30)/1.5)
	}},
	{name: "stall 1.2x", harsh: true, calm: [2]float64{30, 46}, arrive: func(c float64, _ int, _ []float64, _ *rand.Rand) float64 {
		if c < 30 {
			return c
		}
		return max(c, 32+(c-30)/1.2)
	}},
	{name: "starts 3 s late", late: true, arrive: func(c float64, _ int, _ []float64, _ *rand.Rand) float64 { return max(c, 3+c/3) }},
	{name: "bloat", harsh: true, arrive: func(c float64, _ int, _ []float64, _ *rand.Rand) float64 {
		if k := math.Mod(c, 20); k < 12 {
			return c + 0.35*min(max(k-5, 0), 2)
		}
		return c
	}},
}

const honestLimit = 0.06 // seconds

// clockModels say what a publisher's clock shows at a time of capture, from the
// time of the fault on.
var clockModels = func() (all []clockModel) {
	add := func(name string, limit float64, rate, slow bool, says func(c, fault float64, i int, r *rand.Rand) float64) {
		all = append(all, clockModel{name, limit, rate, slow, says})
	}
	add("honest", honestLimit, false, false, func(c, _ float64, _ int, _ *rand.Rand) float64 { return c })
	for _, ppm := range []float64{50, -50} {
		add(fmt.Sprintf("%+g ppm", ppm), honestLimit, false, false, func(c, _ float64, _ int, _ *rand.Rand) float64 { return c * (1 + ppm*1e-6) })
	}
	for _, rate := range []float64{1.02, 0.98, 1.2, 0.8, 0.6, 10, 0.1} {
		add(fmt.Sprintf("x %g", rate), 0.25, true, math.Abs(rate-1) < 0.05, func(c, fault float64, _ int, _ *rand.Rand) float64 {
			if c < fault {
				return c
			}
			return fault + (c-fault)*rate
		})
	}
	for _, by := range []float64{0.05, 0.3, 1.5, 5, 9, 20, 3e8, -0.05, -0.3, -1.5, -5, -20, -3e8} {
		add(fmt.Sprintf("step %+g", by), 0.25, false, false, func(c, fault float64, _ int, _ *rand.Rand) float64 {
			if c < fault {
				return c
			}
			return c + by
		})
	}
	outlier := func(r *rand.Rand) float64 { return []float64{-9800, 37600, -0.5, 0.6, 2, 5}[r.IntN(6)] }
	add("outliers", 0.25, false, false, func(c, _ float64, i int, r *rand.Rand) float64 {
		if i%97 == 50 {
			return c + outlier(r)
		}
		return c
	})
	add("outlier pairs", 0.25, false, false, func(c, _ float64, i int, _ *rand.Rand) float64 {
		if i%97 == 50 || i%97 == 51 {
			return c - 9800
		}
		return c
	})
	add("every tenth", 0.25, false, false, func(c, _ float64, i int, r *rand.Rand) float64 {
		if i%10 == 5 {
			return c + outlier(r)
		}
		return c
	})
	return all
}()

type clockModel struct {
	name  string
	limit float64 // by which it may be off in the end
	rate  bool    // it is one
	slow  bool    // it takes 15 s
	says  func(c, fault float64, i int, r *rand.Rand) float64
}

// captures returns when a camera of that many frames a second makes them.
func captures(fps, lasts float64) (all []float64) {
	for i := 0; float64(i)/fps < lasts; i++ {
		all = append(all, float64(i)/fps)
	}
	return all
}

const simStart = 10.0 // on vw's clock

// simulate runs one camera, and returns by how much it was off in the end.
func simulate(arrival int, model clockModel, fps, fault float64, seed uint64, wrapAt float64) (worst float64, sim *simulation) {
	r := rand.New(rand.NewPCG(seed, 7))
	made := captures(fps, 100)
	am := arrivalModels[arrival]
	origin := r.Float64() * 90000
	if wrapAt > 0 {
		origin = float64(wrap)/float64(second) - wrapAt
	}
	var frames []simFrame
	before := 0.0
	for i, c := range made {
		at := max(before, am.arrive(c, i, made, r))
		before = at
		says := origin + model.says(c, fault, i, r)
		frames = append(frames, simFrame{c, simStart + at, says, says, simVideo, i%max(int(fps), 1) == 0})
	}
	sim = &simulation{}
	sim.run(frames)
	var usual []float64
	for _, x := range sim.results {
		if 9 < x.made && x.made < fault-1 && x.fate == fateGoes {
			usual = append(usual, x.out-x.made)
		}
	}
	if len(usual) == 0 {
		return 99, sim
	}
	slices.Sort(usual)
	patience := 5.0
	switch {
	case model.rate && !am.even, model.slow:
		patience = 15
	case fps <= 5:
		patience = 10
	}
	worst, n := 0.0, 0
	for _, x := range sim.results {
		at := x.at - simStart
		if at > fault+patience && x.fate == fateGoes && (at < am.calm[0] || at > am.calm[1]) {
			worst = max(worst, math.Abs(x.out-x.made-usual[len(usual)/2]))
			n++
		}
	}
	if n < 10 {
		worst = 99
	}
	return worst, sim
}

var clockTable = flag.String("clocktable", "", "write the table of TestClockSimulation to this file")

// TestClockSimulation: every clock under every arrival keeps the rules of what
// goes out, and is right in the end.
func TestClockSimulation(t *testing.T) {
	notUnderRace(t)
	rates, faults := []float64{1, 2, 5, 15, 25, 30, 50, 60}, []float64{20, 21.3, 23.77}
	if testing.Short() {
		rates, faults = []float64{1, 5, 25}, []float64{21.3}
	}
	simulateAt := func(fps float64) string {
		var table strings.Builder
		fmt.Fprintf(&table, "\n%g frames a second\n%16s", fps, "")
		for _, m := range clockModels {
			fmt.Fprintf(&table, "%14s", m.name)
		}
		for a, am := range arrivalModels {
			fmt.Fprintf(&table, "\n%-16s", am.name)
			for _, m := range clockModels {
				worst, late := 0.0, uint64(0)
				for i, fault := range faults {
					off, sim := simulate(a, m, fps, fault, uint64(i), fault) // the wrap is at the fault too
					worst, late = max(worst, off), max(late, sim.clock.troubles[troubleLate].count)
					if len(sim.problems) > 0 {
						t.Errorf("%g frames a second, %s, %s: %d problems: %s", fps, am.name, m.name, len(sim.problems), sim.problems[0])
					}
				}
				if worst > m.limit && !am.late && !(am.harsh && m.limit > honestLimit) {
					t.Errorf("%g frames a second, %s, %s: got %.3f s off, want %.2f at most", fps, am.name, m.name, worst, m.limit)
				}
				cell := fmt.Sprintf("%.3f", worst)
				if late > 0 {
					cell += fmt.Sprintf(" -%d", late)
				}
				fmt.Fprintf(&table, "%14s", cell)
			}
		}
		return table.String()
	}
	tables := make([]string, len(rates))
	var running sync.WaitGroup
	for i, fps := range rates {
		running.Go(func() { tables[i] = simulateAt(fps) })
	}
	running.Wait()
	if *clockTable != "" {
		if err := os.WriteFile(*clockTable, []byte(strings.Join(tables, "")), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// FuzzClock: whatever the timestamps of two tracks are, and whenever they arrive,
// what goes out keeps the rules.
func FuzzClock(f *testing.F) {
	f.Add([]byte("\x00\x10\x10\x00\x01\x11\x11\x00"))
	f.Add(bytes.Repeat([]byte{0, 0x2e, 0x2e, 0}, 300))                                                         // 25 a second
	f.Add(append(bytes.Repeat([]byte{1, 0x5d, 0x5d, 0}, 300), bytes.Repeat([]byte{1, 0x60, 0x5d, 0}, 300)...)) // and then faster
	// A byte is a distance from 0 to 12 hours, coarser where it is longer.
	far := func(b byte) ticks {
		if b == 0 {
			return 0
		}
		return (16 + 3*ticks(b&15)) << (2 * (b >> 4)) / 16
	}
	const most = 600 // PES; the fuzzer's own time to make an input smaller grows with it
	f.Fuzz(func(t *testing.T, in []byte) {
		in = in[:min(len(in), 4*most)]
		sim := &simulation{last: map[*trackClock]ticks{}}
		sim.hasVideo = len(in)%2 == 0
		at := [2]ticks{10 * second, 10 * second}
		var dts [2]ticks
		for i := 0; i+4 <= len(in); i += 4 {
			how := in[i]
			n := how & 1
			if how&2 != 0 {
				dts[n] -= far(in[i+1])
			} else {
				dts[n] += far(in[i+1])
			}
			now := max(at[0], at[1])
			if how&4 == 0 {
				now += far(in[i+2])
			}
			at[n] = now
			tr := []*track{simVideo, simSound}[n]
			for _, s := range sim.add(tr, dts[n]+far(in[i+3]), dts[n], now, how&8 == 0, i == 0 || how&0xf0 == 0xf0) {
				if s.fate == fateGoes {
					sim.check(s, now)
				}
			}
		}
		if len(sim.problems) > 0 {
			t.Fatalf("got %d problems: %s", len(sim.problems), sim.problems[0])
		}
	})
}

// simTrack is a track of a simulated feed.
type simTrack struct {
	*track
	every  float64 // a PES
	behind float64 // by which it arrives later than it must
	group  int     // PES of the encoder in one that is sent, which arrives at its end
	says   func(c float64) float64
	b      int // pictures between two that others refer to
	ahead  float64
}

// frames returns what the track sends in a time.
func (tr simTrack) frames(lasts float64, r *rand.Rand) (all []simFrame) {
	group := max(tr.group, 1)
	for i := 0; float64(i)*tr.every < lasts; i += group {
		made := float64(i) * tr.every
		at := made + tr.behind + r.Float64()*0.01
		if tr.track != simVideo {
			at += float64(group) * tr.every
		}
		f := simFrame{made: made, at: simStart + at, dts: tr.says(made), track: tr.track, key: i%25 == 0}
		f.pts = f.dts + tr.ahead
		if n := i % (tr.b + 1); tr.b > 0 && n == 0 {
			f.pts += float64(tr.b+1) * tr.every
		}
		all = append(all, f)
	}
	return all
}

// TestClockFeeds: feeds of one or two tracks, of which some go wrong at 30 s.
func TestClockFeeds(t *testing.T) {
	t.Parallel()
	honest := func(c float64) float64 { return c }
	step := func(by float64) func(float64) float64 {
		return func(c float64) float64 {
			if c < 30 {
				return c
			}
			return c + by
		}
	}
	fast := func(rate float64) func(float64) float64 {
		return func(c float64) float64 {
			if c < 30 {
				return c
			}
			return 30 + (c-30)*rate
		}
	}
	video := func(says func(float64) float64) simTrack { return simTrack{track: simVideo, every: 0.04, says: says} }
	sound := func(says func(float64) float64, behind float64, group int) simTrack {
		return simTrack{track: simSound, every: 0.024, says: says, behind: behind, group: group}
	}
	withB := func(says func(float64) float64) simTrack { v := video(says); v.b = 2; return v }
	slow := simTrack{track: simVideo, every: 1, says: step(-0.3), ahead: 5}
	tests := []struct {
		name     string
		tracks   []simTrack
		patience float64
		want     float64 // off at most, after the fault
	}{
		{"sound in PES of 360 ms", []simTrack{sound(honest, 0, 15)}, 0, honestLimit},
		{"sound in PES of 360 ms steps 5 s", []simTrack{sound(step(5), 0, 15)}, 5, 0.25},
		{"sound in PES of 360 ms steps -0.3 s", []simTrack{sound(step(-0.3), 0, 15)}, 10, 0.25},
		{"sound in PES of 360 ms steps -1.5 s", []simTrack{sound(step(-1.5), 0, 15)}, 5, 0.25},
		{"sound is 20 % fast", []simTrack{sound(fast(1.2), 0, 15)}, 5, 0.25},
		{"sound 0.7 s behind", []simTrack{video(honest), sound(honest, 0.7, 1)}, 0, honestLimit},
		{"sound in long PES beside picture", []simTrack{video(honest), sound(honest, 0, 15)}, 0, honestLimit},
		{"sound steps 5 s", []simTrack{video(honest), sound(step(5), 0, 1)}, 5, 0.25},
		{"sound steps 0.3 s", []simTrack{video(honest), sound(step(0.3), 0, 1)}, 5, 0.25},
		{"sound 0.7 s behind steps 0.3 s", []simTrack{video(honest), sound(step(0.3), 0.7, 1)}, 5, 0.25},
		{"sound in long PES steps 0.3 s", []simTrack{video(honest), sound(step(0.3), 0, 15)}, 5, 0.25},
		{"sound steps -1.5 s", []simTrack{video(honest), sound(step(-1.5), 0, 1)}, 5, 0.25},
		{"sound in long PES steps -1.5 s", []simTrack{video(honest), sound(step(-1.5), 0, 15)}, 5, 0.25},
		{"picture steps -5 s", []simTrack{video(step(-5)), sound(honest, 0, 15)}, 5, 0.25},
		{"both step 20 s", []simTrack{video(step(20)), sound(step(20), 0, 1)}, 5, 0.25},
		{"both step -20 s, sound 0.7 s behind", []simTrack{video(step(-20)), sound(step(-20), 0.7, 15)}, 5, 0.25},
		{"picture is 20 % fast", []simTrack{video(fast(1.2)), sound(honest, 0, 1)}, 5, 0.25},
		{"picture is 16 % slow", []simTrack{video(fast(21. / 25)), sound(honest, 0, 15)}, 5, 0.25},
		{"picture is 40 % slow", []simTrack{video(fast(15. / 25)), sound(honest, 0, 1)}, 5, 0.25},
		{"sound is 20 % fast, 0.7 s behind", []simTrack{video(honest), sound(fast(1.2), 0.7, 1)}, 5.7, 0.25},
		{"all is ten times too fast", []simTrack{video(fast(10)), sound(fast(10), 0, 1)}, 5, 0.25},
		{"all is 20 % slow", []simTrack{video(fast(0.8)), sound(fast(0.8), 0, 15)}, 5, 0.25},
		{"pictures between", []simTrack{withB(honest), sound(honest, 0, 1)}, 0, honestLimit},
		{"pictures between, 20 % fast", []simTrack{withB(fast(1.2)), sound(honest, 0, 1)}, 5, 0.25},
		{"pictures between, 40 % slow", []simTrack{withB(fast(0.6)), sound(honest, 0, 1)}, 5, 0.25},
		{"pictures between, ten times too fast", []simTrack{withB(fast(10))}, 5, 0.25},
		{"pictures between step 5 s", []simTrack{withB(step(5)), sound(step(5), 0, 15)}, 5, 0.25},
		{"one a second, PTS 5 s ahead", []simTrack{slow}, 10, 0.25},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := rand.New(rand.NewPCG(3, 4))
			var frames []simFrame
			for _, tr := range tt.tracks {
				frames = append(frames, tr.frames(60, r)...)
			}
			sim := &simulation{}
			sim.run(frames)
			if len(sim.problems) > 0 {
				t.Errorf("got %d problems: %s", len(sim.problems), sim.problems[0])
			}
			for _, tr := range tt.tracks {
				var usual []float64
				worst := 0.0
				for _, x := range sim.results {
					switch at := x.at - simStart; {
					case x.track != tr.track || x.fate != fateGoes:
					case at > 5 && at < 29:
						usual = append(usual, x.out-x.made)
					case at > 30+tt.patience:
						slices.Sort(usual)
						worst = max(worst, math.Abs(x.out-x.made-usual[len(usual)/2]))
					}
				}
				if worst > tt.want {
					t.Errorf("%s: got %.3f s off, want %.2f at most", tr.coding().name, worst, tt.want)
				}
			}
		})
	}
}
