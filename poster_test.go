// A poster of broken clocks: a clip that ffmpeg made is posted in real time, with
// its timestamps changed on the way. What a relay that is not ours gets of it is
// held to the rules of the clock, and decoded by ffmpeg; players show it.

package main

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"
)

// brokenClock is a publisher whose clock goes wrong at a time, the fault. Times are
// in seconds since it began.
type brokenClock struct {
	name           string
	clip           string
	picture, sound says                       // nil: the truth
	sent           func(t, f float64) float64 // when what is of t is sent, with the fault at f; nil: at t
	then           string                     // the clip of another publisher, who comes at the fault; "": nobody does
	patience       float64                    // after the fault, in which it may be off; 0: 5 s
	lost           float64                    // the part of all PES that may be left out
	always         bool                       // the fault is there from the start
	squeezed       bool                       // frames of sound overlap a little while it is slewed back, which ffmpeg may note
	usual          bool                       // it is not one of the long ones
}

// says is what a clock shows at t, of the PES n since the fault at f.
type says func(t, f float64, n int) float64

// after is a clock that is right before the fault.
func after(shows says) says {
	return func(t, f float64, n int) float64 {
		if n < 0 {
			return t
		}
		return shows(t, f, n)
	}
}

func stepsBy(by float64) says { return after(func(t, _ float64, _ int) float64 { return t + by }) }

func runsAt(rate float64) says {
	return after(func(t, f float64, _ int) float64 { return f + (t-f)*rate })
}

// strays is a clock that is off for some PES in a row, the first of each so many.
func strays(by float64, inRow, each int) says {
	return after(func(t, _ float64, n int) float64 {
		if n%each < inRow {
			return t + by
		}
		return t
	})
}

// wraps is a clock that begins anew: the clips begin at 1.4 s.
func wraps(t, f float64, _ int) float64 { return t + float64(wrap)/float64(second) - 1.4 - f }

// Clips of a publisher, and brokenClocks that they are posted with.
const (
	liveClip    = "h264 and aac"
	swappedClip = "aac and h264"
	mpegClip    = "mpeg1video and mp2 in long PES"
	reorderClip = "h264 with B-frames and aac"
	soundClip   = "mp2 in long PES"
)

var brokenClips = map[string][][]string{
	liveClip:    {testPicture("160x120"), noise, liveCodec, {"-g", "25"}, aacCodec},
	swappedClip: {testPicture("160x120"), noise, {"-map", "1", "-map", "0"}, liveCodec, {"-g", "25"}, aacCodec},
	mpegClip:    {testPicture("160x120"), noise, videoCodec, mp2Codec},
	reorderClip: {testPicture("160x120"), noise, h264Codec, aacCodec},
	soundClip:   {noise, mp2Codec},
}

// noise is sound of which no PES is like another.
var noise = []string{"-f", "lavfi", "-i", "anoisesrc=sample_rate=48000:amplitude=0.2"}

var brokenClocks = func() (all []brokenClock) {
	const once = 1 << 30
	all = []brokenClock{
		{name: "honest", clip: liveClip},
		{name: "honest, B-frames", clip: reorderClip},
		{name: "honest, long PES", clip: mpegClip},
		{name: "one picture -9800 s", clip: liveClip, picture: strays(-9800, 1, once), usual: true},
		{name: "one picture +37600 s", clip: mpegClip, picture: strays(37600, 1, once)},
		{name: "one picture +1 s", clip: liveClip, picture: strays(1, 1, once)},
		{name: "one sound -9800 s", clip: mpegClip, sound: strays(-9800, 1, once)},
		{name: "two pictures -9800 s", clip: liveClip, picture: strays(-9800, 2, once)},
		{name: "two sounds +9800 s", clip: liveClip, sound: strays(9800, 2, once)},
		{name: "every tenth picture -9800 s", clip: reorderClip, picture: strays(-9800, 1, 10)},
		{name: "both step 20 s", clip: mpegClip, picture: stepsBy(20), sound: stepsBy(20)},
		{name: "both step -20 s", clip: reorderClip, picture: stepsBy(-20), sound: stepsBy(-20)},
		{name: "both step 40000 s", clip: liveClip, picture: stepsBy(40000), sound: stepsBy(40000)},
		{name: "picture says 25 and gives 30", clip: liveClip, picture: runsAt(30. / 25), usual: true},
		{name: "picture says 25 and gives 21", clip: liveClip, picture: runsAt(21. / 25)},
		{name: "picture says 25 and gives 15", clip: mpegClip, picture: runsAt(15. / 25)},
		{name: "picture 40 % slow, B-frames", clip: reorderClip, picture: runsAt(0.6)},
		{name: "sound 20 % fast", clip: mpegClip, sound: runsAt(1.2), squeezed: true},
		{name: "sound 3 % slow", clip: liveClip, sound: runsAt(0.97), patience: 15},
		{name: "both ten times too fast", clip: liveClip, picture: runsAt(10), sound: runsAt(10)},
		{name: "both ten times too fast, long PES", clip: mpegClip, picture: runsAt(10), sound: runsAt(10), squeezed: true},
		{name: "both ten times too slow", clip: liveClip, picture: runsAt(0.1), sound: runsAt(0.1), lost: 0.1},
		{name: "the timestamps wrap", clip: reorderClip, picture: wraps, sound: wraps},
		{name: "sound alone steps 5 s", clip: soundClip, sound: stepsBy(5)},
		{name: "sound alone steps -1.5 s", clip: soundClip, sound: stepsBy(-1.5)},
		{name: "a stall of 6 s", clip: liveClip, sent: func(t, f float64) float64 {
			if f <= t && t < f+6 {
				return f + 6
			}
			return t
		}, patience: 8, lost: 0.25},
		{name: "a restart", clip: liveClip, then: liveClip},
		{name: "a restart, long PES", clip: mpegClip, then: mpegClip},
		{name: "a restart of sound alone", clip: soundClip, then: soundClip},
		{name: "a restart with the tracks swapped", clip: liveClip, then: swappedClip, usual: true},
		{name: "H.264 after MPEG-1", clip: mpegClip, then: liveClip},
	}
	for _, by := range []float64{0.3, 1.5, 5, 9, -0.3, -0.5, -1.5, -5, -9} {
		all = append(all, brokenClock{name: fmt.Sprintf("sound steps %+g s", by), clip: liveClip, sound: stepsBy(by), usual: by == 5},
			brokenClock{name: fmt.Sprintf("sound steps %+g s, long PES", by), clip: mpegClip, sound: stepsBy(by)})
	}
	for _, by := range []float64{0.5, 5, -0.5, -5} {
		all = append(all, brokenClock{name: fmt.Sprintf("picture steps %+g s", by), clip: reorderClip, picture: stepsBy(by)})
	}
	for _, b := range []brokenClock{
		{name: "picture says 25 and gives 30", clip: liveClip, picture: runsAt(30. / 25)},
		{name: "picture says 25 and gives 21", clip: mpegClip, picture: runsAt(21. / 25)},
		{name: "picture says 25 and gives 15", clip: reorderClip, picture: runsAt(15. / 25)},
		{name: "sound 20 % fast", clip: liveClip, sound: runsAt(1.2)},
		{name: "both ten times too fast", clip: liveClip, picture: runsAt(10), sound: runsAt(10)},
	} {
		b.name, b.always = b.name+", from the start", true
		all = append(all, b)
	}
	return all
}()

// clipPES is a PES packet of a clip or of a recording. Its bytes but for the header
// tell which it is.
type clipPES struct {
	unit
	from     int // packet after the PES before it: of PSI, if there is some
	pts, dts ticks
	ahead    float64 // of the PCR before it, in seconds
	sum      [sha256.Size]byte
}

func seconds(t ticks) float64 { return float64(t) / float64(second) }

// pesOfClip returns the PES packets of ts that have timestamps.
func pesOfClip(t *testing.T, ts []byte) (all []clipPES) {
	t.Helper()
	list, err := units(ts)
	if err != nil {
		t.Fatal(err)
	}
	end := 0 // of the one before
	for _, u := range list {
		pts, dts := timestamps(tsPayload(tsPacket(ts, u.first)))
		if pts == nil {
			continue
		}
		if dts == nil {
			dts = pts
		}
		p := clipPES{unit: u, from: end, pts: readTime(pts), dts: readTime(dts)}
		end = u.last + 1
		var es []byte
		for i := u.first; i <= u.last; i++ {
			if q := tsPacket(ts, i); tsPID(q) == u.pid {
				es = append(es, tsPayload(q)...)
			}
		}
		p.sum = sha256.Sum256(es[9+int(es[8]):])
		all = append(all, p)
	}
	return all
}

// sentPES is a PES packet as it is posted.
type sentPES struct {
	clipPES
	bytes []byte  // with the packets before it
	again bool    // by the second publisher
	at    float64 // when it is sent
	truth float64 // its PTS on the clock of the test
}

// schedule returns what is posted of clips until the end.
func (b *brokenClock) schedule(t *testing.T, clips map[string][]byte, fault, lasts float64) (all []sentPES) {
	t.Helper()
	const pause = 0.4 // between two publishers
	add := func(clip string, begin, end float64) {
		ts := bytes.Clone(clips[clip])
		list := pesOfClip(t, ts)
		first, now, next := list[0].dts, 0.0, 0
		since := map[bool]int{} // by kind: PES after the fault
		for _, p := range list {
			of := seconds(p.dts - first)
			if now = max(now, of); begin+now >= end {
				break
			}
			s := sentPES{clipPES: p, again: begin > 0, at: begin + now, truth: begin + seconds(p.pts-first)}
			shows := b.sound
			if p.video {
				shows = b.picture
			}
			if shows != nil {
				n := -1
				if of >= fault {
					n = since[p.video]
					since[p.video]++
				}
				move := func(by ticks) ticks {
					return (first + toTick(shows(seconds(by-first), fault, n))) & (wrap - 1)
				}
				pts, dts := timestamps(tsPayload(tsPacket(ts, p.first)))
				if writeTime(pts, move(p.pts)); dts != nil {
					writeTime(dts, move(p.dts))
				}
			}
			if b.sent != nil {
				s.at = b.sent(s.at, fault)
			}
			s.bytes = ts[next : (p.last+1)*packetSize]
			next = (p.last + 1) * packetSize
			all = append(all, s)
		}
	}
	if b.then == "" {
		add(b.clip, 0, lasts)
	} else {
		add(b.clip, 0, fault)
		add(b.then, fault+pause, lasts)
	}
	return all
}

var errKilled = errors.New("killed")

// post posts all to a URL. The first of two publishers is killed.
func (b *brokenClock) post(url string, all []sentPES, start time.Time) error {
	var posts sync.WaitGroup
	defer posts.Wait()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	failed := make(chan error, 2)
	publish := func() *io.PipeWriter {
		body, in := io.Pipe()
		posts.Go(func() {
			a, err := client.Post(url, "video/mp2t", body)
			if err == nil {
				a.Body.Close()
				if a.StatusCode != http.StatusOK {
					err = errors.New(a.Status)
				}
			}
			body.CloseWithError(cmp.Or(err, io.EOF))
			failed <- err
		})
		return in
	}
	in := publish()
	for i, s := range all {
		if i > 0 && s.again && !all[i-1].again {
			in.CloseWithError(errKilled)
			if err := <-failed; !errors.Is(err, errKilled) {
				return fmt.Errorf("the first post ended with %w", err)
			}
			in = publish()
		}
		time.Sleep(time.Until(start.Add(time.Duration(s.at * float64(time.Second)))))
		if _, err := in.Write(s.bytes); err != nil {
			return err
		}
	}
	in.Close()
	return <-failed
}

// TestBrokenClocks: whatever the clock of a publisher does, the stream of it keeps
// the rules, its picture and sound are soon where they were, and ffmpeg decodes it
// all without a complaint.
func TestBrokenClocks(t *testing.T) {
	notUnderRace(t)
	t.Parallel()
	fault, lasts := scaled(4., 4., 9.), scaled(10., 10., 30.)
	clocks := slices.Clone(brokenClocks)
	if !*long {
		clocks = slices.DeleteFunc(clocks, func(b brokenClock) bool { return !b.usual })
	}
	clips := makeClips(t, clocks, lasts)
	relay := startRelay(t, "127.0.0.1:0")
	v := startVW(t)
	type row struct {
		brokenClock
		all []sentPES
		err error
	}
	rows := make([]*row, len(clocks))
	for n, b := range clocks {
		begins := fault
		if b.always {
			begins = 0
		}
		rows[n] = &row{brokenClock: b, all: b.schedule(t, clips, begins, lasts)}
		v.call(t, http.StatusOK, "POST", "/api/streams", fmt.Sprintf(`{"stream":"stream/%d","feeds":["feed%[1]d"]}`, n))
		v.send(t, fmt.Sprint(n), fmt.Sprintf("stream/%d", n), fmt.Sprintf("ws://%s/in/%d", relay.addr, n))
	}
	var posts sync.WaitGroup
	start := time.Now()
	for i, r := range rows {
		posts.Go(func() { r.err = r.post(feedURL(v.addr, i), r.all, start) })
	}
	posts.Wait()
	time.Sleep(300 * time.Millisecond) // what was posted last arrives
	for i, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			if r.err != nil {
				t.Fatal(r.err)
			}
			r.check(t, relay.record(i+1), r.all, fault)
		})
	}
}

// makeClips returns what ffmpeg makes for clocks.
func makeClips(t *testing.T, clocks []brokenClock, lasts float64) map[string][]byte {
	t.Helper()
	clips := make(map[string][]byte)
	for _, b := range clocks {
		for _, name := range []string{b.clip, b.then} {
			if args, ok := brokenClips[name]; ok && clips[name] == nil {
				clips[name] = runFFmpeg(t, slices.Concat(args...), []string{"-t", fmt.Sprint(lasts), "-"})
			}
		}
	}
	return clips
}

// ownTimes makes ffmpeg keep timestamps as they are. By itself it rounds them to the
// pictures a second that the encoder declared, and complains where two become one.
var ownTimes = []string{"-enc_time_base:v", "-1"}

// check holds the recording of what was sent to what is promised.
func (b *brokenClock) check(t *testing.T, name string, sent []sentPES, fault float64) {
	t.Helper()
	ts, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(t.ArtifactDir(), "record.ts"), ts, 0o600); err != nil { // to look at with go test -artifacts
		t.Fatal(err)
	}
	strict := newTSCheck()
	strict.read(ts)
	for _, p := range strict.problems {
		t.Error(p)
	}
	got := pesOfClip(t, ts)
	measureAhead(ts, got)
	least, most := math.Inf(1), math.Inf(-1)
	for _, p := range got {
		least, most = min(least, p.ahead), max(most, p.ahead)
	}
	if least < -2.5 || most > 2 {
		t.Errorf("DTS are %.2f to %.2f s ahead of the PCR, want -2.5 to 2", least, most)
	}
	patience := cmp.Or(b.patience, 5)
	text := ""
	for _, video := range []bool{true, false} {
		m := match(sent, got, video)
		if m.posted == 0 {
			continue
		}
		off, gap, later := m.off(fault, fault+patience)
		if b.always {
			off = m.offPCR(fault + patience)
		}
		if off > 0.25 {
			t.Errorf("video %v: %.3f s off, want 0.25 at most", video, off)
		}
		if later > 0.5 {
			t.Errorf("video %v: in the end, PTS are %.2f s apart, want 0.5 at most", video, later)
		}
		missing := m.posted - len(m.pairs)
		atEnd := 1 // the last PES of a body that broke off
		if float64(missing) > b.lost*float64(m.posted)+float64(atEnd) {
			t.Errorf("video %v: %d of %d PES are missing", video, missing, m.posted)
		}
		text += fmt.Sprintf("; video %v: %.3f s off, PTS %.2f s apart at most, %d of %d missing", video, off, gap, missing, m.posted)
	}
	t.Logf("DTS %.2f to %.2f s ahead of the PCR%s", least, most, text)
	if !b.squeezed {
		decodes(t, name, ownTimes...)
	}
	if b.then == "" {
		return
	}
	second := slices.IndexFunc(got, func(p clipPES) bool {
		return slices.ContainsFunc(sent, func(s sentPES) bool { return s.again && s.sum == p.sum })
	})
	if second < 0 {
		t.Fatal("got nothing of the second publisher")
	}
	name = filepath.Join(t.TempDir(), "second.ts")
	if err := os.WriteFile(name, ts[got[second].from*packetSize:], 0o600); err != nil {
		t.Fatal(err)
	}
	decodes(t, name, ownTimes...)
}

// measureAhead sets by how much the DTS in ts are ahead of the PCR before them.
func measureAhead(ts []byte, all []clipPES) {
	pcr, at := ticks(-1), 0
	for i, p := range all {
		for ; at < p.first; at++ {
			if q := tsPacket(ts, at); q[3]&0x20 != 0 && q[4] >= 7 && q[5]&0x10 != 0 {
				pcr = ticks(q[6])<<25 | ticks(q[7])<<17 | ticks(q[8])<<9 | ticks(q[9])<<1 | ticks(q[10])>>7
			}
		}
		all[i].ahead = seconds(signed33(p.dts - pcr))
	}
}

// matched are the PES of a kind that were posted and came.
type matched struct {
	posted int
	pairs  []pair
}

// pair is a PES when it was sent, and how its PTS went out.
type pair struct{ at, truth, out, ahead float64 }

func match(sent []sentPES, got []clipPES, video bool) (m matched) {
	got = slices.DeleteFunc(slices.Clone(got), func(p clipPES) bool { return p.video != video })
	for _, s := range sent {
		if s.video != video {
			continue
		}
		m.posted++
		if i := slices.IndexFunc(got, func(p clipPES) bool { return p.sum == s.sum }); i >= 0 {
			m.pairs = append(m.pairs, pair{s.at, s.truth, seconds(got[i].pts), got[i].ahead})
			got = got[i+1:]
		}
	}
	return m
}

// off returns by how many seconds what came after a time is from where it was
// before the fault, and how far apart PTS are: at most, and after that time.
func (m matched) off(fault, from float64) (off, gap, later float64) {
	var usual []float64
	for _, p := range m.pairs {
		if fault-2 < p.at && p.at < fault {
			usual = append(usual, p.out-p.truth)
		}
	}
	shown := slices.SortedFunc(slices.Values(m.pairs), func(a, b pair) int { return cmp.Compare(a.out, b.out) })
	if len(usual) == 0 || m.pairs[len(m.pairs)-1].at <= from {
		return math.Inf(1), 0, 0
	}
	slices.Sort(usual)
	for i, p := range shown {
		apart := 0.0
		if i > 0 {
			apart = p.out - shown[i-1].out
		}
		gap = max(gap, apart)
		if p.at > from {
			later = max(later, apart)
			off = max(off, math.Abs(p.out-p.truth-usual[len(usual)/2]))
		}
	}
	return off, gap, later
}

// offPCR returns by how many seconds what came after a time is from where an honest
// clock has it, in the median: there is no time before the fault to compare with.
func (m matched) offPCR(from float64) float64 {
	var ahead []float64
	for _, p := range m.pairs {
		if p.at > from {
			ahead = append(ahead, p.ahead)
		}
	}
	slices.Sort(ahead)
	return math.Abs(ahead[len(ahead)/2] - seconds(lead))
}

// TestBrokenClocksPlayed: mpegts.js and JSMpeg show all pictures of broken clocks,
// without a pause of a second. It is one of the long ones.
func TestBrokenClocksPlayed(t *testing.T) {
	if !*long {
		return
	}
	const fault, lasts = 8., 20.
	v := startVW(t, "VW_PLAYER="+npmPlayers(t))
	b := pageBrowser{startBrowser(t)}
	b.open(t, v.url+"/")
	const once = 1 << 30
	var clocks []brokenClock
	for _, clip := range []string{liveClip, mpegClip} { // the one is for mpegts.js, the other for JSMpeg
		clocks = append(clocks,
			brokenClock{name: "one picture -9800 s", clip: clip, picture: strays(-9800, 1, once)},
			brokenClock{name: "sound steps 5 s", clip: clip, sound: stepsBy(5)},
			brokenClock{name: "picture says 25 and gives 30", clip: clip, picture: runsAt(30. / 25)})
	}
	clips := makeClips(t, clocks, lasts)
	for i, c := range clocks {
		t.Run(c.clip+", "+c.name, func(t *testing.T) {
			name := fmt.Sprintf("stream/%d", i)
			v.call(t, http.StatusOK, "POST", "/api/streams", fmt.Sprintf(`{"stream":%q,"feeds":["feed%d"]}`, name, i))
			all := c.schedule(t, clips, fault, lasts)
			posted := make(chan error, 1)
			start := time.Now()
			go func() { posted <- c.post(feedURL(v.addr, i), all, start) }()
			b.until(t, "live", part(row("feeds", fmt.Sprint("feed", i)), "state")+".textContent")
			b.tap(t, part(row("streams", name), "watch"))
			b.until(t, name, "watching?.name")
			b.until(t, "true", "watching.pictures > 25")
			b.tap(t, "document.querySelector('#preview .sound')")
			b.js(t, `clearInterval(window.shown?.timer), window.shown = {watching, longest: 0, n: 0},
				shown.count = () => {
					const q = watching.element?.getVideoPlaybackQuality();
					return q ? q.totalVideoFrames - q.droppedVideoFrames : watching.pictures;
				},
				shown.n = shown.from = shown.count(), shown.at = shown.began = performance.now(),
				shown.look = () => {
					const n = shown.count(), now = performance.now();
					shown.longest = Math.max(shown.longest, now - shown.at);
					if (n !== shown.n) [shown.n, shown.at] = [n, now];
				},
				shown.timer = setInterval(shown.look, 50)`)
			time.Sleep(time.Until(start.Add((lasts - 1) * time.Second)))
			var got struct {
				Pictures, Took, Longest float64
				Same                    bool
			}
			b.evaluate(t, `(shown.look(), {pictures: shown.n - shown.from, took: (performance.now() - shown.began) / 1000,
				longest: shown.longest / 1000, same: watching === shown.watching})`, &got)
			t.Logf("in %.1f s: %.0f pictures, at most %.2f s without one", got.Took, got.Pictures, got.Longest)
			if got.Took < lasts/2 || got.Pictures < 0.9*25*got.Took || got.Longest > 1 || !got.Same {
				t.Errorf("got %+v, want 25 pictures/s of one player, and none shown for 1 s", got)
			}
			if err := <-posted; err != nil {
				t.Error(err)
			}
		})
	}
	b.quiet(t)
}
