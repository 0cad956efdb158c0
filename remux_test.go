package main

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// bench is a mux with publishers and a reader, without goroutines, at times
// that the test sets.
type bench struct {
	*mux
	t    *testing.T
	at   time.Time
	sub  *subscriber
	pubs map[string]*publisher
}

func newBench(t *testing.T, stream string, feeds ...string) *bench {
	b := &bench{mux: newMux(), t: t, at: time.Now(), sub: newSubscriber(raw, time.Minute, nil), pubs: map[string]*publisher{}}
	b.setStream(stream, feeds, true)
	b.join(stream, b.sub)
	return b
}

// post publishes what one read of a publisher gave at b.at.
func (b *bench) post(name string, chunk []byte) {
	p := b.pubs[name]
	first := p == nil
	if first {
		p = &publisher{interrupt: func() {}}
		b.pubs[name] = p
		b.attach(name, p)
	}
	all, err := frames(bytes.NewReader(chunk))
	if err != nil {
		b.t.Fatal(err)
	}
	for i, m := range all {
		m.at, m.first = b.at, first && i == 0
		b.feeds[name].publish(p, m, b.now(b.at))
	}
}

// restart makes the next post of a feed that of a new publisher.
func (b *bench) restart(name string) { delete(b.pubs, name) }

// got takes what the reader has.
func (b *bench) got() []byte {
	var out []byte
	for {
		parts := b.sub.take(nil, 1<<20, false, time.Now())
		if len(parts) == 0 {
			return out
		}
		n := 0
		for _, p := range parts {
			out = append(out, p...)
			n += len(p)
		}
		b.sub.wrote(n)
	}
}

// TestStreamIsAProgram: two ffmpeg processes that collide on their PIDs.
func TestStreamIsAProgram(t *testing.T) {
	b := newBench(t, "stream/x", "video0", "audio0")
	v, a := newCamera(), newMicrophone()
	check := newTSCheck()
	var want int
	for i := range 250 { // 10 s
		b.at = b.at.Add(40 * time.Millisecond)
		b.post("video0", v.next())
		for ; a.n*24 < i*40; want++ {
			b.post("audio0", a.next())
		}
		check.read(b.got())
	}
	if len(check.problems) > 0 {
		t.Errorf("got %d problems: %q", len(check.problems), check.problems[:min(5, len(check.problems))])
	}
	if check.types[0x100] != 1 || check.types[0x101] != 3 || len(check.types) != 2 {
		t.Errorf("got tracks %v, want video on 0x100 and audio on 0x101", check.types)
	}
	if got := len(check.pts[0x100]); got != 250 {
		t.Errorf("got %d pictures, want 250", got)
	}
	if got := len(check.pts[0x101]); got != want {
		t.Errorf("got %d audio frames, want %d", got, want)
	}
	if ms := check.gap / 27000; ms > 100 {
		t.Errorf("PCR are %d ms apart, want 100 at most", ms)
	}
	if check.versions != 1 || check.jumps != 2 {
		t.Errorf("got %d versions and %d discontinuities, want 1 for the second feed and one a feed", check.versions, check.jumps)
	}
	// Both frames of the last moment: one clock, PTS 200 ms ahead of the PCR.
	lead := check.pts[0x100][249] - ticks(check.pcr/300)
	apart := check.pts[0x100][249] - check.pts[0x101][want-1]
	if lead < second/10 || lead > second*3/10 || apart < -second/20 || apart > second/20 {
		t.Errorf("video is %d ticks ahead of the PCR and %d of audio", lead, apart)
	}
}

// TestStreamTables: PAT, PMT and a PCR come ahead of each keyframe, and at most
// 100 ms after the last ones while frames do, whether they go out or are muted.
func TestStreamTables(t *testing.T) {
	t.Parallel()
	for _, muted := range []kindSet{0, muteSound} {
		b := newBench(t, "stream/x", "video0", "audio0")
		b.setMute(muted)
		v, a := newCamera(), newMicrophone()
		random := rand.New(rand.NewPCG(9, 0))
		var last time.Time
		count := 0
		for i := range 5000 {
			b.at = b.at.Add(time.Duration(random.IntN(45000)) * time.Microsecond)
			b.post("audio0", a.next())
			got := packet(b.got())
			key := false
			if i%1000 < 500 { // then the camera stands still
				key = v.n%v.gop == 0
				b.post("video0", v.next())
				if key {
					got = b.got()
				} else {
					got = append(got, b.got()...)
				}
			}
			if count == 0 && len(got) == 0 {
				continue // the clocks are not set yet
			}
			apart := b.at.Sub(last)
			if count > 0 && apart > 100*time.Millisecond {
				t.Fatalf("muted %v, frame %d: the last PAT is %v old", muted, i, apart)
			}
			if len(got) > 0 && got.pid() == patPID {
				if p := got[packetSize:]; p.pid() != outPMT || p[packetSize:].pid() != outPCR {
					t.Fatalf("muted %v, frame %d: PID %#x and %#x follow the PAT", muted, i, p.pid(), p[packetSize:].pid())
				}
				last = b.at
				count++
			} else if key {
				t.Fatalf("muted %v, frame %d: a keyframe without PAT", muted, i)
			}
		}
		if count < 1000 {
			t.Errorf("muted %v: got %d PAT in 112 s", muted, count)
		}
	}
}

// TestStreamChanges: mute, unmute, restart and new tracks leave a valid
// program, and the version steps with what changed.
func TestStreamChanges(t *testing.T) {
	b := newBench(t, "stream/x", "video0", "audio0")
	v, a := newCamera(), newMicrophone()
	check := newTSCheck()
	play := func(n int, video, audio bool) {
		for range n {
			b.at = b.at.Add(40 * time.Millisecond)
			if video {
				b.post("video0", v.next())
			}
			if audio {
				b.post("audio0", a.next())
			}
			check.read(b.got())
		}
	}
	play(30, true, true)
	before := check.versions
	for i := range 10 {
		b.setStream("stream/x", []string{"video0"}, true) // mute
		play(7, true, true)
		if check.versions != before+1 || check.types[0x101] != 0 {
			t.Fatalf("mute %d: got %d version steps, tracks %v", i, check.versions-before, check.types)
		}
		b.setStream("stream/x", []string{"video0", "audio0"}, true)
		play(7, true, true)
		if check.versions != before+2 || check.types[0x101] != 3 {
			t.Fatalf("unmute %d: got %d version steps, tracks %v", i, check.versions-before, check.types)
		}
		before = check.versions
	}
	for range 10 { // video muted, and unmuted in the middle of a group
		b.setStream("stream/x", []string{"audio0"}, true)
		play(7, true, true)
		b.setStream("stream/x", []string{"video0", "audio0"}, true)
		play(17, true, true)
	}
	before = check.versions
	for range 10 { // ffmpeg killed and started again
		play(5, false, true)
		b.restart("video0")
		v = newCamera()
		play(20, true, true)
	}
	if check.versions != before {
		t.Errorf("a restart: got %d version steps, want none", check.versions-before)
	}
	b.restart("video0")
	v = newCamera()
	v.kind, v.pid = 0x1b, 0x101 // another codec, on the PID that audio has
	play(5, true, true)
	if check.versions != before+1 || check.types[0x101] != 3 || check.types[0x100] != 0x1b && check.types[0x102] != 0x1b {
		t.Errorf("another codec: got %d version steps, tracks %v", check.versions-before, check.types)
	}
	if len(check.problems) > 0 {
		t.Errorf("got %d problems: %q", len(check.problems), check.problems[:min(5, len(check.problems))])
	}
}

// TestPMTVersion: the version of the PMT is counted by what goes out: a change that
// was taken back before the next PMT leaves it as it was.
func TestPMTVersion(t *testing.T) {
	t.Parallel()
	var x remuxer
	x.arrange([]string{"video0", "audio0"}, time.Now())
	program := func(pid uint16, kind byte) *program { return &program{tracks: []track{{pid, kind, nil}}} }
	x.follow(x.source("video0"), program(0x100, typeMPEG1Video))
	x.follow(x.source("audio0"), program(0x101, typeMPEG1Audio))
	check := newTSCheck()
	for i, step := range []struct {
		name    string
		blocked []kindSet // one after the other, before the next PMT
		changed bool      // in the end
		version int
	}{
		{"first", nil, true, 0},
		{"again", nil, false, 0},
		{"muted and lifted", []kindSet{muteSound, 0}, false, 0},
		{"muted", []kindSet{muteSound}, true, 1},
		{"lifted and muted", []kindSet{0, muteSound}, false, 1},
		{"another kind", []kindSet{0, mutePicture}, true, 2},
		{"lifted", []kindSet{muteSound, 0}, true, 3},
	} {
		changed := i == 0
		for _, kinds := range step.blocked {
			changed = x.block(kinds)
		}
		if changed != step.changed {
			t.Errorf("%s: changed: got %v, want %v", step.name, changed, step.changed)
		}
		check.read(x.appendPSI(nil, ticks(i+1)*psiEvery))
		if check.version != step.version {
			t.Errorf("%s: got version %d, want %d", step.name, check.version, step.version)
		}
	}
	if len(check.problems) > 0 {
		t.Errorf("got %q", check.problems)
	}
}

// TestStreamPIDs: a PID stays that of its track when that is gone, for as long
// as there are PIDs to spare.
func TestStreamPIDs(t *testing.T) {
	t.Parallel()
	b := newBench(t, "stream/x")
	b.at = time.Now().Add(time.Hour) // after every change of the stream
	check := newTSCheck()
	play := func(feed string, c *camera) (pid uint16) {
		t.Helper()
		b.setStream("stream/x", []string{feed}, true)
		for range 10 {
			b.at = b.at.Add(40 * time.Millisecond)
			b.post(feed, c.next())
		}
		b.detach(b.feeds[feed], b.pubs[feed])
		b.restart(feed)
		check.read(b.got())
		if len(check.types) != 1 {
			t.Fatalf("%s: got tracks %v, want one", feed, check.types)
		}
		for pid = range check.types {
		}
		return pid
	}
	a, v := newMicrophone(), newCamera()
	sound, picture := play("audio0", a), play("video0", v)
	if sound == picture || play("audio0", a) != sound || play("video0", v) != picture {
		t.Errorf("sound was on %#x and picture on %#x, want two PIDs that stay", sound, picture)
	}
	for i := range maxOrigins + 100 {
		play(fmt.Sprint("other", i), newCamera())
	}
	if n := len(b.streams["stream/x"].remux.origins); n > maxOrigins+1 {
		t.Errorf("%d PIDs are kept, want %d at most", n, maxOrigins)
	}
	if len(check.problems) > 0 {
		t.Errorf("got %d problems: %q", len(check.problems), check.problems[:min(5, len(check.problems))])
	}
}

// TestStreamReader: a new reader first gets PAT and PMT, and its first picture
// is a keyframe; after a drop it is told that counters do not go on.
func TestStreamReader(t *testing.T) {
	b := newBench(t, "stream/x", "video0")
	v := newCamera()
	play := func(n int) {
		for range n {
			b.at = b.at.Add(40 * time.Millisecond)
			b.post("video0", v.next())
		}
	}
	play(5)
	late := newSubscriber(raw, time.Minute, nil)
	b.sub = late
	b.join("stream/x", late)
	play(20)
	got := b.got()
	if p := packet(got); p.pid() != patPID || packet(got[188:]).pid() != outPMT {
		t.Errorf("got PIDs %#x, %#x first, want PAT and PMT", p.pid(), packet(got[188:]).pid())
	}
	for p := packet(got); len(p) > 0; p = p[packetSize:] {
		if p.unitStart() && p.pid() == 0x100 {
			if !p.randomAccess() {
				t.Error("the first picture is not a keyframe")
			}
			break
		}
	}
	check := newTSCheck()
	check.read(got)
	late.maxAge = 200 * time.Millisecond
	play(60) // and nothing is taken: a reader that stalls
	late.maxAge = time.Minute
	play(1)
	check.read(b.got())
	if len(check.problems) > 0 {
		t.Errorf("got %q", check.problems)
	}
	if check.jumps < 1 {
		t.Error("got no discontinuity_indicator after a drop")
	}
}

// TestStreamNoKeyframe: a stream passes a feed without keyframes after 5 s, to
// readers that were there before.
func TestStreamNoKeyframe(t *testing.T) {
	b := newBench(t, "stream/x", "video0")
	v := newCamera()
	v.gop, v.n = 1<<30, 1
	start := b.at
	for b.at.Sub(start) < 6*time.Second {
		b.at = b.at.Add(40 * time.Millisecond)
		b.post("video0", v.next())
	}
	check := newTSCheck()
	check.read(b.got())
	if n := len(check.pts[0x100]); n < 20 {
		t.Errorf("got %d pictures in 6 s, want those of the last", n)
	}
}

// TestStreamHeldWhileMuted: what waited for the clock while its feed was muted
// does not come after the unmute.
func TestStreamHeldWhileMuted(t *testing.T) {
	b := newBench(t, "stream/x")
	a := newMicrophone()
	b.at = time.Now().Add(-time.Second)
	play := func(n int) {
		for range n {
			b.at = b.at.Add(24 * time.Millisecond)
			b.post("audio0", a.next())
		}
	}
	play(4)
	b.setStream("stream/x", []string{"audio0"}, true)
	b.at = time.Now()
	play(20)
	check := newTSCheck()
	check.read(b.got())
	if n := len(check.pts[0x100]); n != 20 {
		t.Errorf("got %d PES, want the 20 after the unmute", n)
	}
}

// TestStreamPrograms: of several programs the first is taken, whether their
// maps share a PID or not, and however far apart their clocks are.
func TestStreamPrograms(t *testing.T) {
	for _, other := range []uint16{testPMT, 0x1100} {
		b := newBench(t, "stream/x", "video0")
		check := newTSCheck()
		var m tsMaker
		for i := range 100 {
			b.at = b.at.Add(40 * time.Millisecond)
			m.Reset()
			m.section(patPID, 0, 0, 0, 0, 1, 0xc1, 0, 0, 0, 1, 0xe0|testPMT>>8, testPMT&0xff, 0, 2, 0xe0|byte(other>>8), byte(other))
			m.section(testPMT, 2, 0, 0, 0, 1, 0xc1, 0, 0, 0xe1, 0, 0xf0, 0, 1, 0xe1, 0, 0xf0, 0)
			m.section(other, 2, 0, 0, 0, 2, 0xc1, 0, 0, 0xe2, 0, 0xf0, 0, 1, 0xe2, 0, 0xf0, 0)
			m.frame(pes{pid: 0x100, id: 0xe0, key: i%12 == 0, pts: 126000 + ticks(i)*3600, size: 2000})
			m.frame(pes{pid: 0x200, id: 0xe0, key: i%12 == 0, pts: 126000 + 1000*second + ticks(i)*3600, size: 2000})
			b.post("video0", bytes.Clone(m.Bytes()))
			check.read(b.got())
		}
		if n := len(check.pts[0x100]); n != 100 || check.jumps != 1 || check.versions != 0 || len(check.types) != 1 || len(check.problems) > 0 {
			t.Errorf("maps on %#x: got %d pictures, %d discontinuities, %d version steps, tracks %v, %q", other, n, check.jumps, check.versions, check.types, check.problems)
		}
	}
}

// TestStreamAsFeed: what a stream sends is a feed of whole frames to the next vw.
func TestStreamAsFeed(t *testing.T) {
	b := newBench(t, "stream/x", "video0")
	v := newCamera()
	var got [][]byte
	for range 60 {
		b.at = b.at.Add(40 * time.Millisecond)
		b.post("video0", v.next())
		got = append(got, b.got())
	}
	all, err := frames(&writes{got, io.EOF})
	if err != nil || len(all) < 50 {
		t.Fatalf("got %d messages, %v", len(all), err)
	}
	for i, m := range all {
		if !m.info.start {
			t.Errorf("message %d begins inside a frame", i)
		}
	}
}

// FuzzStream: whatever two feeds post, what comes out is a valid program.
func FuzzStream(f *testing.F) {
	v, a := newCamera(), newMicrophone()
	f.Add(slices.Concat(bytes.Clone(v.next()), v.next()), slices.Concat(bytes.Clone(a.next()), a.next()))
	f.Add(testClip(2, 100), testClip(3, 500))
	f.Fuzz(func(t *testing.T, one, two []byte) {
		b := &bench{mux: newMux(), t: t, at: time.Now().Add(time.Second), sub: newSubscriber(raw, time.Minute, nil), pubs: map[string]*publisher{}}
		b.setStream("stream/x", []string{"one", "two"}, true)
		b.join("stream/x", b.sub)
		for name, in := range map[string][]byte{"one": one, "two": two} {
			p := &publisher{interrupt: func() {}}
			fd := b.attach(name, p)
			all, _ := frames(bytes.NewReader(in))
			for i, m := range all {
				m.at, m.first = b.at.Add(time.Duration(i)*40*time.Millisecond), i == 0
				fd.publish(p, m, b.now(m.at))
			}
			b.detach(fd, p)
		}
		out := b.got()
		if len(out)%packetSize != 0 {
			t.Fatalf("got %d bytes", len(out))
		}
		var tables psi
		for ; len(out) > 0; out = out[packetSize:] {
			p := packet(out[:packetSize])
			if p[0] != syncByte || p.damaged() {
				t.Fatal("got what is no packet")
			}
			if !tables.add(p) && p.pid() != outPCR && (len(tables.programs) == 0 || tables.programs[0].program.find(p.pid()) == nil) {
				t.Fatalf("got PID %#x, which the PMT does not have", p.pid())
			}
		}
	})
}

// BenchmarkRemux: what a stream costs above a copy of the same bytes.
func BenchmarkRemux(b *testing.B) {
	chunk := testClip(12, 20000)
	all, err := frames(bytes.NewReader(chunk))
	if err != nil {
		b.Fatal(err)
	}
	var x remuxer
	x.arrange([]string{"video0"}, time.Now())
	s := x.source("video0")
	x.follow(s, all[0].info.program)
	var c clock
	var stamps []stamp
	at := 10 * second
	dst := make([]byte, len(chunk))
	b.SetBytes(int64(len(chunk)))
	b.ReportAllocs()
	var remuxing, copying time.Duration
	for b.Loop() {
		start := time.Now()
		stamps = c.read(chunk, all[0].info.program, stamps[:0])
		for i := range stamps {
			stamps[i].pts, stamps[i].dts = stamps[i].pts+at, stamps[i].dts+at
		}
		c.note(stamps, at, at == 10*second, true)
		c.place(stamps, true, at, at)
		x.remux(s, chunk, stamps)
		at += 12 * 3600
		middle := time.Now()
		for p := 0; p < len(chunk); p += packetSize {
			copy(dst[p:], chunk[p:p+packetSize])
		}
		remuxing += middle.Sub(start)
		copying += time.Since(middle)
	}
	b.ReportMetric(float64(remuxing)/float64(copying), "ratio")
	b.ReportMetric(float64(remuxing.Nanoseconds())/float64(b.N)/float64(len(chunk)/packetSize), "ns/packet")
}
