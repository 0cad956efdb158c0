package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// tsCheck reads a program as a strict receiver would: the tests' own reading
// of ISO 13818-1, apart from the packet accessors.
type tsCheck struct {
	cc       map[uint16]int
	version  int
	versions int              // steps of the PMT
	pmt      []byte           // tracks of it
	types    map[uint16]byte  // stream_type by PID
	pcr      int64            // 27 MHz
	gap      int64            // the largest between two PCR
	dts      map[uint16]ticks // last, by PID
	pts      map[uint16][]ticks
	jumps    int // discontinuity_indicator
	problems []string
}

func newTSCheck() *tsCheck {
	return &tsCheck{cc: map[uint16]int{}, version: -1, types: map[uint16]byte{}, dts: map[uint16]ticks{}, pts: map[uint16][]ticks{}}
}

func (c *tsCheck) problem(format string, args ...any) {
	c.problems = append(c.problems, fmt.Sprintf(format, args...))
}

func (c *tsCheck) read(b []byte) {
	if len(b)%packetSize != 0 {
		c.problem("%d bytes are not whole packets", len(b))
		return
	}
	for ; len(b) > 0; b = b[packetSize:] {
		p := packet(b[:packetSize])
		if p[0] != syncByte {
			c.problem("a packet begins with %#x", p[0])
			return
		}
		c.packet(p)
	}
}

func (c *tsCheck) packet(p packet) {
	pid, payload := p.pid(), p.payload()
	a := p.adaptation()
	jump := len(a) > 0 && a[0]&0x80 != 0
	if jump {
		c.jumps++
	}
	if last, ok := c.cc[pid]; ok && !jump {
		want := last
		if payload != nil {
			want = (last + 1) & 15
		}
		if p.continuity() != want {
			c.problem("PID %#x: continuity counter %d, want %d", pid, p.continuity(), want)
		}
	}
	c.cc[pid] = p.continuity()
	switch {
	case payload == nil && pid != outPCR:
	case pid == patPID || pid == outPMT:
		c.section(pid, payload)
	case pid == outPCR:
		base := int64(a[1])<<25 | int64(a[2])<<17 | int64(a[3])<<9 | int64(a[4])<<1 | int64(a[5])>>7
		pcr := base*300 + int64(a[5]&1)<<8 + int64(a[6])
		if c.pcr > 0 {
			if pcr <= c.pcr {
				c.problem("PCR %d after %d", pcr, c.pcr)
			}
			c.gap = max(c.gap, pcr-c.pcr)
		}
		c.pcr = pcr
	case c.types[pid] == 0:
		c.problem("PID %#x is not in the PMT", pid)
	case len(a) > 0 && a[0]&0x18 != 0:
		c.problem("PID %#x: a feed's PCR", pid)
	case p.unitStart():
		pts, dts := timestamps(payload)
		if pts == nil {
			break
		}
		if dts == nil {
			dts = pts
		}
		if d := readTime(dts); c.dts[pid] != 0 && signed33(d-c.dts[pid]) <= 0 {
			c.problem("PID %#x: DTS %d after %d", pid, d, c.dts[pid])
		}
		c.dts[pid] = readTime(dts)
		c.pts[pid] = append(c.pts[pid], readTime(pts))
	}
}

func (c *tsCheck) section(pid uint16, payload []byte) {
	n := 3 + int(binary.BigEndian.Uint16(payload[2:])&0xfff)
	s := payload[1 : 1+n]
	if crc32MPEG(s) != 0 {
		c.problem("PID %#x: wrong CRC", pid)
	}
	if pid == patPID {
		return
	}
	version, tracks := int(s[5]>>1&31), bytes.Clone(s[12:n-4])
	switch {
	case version == c.version && !bytes.Equal(tracks, c.pmt):
		c.problem("the PMT changed, its version did not")
	case version != c.version && c.version >= 0:
		c.versions++
		if bytes.Equal(tracks, c.pmt) {
			c.problem("the version of the PMT changed, its content did not")
		}
	}
	c.version, c.pmt = version, tracks
	clear(c.types)
	for i := 0; i+5 <= len(tracks); i += 5 + int(binary.BigEndian.Uint16(tracks[i+3:])&0xfff) {
		c.types[binary.BigEndian.Uint16(tracks[i+1:])&0x1fff] = tracks[i]
	}
}

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
	b := &bench{mux: newMux(), t: t, at: time.Now(), sub: newSubscriber(raw, time.Minute), pubs: map[string]*publisher{}}
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
		b.feeds[name].publish(p, m)
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

// camera makes the frames of an ffmpeg that begins at 1.4 s.
type camera struct {
	tsMaker
	pid  uint16
	kind int // stream_type
	id   byte
	n    int
	gop  int
	step ticks
	size int
}

func newCamera() *camera {
	return &camera{pid: 0x100, kind: 1, id: 0xe0, gop: 12, step: 3600, size: 2000}
}

func newMicrophone() *camera {
	return &camera{pid: 0x100, kind: 3, id: 0xc0, gop: 1, step: 2160, size: 576}
}

func (c *camera) next() []byte {
	c.Reset()
	c.tables(int(c.pid), c.kind)
	c.frame(pes{pid: c.pid, id: c.id, key: c.n%c.gop == 0, pts: 126000 + ticks(c.n)*c.step, size: c.size, length: c.id != 0xe0})
	c.n++
	return c.Bytes()
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
	late := newSubscriber(raw, time.Minute)
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

// onePES is one packet that begins a PES.
func onePES(pts ticks) []byte {
	var m tsMaker
	m.frame(pes{pid: 0x100, id: 0xe0, pts: pts, size: 10})
	return m.Bytes()
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

// FuzzStream: whatever two feeds post, what comes out is a valid program.
func FuzzStream(f *testing.F) {
	v, a := newCamera(), newMicrophone()
	f.Add(slices.Concat(bytes.Clone(v.next()), v.next()), slices.Concat(bytes.Clone(a.next()), a.next()))
	f.Add(testClip(2, 100), testClip(3, 500))
	f.Fuzz(func(t *testing.T, one, two []byte) {
		b := &bench{mux: newMux(), t: t, at: time.Now().Add(time.Second), sub: newSubscriber(raw, time.Minute), pubs: map[string]*publisher{}}
		b.setStream("stream/x", []string{"one", "two"}, true)
		b.join("stream/x", b.sub)
		for name, in := range map[string][]byte{"one": one, "two": two} {
			p := &publisher{interrupt: func() {}}
			fd := b.attach(name, p)
			all, _ := frames(bytes.NewReader(in))
			for i, m := range all {
				m.at, m.first = b.at.Add(time.Duration(i)*40*time.Millisecond), i == 0
				fd.publish(p, m)
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
			if !tables.add(p) && p.pid() != outPCR && tables.program.find(p.pid()) == nil {
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
	f := &feed{}
	x.arrange([]*feed{f}, time.Now())
	s := x.source(f)
	x.follow(s, all[0].info.program)
	dst := make([]byte, len(chunk))
	b.SetBytes(int64(len(chunk)))
	b.ReportAllocs()
	var remuxing, copying time.Duration
	for b.Loop() {
		start := time.Now()
		x.remux(s, chunk, second)
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
