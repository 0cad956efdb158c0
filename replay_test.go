package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/websocket"
)

// recording is what ffmpeg made, as messages that come when their first picture
// is due.
type recording struct {
	messages []*message
	due      []time.Duration
}

// record returns what ffmpeg makes with the arguments of two pictures and a
// sound, of which the mapping chooses. It is made once.
func record(t *testing.T, args ...string) recording {
	t.Helper()
	ffmpeg := needs(t, "ffmpeg")
	once, _ := recordings.LoadOrStore(strings.Join(args, " "), sync.OnceValues(func() (recording, error) { return newRecording(ffmpeg, args) }))
	r, err := once.(func() (recording, error))()
	if err != nil {
		t.Fatal("ffmpeg: ", err)
	}
	return r
}

var recordings sync.Map // functions that make them, by arguments

func newRecording(ffmpeg string, args []string) (r recording, err error) {
	all := []string{
		"-v", "error", "-f", "lavfi", "-i", "testsrc2=size=160x120:rate=25", "-f", "lavfi", "-i", "testsrc=size=160x120:rate=25",
		"-f", "lavfi", "-i", "sine=sample_rate=48000", "-t", "9",
	}
	out, err := exec.Command(ffmpeg, slices.Concat(all, args, []string{"-muxdelay", "0.001", "-f", "mpegts", "-"})...).Output()
	if err != nil {
		return r, err
	}
	if r.messages, err = frames(splitUp(out, packetSize)); err != nil {
		return r, err
	}
	first, due := ticks(-1), time.Duration(0)
	for _, m := range r.messages {
		for p := packet(m.payload()); len(p) > 0; p = p[packetSize:] {
			pts, dts := timestamps(p[:packetSize].payload())
			if dts == nil {
				dts = pts
			}
			if !p.unitStart() || dts == nil {
				continue
			}
			if first < 0 {
				first = readTime(dts)
			}
			due = max(due, time.Duration(readTime(dts)-first)*100_000/9)
		}
		r.due = append(r.due, due)
	}
	return r, nil
}

// message returns a copy of a message, as one that comes now.
func (r recording) message(i int, now time.Time) *message {
	m := newMessage(r.messages[i].payload(), now, r.messages[i].info)
	m.first = i == 0
	return m
}

// play publishes the recording to feed f of stream/x of b in virtual time, and
// calls at after each message with its number.
func (r recording) play(b *bench, at func(i int)) {
	start := time.Now()
	b.attach("f", &publisher{interrupt: func() {}})
	for i := range r.messages {
		time.Sleep(time.Until(start.Add(r.due[i])))
		now := time.Now()
		b.feeds["f"].publish(b.feeds["f"].pub, r.message(i, now), b.now(now))
		at(i)
	}
}

// takeAll returns what is queued for s.
func (b *bench) takeAll(s *subscriber) []byte {
	was := b.sub
	defer func() { b.sub = was }()
	b.sub = s
	return b.got()
}

// replayCases are what encoders make, and whether a stream of it is replayed.
var replayCases = []struct {
	name string
	args []string
	want bool
}{
	{"x264 defaults", []string{"-map", "0", "-c:v", "libx264", "-preset", "fast"}, true},
	{"x264 without B-frames", []string{"-map", "0", "-c:v", "libx264", "-bf", "0"}, true},
	{"x265", []string{"-map", "0", "-c:v", "libx265", "-x265-params", "log-level=none"}, true},
	{"MPEG-1", []string{"-map", "0", "-c:v", "mpeg1video", "-g", "12"}, true},
	{"MPEG-1 with B-frames", []string{"-map", "0", "-c:v", "mpeg1video", "-g", "12", "-bf", "2"}, true},
	{"MPEG-1 with a long group", []string{"-map", "0", "-c:v", "mpeg1video", "-g", "100"}, false},
	{"picture and sound", []string{"-map", "0", "-map", "2", "-c:v", "libx264", "-c:a", "mp2"}, true},
	{"two videos", []string{"-map", "0", "-map", "1", "-c:v", "libx264"}, true},
}

// TestReplay: a reader that joins a stream between two keyframes has the pictures
// since the last one at once, squeezed, and from then on what everybody has.
func TestReplay(t *testing.T) {
	for _, tt := range replayCases {
		t.Run(tt.name, func(t *testing.T) {
			r := record(t, tt.args...)
			var replayed, live []byte
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t, "stream/x", "f")
				late := newSubscriber(raw, time.Minute, nil)
				late.wantReplay()
				join := len(r.messages) * 2 / 3
				r.play(b, func(i int) {
					if i == join {
						b.join("stream/x", late)
						replayed = b.takeAll(late)
					}
				})
				live = b.takeAll(late)
				sum(t, late)
				all := b.takeAll(b.sub)
				checkReplay(t, b, slices.Concat(replayed, live), replayed, all, tt.want)
			})
			if tt.want {
				decodesFirst(t, slices.Concat(replayed, live))
			}
		})
	}
}

// witness keeps what a reader got, and when.
type witness struct {
	name  string
	asked time.Time

	mu   sync.Mutex
	all  []byte
	ends []int // in all, of each piece
	at   []time.Time
}

func (w *witness) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.all = append(w.all, b...)
	w.ends, w.at = append(w.ends, len(w.all)), append(w.at, time.Now())
	return len(b), nil
}

// pictures returns when each picture was there, by its PID and its bytes
// without the PES header, and when the first was.
func (w *witness) pictures() (at map[string]time.Time, first time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	type picture struct {
		es []byte
		at time.Time
	}
	open := make(map[uint16]*picture)
	at = make(map[string]time.Time)
	done := func(pid uint16) {
		p := open[pid]
		if p == nil {
			return
		}
		at[fmt.Sprintf("%x %x", pid, sha256.Sum256(p.es))] = p.at
		if first.IsZero() || p.at.Before(first) {
			first = p.at
		}
	}
	for i := 0; i+packetSize <= len(w.all); i += packetSize {
		p := packet(w.all[i : i+packetSize])
		payload := p.payload()
		if p.unitStart() && len(payload) > 8 && bytes.HasPrefix(payload, []byte{0, 0, 1}) && payload[3]&0xf0 == 0xe0 {
			done(p.pid())
			open[p.pid()] = &picture{}
			payload = payload[9+int(payload[8]):]
		}
		if o := open[p.pid()]; o != nil {
			piece, _ := slices.BinarySearch(w.ends, i+packetSize) // that has its end
			o.es, o.at = append(o.es, payload...), w.at[piece]
		}
	}
	for pid := range open {
		done(pid)
	}
	return at, first
}

// readers read streams of a vw until they are ended.
type readers struct {
	t   *testing.T
	v   *vwProcess
	ctx context.Context
	sync.WaitGroup
}

// get reads on GET /ts.
func (r *readers) get(stream string) *witness {
	w := &witness{name: "GET /ts", asked: time.Now()}
	r.Go(func() {
		request, err := http.NewRequestWithContext(r.ctx, "GET", r.v.url+"/ts/"+stream, nil)
		if err != nil {
			r.t.Error(err)
			return
		}
		client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		if a, err := client.Do(request); err == nil {
			io.Copy(w, a.Body)
			a.Body.Close()
		}
	})
	return w
}

// view reads on the websocket /out, as the preview does.
func (r *readers) view(stream string) *witness {
	w := &witness{name: "/out", asked: time.Now()}
	c, err := websocket.Dial("ws://"+r.v.addr+"/out/"+stream, "", r.v.url)
	if err != nil {
		r.t.Fatal(err)
	}
	r.Go(func() {
		defer context.AfterFunc(r.ctx, func() { c.Close() })()
		for b := []byte(nil); websocket.Message.Receive(c, &b) == nil; {
			w.Write(b)
		}
	})
	return w
}

// send reads as a relay.
func (r *readers) send(id int, stream string) *witness {
	w := &witness{name: "a destination"}
	relay := &chaosRelay{t: r.t, see: func(b []byte) { w.Write(b) }}
	relay.start()
	w.asked = time.Now()
	r.v.call(r.t, 200, "POST", "/api/destinations", fmt.Sprintf(`{"id":%d,"stream":%q,"destination":"ws://%s"}`, id, stream, relay.addr))
	return w
}

// TestReplayWays: whichever way a reader comes, it has a picture within 0.4 s,
// and is within 1 s as live as one that was there from the start.
func TestReplayWays(t *testing.T) {
	notUnderRace(t)
	t.Parallel()
	all := make([]recording, len(replayCases))
	for i, tt := range replayCases {
		all[i] = record(t, tt.args...)
	}
	ctx, cancel := context.WithCancel(t.Context())
	readers := readers{t: t, v: startVW(t), ctx: ctx}
	var publishing sync.WaitGroup
	begin := time.Now().Add(time.Second)
	early, late := make([]*witness, len(all)), make([][]*witness, len(all))
	for i, r := range all {
		feed := fmt.Sprint("f", i)
		readers.v.call(t, 200, "POST", "/api/streams", fmt.Sprintf(`{"stream":"stream/%s","feeds":[%q]}`, feed, feed))
		early[i] = readers.get("stream/" + feed)
		post := startPost(t, readers.v.addr, feed)
		publishing.Go(func() {
			for j, m := range r.messages {
				time.Sleep(time.Until(begin.Add(r.due[j])))
				post.write(t, m.payload())
			}
			post.end(t)
		})
	}
	time.Sleep(time.Until(begin.Add(6 * time.Second)))
	for i := range all {
		stream := fmt.Sprint("stream/f", i)
		late[i] = []*witness{readers.get(stream), readers.view(stream), readers.send(i, stream)}
	}
	publishing.Wait()
	time.Sleep(100 * time.Millisecond) // what was published last arrives
	cancel()
	readers.Wait()
	for i, tt := range replayCases {
		t.Run(tt.name, func(t *testing.T) {
			for _, w := range late[i] {
				w.compare(t, early[i], tt.want)
			}
			decodesFirst(t, late[i][0].all)
		})
	}
}

// compare fails the test unless w, who came late, had a picture at once, if one
// is replayed, was soon as live as early, and got one program.
func (w *witness) compare(t *testing.T, early *witness, replays bool) {
	t.Helper()
	was, _ := early.pictures()
	is, first := w.pictures()
	var behind, newest time.Duration // of what came live, of what was replayed
	live, replayed := 0, 0
	for picture, at := range is {
		then, ok := was[picture]
		switch {
		case !ok:
			t.Errorf("%s: a picture that the early reader did not get", w.name)
		case then.After(w.asked.Add(time.Second)):
			behind = max(behind, at.Sub(then))
			live++
		case then.Before(w.asked):
			newest = max(newest, at.Sub(w.asked))
			replayed++
		}
	}
	t.Logf("%s: a picture after %v; %d were replayed, the last after %v; then at most %v behind",
		w.name, first.Sub(w.asked), replayed, newest, behind)
	if got := first.Sub(w.asked); replays && (got > 400*time.Millisecond || replayed == 0 || live < 25 || newest > 400*time.Millisecond) {
		t.Errorf("%s: got a picture after %v, the last of %d replayed after %v, and %d live ones; want some at once, and live ones", w.name, got, replayed, newest, live)
	}
	if replayed > 0 != replays || behind > 200*time.Millisecond {
		t.Errorf("%s: got %d replayed pictures, want some: %v; live ones were up to %v behind the early reader", w.name, replayed, replays, behind)
	}
	check := newTSCheck()
	check.read(w.all)
	if len(check.problems) > 0 {
		t.Errorf("%s: got %d problems: %q", w.name, len(check.problems), check.problems[:min(5, len(check.problems))])
	}
}

// checkReplay compares what a late reader got with what one had from the start.
func checkReplay(t *testing.T, b *bench, got, replayed, all []byte, want bool) {
	t.Helper()
	check, whole := newTSCheck(), newTSCheck()
	check.read(got)
	whole.read(all)
	if len(check.problems) > 0 {
		t.Errorf("got %d problems: %q", len(check.problems), check.problems[:min(5, len(check.problems))])
	}
	for _, src := range b.streams["stream/x"].remux.sources {
		for _, v := range src.videos() {
			first := pesTimes(replayed, v.out)
			if (len(first) > 0) != want {
				t.Fatalf("PID %#x: got %d pictures on joining, want some: %v", v.out, len(first), want)
			}
			if !want {
				continue
			}
			if !firstOn(replayed, v.out).randomAccess() {
				t.Errorf("PID %#x: the first picture is no keyframe", v.out)
			}
			span := slices.Max(first) - slices.Min(first)
			if most := squeezeInto + 4*second/25; span > most {
				t.Errorf("PID %#x: the replay spans %d ticks, want %d at most", v.out, span, most)
			}
			if n := len(slices.Compact(slices.Sorted(slices.Values(first)))); n != len(first) {
				t.Errorf("PID %#x: %d pictures of %d have the same PTS", v.out, len(first)-n, len(first))
			}
			rest := pesTimes(got, v.out)[len(first):]
			if !slices.Equal(rest, whole.pts[v.out][len(whole.pts[v.out])-len(rest):]) {
				t.Errorf("PID %#x: what came live has other timestamps than for others", v.out)
			}
			total := len(whole.pts[v.out])
			t.Logf("PID %#x: %d pictures at once, then %d of %d", v.out, len(first), len(rest), total)
		}
	}
}

// firstOn returns the first packet of the first PES on a PID.
func firstOn(ts []byte, pid uint16) packet {
	for p := packet(only(ts, pid)); len(p) > 0; p = p[packetSize:] {
		if p.unitStart() {
			return p[:packetSize]
		}
	}
	return nullPacket
}

// decodesFirst fails the test unless ffmpeg decodes each picture of b, from its
// first byte on, without a complaint.
func decodesFirst(t *testing.T, b []byte) {
	t.Helper()
	name := filepath.Join(t.TempDir(), "late.ts")
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(needs(t, "ffmpeg"), "-v", "error", "-i", name, "-map", "0", "-enc_time_base:v", "1:90000", "-f", "framecrc", "-")
	var says strings.Builder
	cmd.Stderr = &says
	out, err := cmd.Output()
	if err != nil || says.Len() > 0 {
		t.Errorf("ffmpeg decodes with %v and says %.1000q, want nothing", err, says.String())
	}
	decoded, sent := 0, 0
	for _, found := range regexp.MustCompile(`(?m)^#media_type (\d+): video$`).FindAllStringSubmatch(string(out), -1) {
		decoded += strings.Count(string(out), "\n"+found[1]+", ")
	}
	shown := make(map[uint16]ticks) // the first picture of each video
	for p := packet(b); len(p) > 0; p = p[packetSize:] {
		pts, _ := timestamps(p[:packetSize].payload())
		if pts == nil || !p.unitStart() || p[:packetSize].payload()[3] != 0xe0 {
			continue
		}
		if _, ok := shown[p.pid()]; !ok {
			shown[p.pid()] = readTime(pts)
		}
		if readTime(pts) >= shown[p.pid()] { // else it lacks the pictures before the keyframe
			sent++
		}
	}
	if decoded != sent || sent == 0 {
		t.Errorf("ffmpeg decodes %d pictures of %d", decoded, sent)
	}
}

// TestReplayNever: nothing is replayed from before a rule or a mute, of a video
// that stopped, or to a reader that is not new.
func TestReplayNever(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(b *bench)
		want bool
	}{
		{"nothing happens", func(*bench) {}, true},
		{"sound is muted", func(b *bench) { b.setMute(muteSound) }, false},
		{"sound is muted and unmuted", func(b *bench) { b.setMute(muteSound); b.setMute(0) }, false},
		{"picture is muted and unmuted", func(b *bench) { b.setMute(mutePicture); b.setMute(0) }, false},
		{"the feed is taken out and put back", func(b *bench) {
			b.setStream("stream/x", nil, true)
			b.setStream("stream/x", []string{"f"}, true)
		}, false},
		{"another feed is added", func(b *bench) { b.setStream("stream/x", []string{"f", "g"}, true) }, false},
		{"the video stops", func(*bench) { time.Sleep(1100 * time.Millisecond) }, false},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := newStudio(t)
			s.play(18)
			tt.do(s.bench)
			for _, isNew := range []bool{true, false} {
				late := newSubscriber(raw, time.Minute, nil)
				if isNew {
					late.wantReplay()
				}
				s.join("stream/x", late)
				if n := len(pesTimes(s.takeAll(late), 0x100)); n > 0 != (tt.want && isNew) {
					t.Errorf("%s, reader new %v: got %d pictures on joining", tt.name, isNew, n)
				}
			}
		})
	}
}

// TestReplayPrivate: of 1,000 readers that join around mutes, lifts and changes of
// the rule, none gets a picture that was captured before the last of them.
func TestReplayPrivate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStudio(t)
		random := rand.New(rand.NewPCG(17, 0))
		s.play(5)
		feeds, muted := []string{"f"}, kindSet(0)
		changes := []func(){
			func() { muted ^= muteSound; s.setMute(muted) },
			func() { muted ^= mutePicture; s.setMute(muted) },
			func() { muted = 0; s.setMute(muted) },
			func() { // the feed leaves or comes back
				feeds = map[bool][]string{true: {"f"}, false: nil}[len(feeds) == 0]
				s.setStream("stream/x", feeds, true)
			},
			func() { // another one comes or leaves
				feeds = map[bool][]string{true: {"f", "g"}, false: {"f"}}[len(feeds) < 2]
				s.setStream("stream/x", feeds, true)
			},
		}
		capture := func() []byte {
			b := s.record()
			return numbered(b, s.n)
		}
		play := func(frames int) {
			for range frames {
				s.arrive(capture())
			}
		}
		oldest, replayed, joins := 0, 0, 0
		for joins < 1000 {
			play(random.IntN(20))
			b := capture() // and then there is a change
			if change := random.IntN(len(changes) + 1); change < len(changes) {
				was := muted
				changes[change]()
				oldest = s.n
				if was&^muted&mutePicture != 0 {
					oldest++ // it was captured before the lift
				}
			}
			s.arrive(b)
			play(random.IntN(20))
			for range 4 {
				late := newSubscriber(raw, time.Minute, nil)
				late.wantReplay()
				s.join("stream/x", late)
				for _, n := range numbers(s.takeAll(late)) {
					replayed++
					if n < oldest || muted&mutePicture != 0 || len(feeds) == 0 {
						t.Fatalf("reader %d got picture %d, want none before %d; muted %v, feeds %q", joins, n, oldest, muted, feeds)
					}
				}
				s.leave("stream/x", late)
				joins++
				play(1)
			}
		}
		if replayed < 1000 {
			t.Errorf("got %d pictures in all, want more", replayed)
		}
		t.Logf("%d readers got %d pictures", joins, replayed)
	})
}

// numbered writes a number into the end of the picture in b.
func numbered(b []byte, n int) []byte {
	for i := len(b) - packetSize; ; i -= packetSize {
		if p := packet(b[i : i+packetSize]); p.pid() == 0x100 {
			binary.BigEndian.PutUint32(p[packetSize-4:], uint32(n))
			return b
		}
	}
}

// numbers returns the numbers of the pictures in ts.
func numbers(ts []byte) (all []int) {
	for p := packet(ts); len(p) > 0; p = p[packetSize:] {
		if p.pid() == 0x100 && !p.unitStart() && p[:packetSize].payload() != nil && len(p[:packetSize].adaptation()) > 0 { // stuffing: the last of a picture
			all = append(all, int(binary.BigEndian.Uint32(p[packetSize-4:])))
		}
	}
	return all
}

// TestReplayShared: readers that join together share what was made for them, and
// the store has its bounds and is freed with its stream.
func TestReplayShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStudio(t)
		s.play(18)
		var subs []*subscriber
		for range 100 {
			late := newSubscriber(raw, time.Minute, nil)
			late.wantReplay()
			s.join("stream/x", late)
			subs = append(subs, late)
		}
		for _, late := range subs {
			if n, first := len(late.items), subs[0]; n < 2 || late.items[n-1].message != first.items[n-1].message {
				t.Fatalf("got %d items, want the replay of the first reader", n)
			}
		}
		r := &s.streams["stream/x"].remux.sources[0].replay
		for i := range 3000 {
			m := newMessage(make([]byte, 20*packetSize), time.Now().Add(time.Duration(i)*time.Millisecond), chunkInfo{key: i%2500 == 0, hasVideo: true})
			r.add(m, &outTrack{track: track{0x100, typeH264, nil}}, 1)
			m.release()
			if r.bytes > maxReplay || len(r.kept) > 0 && r.bytes == 0 {
				t.Fatalf("message %d: %d bytes are kept in %d messages", i, r.bytes, len(r.kept))
			}
			if r.bytes == 0 {
				break // without a keyframe nothing is kept
			}
		}
		s.setStream("stream/x", nil, true)
		if r.bytes != 0 || r.made != nil {
			t.Errorf("%d bytes are kept after the feed was taken out", r.bytes)
		}
	})
}

// TestReplayMemory: what streams keep for readers to come stays within its bound
// for each of them, 1,000 readers that join within a second share what is made
// for them, and it is all freed with the streams.
func TestReplayMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := scaled(4, 8, 64)
		b := newBench(t, "stream/x")
		var cameras []*camera
		picture := func(feeds int) {
			time.Sleep(40 * time.Millisecond)
			b.at = time.Now()
			for i, c := range cameras[:feeds] {
				b.post(fmt.Sprint(i), c.next())
			}
		}
		before := heapMB()
		for i := range n {
			c := newCamera()
			c.kind, c.size, c.gop = typeH264, 40_000, 500 // 8 Mbit/s
			cameras = append(cameras, c)
			b.setStream(fmt.Sprint("stream/", i), []string{fmt.Sprint(i)}, true)
		}
		for range 70 {
			picture(n)
		}
		kept := &b.streams["stream/0"].remux.sources[0].replay
		full := heapMB() - before
		if most := 1.25 * mb(maxReplay) * float64(n); kept.bytes < maxReplay/2 || full > most {
			t.Errorf("%d streams keep %.1f MB, of which the first has %.1f MB; want %.1f MB at most", n, full, mb(kept.bytes), most)
		}
		var readers []*subscriber
		for len(readers) < 1000 {
			for range 40 {
				s := newSubscriber(raw, time.Minute, nil)
				s.wantReplay()
				b.join("stream/0", s)
				readers = append(readers, s)
			}
			picture(1)
		}
		joined := heapMB() - before - full
		if most := 1.25 * mb(maxReplay) * 25; joined > most {
			t.Errorf("1,000 readers that take nothing hold %.1f MB, want %.1f MB at most", joined, most)
		}
		for _, s := range readers {
			if len(s.items) < 50 {
				t.Fatalf("a reader got %d messages, want a replay", len(s.items))
			}
			b.leave("stream/0", s)
			s.end()
		}
		for range 20 {
			picture(1)
		}
		if kept.bytes != 0 {
			t.Errorf("%.1f MB are kept of a group of pictures that is longer than is kept", mb(kept.bytes))
		}
		for i := range n {
			b.setStream(fmt.Sprint("stream/", i), nil, false)
		}
		left := heapMB() - before
		if left > 4 {
			t.Errorf("%.1f MB are held after the streams were deleted, want 4 MB at most", left)
		}
		t.Logf("%d streams of 8 Mbit/s: %.1f MB; 1,000 readers that take nothing: %.1f MB more; without the streams: %.1f MB", n, full, joined, left)
	})
}

// heapMB returns how much memory is in use.
func heapMB() float64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // what a pool keeps goes at the second
	runtime.ReadMemStats(&m)
	return mb(int(m.HeapAlloc))
}

// TestReplayNarrow: a reader that does not take its replay within its age bound
// loses it, and goes on as one that got none.
func TestReplayNarrow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, tt := range []struct {
			kbit int
			want bool
		}{{50_000, true}, {200, false}} {
			s := newStudio(t)
			s.play(20)
			late := newSubscriber(raw, 500*time.Millisecond, nil)
			late.wantReplay()
			s.join("stream/x", late)
			var got []byte
			for range 20 {
				room := tt.kbit * 5 // bytes in 40 ms
				for room > 0 {
					n := 0
					for _, b := range late.take(nil, 4096, true, time.Now()) {
						b = b[:min(len(b), room-n)]
						got, n = append(got, b...), n+len(b)
					}
					late.wrote(n)
					if room -= n; n == 0 {
						break
					}
				}
				s.play(1)
			}
			sum(t, late)
			gated, age := late.counters.dropped[dropLag]+late.counters.dropped[dropGate], late.age(time.Now())
			if (gated == 0) != tt.want || age > 500*time.Millisecond {
				t.Errorf("%d kbit/s: %d messages dropped, the oldest is %v old", tt.kbit, gated, age)
			}
			if tt.want && len(pesTimes(got, 0x100)) < 25 {
				t.Errorf("%d kbit/s: got %d pictures", tt.kbit, len(pesTimes(got, 0x100)))
			}
		}
	})
}

// TestSqueeze: the timestamps of a replay keep their order, rise by a tick at
// least, and what is from the newest DTS on stays.
func TestSqueeze(t *testing.T) {
	for _, tt := range []struct {
		name string
		dts  []ticks
		want []ticks
	}{
		{"none", nil, nil},
		{"one", []ticks{100}, []ticks{100}},
		{"short", []ticks{0, 3600, 7200}, []ticks{0, 3600, 7200}},
		{"long", []ticks{0, 450000, 900000}, []ticks{891000, 895500, 900000}},
		{"dense", []ticks{0, 899998, 899999, 900000}, []ticks{891000, 899998, 899999, 900000}},
	} {
		got := squeeze(slices.Clone(tt.dts)).dts
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s: got %v, want %v", tt.name, got, tt.want)
		}
	}
}

// TestReplayDestination: the first connection of a destination has a picture at
// once; one that comes back goes on from the next keyframe.
func TestReplayDestination(t *testing.T) {
	rec := record(t, "-map", "0", "-c:v", "libx264", "-g", "100", "-keyint_min", "100")
	r, ctx, tasks := realRules(t, io.Discard)
	if _, err := r.setStream(streamRule{"stream/x", []string{"f"}}); err != nil {
		t.Fatal(err)
	}
	var conn atomic.Pointer[net.Conn]
	dial := r.dialer.dial
	r.dialer.dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := dial(ctx, network, address)
		conn.Store(&c)
		return c, err
	}
	var pictures atomic.Int64 // since the connection was opened
	relay := &chaosRelay{t: t, see: func(b []byte) { pictures.Add(int64(len(pesTimes(b, 0x100)))) }}
	relay.start()
	begun := time.Now()
	tasks.Go(func() {
		p := &publisher{interrupt: func() {}}
		f := r.mux.attach("f", p)
		defer r.mux.detach(f, p)
		for i := range rec.messages {
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Until(begun.Add(rec.due[i]))):
			}
			now := time.Now()
			f.publish(p, rec.message(i, now), r.mux.now(now))
		}
	})
	time.Sleep(2 * time.Second) // two more to the next keyframe
	asked := time.Now()
	r.to(t, "0", "stream/x", "ws://"+relay.addr)
	waitFor(t, "the first picture", func() bool { return pictures.Load() > 0 })
	first := time.Since(asked)
	waitFor(t, "those since the keyframe", func() bool { return pictures.Load() >= 20 })
	if all := time.Since(asked); all > 400*time.Millisecond {
		t.Errorf("got the pictures since the keyframe after %v, the first after %v, want 400 ms at most", all, first)
	}
	pictures.Store(-1 << 40)
	(*conn.Load()).Close()
	waitFor(t, "the second connection", func() bool { return relay.conns.Load() == 2 })
	pictures.Store(0)
	waitFor(t, "its first picture", func() bool { return pictures.Load() > 0 })
	if at := time.Since(begun); at < 3900*time.Millisecond {
		t.Errorf("a connection that came back had a picture %v after the start, want it to wait for the keyframe at 4 s", at)
	}
	t.Logf("the first picture came after %v", first)
}

// sharedLink is four relays behind one narrow link, and what they got.
type sharedLink struct {
	addrs [4]string
	first [4]time.Time // when the first picture came, replayed or live
	at    [4][]time.Time
	ages  [4][]time.Duration // of the pictures since the three joined

	mu     sync.Mutex
	born   []time.Time // of each picture
	joined int         // the first picture that was made after that
}

// listen makes the relays listen, behind a link of so many kbit/s.
func (u *sharedLink) listen(t *testing.T, kbit int) {
	var ports []int
	for i := range u.addrs {
		l, err := net.Listen("tcp", "192.0.2.1:0")
		if err != nil {
			t.Fatal(err)
		}
		u.addrs[i] = l.Addr().String()
		serveEach(t, l, func(conn net.Conn) { serveRelay(conn, func(b []byte) { u.arrive(i, numbers(b)) }) })
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	narrow(t, kbit, 200*time.Millisecond, ports...)
}

func (u *sharedLink) arrive(reader int, pictures []int) {
	now := time.Now()
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, n := range pictures {
		if u.first[reader].IsZero() {
			u.first[reader] = now
		}
		if u.joined > 0 && n >= u.joined {
			u.at[reader] = append(u.at[reader], now)
			u.ages[reader] = append(u.ages[reader], now.Sub(u.born[n]))
		}
	}
}

// film publishes 25 pictures/s of so many bytes until ctx is done, with a keyframe
// every 10 s.
func (u *sharedLink) film(ctx context.Context, x *mux, size int) {
	c := newCamera()
	c.kind, c.gop, c.size = typeH264, 250, size
	pr, pw := io.Pipe()
	defer pw.Close()
	var publishing sync.WaitGroup
	defer publishing.Wait()
	publishing.Go(func() { x.publish("f", &publisher{interrupt: func() {}}, pr) })
	tick := time.NewTicker(40 * time.Millisecond)
	defer tick.Stop()
	for ctx.Err() == nil {
		b := numbered(c.next(), len(u.born))
		u.mu.Lock()
		u.born = append(u.born, time.Now())
		u.mu.Unlock()
		pw.Write(b)
		<-tick.C
	}
	pw.Close()
}

// linkFigures are what a relay got since others joined; who joined, since the next
// keyframe.
type linkFigures struct {
	missing            int // live pictures
	first, oldest, gap time.Duration
}

// join publishes a stream of which four fill most of a link of so many kbit/s to a
// relay, and 8 s after a keyframe to three more.
func (u *sharedLink) join(t *testing.T, kbit int, replays bool) (all [4]linkFigures) {
	u.listen(t, kbit)
	r, ctx, tasks := realRules(t, io.Discard)
	ctx, cancel := context.WithCancel(ctx)
	defer tasks.Wait()
	defer cancel()
	if _, err := r.setStream(streamRule{"stream/x", []string{"f"}}); err != nil {
		t.Fatal(err)
	}
	r.to(t, "0", "stream/x", "ws://"+u.addrs[0])
	tasks.Go(func() { u.film(ctx, r.mux, kbit*1000/8/25/4*7/10) })
	time.Sleep(8 * time.Second)
	if !replays {
		st := r.mux.streams["stream/x"]
		st.mu.Lock()
		st.forgetReplays()
		st.mu.Unlock()
	}
	begun := time.Now()
	u.mu.Lock()
	u.joined = len(u.born)
	u.mu.Unlock()
	for i, addr := range u.addrs[1:] {
		r.to(t, id(fmt.Sprint(i+1)), "stream/x", "ws://"+addr)
	}
	time.Sleep(7 * time.Second)
	u.mu.Lock()
	defer u.mu.Unlock()
	for i := range all {
		from := u.joined
		if i > 0 {
			from = 250 // a keyframe; a busy machine makes fewer than 25 a second
		}
		f, last := &all[i], u.born[from]
		f.first, f.missing = u.first[i].Sub(begun), len(u.born)-from-len(u.at[i])
		for j, at := range u.at[i] {
			f.oldest, f.gap, last = max(f.oldest, u.ages[i][j]), max(f.gap, at.Sub(last)), at
		}
	}
	return all
}

// TestReplayUplink: where an uplink is too narrow for replays, nobody is worse off
// than without them: who was live stays live, and who joined is at the next
// keyframe.
func TestReplayUplink(t *testing.T) {
	if !*long {
		t.Skip("it takes a minute; with -long")
	}
	if !inNamespace(t) {
		return
	}
	for _, kbit := range []int{1500, 5000} {
		without, with := new(sharedLink).join(t, kbit, false), new(sharedLink).join(t, kbit, true)
		for i, f := range with {
			t.Logf("%d kbit/s, reader %d, without replays and with: %+v, %+v", kbit, i, without[i], f)
			if f.missing > without[i].missing+3 || f.gap > without[i].gap+200*time.Millisecond || f.oldest > 400*time.Millisecond {
				t.Errorf("%d kbit/s, reader %d: got %+v, want it no worse than without replays, %+v", kbit, i, f, without[i])
			}
		}
	}
}

// TestReplayHeld: of a replay, no more is written than as much again as the other
// side has acknowledged, or a first part.
func TestReplayHeld(t *testing.T) {
	const parts = 20
	for _, tt := range []struct {
		written int // parts
		unacked int // bytes
		want    bool
	}{
		{0, 0, false},
		{0, replayPart / 2, false}, // of the handshake
		{1, replayPart, true},
		{1, replayPart / 2, false},
		{10, 6 * replayPart, true},
		{10, 4 * replayPart, false},
		{parts, 100 * replayPart, false}, // it is all written
	} {
		s, at := newSubscriber(raw, time.Minute, nil), time.Now()
		var replay []*message
		for range parts {
			replay = append(replay, newReplayMessage(make([]byte, replayPart/packetSize*packetSize), "f", nil, at, 1))
		}
		s.replay("f", replay, at)
		for range tt.written {
			n := 0
			for _, b := range s.take(nil, 1<<20, false, at) {
				n += len(b)
			}
			if n > replayPart {
				t.Fatalf("got %d bytes to write, want %d at most", n, replayPart)
			}
			s.wrote(n)
		}
		if got := s.isReplaying() && s.holdsReplay(tt.unacked, at); got != tt.want {
			t.Errorf("%d parts are written, %d bytes not acknowledged: held %v, want %v", tt.written, tt.unacked, got, tt.want)
		}
	}
}
