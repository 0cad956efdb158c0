// End to end: the vw that is shipped, between real ffmpegs and a relay that is
// not ours (testdata/relay), directly and through nginx, haproxy and caddy.
//
// What a relay got is judged by a reader of transport streams that shares no
// code with the product. Every test ends what it starts, and vw must always end
// with status 0.

package main

import (
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestE2EFeedIsUntouched: a destination on a feed gets the very packets that
// ffmpeg posted, from the moment it joins to the end, whatever is in between.
// Holds I1 and I5.
func TestE2EFeedIsUntouched(t *testing.T) {
	t.Parallel()
	certs := newCerts(t)
	for _, tt := range []struct {
		name string
		tls  bool                                                    // the relay's own
		via  func(t *testing.T, c certificates, relay string) string // returns its address; nil: nothing
	}{
		{"ws", false, nil},
		{"wss", true, nil},
		{"nginx", false, startNginx},
		{"haproxy", false, startHAProxy},
		{"caddy", false, startCaddy},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var args []string
			url := "ws://"
			if tt.tls {
				args = []string{"-cert", certs.cert, "-key", certs.key}
				url = "wss://"
			}
			r := startRelay(t, "127.0.0.1:0", args...)
			if url += r.addr; tt.via != nil {
				url = "wss://" + tt.via(t, certs, r.addr)
			}
			v := startVW(t, "SSL_CERT_FILE="+certs.ca)

			tracks := []struct {
				feed         string
				input, codec []string
				tap          *tap
			}{
				{feed: "video0", input: videoInput, codec: videoCodec},
				{feed: "audio0", input: audioInput, codec: audioCodec},
			}
			for _, tr := range tracks { // connections 1 and 2: there from the first packet
				v.send(t, tr.feed, tr.feed, url+"/in/"+tr.feed)
			}
			var ffmpegs []*process
			for i, tr := range tracks {
				tracks[i].tap = startTap(t, v.addr)
				out := "http://" + tracks[i].tap.addr + "/ts/" + tr.feed
				ffmpegs = append(ffmpegs, startFFmpeg(t, realTime, tr.input, eightSecs, tr.codec, []string{out}))
			}
			eventually(t, startupTime, func() error {
				if n := len(r.messages(t, 1)); n < 30 {
					return fmt.Errorf("got %d messages of video, want 30 before others join", n)
				}
				return nil
			})
			for _, tr := range tracks { // connections 3 and 4: in the middle of it
				v.send(t, tr.feed+".late", tr.feed, url+"/in/"+tr.feed)
			}
			for _, p := range ffmpegs {
				p.endsItself(t, 2*startupTime)
			}
			for i := range 4 {
				tr := tracks[i%2]
				posted := tr.tap.posted(t)
				late := i >= 2
				var d delivery
				eventually(t, settleTime, func() (err error) {
					d, err = checkDelivery(posted, r.messages(t, i+1), tr.feed == "video0")
					return err
				})
				if late != (d.from > 0) {
					t.Errorf("%s, late %v: got the post from its packet %d on", tr.feed, late, d.from)
				}
				if late && tr.feed == "video0" && !d.units[0].key {
					t.Errorf("%s: joined at a frame that is not a keyframe", tr.feed)
				}
				decodes(t, r.record(i+1))
				t.Logf("%s, late %v: %v", tr.feed, late, d)
			}
		})
	}

	// What makes the wss cases mean something: vw does look at certificates.
	t.Run("wss of an unknown CA", func(t *testing.T) {
		t.Parallel()
		r := startRelay(t, "127.0.0.1:0", "-cert", certs.cert, "-key", certs.key)
		v := startVW(t)
		v.call(t, http.StatusOK, "POST", "/api/destinations", `{"id":"0","stream":"video0","destination":"wss://`+r.addr+`"}`)
		v.expect(t, 0, settleTime, `unknown authority`)
		if got := r.out.find(0, `open`); got != nil {
			t.Errorf("got a websocket to a relay with a certificate of an unknown CA, want none")
		}
	})
}

// TestE2EFrames: messages begin at a frame and hold whole frames, whatever the
// frames are like and however the post was split. Holds I1.
func TestE2EFrames(t *testing.T) {
	t.Parallel()
	big := []string{"-f", "mpegts", "-codec:v", "mpeg2video", "-b:v", "20M", "-minrate", "20M", "-maxrate", "20M", "-bufsize", "4M", "-bf", "0", "-g", "1"}
	for _, tt := range []struct {
		name   string
		ffmpeg []string                                             // input and codecs; nil: the clip is posted
		post   func(t *testing.T, vw string, clip []byte) (end int) // end: how much of the clip is to arrive
		video  bool
		frame  int // bytes; the largest frame is to be longer
	}{
		{name: "video", ffmpeg: slices.Concat(videoInput, threeSecs, videoCodec), video: true},
		{name: "audio", ffmpeg: slices.Concat(audioInput, threeSecs, audioCodec)},
		{name: "video and audio in one post", ffmpeg: slices.Concat(videoInput, audioInput, threeSecs, audioCodec, videoCodec), video: true},
		{name: "frames over 32 KiB", ffmpeg: slices.Concat(videoInput, threeSecs, big), video: true, frame: 32 << 10},
		{name: "muxrate", ffmpeg: slices.Concat(videoInput, threeSecs, videoCodec, []string{"-muxrate", "3M"}), video: true},
		{name: "pieces of 1 to 1,000 bytes", post: postPieces, video: true},
		{name: "broken off in a frame", post: postBroken, video: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := startRelay(t, "127.0.0.1:0")
			v := startVW(t)
			v.send(t, "0", "feed", "ws://"+r.addr)
			var posted []byte
			if tt.post == nil {
				tap := startTap(t, v.addr)
				startFFmpeg(t, realTime, tt.ffmpeg, []string{"http://" + tap.addr + "/ts/feed"}).endsItself(t, startupTime)
				posted = tap.posted(t)
			} else {
				posted = videoClip(t)
				posted = posted[:tt.post(t, v.addr, posted)]
			}
			var d delivery
			eventually(t, settleTime, func() (err error) {
				d, err = checkDelivery(posted, r.messages(t, 1), tt.video)
				return err
			})
			if d.from != 0 {
				t.Errorf("got the post from its packet %d on, want all of it", d.from)
			}
			if d.largest <= tt.frame {
				t.Errorf("the largest frame had %d bytes, want more than %d: the case shows nothing", d.largest, tt.frame)
			}
			if tt.name == "muxrate" && (d.nulls == 0 || d.inside == 0) {
				t.Errorf("got %d null packets and %d packets inside frames of other PIDs, want some of both: the case shows nothing", d.nulls, d.inside)
			}
			decodes(t, r.record(1))
			t.Log(d)
		})
	}
}

// postPieces posts the clip in writes of 1 to 1,000 bytes.
func postPieces(t *testing.T, vw string, clip []byte) int {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := mathrand.New(mathrand.NewPCG(seed, 0))
	p := startPost(t, vw, "feed")
	for rest := clip; len(rest) > 0; {
		n := min(len(rest), 1+random.IntN(1000))
		p.write(t, rest[:n])
		rest = rest[n:]
		time.Sleep(200 * time.Microsecond) // else the kernel puts them together again
	}
	p.end(t)
	return len(clip)
}

// postBroken closes its connection in the middle of a frame, which is then not
// to arrive, and neither are the tables before it.
func postBroken(t *testing.T, vw string, clip []byte) int {
	list, err := units(clip)
	if err != nil {
		t.Fatal(err)
	}
	// Of the last half of the clip, a frame that tables come before.
	for i := len(list) / 2; i < len(list); i++ {
		before := list[i-1].last + 1
		if u := list[i]; u.first > before && u.last-u.first > 4 {
			p := startPost(t, vw, "feed")
			p.write(t, clip[:(u.first+3)*188+100])
			p.conn.Close()
			return before * 188
		}
	}
	t.Fatal("the clip has no frame after a table")
	return 0
}

// TestE2ERelayReturns: a relay that was killed and comes back gets video again
// within a second, from a keyframe, and ffmpeg notices nothing.
//
// Not beside other tests: the second is a promise to viewers, and the wait of
// up to 0.4 s before a dial and 0.48 s for a keyframe leave little of it to a busy
// machine.
func TestE2ERelayReturns(t *testing.T) {
	notUnderRace(t)
	certs := newCerts(t)
	for _, tt := range []struct {
		name   string
		via    func(t *testing.T, c certificates, relay string) string // returns its address; nil: nothing
		absent string                                                  // what vw says while the relay is gone
	}{
		{"direct", nil, `connection refused`},
		{"behind nginx", startNginx, `502 Bad Gateway`},
		{"behind haproxy", startHAProxy, `503 Service Unavailable`},
		{"behind caddy", startCaddy, `502 Bad Gateway`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := startRelay(t, "127.0.0.1:0")
			url := "ws://" + r.addr
			if tt.via != nil {
				url = "wss://" + tt.via(t, certs, r.addr)
			}
			v := startVW(t, "SSL_CERT_FILE="+certs.ca)
			checkReturns(t, v, r, url, tt.absent)
		})
	}
}

// checkReturns posts video for the destination, kills the relay twice and
// starts it again with args: each time there must be video again within a
// second, from a keyframe, and ffmpeg must notice nothing. absent is what the
// stats say while the relay is away, and the log the first time.
func checkReturns(t *testing.T, v *vwProcess, r *relayProcess, url, absent string, args ...string) {
	t.Helper()
	v.send(t, "0", "video0", url)
	tap := startTap(t, v.addr)
	ffmpeg := startFFmpeg(t, realTime, videoInput, videoCodec, []string{"http://" + tap.addr + "/ts/video0"})
	flows := func(r *relayProcess) (first recorded) {
		eventually(t, startupTime, func() error {
			all := r.messages(t, 1)
			if len(all) == 0 {
				return errors.New("no video arrives")
			}
			first = all[0]
			return nil
		})
		return first
	}
	flows(r)
	for round := range 2 {
		r.kill(t)
		if round == 0 { // after so short a return it is not told again
			v.expect(t, 0, startupTime, absent)
		}
		eventually(t, startupTime, func() error {
			stats := v.call(t, http.StatusOK, "GET", "/api/stats", "")
			if !regexp.MustCompile(absent).MatchString(stats) {
				return fmt.Errorf("got the stats %s, want %q in them", stats, absent)
			}
			return nil
		})
		r = startRelay(t, r.addr, args...)
		back := time.Now()
		if took := flows(r).at.Sub(back); took > time.Second {
			t.Errorf("round %d: video came %v after the relay, want at most 1s", round, took)
		} else {
			t.Logf("round %d: video came %v after the relay", round, took)
		}
	}
	if ffmpeg.ended() {
		t.Errorf("ffmpeg ended: %v\n%s", ffmpeg.err, ffmpeg.out.String())
	}
	ffmpeg.stop(t)
	if got := ffmpeg.out.String(); got != "" {
		t.Errorf("ffmpeg said %q, want nothing", got)
	}
	posted := tap.posted(t)
	eventually(t, settleTime, func() error {
		d, err := checkDelivery(posted, r.messages(t, 1), true)
		if err == nil && !d.units[0].key {
			err = errors.New("the first frame after the return is no keyframe")
		}
		return err
	})
	decodes(t, r.record(1))
}

// TestE2EBurst: far more than any camera sends arrives complete at relays that
// keep up, and vw's memory does not grow with it.
//
// Not parallel: a relay that shares its processor with other tests does not
// keep up.
func TestE2EBurst(t *testing.T) {
	notUnderRace(t)
	const (
		rate   = 200e6 / 8 // bytes a second
		relays = 4
		block  = 25_000 // bytes, about one a millisecond
	)
	duration := scaled(time.Second, 3*time.Second, 10*time.Second)
	// A machine that stops for half a second is not what is judged; of the queue
	// that this makes, the limit has the runtime return the memory.
	v := startVW(t, "VW_MAXLAG=5s", "GOMEMLIMIT=20MiB")
	var rs []*relayProcess
	for i := range relays {
		r := startRelay(t, "127.0.0.1:0", "-record", "", "-sum")
		v.send(t, strconv.Itoa(i), "video0", "ws://"+r.addr)
		rs = append(rs, r)
	}
	clip := videoClip(t)
	loops := int(rate*duration.Seconds())/len(clip) + 1
	idle, err := v.rss()
	if err != nil {
		t.Fatal(err)
	}

	stop := v.sampleRSS(t, 20*time.Millisecond)
	p := startPost(t, v.addr, "video0")
	p.sum = sha256.New()
	start := time.Now()
	for range loops {
		for b := range slices.Chunk(clip, block) {
			p.write(t, b)
			time.Sleep(time.Until(start.Add(time.Duration(float64(p.bytes) / rate * float64(time.Second)))))
		}
	}
	p.end(t)
	took := time.Since(start)
	samples := stop()

	if took > 2*duration {
		t.Errorf("the post took %v, want about %v: vw held it up", took, duration)
	}
	for i, r := range rs {
		eventually(t, settleTime, func() error {
			if got := r.total(t); got != p.bytes {
				return fmt.Errorf("relay %d: got %d bytes, want %d", i, got, p.bytes)
			}
			return nil
		})
		v.call(t, http.StatusOK, "DELETE", "/api/destinations/"+strconv.Itoa(i), "")
		got := r.expect(t, 0, settleTime, `sum 1 (\d+) (\w+)\nclose 1 (\d+)\n`)
		if want := hex.EncodeToString(p.sum.Sum(nil)); got[2] != want {
			t.Errorf("relay %d: got %s bytes of sum %s, want %d of %s", i, got[1], got[2], p.bytes, want)
		}
		if got[3] != "1000" {
			t.Errorf("relay %d: got close code %s, want 1000", i, got[3])
		}
	}
	if len(samples) < 20 {
		t.Fatalf("got %d samples of memory in %v, want at least 20", len(samples), took)
	}
	// The lower quartile, since a machine that stops for a moment makes a queue,
	// and a peak with it. What was kept for good would show all the same.
	third := len(samples) / 3
	quartile := func(v []int) int { return slices.Sorted(slices.Values(v))[len(v)/4] }
	early, late, most := quartile(samples[:third]), quartile(samples[2*third:]), slices.Max(samples)
	t.Logf("%d MB in %v (%.0f Mbit/s) to %d relays; resident: %.1f MB idle, mostly %.1f MB in the first third and %.1f MB in the last, at most %.1f MB",
		p.bytes/1e6, took.Round(time.Millisecond), float64(p.bytes)*8/1e6/took.Seconds(), relays, mb(idle), mb(early), mb(late), mb(most))
	if late > early+8<<20 {
		t.Errorf("resident memory grew from %.1f to %.1f MB", mb(early), mb(late))
	}
	// The largest queue of 16 MiB, in its two forms, and as much garbage.
	if limit := idle + 64<<20; most > limit {
		t.Errorf("resident memory: got %.1f MB, want at most %.1f", mb(most), mb(limit))
	}
}

// TestE2EShutdown: SIGTERM ends everything within 5 s, with a proper farewell
// to relays that listen, though one of them may be stuck.
func TestE2EShutdown(t *testing.T) {
	t.Parallel()
	certs := newCerts(t)
	for _, tt := range []struct {
		name  string
		stuck string // scheme of a second relay that never reads; "": there is none
	}{
		{"streaming", ""},
		{"with a stuck relay", "ws"},
		{"with a stuck relay over TLS", "wss"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := startRelay(t, "127.0.0.1:0")
			v := startVW(t, "SSL_CERT_FILE="+certs.ca)
			v.send(t, "0", "video0", "ws://"+r.addr)
			stuck := &chaosRelay{t: t, rcvbuf: 4096}
			if tt.stuck != "" {
				if tt.stuck == "wss" {
					stuck.tls = certs.server
				}
				stuck.start()
				v.send(t, "1", "video0", tt.stuck+"://"+stuck.addr)
				stuck.stall.Lock()
				t.Cleanup(stuck.stall.Unlock)
			}
			ffmpeg := startFFmpeg(t, realTime, videoInput, videoCodec, []string{v.url + "/ts/video0"})
			eventually(t, startupTime, func() error {
				if len(r.messages(t, 1)) == 0 {
					return errors.New("no video arrives")
				}
				return nil
			})
			if tt.stuck != "" {
				awaitFull(t, stuck.addr)
			}
			start := time.Now()
			v.signal(t, syscall.SIGTERM)
			select {
			case <-v.done:
			case <-time.After(5 * time.Second):
				t.Fatal("vw still runs 5s after SIGTERM")
			}
			took := time.Since(start)
			if v.err != nil {
				t.Errorf("vw ended with %v, want status 0", v.err)
			}
			if got := r.expect(t, 0, settleTime, `close 1 (\d+)`); got[1] != "1001" {
				t.Errorf("the relay got close code %s, want 1001", got[1])
			}
			select {
			case <-ffmpeg.done:
			case <-time.After(settleTime):
				t.Errorf("ffmpeg still runs %v after vw has ended", settleTime)
			}
			t.Logf("vw ended in %v, ffmpeg after %v", took.Round(time.Millisecond), time.Since(start).Round(time.Millisecond))
		})
	}
}

// TestE2EStaticBinaries: what is shipped is small, static and soon there.
//
// Not parallel: it measures how fast vw starts.
func TestE2EStaticBinaries(t *testing.T) {
	const maxSize = 9e6 // bytes
	for _, target := range []string{"linux/amd64", "linux/arm64", "darwin/arm64", "windows/amd64"} {
		name := build(t, target)
		info, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %d bytes", target, info.Size())
		if !strings.HasPrefix(target, "linux/") {
			continue
		}
		if info.Size() > maxSize {
			t.Errorf("%s: got %d bytes, want at most %d", target, info.Size(), int(maxSize))
		}
		f, err := elf.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range f.Progs {
			if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
				t.Errorf("%s: it has a segment %v, want a static binary", target, p.Type)
			}
		}
		f.Close()
	}

	var ready []time.Duration
	var rss []int
	for range 5 {
		start := time.Now()
		v := startVW(t)
		if got := v.call(t, http.StatusOK, "GET", "/healthcheck", ""); got != `"ok"` {
			t.Fatalf("healthcheck: got %s, want %q", got, `"ok"`)
		}
		ready = append(ready, time.Since(start))
		n, err := v.rss()
		if err != nil {
			t.Fatal(err)
		}
		rss = append(rss, n)
		v.stop(t)
	}
	t.Logf("ready in %v, idle in %.1f MB", ready, mb(slices.Max(rss)))
	if best := slices.Min(ready); best > 50*time.Millisecond {
		t.Errorf("ready %v after its start at best, want at most 50ms", best)
	}
	if most := slices.Max(rss); most > 16<<20 {
		t.Errorf("resident when idle: got %.1f MB, want at most 16", mb(most))
	}
}

// TestE2EArm64: the binary for the boards that it is meant for sends a feed.
func TestE2EArm64(t *testing.T) {
	t.Parallel()
	r := startRelay(t, "127.0.0.1:0")
	v := startVWCommand(t, exec.Command(needs(t, "qemu-aarch64-static"), build(t, "linux/arm64"), "stream"))
	v.send(t, "0", "video0", "ws://"+r.addr)
	tap := startTap(t, v.addr)
	startFFmpeg(t, realTime, videoInput, threeSecs, videoCodec, []string{"http://" + tap.addr + "/ts/video0"}).endsItself(t, startupTime)
	posted := tap.posted(t)
	var d delivery
	eventually(t, settleTime, func() (err error) {
		d, err = checkDelivery(posted, r.messages(t, 1), true)
		return err
	})
	if d.from != 0 {
		t.Errorf("got the post from its packet %d on, want all of it", d.from)
	}
	decodes(t, r.record(1))
	t.Log(d)
}
