// A stream is a valid program: ffmpeg, an analyser in another language and
// JSMpeg in Chromium look at what a relay that is not ours got of a stream.
//
// What was posted is kept by a tap between ffmpeg and vw, and judged by the
// same tools; testdata/tscheck.py shares no line with vw.

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"image"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Codecs as publishers use them, each with its container.
var (
	mp3Codec  = []string{"-f", "mpegts", "-codec:a", "libmp3lame", "-b:a", "128k"} // with the default muxdelay
	mp2Codec  = []string{"-f", "mpegts", "-codec:a", "mp2", "-b:a", "128k"}
	aacCodec  = []string{"-f", "mpegts", "-codec:a", "aac", "-b:a", "96k", "-muxdelay", "0.001"}
	h264Codec = []string{"-f", "mpegts", "-codec:v", "libx264", "-preset", "veryfast", "-bf", "2", "-g", "25", "-b:v", "500k"}
	liveCodec = []string{"-f", "mpegts", "-codec:v", "libx264", "-preset", "ultrafast", "-tune", "zerolatency", "-g", "50", "-b:v", "500k"}
)

func testPicture(size string) []string {
	return []string{"-f", "lavfi", "-i", "testsrc2=rate=25:size=" + size}
}

func testTone(hertz int) []string {
	return []string{"-f", "lavfi", "-i", fmt.Sprintf("sine=sample_rate=48000:frequency=%d", hertz)}
}

// TestProgramPairs: tracks of several ffmpegs come out as one program that has
// every frame of each, with every byte of it but the timestamps.
func TestProgramPairs(t *testing.T) {
	notUnderRace(t)
	t.Parallel()
	for _, tt := range []struct {
		name  string
		feeds [][]string // input and codec of each
		want  []string   // codecs, in the order of the program map
	}{
		{"mpeg1video and mp2", [][]string{slices.Concat(videoInput, videoCodec), slices.Concat(audioInput, audioCodec)},
			[]string{"mpeg1video", "mp2"}},
		{"mpeg1video and mp3", [][]string{slices.Concat(videoInput, videoCodec), slices.Concat(audioInput, mp3Codec)},
			[]string{"mpeg1video", "mp3"}},
		{"h264 and aac", [][]string{slices.Concat(testPicture("320x240"), h264Codec), slices.Concat(audioInput, aacCodec)},
			[]string{"h264", "aac"}},
		{"two videos", [][]string{slices.Concat(videoInput, videoCodec), slices.Concat(testPicture("320x240"), liveCodec)},
			[]string{"mpeg1video", "h264"}},
		{"video with audio, and another audio", [][]string{
			slices.Concat(testPicture("320x240"), audioInput, []string{"-codec:a", "mp2"}, videoCodec), slices.Concat(testTone(600), mp3Codec)},
			[]string{"mpeg1video", "mp2", "mp3"}},
		{"six feeds", [][]string{
			slices.Concat(testPicture("320x240"), videoCodec), slices.Concat(audioInput, audioCodec),
			slices.Concat(testPicture("160x120"), liveCodec), slices.Concat(testTone(600), aacCodec),
			slices.Concat(testPicture("160x128"), videoCodec), slices.Concat(testTone(700), mp2Codec)},
			[]string{"mpeg1video", "mp2", "h264", "aac", "mpeg1video", "mp2"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			duration := scaled(5, 5, 30)
			s := startStream(t, len(tt.feeds))
			var taps []*tap
			var ffmpegs []*process
			for i, args := range tt.feeds {
				taps = append(taps, startTap(t, s.vw.addr))
				ffmpegs = append(ffmpegs, startFFmpeg(t, pacedInputs(args), []string{"-t", strconv.Itoa(duration), feedURL(taps[i].addr, i)}))
			}
			var posted []programTrack
			for i := range tt.feeds {
				ffmpegs[i].endsItself(t, time.Duration(duration)*time.Second+startupTime)
				name := filepath.Join(t.TempDir(), "feed.ts")
				if err := os.WriteFile(name, taps[i].posted(t), 0o600); err != nil {
					t.Fatal(err)
				}
				posted = append(posted, programTracks(t, name)...)
			}
			if len(posted) != len(tt.want) {
				t.Fatalf("ffmpeg posted %d tracks, want %d", len(posted), len(tt.want))
			}
			c := s.await(t, func(c programCheck) error {
				for i, tr := range c.tracks() {
					if i >= len(posted) || tr.PES < posted[i].PES {
						return fmt.Errorf("track %d: got %d PES", i, tr.PES)
					}
				}
				if len(c.tracks()) < len(posted) {
					return fmt.Errorf("got %d tracks, want %d", len(c.tracks()), len(posted))
				}
				return nil
			})
			c.valid(t)
			if got := len(c.PMTs); got > len(tt.feeds) {
				t.Errorf("got %d program maps, want one more with each of %d feeds at most", got, len(tt.feeds))
			}
			decodes(t, s.record())
			for i, got := range programTracks(t, s.record()) {
				if i >= len(posted) {
					t.Errorf("track %d: got %s, want none", i, got.codec)
					continue
				}
				want := posted[i]
				if got.codec != tt.want[i] || want.codec != tt.want[i] {
					t.Errorf("track %d: got %s of %s, want %s", i, got.codec, want.codec, tt.want[i])
				}
				if got.frames != want.frames || got.frames < duration*20 {
					t.Errorf("track %d, %s: decoded %d frames, of the feed alone %d", i, got.codec, got.frames, want.frames)
				}
				if got.PES != want.PES || got.PESHash != want.PESHash {
					t.Errorf("track %d, %s: got %d PES of sum %.8s, want %d of %.8s", i, got.codec, got.PES, got.PESHash, want.PES, want.PESHash)
				}
				if got.DelayHash != want.DelayHash {
					t.Errorf("track %d, %s: PTS - DTS changed", i, got.codec)
				}
				if n := len(got.Discontinuities); n != 1 {
					t.Errorf("track %d, %s: got %d discontinuity_indicators, want the one at its begin", i, got.codec, n)
				}
				t.Logf("track %d, %s: %d frames, %d PES, lasts %.1f ms longer than posted, DTS ahead of the PCR by %.0f to %.0f ms",
					i, got.codec, got.frames, got.PES, got.span()-want.span(), got.Ahead[0], got.Ahead[1])
			}
		})
	}
}

// pacedInputs is args with each input read in real time.
func pacedInputs(args []string) (paced []string) {
	for i, a := range args {
		if a == "-f" && args[i+1] == "lavfi" {
			paced = append(paced, realTime...)
		}
		paced = append(paced, a)
	}
	return paced
}

func feedURL(addr string, feed int) string { return fmt.Sprintf("http://%s/ts/feed%d", addr, feed) }

// TestProgramAVOffset: what two ffmpegs, started seconds apart, saw and heard
// at the same moment of the wall clock is together in the stream.
//
// Not parallel: the moments are those at which ffmpeg, which must not wait for
// its turn, makes a frame.
func TestProgramAVOffset(t *testing.T) {
	apart := scaled(3*time.Second, 3*time.Second, 7*time.Second)
	duration := scaled(9*time.Second, 9*time.Second, time.Minute)
	const most = 60.0 // ms
	// Both make them in the first 200 ms of each second.
	flash := []string{"-re", "-f", "lavfi", "-i", "color=black:size=320x240:rate=50",
		"-vf", "drawbox=color=white:t=fill:enable='lt(mod(time(0),1),0.2)'"}
	beep := []string{"-re", "-f", "lavfi", "-i", "sine=frequency=1000:sample_rate=48000:samples_per_frame=256",
		"-af", "volume=eval=frame:volume='lt(mod(time(0),1),0.2)'"}
	type offset struct {
		name       string
		audioFirst bool
		video      []string
		audio      []string
	}
	cases := []offset{
		{"mpeg1video and mp2", false, []string{"-f", "mpegts", "-codec:v", "mpeg1video", "-b:v", "500k", "-bf", "0", "-g", "12"}, audioCodec},
		{"h264 and aac", false, liveCodec, aacCodec},
	}
	if *long {
		cases = append(cases, offset{"mp2 before mpeg1video", true, cases[0].video, cases[0].audio})
	}
	for _, tt := range cases {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := startStream(t, 2)
			first, second := slices.Concat(flash, tt.video, []string{feedURL(s.vw.addr, 0)}), slices.Concat(beep, tt.audio, []string{feedURL(s.vw.addr, 1)})
			if tt.audioFirst {
				first, second = second, first
			}
			ffmpegs := []*process{startFFmpeg(t, first)}
			time.Sleep(apart)
			ffmpegs = append(ffmpegs, startFFmpeg(t, second))
			time.Sleep(duration)
			for _, p := range ffmpegs {
				p.stop(t)
			}
			s.await(t, func(programCheck) error { return nil }).valid(t)
			flashes, video := onsets(t, s.record(), "v", "signalstats,metadata=print:key=lavfi.signalstats.YAVG:file=-", 120)
			beeps, audio := onsets(t, s.record(), "a", "asetnsamples=n=120,"+ // 2.5 ms
				"astats=metadata=1:reset=1:measure_perchannel=none:measure_overall=RMS_level,ametadata=print:file=-", -30)
			if len(flashes) == 0 || len(beeps) == 0 {
				t.Fatalf("got %d flashes and %d beeps", len(flashes), len(beeps))
			}
			// At each end, one may have been made without the other.
			from, to := max(video[0], audio[0])+0.1, min(video[1], audio[1])-0.1
			var offsets, off []float64
			for _, at := range flashes {
				if at < from || at > to {
					continue
				}
				near := slices.MinFunc(beeps, func(a, b float64) int { return cmp.Compare(math.Abs(a-at), math.Abs(b-at)) })
				offset := (near - at) * 1000
				offsets = append(offsets, offset)
				if math.Abs(offset) >= most {
					off = append(off, offset)
				}
			}
			// An ffmpeg that had to wait makes one too late, but not often.
			if len(off) > 1+len(offsets)/20 || len(off) > 0 && off[0] == offsets[0] {
				t.Errorf("of %d beeps, %d are %v ms or more off: %+.1f", len(offsets), len(off), most, off)
			}
			if want := int(duration.Seconds()) - 2; len(offsets) < want {
				t.Errorf("got %d flashes while both ran, want at least %d", len(offsets), want)
			}
			if n := len(offsets); n > 0 {
				sum := 0.0
				for _, o := range offsets {
					sum += o
				}
				t.Logf("%d flashes; beep after flash by %+.1f ms at first, %+.1f to %+.1f ms, mean %+.1f ms: %.0f",
					n, offsets[0], slices.Min(offsets), slices.Max(offsets), sum/float64(n), offsets)
			}
		})
	}
}

// onsets returns when the value that a filter prints of the video, "v", or the
// audio, "a", rises above a threshold, and the times of its first and last
// value; PTS in seconds.
func onsets(t *testing.T, name, kind, filter string, threshold float64) (at []float64, span [2]float64) {
	t.Helper()
	out, err := exec.Command(needs(t, "ffmpeg"), "-nostdin", "-v", "quiet", "-copyts", "-i", name,
		"-map", "0:"+kind, "-"+kind+"f", filter, "-f", "null", "-").Output()
	if err != nil {
		t.Fatalf("ffmpeg %s: %v", filter, err)
	}
	on, known, pts := false, false, 0.0
	for _, m := range regexp.MustCompile(`pts_time:([\d.]+)|(?:YAVG|Overall\.RMS_level)=(\S+)`).FindAllStringSubmatch(string(out), -1) {
		if m[1] != "" {
			pts, _ = strconv.ParseFloat(m[1], 64)
			if span[0] == 0 {
				span[0] = pts
			}
			span[1] = pts
			continue
		}
		v, err := strconv.ParseFloat(m[2], 64)
		now := err == nil && v > threshold // silence is -inf
		if now && !on && known {
			at = append(at, pts)
		}
		on, known = now, true
	}
	return at, span
}

// TestProgramChanges: through mutes, kills and returns the stream stays one
// valid program with every frame that was posted.
func TestProgramChanges(t *testing.T) {
	notUnderRace(t)
	t.Parallel()
	rounds := scaled(3, 3, 10)
	s := startStream(t, 2)
	inputs := [][]string{slices.Concat(realTime, videoInput, videoCodec), slices.Concat(realTime, audioInput, audioCodec)}
	ffmpegs, taps := make([]*process, 2), make([][]*tap, 2)
	begin := func(i int) {
		tp := startTap(t, s.vw.addr)
		taps[i] = append(taps[i], tp)
		ffmpegs[i] = startFFmpeg(t, inputs[i], []string{feedURL(tp.addr, i)})
	}
	flows := func(i int) { // 10 more frames of feed i arrive
		t.Helper()
		from := s.frames(t)[i]
		eventually(t, startupTime, func() error {
			if got := s.frames(t)[i] - from; got < 10 {
				return fmt.Errorf("feed %d: got %d more frames, want 10", i, got)
			}
			return nil
		})
	}
	begin(0)
	begin(1)
	flows(0)
	flows(1)
	for range rounds {
		s.rule(t, 0)
		flows(0)
		s.rule(t, 0, 1)
		flows(1)
		for i := range 2 {
			ffmpegs[i].kill(t)
			flows(1 - i)
			begin(i)
			flows(i)
		}
	}
	for _, p := range ffmpegs {
		p.stop(t)
	}
	posted := 0 // whole frames of video
	for _, tp := range taps[0] {
		posted += wholeFrames(t, tp)
	}
	c := s.await(t, func(c programCheck) error {
		if tr := c.tracks(); len(tr) != 2 || tr[0].PES < posted {
			return fmt.Errorf("got not yet all of %d frames", posted)
		}
		return nil
	})
	c.valid(t)
	video, audio := c.tracks()[0], c.tracks()[1]
	if video.PES != posted {
		t.Errorf("got %d frames of video, posted were %d", video.PES, posted)
	}
	if got := programTracks(t, s.record()); got[0].codec != "mpeg1video" || got[0].frames != posted || got[1].codec != "mp2" {
		t.Errorf("decoded %d frames of %s, and %s; posted were %d of mpeg1video, and mp2", got[0].frames, got[0].codec, got[1].codec, posted)
	}
	for name, tr := range map[string]programPID{"video": video, "audio": audio} {
		if len(tr.PTSBack) > 0 { // there are no B-frames
			t.Errorf("%s: PTS goes back at packets %d", name, tr.PTSBack)
		}
	}
	// At its begin, and at each return.
	if got, want := len(video.Discontinuities), 1+rounds; got != want {
		t.Errorf("video: got %d discontinuity_indicators, want %d", got, want)
	}
	if got, want := len(audio.Discontinuities), 1+2*rounds; got != want {
		t.Errorf("audio: got %d discontinuity_indicators, want %d", got, want)
	}
	// One map with both, then for each mute one without audio and the same again.
	full := slices.IndexFunc(c.PMTs, func(m programMap) bool { return len(m.Tracks) == 2 })
	if full < 0 || full > 1 {
		t.Fatalf("got program maps %v, want one with both tracks first or second", c.PMTs)
	}
	maps := c.PMTs[full:]
	if got, want := len(maps), 1+2*rounds; got != want {
		t.Errorf("got %d program maps, want %d", got, want)
	}
	for i, m := range maps {
		want := maps[0].Tracks
		if i%2 == 1 {
			want = want[:1]
		}
		if !slices.Equal(m.Tracks, want) {
			t.Errorf("program map %d: got %v, want %v", i, m.Tracks, want)
		}
		if want := (maps[0].Version + i) % 32; m.Version != want {
			t.Errorf("program map %d: got version %d, want %d", i, m.Version, want)
		}
	}
	decodes(t, s.record())
	t.Logf("%d rounds: %d frames of video posted, %d PES of audio, %d program maps", rounds, posted, audio.PES, len(maps))
}

// wholeFrames counts the frames of video of a post, which may have been broken
// off. Of the last one only stuffing tells that it is whole.
func wholeFrames(t *testing.T, tp *tap) int {
	t.Helper()
	select {
	case <-tp.done:
	case <-time.After(settleTime):
		t.Fatal("the post has not ended")
	}
	r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(tp.said.Bytes())))
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(r.Body)
	proper := err == nil
	n, whole := 0, true
	for ; len(b) >= 188; b = b[188:] {
		if pes := tsPayload(b); tsPID(b) == 0x100 && len(pes) > 0 {
			if b[1]&0x40 != 0 {
				n++
			}
			whole = proper || b[3]&0x20 != 0 && b[1]&0x40 == 0
		}
	}
	if !whole {
		n--
	}
	return n
}

// TestProgramPlayer: JSMpeg in a browser decodes picture and tone of a stream
// at their rates, and shows the picture.
func TestProgramPlayer(t *testing.T) {
	watch := scaled(10*time.Second, 10*time.Second, 30*time.Second)
	npmPlayers(t)
	v := startVW(t)
	v.call(t, http.StatusOK, "POST", "/api/streams", `{"stream":"stream/demo","feeds":["video0","audio0"]}`)
	ffmpegs := []*process{
		startFFmpeg(t, realTime, videoInput, videoCodec, []string{v.url + "/ts/video0"}),
		startFFmpeg(t, realTime, audioInput, audioCodec, []string{v.url + "/ts/audio0"}),
	}
	page := servePage(t, v)
	b := startBrowser(t)
	b.open(t, page+"/?stream/demo")

	type snapshot struct {
		Video, Audio, Ended, Width, Height int
		At                                 float64 // ms
	}
	look := func() (s snapshot) {
		t.Helper()
		b.evaluate(t, "snapshot()", &s)
		return s
	}
	var first snapshot
	eventually(t, startupTime, func() error {
		if first = look(); first.Video < 10 || first.Audio < 10 {
			return fmt.Errorf("decoded %+v", first)
		}
		return nil
	})
	pictures := []image.Image{b.screenshot(t, "first.png")}
	time.Sleep(watch)
	last := look()
	pictures = append(pictures, b.screenshot(t, "last.png"))

	seconds := (last.At - first.At) / 1000
	for _, tt := range []struct {
		name string
		got  int
		rate float64
	}{
		{"video", last.Video - first.Video, 25},
		{"audio", last.Audio - first.Audio, 48000. / 1152},
	} {
		want := tt.rate * seconds
		// What is under way at either end: less than half a second.
		if got := float64(tt.got); math.Abs(got-want) > tt.rate/2 {
			t.Errorf("%s: decoded %d frames in %.2f s, want about %.0f", tt.name, tt.got, seconds, want)
		}
		t.Logf("%s: decoded %d frames in %.2f s, %.2f a second, of %.2f", tt.name, tt.got, seconds, float64(tt.got)/seconds, tt.rate)
	}
	if last.Width != 640 || last.Height != 480 || last.Ended != 0 {
		t.Errorf("the player says %+v, want 640 by 480, and no end", last)
	}
	for _, p := range pictures {
		colours, brightness := looks(p)
		if colours < 20 || brightness < 40 || brightness > 215 {
			t.Errorf("the screenshot has %d colours and a brightness of %d, want a test picture", colours, brightness)
		}
		part := bars(p)
		if part < 0.7 { // 0.77 at least when ffmpeg decodes it
			t.Errorf("%.2f of the bars from red to cyan are as they should be, want at least 0.70", part)
		}
		t.Logf("screenshot: %d colours, brightness %d, %.2f of the bars", colours, brightness, part)
	}
	if d := difference(pictures[0], pictures[1]); d < 0.001 {
		t.Errorf("%.4f of the picture changed in %v, want a moving one", d, watch)
	}
	for _, p := range ffmpegs {
		p.stop(t)
	}
	// Whatever the console was told until the very end.
	look()
	for _, line := range b.console {
		t.Errorf("console: %s", line)
	}
}

// TestProgramPlayerMutes: JSMpeg and mpegts.js go on through ten mutes and lifts of
// the sound and of the picture, and what a relay recorded meanwhile decodes without a
// complaint. It is one of the long ones.
func TestProgramPlayerMutes(t *testing.T) {
	if !*long {
		return
	}
	npmPlayers(t)
	for _, tt := range []struct {
		name, page   string
		video, audio []string
	}{
		{"JSMpeg", "/", videoCodec, audioCodec},
		{"mpegts.js", "/mpegts.html", liveCodec, aacCodec},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := startStream(t, 2)
			ffmpegs := []*process{
				startFFmpeg(t, realTime, videoInput, tt.video, []string{feedURL(s.vw.addr, 0)}),
				startFFmpeg(t, realTime, audioInput, tt.audio, []string{feedURL(s.vw.addr, 1)}),
			}
			b := startBrowser(t)
			b.open(t, servePage(t, s.vw)+tt.page+"?stream/test")
			type snapshot struct{ Video, Audio, Ended int }
			look := func() (s snapshot) {
				t.Helper()
				b.evaluate(t, "snapshot()", &s)
				return s
			}
			goesOn := func(what string) { // both are decoded
				t.Helper()
				from := look()
				eventually(t, 15*time.Second, func() error {
					if got := look(); got.Video < from.Video+15 || got.Audio < from.Audio+15 || got.Ended != 0 {
						return fmt.Errorf("%s: decoded %+v since %+v", what, got, from)
					}
					return nil
				})
			}
			goesOn("at first")
			for i := range 10 {
				for _, kind := range []string{"audio", "video"} {
					s.vw.call(t, http.StatusOK, "PUT", "/api/mute", fmt.Sprintf(`{%q:true}`, kind))
					time.Sleep(rand.N(1500 * time.Millisecond))
					s.vw.call(t, http.StatusOK, "PUT", "/api/mute", fmt.Sprintf(`{%q:false}`, kind))
					goesOn(fmt.Sprintf("after mute %d of the %s", i, kind))
				}
			}
			for _, line := range b.console {
				t.Errorf("console: %s", line)
			}
			for _, p := range append(ffmpegs, b.process) {
				p.stop(t)
			}
			s.await(t, func(programCheck) error { return nil }).valid(t)
			decodes(t, s.record())
		})
	}
}

// servePage serves the player and, as if it were its own, what vw sends: the
// page and the websocket must be of one origin.
func servePage(t *testing.T, v *vwProcess) (addr string) {
	target, err := url.Parse(v.url)
	if err != nil {
		t.Fatal(err)
	}
	routes := http.NewServeMux()
	routes.Handle("/", http.FileServer(http.Dir("testdata/player")))
	routes.Handle("/out/", &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(target)
		r.Out.Host = r.In.Host
	}})
	s := httptest.NewServer(routes)
	t.Cleanup(s.Close)
	return s.URL
}

// TestProgramCheck: the analyser finds what is wrong.
func TestProgramCheck(t *testing.T) {
	t.Parallel()
	ts := runFFmpeg(t, videoInput, audioInput, threeSecs, []string{"-pat_period", "0.05", "-codec:a", "mp2"}, videoCodec, []string{"-"})
	var packets [][]byte
	for p := range slices.Chunk(ts, 188) {
		if tsPID(p) != 0x11 { // the SDT is in no program map
			packets = append(packets, p)
		}
	}
	if len(packets) < 500 {
		t.Fatalf("got %d packets of ffmpeg", len(packets))
	}
	const video, audio, pmt = 0x100, 0x101, 0x1000
	find := func(all [][]byte, from, pid int, ok func(p []byte) bool) int {
		for i := from; i < len(all); i++ {
			if tsPID(all[i]) == pid && ok(all[i]) {
				return i
			}
		}
		t.Fatalf("no packet of PID %#x", pid)
		return 0
	}
	starts := func(p []byte) bool { return p[1]&0x40 != 0 }
	inside := func(p []byte) bool { return p[1]&0x40 == 0 && p[3] == p[3]&0x0f|0x10 }
	hasPCR := func(p []byte) bool { return p[3]&0x20 != 0 && p[4] > 0 && p[5]&0x10 != 0 }
	// section changes the program map in a packet, and mends its CRC.
	section := func(p []byte, change func(s []byte)) {
		n := 3 + int(binary.BigEndian.Uint16(p[6:])&0x0fff)
		s := p[5 : 5+n]
		change(s)
		binary.BigEndian.PutUint32(s[n-4:], crc32MPEG(s[:n-4]))
	}
	fromMiddle := func(all [][]byte, change func(s []byte)) [][]byte {
		for _, p := range all[300:] {
			if tsPID(p) == pmt {
				section(p, change)
			}
		}
		return all
	}
	empty := func(pid, cc int, flags byte) []byte {
		p := bytes.Repeat([]byte{0xff}, 188)
		copy(p, []byte{0x47, byte(pid >> 8), byte(pid), 0x20 | byte(cc&15), 183, flags})
		return p
	}
	for _, tt := range []struct {
		name string
		harm func(all [][]byte) [][]byte
		want string // in an error; "": none
	}{
		{"nothing", func(all [][]byte) [][]byte { return all }, ""},
		{"packet lost", func(all [][]byte) [][]byte {
			i := find(all, 300, video, inside)
			return slices.Delete(all, i, i+1)
		}, "continuity at packet"},
		{"packet twice", func(all [][]byte) [][]byte {
			i := find(all, 300, video, inside)
			return slices.Insert(all, i, all[i])
		}, ""},
		{"packet three times", func(all [][]byte) [][]byte {
			i := find(all, 300, video, inside)
			return slices.Insert(all, i, all[i], all[i])
		}, "continuity at packet"},
		{"jump with discontinuity_indicator", func(all [][]byte) [][]byte {
			i := find(all, 300, audio, starts)
			for _, p := range all[i:] {
				if tsPID(p) == audio {
					p[3] = p[3]&0xf0 | (p[3]+5)&15
				}
			}
			return slices.Insert(all, i, empty(audio, int(all[i][3])-1, 0x80))
		}, ""},
		{"jump with an empty packet", func(all [][]byte) [][]byte {
			i := find(all, 300, audio, starts)
			for _, p := range all[i:] {
				if tsPID(p) == audio {
					p[3] = p[3]&0xf0 | (p[3]+5)&15
				}
			}
			return slices.Insert(all, i, empty(audio, int(all[i][3])-1, 0))
		}, "without payload"},
		{"program map damaged", func(all [][]byte) [][]byte {
			all[find(all, 300, pmt, starts)][20] ^= 1
			return all
		}, "CRC at packet"},
		{"version alone", func(all [][]byte) [][]byte {
			return fromMiddle(all, func(s []byte) { s[5] ^= 2 })
		}, "the content did not"},
		{"content alone", func(all [][]byte) [][]byte {
			return fromMiddle(all, func(s []byte) { s[12] = 0x1b })
		}, "the version did not"},
		{"version steps by two", func(all [][]byte) [][]byte {
			return fromMiddle(all, func(s []byte) { s[5] ^= 4; s[12] = 0x1b })
		}, "version 2 after 0"},
		{"PCR goes back", func(all [][]byte) [][]byte {
			i := find(all, 300, video, hasPCR)
			j := find(all, i+1, video, hasPCR)
			copy(all[j][6:12], all[i][6:12])
			return all
		}, "PCR goes back"},
		{"PCR rare", func(all [][]byte) [][]byte {
			n := 0
			for _, p := range all {
				if tsPID(p) == video && hasPCR(p) {
					if n++; n%4 != 0 {
						p[5] &^= 0x10
					}
				}
			}
			return all
		}, "PCR: "},
		{"PAT rare", func(all [][]byte) [][]byte {
			n := 0
			return slices.DeleteFunc(all, func(p []byte) bool {
				if tsPID(p) == 0 {
					n++
				}
				return tsPID(p) == 0 && n%8 != 1
			})
		}, "PAT: "},
		{"DTS goes back", func(all [][]byte) [][]byte {
			i := find(all, 300, audio, starts)
			j := find(all, i+1, audio, starts)
			pes := tsPayload(all[j])
			copy(pes[9:14], tsPayload(all[i])[9:14])
			return all
		}, "DTS goes back"},
		{"PES cut", func(all [][]byte) [][]byte {
			i := find(all, 300, audio, starts)
			j := find(all, i, audio, inside)
			all = slices.Delete(all, j, j+1)
			for _, p := range all[j:] {
				if tsPID(p) == audio {
					p[3] = p[3]&0xf0 | (p[3]-1)&15
				}
			}
			return all
		}, "PES length"},
		{"foreign packet", func(all [][]byte) [][]byte { return slices.Insert(all, 300, empty(0x200, 0, 0)) }, "unlisted PID"},
		{"no sync", func(all [][]byte) [][]byte { all[300][0] = 0x48; return all }, "sync at packet 300"},
		{"no program map", func(all [][]byte) [][]byte {
			return slices.DeleteFunc(all, func(p []byte) bool { return tsPID(p) == pmt })
		}, "no PMT"},
		{"part of a packet", func(all [][]byte) [][]byte { return append(all, all[300][:100]) }, "part of a packet"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			all := make([][]byte, len(packets))
			for i, p := range packets {
				all[i] = bytes.Clone(p)
			}
			name := filepath.Join(t.TempDir(), "clip.ts")
			if err := os.WriteFile(name, bytes.Join(tt.harm(all), nil), 0o600); err != nil {
				t.Fatal(err)
			}
			got := strings.Join(checkProgram(t, name).findings(), "\n")
			if tt.want == "" && got != "" || !strings.Contains(got, tt.want) {
				t.Errorf("got %q, want %q in it", got, tt.want)
			}
		})
	}
}

// ---- Judging a program

// programCheck is what testdata/tscheck.py says.
type programCheck struct {
	Packets       int
	PAT, PMT, PCR programGaps
	PMTs          []programMap
	PIDs          map[string]programPID
	Errors        []string
}

// programGaps is how far packets of one kind are apart, in ms.
type programGaps struct {
	Max  float64 `json:"max_ms"`
	Flow float64 `json:"flow_max_ms"` // while packets came
	At   int
}

type programMap struct {
	Packet, Version int
	Tracks          []programMapTrack
}

type programMapTrack struct {
	PID, Type   int
	Descriptors string
}

// programPID is one track.
type programPID struct {
	PES             int
	PESHash         string     `json:"pes_sha256"`    // of every byte but timestamps
	DelayHash       string     `json:"delays_sha256"` // of PTS - DTS
	Discontinuities []int      `json:"discontinuity_indicators"`
	PTSBack         []int      `json:"pts_back"`
	FirstDTS        float64    `json:"first_dts"`
	LastDTS         float64    `json:"last_dts"`
	Ahead           [2]float64 `json:"dts_pcr_ms"` // of the last PCR, the least and the most
}

// span is from the first to the last DTS, in ms.
func (p programPID) span() float64 { return (p.LastDTS - p.FirstDTS) / 90 }

// checkProgram analyses a file; the other arguments are those of tscheck.py.
func checkProgram(t *testing.T, args ...string) (c programCheck) {
	t.Helper()
	cmd := exec.Command(needs(t, "python3"), append([]string{"testdata/tscheck.py"}, args...)...)
	var text bytes.Buffer
	cmd.Stderr = &text
	out, err := cmd.Output()
	if err := json.Unmarshal(out, &c); err != nil {
		t.Fatalf("tscheck.py: %v\n%s", err, text.Bytes())
	}
	if (err != nil) != (len(c.Errors) > 0) {
		t.Fatalf("tscheck.py ended with %v, and found %q", err, c.Errors)
	}
	return c
}

// findings is what is wrong with a stream: ISO 13818-1 2.7.2, ETSI TR 101 290 5.2.1,
// and the PCR that docs/design.md promises.
func (c programCheck) findings() []string {
	all := slices.Clone(c.Errors)
	for name, g := range map[string]programGaps{"PAT": c.PAT, "PMT": c.PMT} {
		// vw sends them with frames, so they are late when ffmpeg is; that it
		// sends them every 100 ms, TestStreamTables shows.
		if g.Flow > 500 {
			all = append(all, fmt.Sprintf("%s: %.0f ms apart while packets flow, want at most 500", name, g.Flow))
		}
	}
	if c.PCR.Max > 100.001 {
		all = append(all, fmt.Sprintf("PCR: %.0f ms apart at packet %d, want at most 100", c.PCR.Max, c.PCR.At))
	}
	return all
}

// valid fails the test for each finding.
func (c programCheck) valid(t *testing.T) {
	t.Helper()
	for _, f := range c.findings() {
		t.Error(f)
	}
	t.Logf("at most %.0f ms between PAT, %.0f while packets flow, %.0f between PMT, %.0f between PCR", c.PAT.Max, c.PAT.Flow, c.PMT.Max, c.PCR.Max)
}

// tracks returns those of the last program map, in its order.
func (c programCheck) tracks() (all []programPID) {
	if len(c.PMTs) > 0 {
		for _, tr := range c.PMTs[len(c.PMTs)-1].Tracks {
			all = append(all, c.PIDs[fmt.Sprintf("%#x", tr.PID)])
		}
	}
	return all
}

// programTrack is a track as the analyser and ffprobe see it.
type programTrack struct {
	programPID
	codec  string
	frames int // that decode
}

// programTracks returns the tracks of a file that has one program, in the
// order of its last map.
func programTracks(t *testing.T, name string) (all []programTrack) {
	t.Helper()
	c := checkProgram(t, name)
	out, err := exec.Command(needs(t, "ffprobe"), "-v", "error", "-count_frames", "-of", "json",
		"-show_entries", "program=program_id:program_stream=id:stream=id,codec_name,nb_read_frames", name).CombinedOutput()
	var probe struct {
		Programs []struct{ Streams []struct{ ID string } }
		Streams  []struct {
			ID     string
			Codec  string `json:"codec_name"`
			Frames string `json:"nb_read_frames"`
		}
	}
	if jsonErr := json.Unmarshal(out, &probe); err != nil || jsonErr != nil {
		t.Fatalf("ffprobe %s: %v, %v\n%s", name, err, jsonErr, out)
	}
	if len(c.PMTs) == 0 || len(probe.Programs) != 1 {
		t.Fatalf("%s: got %d program maps and %d programs, want one program", name, len(c.PMTs), len(probe.Programs))
	}
	tracks := c.PMTs[len(c.PMTs)-1].Tracks
	if got := len(probe.Programs[0].Streams); got != len(tracks) || len(probe.Streams) != len(tracks) {
		t.Errorf("%s: ffprobe sees %d streams, %d of them in the program, want %d", name, len(probe.Streams), got, len(tracks))
	}
	for i, p := range c.tracks() {
		pid := fmt.Sprintf("%#x", tracks[i].PID)
		tr := programTrack{programPID: p}
		for _, s := range probe.Streams {
			if s.ID == pid {
				tr.codec = s.Codec
				tr.frames, _ = strconv.Atoi(s.Frames)
			}
		}
		all = append(all, tr)
	}
	return all
}

// programStream is a vw with the feeds feed0, feed1, … in one stream, and the
// relay that it is sent to.
type programStream struct {
	vw    *vwProcess
	relay *relayProcess

	seen   int64  // bytes of the record that frames has looked at
	counts [2]int // what it found in them
}

func startStream(t *testing.T, feeds int) *programStream {
	t.Helper()
	s := &programStream{relay: startRelay(t, "127.0.0.1:0")}
	s.vw = startVW(t)
	t.Cleanup(func() { // to look at with go test -artifacts
		if b, err := os.ReadFile(s.record()); err == nil && t.Failed() {
			os.WriteFile(filepath.Join(t.ArtifactDir(), "record.ts"), b, 0o600)
		}
	})
	var all []int
	for i := range feeds {
		all = append(all, i)
	}
	s.rule(t, all...)
	s.vw.send(t, "0", "stream/test", "ws://"+s.relay.addr+"/in/test")
	return s
}

// rule gives the stream its feeds.
func (s *programStream) rule(t *testing.T, feeds ...int) {
	t.Helper()
	names := make([]string, len(feeds))
	for i, f := range feeds {
		names[i] = fmt.Sprintf("%q", fmt.Sprintf("feed%d", f))
	}
	s.vw.call(t, http.StatusOK, "POST", "/api/streams", `{"stream":"stream/test","feeds":[`+strings.Join(names, ",")+`]}`)
}

// record is the file of what the relay got.
func (s *programStream) record() string { return s.relay.record(1) }

// await analyses the record once no more of it comes and ready agrees.
func (s *programStream) await(t *testing.T, ready func(programCheck) error) (c programCheck) {
	t.Helper()
	size := int64(-1)
	eventually(t, settleTime, func() error {
		time.Sleep(300 * time.Millisecond)
		info, err := os.Stat(s.record())
		if err != nil {
			return err
		}
		if was := size; was != info.Size() {
			size = info.Size()
			return errors.New("there is still more to come")
		}
		c = checkProgram(t, s.record(), "--index", filepath.Join(s.relay.dir, "index"))
		return nil
	})
	if err := ready(c); err != nil {
		t.Errorf("nothing more comes: %v", err)
	}
	return c
}

// frames counts what the relay got: PES of video and of audio.
func (s *programStream) frames(t *testing.T) [2]int {
	t.Helper()
	f, err := os.Open(s.record())
	if errors.Is(err, os.ErrNotExist) {
		return s.counts
	}
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.NewSectionReader(f, s.seen, math.MaxInt64-s.seen))
	if err != nil {
		t.Fatal(err)
	}
	for ; len(b) >= 188; b = b[188:] {
		s.seen += 188
		if pes := tsPayload(b); b[1]&0x40 != 0 && len(pes) > 4 && bytes.Equal(pes[:3], []byte{0, 0, 1}) {
			switch pes[3] & 0xe0 { // ISO 13818-1 table 2-22
			case 0xe0:
				s.counts[0]++
			case 0xc0:
				s.counts[1]++
			}
		}
	}
	return s.counts
}
