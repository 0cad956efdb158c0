// End to end: the vw that is shipped, between real ffmpegs and a relay that is
// not ours (testdata/relay), directly and through nginx, haproxy and caddy.
//
// What a relay got is judged by a reader of transport streams that shares no
// code with the product. Nothing is skipped: a tool that is missing fails.
// Every test ends what it starts, and vw must always end with status 0.

package main

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"debug/elf"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"hash"
	"io"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

var long = flag.Bool("long", false, "run the tests that have a longer form at full length")

// The owner's ffmpeg lines, without input and output.
var (
	videoInput  = []string{"-f", "lavfi", "-i", "testsrc2=size=640x480:rate=25"}
	videoCodec  = []string{"-f", "mpegts", "-codec:v", "mpeg1video", "-b:v", "1000k", "-bf", "0", "-g", "12"}
	audioInput  = []string{"-f", "lavfi", "-i", "sine=frequency=440:sample_rate=48000"}
	audioCodec  = []string{"-f", "mpegts", "-codec:a", "mp2", "-muxdelay", "0.001"}
	threeSecs   = []string{"-t", "3"}
	eightSecs   = []string{"-t", "8"} // longer than a relay may be silent: without pings and pongs it would be dropped
	realTime    = []string{"-re"}
	startupTime = 10 * time.Second // for a program to be ready, on a busy machine
	settleTime  = 5 * time.Second  // for something that takes milliseconds
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
				decodesCleanly(t, r.record(i+1))
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
			decodesCleanly(t, r.record(1))
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
// second, from a keyframe, and ffmpeg must notice nothing. absent is what vw
// says while the relay is away.
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
		mark := v.out.len()
		r.kill(t)
		v.expect(t, mark, startupTime, absent)
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
	decodesCleanly(t, r.record(1))
}

// TestE2EBurst: far more than any camera sends arrives complete at relays that
// keep up, and vw's memory does not grow with it.
//
// Not parallel: a relay that shares its processor with other tests does not
// keep up.
func TestE2EBurst(t *testing.T) {
	const (
		rate   = 200e6 / 8 // bytes a second
		relays = 4
		block  = 25_000 // bytes, about one a millisecond
	)
	duration := 3 * time.Second
	if *long {
		duration = 10 * time.Second
	}
	v := startVW(t, "VW_MAXLAG=5s") // a machine that stops for half a second is not what is judged
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
			var stuck string
			if tt.stuck != "" {
				stuck = startStuck(t, certs, tt.stuck == "wss")
				v.send(t, "1", "video0", tt.stuck+"://"+stuck)
			}
			ffmpeg := startFFmpeg(t, realTime, videoInput, videoCodec, []string{v.url + "/ts/video0"})
			eventually(t, startupTime, func() error {
				if len(r.messages(t, 1)) == 0 {
					return errors.New("no video arrives")
				}
				return nil
			})
			if stuck != "" {
				awaitFull(t, stuck)
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
	v := startVWCommand(t, exec.Command(tool(t, "qemu-aarch64-static"), build(t, "linux/arm64"), "stream"))
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
	decodesCleanly(t, r.record(1))
	t.Log(d)
}

// TestE2ECheckDelivery: what judges the other tests does find what is wrong.
func TestE2ECheckDelivery(t *testing.T) {
	t.Parallel()
	posted := videoClip(t)
	list, err := units(posted)
	if err != nil {
		t.Fatal(err)
	}
	// whole is the clip as it should arrive, from one keyframe on, two frames
	// a message; a keyframe is never the second.
	whole := func(from int) (all []recorded) {
		start := from
		for i, u := range list {
			end := (u.last + 1) * 188
			last := i == len(list)-1
			if last {
				end = len(posted)
			}
			if end > start && (last || list[i+1].key || end-start > 8000) {
				all = append(all, recorded{kind: "binary", payload: bytes.Clone(posted[start:end])})
				start = end
			}
		}
		return all
	}
	middle := 0 // where the tables before a keyframe in the middle begin
	for i, u := range list[:len(list)-1] {
		if next := list[i+1]; i > len(list)/2 && next.key {
			middle = (u.last + 1) * 188
			break
		}
	}
	tables := slices.Concat(posted[188 : 3*188]) // ffmpeg begins with SDT, PAT, PMT
	psi := recorded{kind: "binary", payload: tables}
	for _, tt := range []struct {
		name string
		from int
		harm func(all []recorded) []recorded
		want string // in the error; "": none
	}{
		{"all", 0, func(all []recorded) []recorded { return all }, ""},
		{"from the middle", middle, func(all []recorded) []recorded { return all }, ""},
		{"nothing", 0, func([]recorded) []recorded { return nil }, "no message"},
		{"byte changed", 0, func(all []recorded) []recorded { all[5].payload[1000] ^= 1; return all }, "differs"},
		{"byte lost", 0, func(all []recorded) []recorded { all[5].payload = all[5].payload[1:]; return all }, "not whole packets"},
		{"packet lost", 0, func(all []recorded) []recorded { all[5].payload = all[5].payload[188:]; return all }, "differs"},
		{"message lost", 0, func(all []recorded) []recorded { return slices.Delete(all, 5, 6) }, "differs"},
		{"message twice", 0, func(all []recorded) []recorded { return slices.Insert(all, 5, all[5]) }, "more than was posted"},
		{"first message lost", 0, func(all []recorded) []recorded { return all[1:] }, "no PAT"},
		{"last message lost", 0, func(all []recorded) []recorded { return all[:len(all)-1] }, "differs"},
		{"swapped", 0, func(all []recorded) []recorded { all[5], all[6] = all[6], all[5]; return all }, "differs"},
		{"text", 0, func(all []recorded) []recorded { all[5].kind = "text"; return all }, "text"},
		{"empty", 0, func(all []recorded) []recorded { return slices.Insert(all, 5, recorded{kind: "binary"}) }, "not whole packets"},
		{"cut in a frame", 0, func(all []recorded) []recorded {
			n := len(all[5].payload) - 188
			all[6].payload = slices.Concat(all[5].payload[n:], all[6].payload)
			all[5].payload = all[5].payload[:n]
			return all
		}, "inside a frame"},
		{"keyframe second", 0, func(all []recorded) []recorded {
			for i := range all[1:] {
				next := all[i+1].payload
				if list, err := units(next); err == nil && list[0].key {
					all[i].payload = slices.Concat(all[i].payload, next)
					return slices.Delete(all, i+1, i+2)
				}
			}
			return nil
		}, "keyframe"},
		{"tables with the frame before them", 0, func(all []recorded) []recorded {
			for i := range all[1:] {
				if next := &all[i+1]; hasPAT(next.payload) {
					all[i].payload = slices.Concat(all[i].payload, next.payload[:188])
					next.payload = next.payload[188:]
					return all
				}
			}
			return nil
		}, "after its last frame"},
		{"needless tables", middle, func(all []recorded) []recorded { return slices.Insert(all, 0, psi) }, "has its own PAT"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := checkDelivery(posted, tt.harm(whole(tt.from)), true)
			switch {
			case tt.want == "" && err != nil:
				t.Errorf("got error %q, want none", err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("got error %v, want one with %q", err, tt.want)
			}
		})
	}
}

// ---- Judging what arrived

// unit is one PES packet in a transport stream: the packets from the one that
// starts it to the last one of its PID that has payload.
type unit struct {
	pid         int
	first, last int  // packets
	video, key  bool // key: random_access_indicator is set
}

// tsPID and tsPayload read one packet of 188 bytes. ISO 13818-1 2.4.3.2.
func tsPID(p []byte) int { return int(p[1]&0x1f)<<8 | int(p[2]) }

func tsPayload(p []byte) []byte {
	switch p[3] >> 4 & 3 {
	case 1:
		return p[4:188]
	case 3:
		return p[min(5+int(p[4]), 188):188]
	}
	return nil
}

func tsPacket(ts []byte, i int) []byte { return ts[i*188 : (i+1)*188] }

// units lists the PES packets of ts in the order of their starts.
func units(ts []byte) ([]unit, error) {
	var list []unit
	open := make(map[int]int) // PID: index in list
	for i := range len(ts) / 188 {
		p := tsPacket(ts, i)
		if p[0] != 0x47 {
			return nil, fmt.Errorf("packet %d begins with %#x", i, p[0])
		}
		pid, payload := tsPID(p), tsPayload(p)
		if len(payload) == 0 || pid == 0x1fff {
			continue
		}
		u, ok := open[pid]
		switch starts := p[1]&0x40 != 0; {
		case starts && bytes.HasPrefix(payload, []byte{0, 0, 1}):
			open[pid] = len(list)
			list = append(list, unit{
				pid: pid, first: i, last: i, video: payload[3]&0xf0 == 0xe0,
				key: p[3]&0x20 != 0 && p[4] > 0 && p[5]&0x40 != 0,
			})
		case !starts && ok:
			list[u].last = i
		}
	}
	return list, nil
}

// hasPAT tells whether a PAT comes before the first PES packet.
func hasPAT(ts []byte) bool {
	for i := range len(ts) / 188 {
		switch p := tsPacket(ts, i); {
		case tsPID(p) == 0:
			return true
		case bytes.HasPrefix(tsPayload(p), []byte{0, 0, 1}):
			return false
		}
	}
	return false
}

// lastTable returns the last packet of a PID in ts; nil without one.
func lastTable(ts []byte, pid int) []byte {
	for i := len(ts)/188 - 1; i >= 0; i-- {
		if p := tsPacket(ts, i); tsPID(p) == pid {
			return p
		}
	}
	return nil
}

// delivery says what arrived of a post.
type delivery struct {
	from     int    // packet of the post that it begins with
	joinPSI  bool   // PAT and PMT were sent ahead of it
	units    []unit // from there on
	messages int
	bytes    int
	largest  int // bytes of a frame
	longest  int // bytes of a message
	nulls    int // null packets
	inside   int // packets between a frame's own that are not of its PID
	byAudio  int // messages of a post with video that begin with another frame
}

func (d delivery) String() string {
	return fmt.Sprintf("%d messages, %d frames, %d bytes from packet %d on; PSI ahead %v; largest frame %d, longest message %d bytes; %d null packets, %d inside frames; %d messages begin with audio",
		d.messages, len(d.units), d.bytes, d.from, d.joinPSI, d.largest, d.longest, d.nulls, d.inside, d.byAudio)
}

// checkDelivery tells whether got is the end of what was posted, byte for byte,
// in binary messages of whole frames. Ahead of it there may be the PAT and PMT
// that were in force, in a message of their own, if it has no PAT itself.
func checkDelivery(posted []byte, got []recorded, video bool) (delivery, error) {
	var d delivery
	for i, m := range got {
		if m.kind != "binary" {
			return d, fmt.Errorf("message %d is %s, want binary", i, m.kind)
		}
		if len(m.payload) == 0 || len(m.payload)%188 != 0 {
			return d, fmt.Errorf("message %d has %d bytes, not whole packets", i, len(m.payload))
		}
	}
	var ahead []byte
	if len(got) > 0 && len(got[0].payload) == 2*188 {
		if none, err := units(got[0].payload); err == nil && len(none) == 0 {
			ahead, got = got[0].payload, got[1:]
		}
	}
	if len(got) == 0 {
		return d, errors.New("no message with a frame")
	}
	if own := hasPAT(got[0].payload); own && ahead != nil {
		return d, errors.New("a PAT was sent ahead of a frame that has its own PAT")
	} else if !own && ahead == nil {
		return d, errors.New("no PAT comes before the first frame")
	}

	var rest []byte
	var starts []int // packets, by message
	for _, m := range got {
		starts = append(starts, len(rest)/188)
		rest = append(rest, m.payload...)
		d.longest = max(d.longest, len(m.payload))
	}
	d.messages, d.bytes = len(got), len(rest)
	if len(rest) > len(posted) {
		return d, fmt.Errorf("got %d bytes, more than was posted, %d", len(rest), len(posted))
	}
	d.from = (len(posted) - len(rest)) / 188
	if want := posted[len(posted)-len(rest):]; !bytes.Equal(rest, want) {
		at := 0
		for rest[at] == want[at] {
			at++
		}
		return d, fmt.Errorf("what arrived, %d of %d bytes, differs from the end of the post at byte %d; its first packet is at byte %d of the post",
			len(rest), len(posted), at, bytes.Index(posted, rest[:188]))
	}
	if ahead != nil {
		pat := lastTable(posted[:d.from*188], 0)
		if pat == nil {
			return d, errors.New("a PAT was sent that is not of the post")
		}
		pmt := lastTable(posted[:d.from*188], int(binary.BigEndian.Uint16(pat[15:]))&0x1fff)
		if want := slices.Concat(pat, pmt); !bytes.Equal(ahead, want) {
			return d, fmt.Errorf("PSI ahead: got %x, want the last of the post, %x", ahead, want)
		}
		d.joinPSI = true
	}
	var err error
	if d.units, err = units(rest); err != nil {
		return d, err
	}
	return d, d.checkFrames(rest, starts, video)
}

// checkFrames tells whether the messages that start at those packets of ts hold
// whole frames, each with the tables before it, and a keyframe only as the
// first. What comes after the last frame of ts has no frame to be with.
func (d *delivery) checkFrames(ts []byte, starts []int, video bool) error {
	in := func(packet int) int { // message of a packet
		i, ok := slices.BinarySearch(starts, packet)
		if !ok {
			i--
		}
		return i
	}
	first := make([]*unit, len(starts)) // frame of each message
	end := make([]int, len(starts))     // packet after the last of its frames
	for i := range d.units {
		u := &d.units[i]
		m := in(u.first)
		if in(u.last) != m {
			return fmt.Errorf("message %d ends inside a frame: packets %d to %d, cut at %d", m, u.first, u.last, starts[m+1])
		}
		if first[m] == nil {
			first[m] = u
		} else if u.video && u.key {
			return fmt.Errorf("message %d has a keyframe that is not its first frame, at packet %d", m, u.first)
		}
		end[m] = max(end[m], u.last+1)
		size := 0
		for j := u.first; j <= u.last; j++ {
			if tsPID(tsPacket(ts, j)) == u.pid {
				size += 188
			} else {
				d.inside++
			}
		}
		d.largest = max(d.largest, size)
	}
	for m, u := range first {
		if u == nil {
			return fmt.Errorf("message %d, from packet %d on, has no frame", m, starts[m])
		}
		if video && !u.video {
			d.byAudio++
		}
		for i := starts[m]; i < u.first; i++ {
			p := tsPacket(ts, i)
			if pid := tsPID(p); pid == 0x1fff {
				d.nulls++
			} else if pid == u.pid && len(tsPayload(p)) > 0 {
				return fmt.Errorf("message %d begins inside a frame, at packet %d", m, i)
			}
		}
		if m+1 < len(starts) && end[m] < starts[m+1] {
			return fmt.Errorf("message %d has %d packets after its last frame, which belong to the next", m, starts[m+1]-end[m])
		}
	}
	return nil
}

// decodesCleanly fails the test unless ffmpeg reads the file without a complaint.
func decodesCleanly(t *testing.T, name string) {
	t.Helper()
	out, err := exec.Command(tool(t, "ffmpeg"), "-nostdin", "-v", "error", "-i", name, "-f", "null", "-").CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("decode %s: got %v, %q, want nothing", name, err, out)
	}
}

// ---- Programs

// tool returns the path of a program that must be installed.
func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// buildDir is beside the test binary, where go test removes it.
var buildDir = sync.OnceValues(func() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	return os.MkdirTemp(filepath.Dir(self), "e2e")
})

// builds has a function for each target, which builds it once.
var builds = map[string]func() (string, error){
	"tokenrelay":    sync.OnceValues(func() (string, error) { return goBuild("tokenrelay", "testdata/tokenrelay") }),
	"relay":         sync.OnceValues(func() (string, error) { return goBuild("relay", "testdata/relay") }),
	"gorilla":       sync.OnceValues(func() (string, error) { return goBuild("gorilla", "testdata/gorilla") }),
	"linux/amd64":   sync.OnceValues(func() (string, error) { return goBuild("linux/amd64", ".") }),
	"linux/arm64":   sync.OnceValues(func() (string, error) { return goBuild("linux/arm64", ".") }),
	"darwin/arm64":  sync.OnceValues(func() (string, error) { return goBuild("darwin/arm64", ".") }),
	"windows/amd64": sync.OnceValues(func() (string, error) { return goBuild("windows/amd64", ".") }),
}

// build returns the path of a binary, built as it is shipped.
func build(t testing.TB, target string) string {
	t.Helper()
	name, err := builds[target]()
	if err != nil {
		t.Fatal(err)
	}
	return name
}

func goBuild(target, dir string) (string, error) {
	out, err := buildDir()
	if err != nil {
		return "", err
	}
	name := filepath.Join(out, strings.ReplaceAll(target, "/", "-"))
	c := exec.Command("go", "build", "-C", dir, "-ldflags", "-s -w", "-o", name, ".")
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	if system, arch, ok := strings.Cut(target, "/"); ok {
		c.Env = append(c.Env, "GOOS="+system, "GOARCH="+arch)
	}
	if text, err := c.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build for %s: %w\n%s", target, err, text)
	}
	return name, nil
}

// videoClip returns three seconds of video as the owner's ffmpeg makes it.
func videoClip(t *testing.T) []byte {
	t.Helper()
	b, err := readClip()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

var readClip = sync.OnceValues(func() ([]byte, error) {
	c := exec.Command("ffmpeg", slices.Concat([]string{"-nostdin", "-v", "error"}, videoInput, threeSecs, videoCodec, []string{"-"})...)
	var text bytes.Buffer
	c.Stderr = &text
	b, err := c.Output()
	if err == nil && (len(b) == 0 || len(b)%188 != 0) {
		err = fmt.Errorf("got %d bytes", len(b))
	}
	if err != nil {
		return nil, fmt.Errorf("clip: %w\n%s", err, text.Bytes())
	}
	return b, nil
})

// transcript is what a program has printed so far.
type transcript struct {
	mu   sync.Mutex
	text []byte
	more chan struct{} // closed when there is more; nil: nobody waits
}

func (o *transcript) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.text = append(o.text, p...)
	if o.more != nil {
		close(o.more)
		o.more = nil
	}
	return len(p), nil
}

func (o *transcript) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return string(o.text)
}

func (o *transcript) len() int { return len(o.String()) }

// find returns the first match of the expression from a byte on, and its
// groups; nil without one.
func (o *transcript) find(from int, expr string) []string {
	return regexp.MustCompile(expr).FindStringSubmatch(o.String()[from:])
}

// changed returns a channel that is closed at the next Write.
func (o *transcript) changed() <-chan struct{} {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.more == nil {
		o.more = make(chan struct{})
	}
	return o.more
}

// process is a program that a test has started, and that ends with the test.
type process struct {
	name string
	cmd  *exec.Cmd
	out  transcript    // stdout and stderr
	done chan struct{} // closed when it has ended
	err  error         // how, once done is closed
}

func start(t *testing.T, name string, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{name: name, cmd: cmd, done: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = &p.out, &p.out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(func() {
		p.stop(t)
		if t.Failed() {
			text := p.out.String()
			t.Logf("%s printed:\n%s", name, text[max(0, len(text)-4000):])
		}
	})
	return p
}

func (p *process) signal(t *testing.T, s os.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil && err != os.ErrProcessDone {
		t.Errorf("signal %s: %v", p.name, err)
	}
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// stop ends p and waits for it.
func (p *process) stop(t *testing.T) {
	t.Helper()
	p.signal(t, syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(startupTime):
		t.Errorf("%s still runs %v after SIGTERM", p.name, startupTime)
		p.kill(t)
	}
}

// kill ends p at once.
func (p *process) kill(t *testing.T) {
	t.Helper()
	p.signal(t, syscall.SIGKILL)
	<-p.done
}

// endsItself waits for p to end with status 0, without a word.
func (p *process) endsItself(t *testing.T, within time.Duration) {
	t.Helper()
	select {
	case <-p.done:
	case <-time.After(within):
		t.Fatalf("%s still runs after %v", p.name, within)
	}
	if text := p.out.String(); p.err != nil || text != "" {
		t.Errorf("%s ended with %v and said %q, want status 0 and nothing", p.name, p.err, text)
	}
}

// expect waits for p to print, after its first from bytes, what matches the
// expression, and returns its groups.
func (p *process) expect(t *testing.T, from int, within time.Duration, expr string) []string {
	t.Helper()
	late := time.After(within)
	for {
		ended := p.ended() // looked at first: what it printed last is then there
		more := p.out.changed()
		if found := p.out.find(from, expr); found != nil {
			return found
		}
		if ended {
			t.Fatalf("%s ended (%v) before it printed %q", p.name, p.err, expr)
		}
		select {
		case <-more:
		case <-p.done:
		case <-late:
			t.Fatalf("%s has not printed %q within %v", p.name, expr, within)
		}
	}
}

// eventually tries f until it succeeds.
func eventually(t *testing.T, within time.Duration, f func() error) {
	t.Helper()
	for end := time.Now().Add(within); ; time.Sleep(10 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("after %v: %v", within, err)
		}
	}
}

// vwProcess is a vw that listens.
type vwProcess struct {
	*process
	addr, url string
}

// startVW starts the vw that is shipped, with nothing in its environment but
// env and a free port.
func startVW(t *testing.T, env ...string) *vwProcess {
	t.Helper()
	return startVWCommand(t, exec.Command(build(t, "linux/amd64"), "stream"), env...)
}

func startVWCommand(t *testing.T, cmd *exec.Cmd, env ...string) *vwProcess {
	t.Helper()
	// One address only: of a port that is free on 127.0.0.1, ::1 may have a user.
	cmd.Env = append(env, "VW_PORT=0", "VW_HOST=127.0.0.1")
	v := &vwProcess{process: start(t, "vw", cmd)}
	t.Cleanup(func() {
		v.stop(t)
		if v.err != nil {
			t.Errorf("vw ended with %v, want status 0", v.err)
		}
	})
	v.addr = v.expect(t, 0, startupTime, `msg=listening addr=(127\.0\.0\.1:\d+)\n`)[1]
	v.url = "http://" + v.addr
	return v
}

// call asks the API and returns the body of the answer.
func (v *vwProcess) call(t *testing.T, want int, method, path, body string) string {
	t.Helper()
	r, err := http.NewRequest(method, v.url+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Close = true // leaves no idle connection behind
	c := http.Client{Timeout: settleTime}
	a, err := c.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Body.Close()
	b, err := io.ReadAll(a.Body)
	if err != nil || a.StatusCode != want {
		t.Fatalf("%s %s %s: got %s %s (%v), want %d", method, path, body, a.Status, b, err, want)
	}
	return string(b)
}

// send adds a destination and waits until it is connected.
func (v *vwProcess) send(t *testing.T, id, feed, url string) {
	t.Helper()
	v.call(t, http.StatusOK, "POST", "/api/destinations", fmt.Sprintf(`{"id":%q,"stream":%q,"destination":%q}`, id, feed, url))
	v.expect(t, 0, startupTime, `msg=connected dest=`+regexp.QuoteMeta(id)+` `)
}

// rss returns the resident bytes of vw.
func (v *vwProcess) rss() (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", v.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	_, after, _ := strings.Cut(string(b), "VmRSS:")
	var n int
	if _, err := fmt.Sscanf(after, "%d kB", &n); err != nil {
		return 0, fmt.Errorf("VmRSS of vw: %w", err)
	}
	return n << 10, nil
}

func mb(bytes int) float64 { return float64(bytes) / (1 << 20) }

// sampleRSS reads the resident memory at each interval, until stop.
func (v *vwProcess) sampleRSS(t *testing.T, every time.Duration) (stop func() []int) {
	var samples []int
	var sampler sync.WaitGroup
	end := make(chan struct{})
	sampler.Go(func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			select {
			case <-end:
				return
			case <-tick.C:
				n, err := v.rss()
				if err != nil {
					t.Error(err)
					return
				}
				samples = append(samples, n)
			}
		}
	})
	stopOnce := sync.OnceFunc(func() {
		close(end)
		sampler.Wait()
	})
	t.Cleanup(stopOnce)
	return func() []int {
		stopOnce()
		return samples
	}
}

// startFFmpeg starts ffmpeg; it is silent unless something is wrong.
func startFFmpeg(t *testing.T, args ...[]string) *process {
	t.Helper()
	return start(t, "ffmpeg", exec.Command(tool(t, "ffmpeg"), slices.Concat([]string{"-nostdin", "-v", "error"}, slices.Concat(args...))...))
}

// relayProcess is testdata/relay, with a record for each connection.
type relayProcess struct {
	*process
	addr, dir string
}

// startRelay starts a relay that listens on addr.
func startRelay(t *testing.T, addr string, args ...string) *relayProcess {
	t.Helper()
	dir := t.TempDir()
	c := exec.Command(build(t, "relay"), slices.Concat([]string{
		"-listen", addr, "-record", filepath.Join(dir, "%d.ts"), "-index", filepath.Join(dir, "index"),
	}, args)...)
	r := &relayProcess{process: start(t, "relay", c), dir: dir}
	r.addr = r.expect(t, 0, startupTime, `^([\d.]+:\d+)\n`)[1]
	return r
}

// record is the file of what a connection brought.
func (r *relayProcess) record(conn int) string {
	return filepath.Join(r.dir, fmt.Sprintf("%d.ts", conn))
}

// recorded is a message that a relay got.
type recorded struct {
	payload []byte
	at      time.Time
	kind    string
}

// entry is a line of the index.
type entry struct {
	conn, offset, size int
	nanoseconds        int64
	kind               string
}

// entries reads the index.
func (r *relayProcess) entries(t *testing.T) (all []entry) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(r.dir, "index"))
	if err != nil {
		t.Fatal(err)
	}
	b = b[:bytes.LastIndexByte(b, '\n')+1]
	for line := range bytes.Lines(b) {
		var e entry
		if _, err := fmt.Sscan(string(line), &e.conn, &e.offset, &e.size, &e.nanoseconds, &e.kind); err != nil {
			t.Fatalf("index %q: %v", line, err)
		}
		all = append(all, e)
	}
	return all
}

// messages returns what a connection brought until now.
func (r *relayProcess) messages(t *testing.T, conn int) (all []recorded) {
	t.Helper()
	index := r.entries(t) // before the record, which then has all of it
	b, err := os.ReadFile(r.record(conn))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range index {
		if e.conn == conn {
			all = append(all, recorded{b[e.offset : e.offset+e.size], time.Unix(0, e.nanoseconds), e.kind})
		}
	}
	return all
}

// total returns how many bytes all connections brought until now.
func (r *relayProcess) total(t *testing.T) (n int) {
	t.Helper()
	for _, e := range r.entries(t) {
		n += e.size
	}
	return n
}

// ---- What stands between

// certificates are files: a CA of our own, a certificate of it for 127.0.0.1
// and more, its key, and both together as haproxy wants them.
type certificates struct{ ca, cert, key, both string }

func newCerts(t testing.TB, more ...net.IP) certificates {
	t.Helper()
	dir := t.TempDir()
	now := time.Now()
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "CA of the tests"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "relay"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
		IPAddresses: append(more, net.IPv4(127, 0, 0, 1)),
		KeyUsage:    x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	check := func(b []byte, err error) []byte {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	newKey := func() *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		check(nil, err)
		return k
	}
	caKey, leafKey := newKey(), newKey()
	write := func(name string, blocks ...[]byte) string {
		name = filepath.Join(dir, name)
		check(nil, os.WriteFile(name, slices.Concat(blocks...), 0o600))
		return name
	}
	block := func(kind string, der []byte) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	}
	cert := block("CERTIFICATE", check(x509.CreateCertificate(rand.Reader, leaf, ca, &leafKey.PublicKey, caKey)))
	key := block("PRIVATE KEY", check(x509.MarshalPKCS8PrivateKey(leafKey)))
	return certificates{
		ca:   write("ca.pem", block("CERTIFICATE", check(x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)))),
		cert: write("cert.pem", cert), key: write("key.pem", key), both: write("both.pem", cert, key),
	}
}

// startWith starts cmd with a port that is open already, as its descriptor 3:
// one that was only looked up might be taken before cmd listens on it. It
// returns the address.
func startWith(t *testing.T, l net.Listener, name string, cmd *exec.Cmd) string {
	t.Helper()
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	defer l.Close()
	cmd.ExtraFiles = []*os.File{f}
	start(t, name, cmd)
	return l.Addr().String()
}

// listenLoopback listens on a free port until the test ends.
func listenLoopback(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// startNginx puts nginx with TLS in front of a relay and returns its address.
func startNginx(t *testing.T, c certificates, relay string) string {
	t.Helper()
	return startNginxWith(t, "ssl", fmt.Sprintf(`
		ssl_certificate %s;
		ssl_certificate_key %s;
		location / {
			proxy_pass http://%s;
			proxy_http_version 1.1;
			proxy_set_header Host $http_host;
			proxy_set_header Upgrade $http_upgrade;
			proxy_set_header Connection "upgrade";
		}`, c.cert, c.key, relay))
}

// startNginxWith starts an nginx that listens with those options and has that
// server; it returns its address.
func startNginxWith(t *testing.T, options, server string) string {
	t.Helper()
	dir := t.TempDir()
	l := listenLoopback(t)
	conf := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, `
user root;
daemon off;
worker_processes 1;
pid %[1]s/pid;
error_log stderr;
events { worker_connections 64; }
http {
	access_log off;
	client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/fastcgi;
	uwsgi_temp_path %[1]s/uwsgi; scgi_temp_path %[1]s/scgi;
	server {
		listen %[2]s %[3]s;
		%[4]s
	}
}
`, dir, l.Addr(), options, server), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(tool(t, "nginx"), "-p", dir, "-c", conf, "-e", "stderr")
	cmd.Env = []string{"NGINX=3;"} // how one nginx leaves its sockets to the next
	return startWith(t, l, "nginx", cmd)
}

// startHAProxy puts haproxy with TLS in front of a relay and returns its address.
func startHAProxy(t *testing.T, c certificates, relay string) string {
	t.Helper()
	l := listenLoopback(t)
	conf := filepath.Join(t.TempDir(), "haproxy.cfg")
	if err := os.WriteFile(conf, fmt.Appendf(nil, `
global
	maxconn 64
defaults
	mode http
	timeout connect 5s
	timeout client 30s
	timeout server 30s
	timeout tunnel 30s
frontend front
	bind fd@3 ssl crt %s alpn http/1.1
	default_backend relay
backend relay
	server relay %s
`, c.both, relay), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(tool(t, "haproxy"), "-db", "-f", conf)
	return startWith(t, l, "haproxy", cmd)
}

// holdPort returns a port of 127.0.0.1 that nobody listens on until the test
// ends, but who shares it.
func holdPort(t *testing.T) int {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	const reusePort = 15 // asm-generic/socket.h
	addr := &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}
	if err := errors.Join(syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, reusePort, 1), syscall.Bind(fd, addr)); err != nil {
		t.Fatal(err)
	}
	name, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return name.(*syscall.SockaddrInet4).Port
}

// startCaddy puts caddy with TLS in front of a relay and returns its address.
// It takes no open port.
func startCaddy(t *testing.T, c certificates, relay string) string {
	t.Helper()
	dir, port := t.TempDir(), holdPort(t)
	conf := filepath.Join(dir, "Caddyfile")
	if err := os.WriteFile(conf, fmt.Appendf(nil, `
{
	admin off
	auto_https off
}
https://127.0.0.1:%d {
	bind 127.0.0.1
	tls %s %s
	reverse_proxy %s
}
`, port, c.cert, c.key, relay), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(tool(t, "caddy"), "run", "--config", conf, "--adapter", "caddyfile")
	cmd.Env = []string{"HOME=" + dir}
	start(t, "caddy", cmd).expect(t, 0, startupTime, `serving initial configuration`)
	return fmt.Sprintf("127.0.0.1:%d", port)
}

// tap stands between ffmpeg and vw and keeps a copy of what ffmpeg says. It
// passes bytes on as they are, so that vw meets ffmpeg's own HTTP.
type tap struct {
	addr string
	done chan struct{} // closed when its one connection has ended

	mu   sync.Mutex
	said bytes.Buffer
}

func (a *tap) Write(p []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.said.Write(p)
}

// startTap listens for one connection and passes it on to vw.
func startTap(t *testing.T, vw string) *tap {
	t.Helper()
	l := listenLoopback(t)
	a := &tap{addr: l.Addr().String(), done: make(chan struct{})}
	t.Cleanup(func() {
		l.Close()
		<-a.done // ffmpeg, started later, has ended
	})
	go func() {
		defer close(a.done)
		client, err := l.Accept()
		if err != nil {
			return
		}
		defer client.Close()
		server, err := net.Dial("tcp", vw)
		if err != nil {
			t.Error(err)
			return
		}
		defer server.Close()
		var back sync.WaitGroup
		back.Go(func() {
			io.Copy(client, server)
			client.(*net.TCPConn).CloseWrite()
		})
		io.Copy(io.MultiWriter(a, server), client)
		server.(*net.TCPConn).CloseWrite()
		back.Wait()
	}()
	return a
}

// posted waits for the end of the connection and returns the body it brought.
func (a *tap) posted(t *testing.T) []byte {
	t.Helper()
	select {
	case <-a.done:
	case <-time.After(settleTime):
		t.Fatalf("the post has not ended after %v", settleTime)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(a.said.Bytes())))
	if err != nil {
		t.Fatalf("what ffmpeg posted: %v", err)
	}
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatalf("what ffmpeg posted: %v after %d bytes", err, len(b))
	}
	return b
}

// post is an HTTP post of our own, in pieces as they are written.
type post struct {
	conn   net.Conn
	chunks io.WriteCloser
	bytes  int
	sum    hash.Hash // of the body, unless nil
}

func startPost(t *testing.T, vw, feed string) *post {
	t.Helper()
	conn, err := net.Dial("tcp", vw)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if _, err := fmt.Fprintf(conn, "POST /ts/%s HTTP/1.1\r\nHost: %s\r\nTransfer-Encoding: chunked\r\n\r\n", feed, vw); err != nil {
		t.Fatal(err)
	}
	return &post{conn: conn, chunks: httputil.NewChunkedWriter(conn)}
}

func (p *post) write(t *testing.T, b []byte) {
	t.Helper()
	p.conn.SetDeadline(time.Now().Add(startupTime))
	if _, err := p.chunks.Write(b); err != nil {
		t.Fatalf("post, after %d bytes: %v", p.bytes, err)
	}
	p.bytes += len(b)
	if p.sum != nil {
		p.sum.Write(b)
	}
}

// end is the proper end of the body; the answer must be 200.
func (p *post) end(t *testing.T) {
	t.Helper()
	p.chunks.Close()
	io.WriteString(p.conn, "\r\n") // no trailers
	a, err := http.ReadResponse(bufio.NewReader(p.conn), nil)
	if err != nil {
		t.Fatalf("post, at its end: %v", err)
	}
	defer a.Body.Close()
	if b, err := io.ReadAll(a.Body); err != nil || a.StatusCode != http.StatusOK {
		t.Fatalf("post, at its end: got %s %s (%v), want 200", a.Status, b, err)
	}
	p.conn.Close()
}

// startStuck listens for one websocket, says yes, and never reads again.
func startStuck(t *testing.T, c certificates, useTLS bool) string {
	t.Helper()
	l := listenLoopback(t)
	var config *tls.Config
	if useTLS {
		cert, err := tls.LoadX509KeyPair(c.cert, c.key)
		if err != nil {
			t.Fatal(err)
		}
		config = &tls.Config{Certificates: []tls.Certificate{cert}}
	}
	end, ended := make(chan struct{}), make(chan struct{})
	t.Cleanup(func() {
		l.Close()
		close(end)
		<-ended
	})
	go func() {
		defer close(ended)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		conn.(*net.TCPConn).SetReadBuffer(4096)
		if config != nil {
			conn = tls.Server(conn, config)
		}
		r, err := http.ReadRequest(bufio.NewReader(conn))
		if err != nil {
			t.Error(err)
			return
		}
		accept := sha1.Sum([]byte(r.Header.Get("Sec-WebSocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11")) // RFC 6455 4.2.2
		fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n",
			base64.StdEncoding.EncodeToString(accept[:]))
		<-end
	}()
	return l.Addr().String()
}

// awaitFull waits until the kernel could not send to a port of loopback for
// half a second, though it had what to send: its reader is stuck.
func awaitFull(t *testing.T, addr string) {
	t.Helper()
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	// Remote address, state ESTABLISHED, bytes that are sent and not yet
	// acknowledged. proc_net_tcp.txt
	line := regexp.MustCompile(fmt.Sprintf(`0100007F:%04X 01 ([0-9A-F]{8}):`, n))
	var last string
	var since time.Time
	eventually(t, settleTime, func() error {
		b, err := os.ReadFile("/proc/net/tcp")
		if err != nil {
			t.Fatal(err)
		}
		m := line.FindSubmatch(b)
		switch {
		case m == nil:
			return fmt.Errorf("no connection to %s", addr)
		case string(m[1]) != last || last == "00000000":
			last, since = string(m[1]), time.Now()
		case time.Since(since) > 500*time.Millisecond:
			return nil
		}
		return fmt.Errorf("the connection to %s is not full: %s", addr, last)
	})
}
