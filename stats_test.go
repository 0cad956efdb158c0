package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestCodecs: what a track is called, by its stream_type and its bytes.
func TestCodecs(t *testing.T) {
	pes := func(id byte, es string) string {
		return "\x00\x00\x01" + string([]byte{id}) + "\x00\x00\x80\x80\x05\x21\x00\x01\x00\x01" + es
	}
	sequence := "\x00\x00\x01\xb3\x28\x01\xe0\x13\xff\xff\xe0\x18"
	for _, tt := range []struct {
		name    string
		track   track
		payload string
		want    string
	}{
		{"MPEG-1 video", track{streamType: 0x02}, pes(0xe0, sequence+"\x00\x00\x01\xb8\x00\x08\x00\x00"), "mpeg1video"},
		{"MPEG-2 video", track{streamType: 0x02}, pes(0xe0, sequence+"\x00\x00\x01\xb5\x14\x8a\x00\x01"), "mpeg2video"},
		{"no sequence header", track{streamType: 0x02}, pes(0xe0, "\x00\x00\x01\x00\x00\x0f\xff\xf8"), "mpeg2video"},
		{"layer 2", track{streamType: 0x03}, pes(0xc0, "\xff\xfd\xa4\x00"), "mp2"},
		{"layer 3", track{streamType: 0x03}, pes(0xc0, "\xff\xfb\x90\x64"), "mp3"},
		{"layer 3, half rate", track{streamType: 0x04}, pes(0xc0, "\xff\xf3\x90\x64"), "mp3"},
		{"ADTS", track{streamType: 0x0f}, pes(0xc0, "\xff\xf1\x50\x80"), "aac"},
		{"H.264", track{streamType: 0x1b}, pes(0xe0, "\x00\x00\x00\x01\x09\xf0"), "h264"},
		{"AV1", track{streamType: 0x06, descriptors: []byte("\x05\x04AV01\x80\x04\x81\x05\x0c\x00")}, "", "av1"},
		{"KLV", track{streamType: 0x15, descriptors: []byte("\x05\x04KLVA")}, "", "klv"},
		{"Opus by its extension alone", track{streamType: 0x06, descriptors: []byte("\x7f\x02\x80\x01")}, "", "opus"},
		{"DTS of DVB", track{streamType: 0x06, descriptors: []byte("\x7b\x00")}, "", "dts"},
		{"Opus", track{streamType: 0x06, descriptors: []byte("\x05\x04Opus\x7f\x02\x80\x01")}, "", "opus"},
		{"AC-3 of DVB", track{streamType: 0x06, descriptors: []byte("\x0a\x04eng\x00\x6a\x01\x00")}, "", "ac3"},
		{"broken descriptor", track{streamType: 0x06, descriptors: []byte("\x05\xffOpus")}, "", "type 0x06"},
		{"private", track{streamType: 0xf0}, "", "type 0xf0"},
		{"cut", track{streamType: 0x02}, "\x00\x00\x01\xe0\x00\x00\x80\x80\xff", "mpeg2video"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFramer(nil)
			f.program = &program{tracks: []track{tt.track}}
			f.state(tt.track.pid).codec = mpegCodec([]byte(tt.payload))
			if got := f.tracks()[0].Codec; got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

// TestProblem: why there is nothing to send though the connection is open.
func TestProblem(t *testing.T) {
	feed := func(kinds ...string) *feedStats {
		f := &feedStats{Publisher: &publisherStats{}}
		for _, k := range kinds {
			f.Tracks = append(f.Tracks, trackStats{Kind: k})
		}
		return f
	}
	all := stats{
		Feeds: map[string]*feedStats{"both": feed("video", "audio"), "audio0": feed("audio"), "data0": feed("data"), "absent": {}},
		Streams: map[string]*streamStats{
			"stream/both": {Feeds: []string{"both"}, Present: []string{"both"}}, "stream/two": {Feeds: []string{"audio0", "both"}, Present: []string{"audio0", "both"}},
			"stream/sound": {Feeds: []string{"audio0", "absent"}, Present: []string{"audio0"}}, "stream/none": {}, "stream/absent": {Feeds: []string{"absent"}},
		},
	}
	const muted = "all of it is muted"
	for _, tt := range []struct {
		source                              string
		want, soundMuted, pictureMuted, off string
	}{
		{"both", "", "", "", muted},
		{"audio0", "", muted, "", muted},
		{"data0", "", muted, muted, muted},
		{"absent", "nobody publishes the feed", "nobody publishes the feed", "nobody publishes the feed", "nobody publishes the feed"},
		{"stream/both", "", "", "", muted},
		{"stream/two", "", "", "", muted},
		{"stream/sound", "", muted, "", muted},
		{"stream/none", "the stream has no feeds", "the stream has no feeds", "the stream has no feeds", "the stream has no feeds"},
		{"stream/absent", "nobody publishes a feed of the stream", "nobody publishes a feed of the stream", "nobody publishes a feed of the stream", "nobody publishes a feed of the stream"},
		{"stream/unknown", "no such stream", "no such stream", "no such stream", "no such stream"},
	} {
		for i, want := range []string{tt.want, tt.soundMuted, tt.pictureMuted, tt.off} {
			all.Mute = muteStatus{Audio: i&1 != 0, Video: i&2 != 0}
			if got := all.problem(tt.source); got != want {
				t.Errorf("%s, muted %+v: got %q, want %q", tt.source, all.Mute, got, want)
			}
		}
	}
}

// TestFeedStats: every state of a feed, and its figures.
func TestFeedStats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := newMux()
		body, in := net.Pipe()
		s := newSubscriber(raw, time.Second, nil)
		x.join("video0", s)
		done := make(chan struct{})
		go func() {
			defer close(done)
			x.publish("video0", &publisher{remote: "127.0.0.1:1", agent: "test"}, body)
		}()
		start := time.Now()
		check := func(want string) (f *feedStats) {
			t.Helper()
			synctest.Wait()
			feeds, _ := x.stats(time.Now())
			f = feeds["video0"]
			if got := fmt.Sprintf("%s %v", f.State, f.Since.Sub(start).Round(time.Second)); got != want {
				t.Errorf("after %v: got %s, want %s", time.Since(start), got, want)
			}
			return f
		}
		var m tsMaker
		m.tables(testVideo, 0x02)
		play := func(frames, gop int) {
			for i := range frames {
				m.frame(pes{pid: testVideo, id: 0xe0, key: i%gop == 0, pts: ticks(time.Since(start) * 9 / 100000), size: 5000})
				in.Write(m.Bytes())
				m.Reset()
				time.Sleep(40 * time.Millisecond)
			}
		}
		play(250, 25)
		f := check("live 0s")
		packets := uint64(2 + 250*28)
		if f.Packets != packets || f.Bytes != packets*packetSize || f.Frames != 250 || f.Keyframes != 10 || f.Resyncs+f.ContinuityErrors+f.Damaged != 0 {
			t.Errorf("got %+v, want %d packets, 250 frames and 10 keyframes", f, packets)
		}
		if rate := fmt.Sprintf("%.0f %.0f %.1f", f.FrameRate, f.BitRate/1e4, f.KeyframeRate); rate != "25 105 1.0" {
			t.Errorf("got rates %s, want 25 105 1.0", rate)
		}
		if f.Publisher.Agent != "test" || len(f.Tracks) != 1 || f.Tracks[0] != (trackStats{testVideo, "mpeg2video", "video"}) {
			t.Errorf("got %+v, %v", f.Publisher, f.Tracks)
		}
		time.Sleep(3 * time.Second)
		check("silent 10s")
		time.Sleep(3 * time.Second)
		if f := check("silent 10s"); f.BitRate != 0 {
			t.Errorf("silent: got bit rate %v, want 0", f.BitRate)
		}
		m.counter(testVideo) // one is missing
		play(3, 3)
		if f := check("damaged 16s"); f.ContinuityErrors != 1 {
			t.Errorf("got %d continuity errors, want 1", f.ContinuityErrors)
		}
		play(275, 1000)
		check("no keyframe 16s")
		in.Close()
		<-done
		check("absent 27s")
		x.leave("video0", s)
		if feeds, _ := x.stats(time.Now()); len(feeds) != 0 {
			t.Errorf("got %v, want no feeds", feeds)
		}
	})
}

// TestFeedStates: what is wrong with a feed is said in words, and "live" only
// while its frames come.
func TestFeedStates(t *testing.T) {
	avcKey, avcPlain := avcAUD+avcSPS+avcPPS+avcIDR+strings.Repeat("\x55", 1000), avcAUD+avcIDR
	type step struct {
		seconds int
		every   time.Duration
		post    func(m *tsMaker, i int)
		want    string
	}
	tables := func(m *tsMaker) { m.tables(testVideo, typeH264, testAudio, typeMPEG1Audio) }
	var began time.Time // of the test, by the clock of its bubble
	picture := func(es string) func(m *tsMaker, i int) {
		return func(m *tsMaker, i int) {
			tables(m)
			at := toTicks(time.Since(began))
			m.elementary(testVideo, unitOfClip{pts: at, dts: at, es: []byte(es)}, 0)
		}
	}
	sound := func(m *tsMaker, i int) {
		tables(m)
		m.frame(pes{pid: testAudio, id: 0xc0, pts: toTicks(time.Since(began)), size: 300, length: true})
	}
	empty := func(m *tsMaker, i int) {
		tables(m)
		m.Write(nullPacket)
	}
	nulls := func(m *tsMaker, i int) { m.Write(nullPacket) }
	scrambled := func(m *tsMaker, i int) {
		at := m.Len()
		picture(avcKey)(m, i)
		for p := range slices.Chunk(m.Bytes()[at:], packetSize) {
			if packet(p).pid() == testVideo {
				p[3] |= 0x80
			}
		}
	}
	const fast = 40 * time.Millisecond
	for _, tt := range []struct {
		name  string
		steps []step
	}{
		{"as it should be", []step{{12, fast, picture(avcKey), "live"}}},
		{"program 1 leaves the air and is back", []step{{3, fast, picture(avcKey), "live"}, {3, fast, empty, "program 1 is off air"}, {3, fast, picture(avcKey), "live"}}},
		{"off air from the start", []step{{4, fast, empty, "program 1 is off air"}}},
		{"nothing but null packets", []step{{4, fast, nulls, "no program map"}}},
		{"only sound comes", []step{{4, fast, sound, "no video"}, {2, fast, picture(avcKey), "live"}}},
		{"no keyframe", []step{{12, fast, picture(avcAUD + avcP), "no keyframe"}}},
		{"parameter sets once", []step{{1, fast, picture(avcKey), "live"}, {2, fast, picture(avcPlain), "no parameter sets"}, {1, fast, picture(avcKey), "live"}}},
		{"parameter sets never", []step{{2, fast, picture(avcPlain), "no parameter sets"}}},
		{"scrambled", []step{{2, fast, scrambled, "scrambled"}}},
		{"a picture every 5 s", []step{{4, 5 * time.Second, picture(avcKey), "live"}, {50, 5 * time.Second, picture(avcKey), "live"}, {7, time.Hour, nil, "live"}, {3, time.Hour, nil, "silent"}}},
		{"every 5 s, with tables between", []step{{100, 100 * time.Millisecond, func(m *tsMaker, i int) {
			if empty(m, i); i%50 == 0 {
				picture(avcKey)(m, i)
			}
		}, "live"}, {14, 100 * time.Millisecond, empty, "program 1 is off air"}}},
		{"a stall of a fast feed", []step{{5, fast, picture(avcKey), "live"}, {3, time.Hour, nil, "silent"}, {5, fast, picture(avcKey), "live"}, {3, time.Hour, nil, "silent"}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x := newMux()
				body, in := net.Pipe()
				done := make(chan struct{})
				go func() {
					defer close(done)
					x.publish("video0", &publisher{interrupt: func() {}}, body)
				}()
				x.join("video0", newSubscriber(raw, time.Second, nil))
				var m tsMaker
				began = time.Now()
				n := 0
				for i, s := range tt.steps {
					for end := time.Now().Add(time.Duration(s.seconds) * time.Second); time.Now().Before(end); n++ {
						if s.post != nil {
							m.Reset()
							s.post(&m, n)
							in.Write(m.Bytes())
						}
						time.Sleep(min(s.every, time.Until(end)))
					}
					synctest.Wait()
					feeds, _ := x.stats(time.Now())
					if got := feeds["video0"].State; got != s.want {
						t.Errorf("after step %d: got %q, want %q", i, got, s.want)
					}
				}
				in.Close()
				<-done
			})
		})
	}
}

// TestMuted: what a stream's rule had and has no more is told as muted.
func TestMuted(t *testing.T) {
	s := newTestServer(t, "")
	for _, tt := range []struct{ feeds, want string }{
		{`["a","b","c"]`, `["a","b","c"] []`},
		{`["c","a"]`, `["c","a"] ["b"]`},
		{`[]`, `[] ["b","c","a"]`},
		{`["b"]`, `["b"] ["c","a"]`},
	} {
		ask(s, `POST /api/streams {"stream":"stream/x","feeds":`+tt.feeds+`}`)
		st := s.commands.stats().Streams["stream/x"]
		feeds, _ := json.Marshal(st.Feeds)
		muted, _ := json.Marshal(st.Muted)
		if got := fmt.Sprintf("%s %s", feeds, muted); got != tt.want {
			t.Errorf("%s: got %s, want %s", tt.feeds, got, tt.want)
		}
	}
	ask(s, "DELETE /api/streams/stream/x")
	ask(s, `POST /api/streams {"stream":"stream/x","feeds":[]}`)
	if st := s.commands.stats().Streams["stream/x"]; len(st.Muted) != 0 {
		t.Errorf("after a delete: got %v muted, want none", st.Muted)
	}
}

// TestDestinationStats: every state of a destination, and its figures.
func TestDestinationStats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var forbid atomic.Bool
		forbid.Store(true)
		l := newLab(t, func(_ int64, _ string, conn net.Conn) {
			if forbid.Load() {
				io.ReadAtLeast(conn, make([]byte, 1000), 100)
				io.WriteString(conn, "HTTP/1.1 403 Forbidden\r\n\r\n")
				return
			}
			serveRelay(conn, func([]byte) {})
		})
		defer l.close()
		l.away.Store(true)
		l.send("video0", "ws://user:geheim@relay.invalid/in/a?code=geheim")
		start := time.Now()
		check := func(want string) (d *destinationStats) {
			t.Helper()
			synctest.Wait()
			d = l.destinations["0"].stats(time.Now())
			if got := fmt.Sprintf("%s %v %s", d.State, d.Since.Sub(start).Round(time.Second), d.Error); got != want {
				t.Errorf("got %s, want %s", got, want)
			}
			if (d.RetryAt != nil) != (d.State == "waiting" || d.State == "refused") {
				t.Errorf("%s: got retry at %v", d.State, d.RetryAt)
			}
			if b, _ := json.Marshal(d); strings.Contains(string(b), "geheim") {
				t.Errorf("got %s, with a secret in it", b)
			}
			return d
		}
		time.Sleep(10 * time.Second)
		check("waiting 0s connect to relay.invalid:80: connection refused")
		l.away.Store(false)
		time.Sleep(time.Second)
		check(`refused 10s the relay answered "403 Forbidden"`)
		forbid.Store(false)
		time.Sleep(15 * time.Second)
		synctest.Wait()
		ctx, stop := context.WithTimeout(t.Context(), 10*time.Second)
		defer stop()
		l.film(ctx, "video0", 2000)
		d := l.destinations["0"].stats(time.Now())
		if d.State != "open" || d.Reconnects != 0 || d.Frames < 200 || d.Messages < d.Frames || d.Bytes < 2000*d.Frames {
			t.Errorf("got %+v, want it open, with at least 200 frames", d)
		}
	})
}

// TestMetrics: Prometheus' own linter has no complaint, and counters are there.
func TestE2EMetrics(t *testing.T) {
	t.Parallel()
	promtool := needs(t, "promtool")
	vw := startVW(t)
	post := startPost(t, vw.addr, "video0")
	post.write(t, testClip(50, 2000))
	vw.call(t, http.StatusOK, "POST", "/api/streams", `{"stream":"stream/a","feeds":["video0","audio0"]}`)
	vw.call(t, http.StatusOK, "POST", "/api/destinations", `{"id":"0","stream":"stream/a","destination":"ws://127.0.0.1:1/"}`)
	vw.send(t, "1", "video0", "ws://"+vw.addr+"/in/relay0")
	eventually(t, 10*time.Second, func() error { // at the first ping
		var s stats
		if err := json.Unmarshal([]byte(vw.call(t, http.StatusOK, "GET", "/api/stats", "")), &s); err != nil {
			return err
		}
		if d := s.Destinations["1"]; d.State != "open" || d.RoundTrip <= 0 || d.RoundTrip > 1 {
			return fmt.Errorf("got %+v, want it open, with a round trip", d)
		}
		return nil
	})
	text := vw.call(t, http.StatusOK, "GET", "/metrics", "")
	for _, want := range []string{
		"\nvw_feed_frames_total{feed=\"video0\"} 5", "\nvw_destination_open{destination=\"0\"} 0\n",
		"\nvw_destination_dropped_messages_total{cause=\"lag\",destination=\"0\"} 0\n",
		"\nvw_stream_feeds{stream=\"stream/a\"} 2\n", "\nvw_stream_feeds_present{stream=\"stream/a\"} 1\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("got\n%s\nwant %q in it", text, want)
		}
	}
	lint := exec.Command(promtool, "check", "metrics")
	lint.Stdin = strings.NewReader(text)
	if out, err := lint.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("promtool: %v\n%s", err, out)
	}
}
