package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestStall: a relay that stops reading for 4 s, at 1, 4 and 8 Mbit/s.
func TestStall(t *testing.T) {
	notUnderRace(t)
	for _, mbit := range []int{1, 4, 8} {
		t.Run(fmt.Sprint(mbit, " Mbit"), func(t *testing.T) {
			t.Parallel()
			var log logBuffer
			r, ctx, tasks := realRules(t, &log)
			c := ffmpegClip(t, mbit*1000, 9)
			stalls, healthy := &chaosRelay{t: t, clip: c, rcvbuf: 64 << 10}, &chaosRelay{t: t, clip: c}
			stalls.start()
			healthy.start()
			r.to(t, "stalls", "video0", "ws://"+stalls.addr)
			r.to(t, "healthy", "video0", "ws://"+healthy.addr)
			waitFor(t, "both connections", func() bool { return strings.Count(log.String(), "msg=connected") == 2 })
			start := c.film(ctx, r.mux, "video0", tasks)
			time.Sleep(2 * time.Second)
			stalls.stall.Lock()
			time.Sleep(4 * time.Second)
			resumed := time.Now()
			stalls.stall.Unlock()
			time.Sleep(2500 * time.Millisecond)

			fresh, jumps := time.Duration(-1), 0
			worst := time.Duration(0)
			prev := -1
			for _, a := range stalls.arrivals() {
				age := a.at.Sub(start.Add(time.Duration(a.frame) * 40 * time.Millisecond))
				if a.frame != prev+1 {
					jumps++
					if !a.key {
						t.Errorf("after frame %d came %d, which is no keyframe", prev, a.frame)
					}
				}
				prev = a.frame
				if a.at.Before(resumed) {
					continue
				}
				if fresh < 0 && age <= 700*time.Millisecond {
					fresh = a.at.Sub(resumed)
				}
				if fresh >= 0 {
					worst = max(worst, age)
				}
			}
			if fresh < 0 || fresh > 500*time.Millisecond || jumps == 0 || worst > 700*time.Millisecond {
				t.Errorf("fresh video %v after resuming, by %d jumps, then %v old at most", fresh, jumps, worst)
			}
			if n := stalls.conns.Load(); n != 1 {
				t.Errorf("got %d connections, want 1: %s", n, &log)
			}
			var lag time.Duration
			for i, a := range healthy.arrivals() {
				if a.frame != i {
					t.Fatalf("the other relay: got frame %d, want %d", a.frame, i)
				}
				lag = max(lag, a.at.Sub(start.Add(time.Duration(i)*40*time.Millisecond)))
			}
			t.Logf("fresh after %v, then at most %v old; the other relay at most %v", fresh, worst, lag)
			if d, _ := r.destinations["healthy"].count(); d.dropped != [causes]uint64{} {
				t.Errorf("the other relay: %+v", d)
			}
			stalls.decodes()
		})
	}
}

// TestStallReplaced: one that stalls longer is replaced, and has fresh video
// within 1.5 s of answering again.
func TestStallReplaced(t *testing.T) {
	t.Parallel()
	r, ctx, tasks := realRules(t, io.Discard)
	c := ffmpegClip(t, 1000, 14)
	relay := &chaosRelay{t: t, clip: c, rcvbuf: 64 << 10}
	relay.start()
	r.to(t, "0", "video0", "ws://"+relay.addr)
	start := c.film(ctx, r.mux, "video0", tasks)
	time.Sleep(time.Second)
	relay.stall.Lock()
	time.Sleep(9 * time.Second)
	resumed := time.Now()
	relay.stall.Unlock()
	time.Sleep(1500 * time.Millisecond)
	for _, a := range relay.arrivals() {
		age := a.at.Sub(start.Add(time.Duration(a.frame) * 40 * time.Millisecond))
		if a.at.After(resumed) && age < 700*time.Millisecond {
			t.Logf("fresh after %v on connection %d", a.at.Sub(resumed), relay.conns.Load())
			if relay.conns.Load() < 2 {
				t.Error("the connection was not replaced")
			}
			return
		}
	}
	t.Error("no fresh video within 1.5 s")
}

// TestDeadPath: a forwarder that swallows bytes without a FIN is noticed in at
// most 7 s, and video is back within 1 s of the path's return.
func TestDeadPath(t *testing.T) {
	t.Parallel()
	var log logBuffer
	r, ctx, tasks := realRules(t, &log)
	c := ffmpegClip(t, 1000, 16)
	relay := &chaosRelay{t: t, clip: c}
	relay.start()
	var dead atomic.Bool
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var conns sync.WaitGroup
	t.Cleanup(conns.Wait)
	t.Cleanup(func() { l.Close(); relay.end() })
	conns.Go(func() {
		for {
			a, err := l.Accept()
			if err != nil {
				return
			}
			b, err := net.Dial("tcp", relay.addr)
			if err != nil || dead.Load() {
				a.Close() // a host without a path would not answer; what matters is the wait
				continue
			}
			for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
				conns.Go(func() {
					defer way[0].Close()
					defer way[1].Close()
					buf := make([]byte, 4096)
					for {
						n, err := way[0].Read(buf)
						if err != nil {
							return
						}
						if !dead.Load() {
							way[1].Write(buf[:n])
						}
					}
				})
			}
		}
	})
	r.to(t, "0", "video0", "ws://"+l.Addr().String())
	c.film(ctx, r.mux, "video0", tasks)
	waitFor(t, "video", func() bool { return len(relay.arrivals()) > 25 })
	dead.Store(true)
	cut := time.Now()
	var noticed time.Duration
	for noticed == 0 && time.Since(cut) < 10*time.Second {
		if strings.Contains(log.String(), "no connection") {
			noticed = time.Since(cut)
		}
		time.Sleep(time.Millisecond)
	}
	if noticed == 0 || noticed > 7*time.Second {
		t.Errorf("noticed after %v, want 7 s at most", noticed)
	}
	dead.Store(false)
	back := time.Now()
	n := len(relay.arrivals())
	waitFor(t, "video again", func() bool { return len(relay.arrivals()) > n })
	t.Logf("noticed after %v, video %v after the path's return", noticed, time.Since(back))
	if d := time.Since(back); d > time.Second {
		t.Errorf("video %v after the path's return, want 1 s at most", d)
	}
}

// TestMute holds I6 at the connection: mute under full load with a slow reader, by
// rules and by the switch, on every way. After the call no message with the muted
// track is begun, and framing and video are whole.
func TestMute(t *testing.T) {
	notUnderRace(t)
	for _, tt := range []struct{ by, way, source string }{
		{"rule", "ws", "stream/x"}, {"switch", "ws", "stream/x"}, {"switch", "ws", "both"},
		{"switch", "wss", "stream/x"}, {"switch", "wss", "both"},
		{"switch", "GET", "stream/x"}, {"switch", "GET", "both"},
		{"switch", "out", "stream/x"}, {"switch", "out", "both"},
	} {
		t.Run(fmt.Sprintf("%s, %s of %s", tt.by, tt.way, tt.source), func(t *testing.T) {
			r, ctx, tasks := realRules(t, io.Discard)
			r.maxLag = time.Minute // what a queue drops for its age is not announced on a feed alone
			conn, plain := watchWay(t, ctx, r, tt.way, tt.source)
			mute := byRule(r)
			heard, rounds := 5*time.Millisecond, scaled(100, 300, 1000)
			if tt.by != "rule" {
				rounds = scaled(50, 150, 1000)
				mute = bySwitch(t, r)
				heard = 60 * time.Millisecond // what was captured while it was muted does not come
			}
			if tt.way != "ws" {
				rounds = scaled(10, 30, 1000)
			}
			for _, feed := range []string{"video0", "audio0", "both"} {
				if feed == tt.source || tt.source != "both" && feed != "both" {
					tasks.Go(func() { load(ctx, r, feed) })
				}
			}
			var marks []int // bytes written when a mute returned, when unmute was called, and so on
			var took []time.Duration
			mutes(t, func(muted bool) error {
				start := time.Now()
				err := mute(muted)
				took = append(took, time.Since(start))
				return err
			}, rounds, 5*time.Millisecond, heard, func(bool) { marks = append(marks, conn.len()) })
			conn.mu.Lock()
			sent := bytes.Clone(conn.sent)
			conn.mu.Unlock()
			var all []begun
			switch tt.way {
			case "wss":
				all = begunFrames(t, plain())
				for i, m := range marks {
					marks[i] = plainBytes(sent[:m])
				}
			case "GET":
				all = begunPackets(t, sent)
			default:
				all = begunFrames(t, sent)
			}
			checkMuted(t, all, marks, tt.source == "both")
			slices.Sort(took)
			n := len(took)
			t.Logf("of %d calls: median %v, p99 %v, slowest %v", n, took[n/2], took[n*99/100], took[n-1])
			if took[n-1] > 100*time.Millisecond {
				t.Errorf("a call took %v, want 100 ms at most", took[n-1])
			}
		})
	}
}

// watchWay makes a slow reader of source, by one of the ways that there are, and
// returns what watches its connection; plain is what came of it in TLS.
func watchWay(t *testing.T, ctx context.Context, r *rules, way, source string) (conn *watch, plain func() []byte) {
	t.Helper()
	conns := make(chan *watch, 10)
	watched := func(c net.Conn) net.Conn {
		w := &watch{Conn: c, slow: 2 * time.Millisecond}
		conns <- w
		return w
	}
	var mu sync.Mutex
	var got []byte
	relay := &chaosRelay{t: t, rcvbuf: 64 << 10, see: func([]byte) {}, accepted: watched}
	dial := r.dialer.dial
	r.dialer.dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := dial(ctx, network, address)
		if err != nil {
			return c, err
		}
		return watched(c), nil
	}
	if way == "wss" {
		ca := newCerts(t)
		relay.tls, r.dialer.roots = ca.server, ca.roots
		relay.saw = func(b []byte) {
			mu.Lock()
			defer mu.Unlock()
			got = append(got, b...)
		}
	}
	relay.start()
	switch way {
	case "GET":
		relay.get(newServer(ctx, r, "", discardLog), "/ts/"+source)
	case "out":
		relay.view(newServer(ctx, r, "", discardLog), "/out/"+source)
	default:
		r.to(t, "0", source, way+"://"+relay.addr)
		waitFor(t, "the connection", func() bool { return relay.conns.Load() == 1 })
	}
	conn = <-conns
	return conn, func() []byte {
		mu.Lock()
		defer mu.Unlock()
		return bytes.Clone(got)
	}
}

// plainBytes returns how many bytes of plain text a client has sent in TLS 1.3. Its
// first record of encrypted data is the end of the handshake. RFC 8446 5.2.
func plainBytes(sent []byte) (n int) {
	const header, overhead = 5, 1 + 16 // the type of the content, and the tag
	for first := true; len(sent) >= header; {
		size := header + int(binary.BigEndian.Uint16(sent[3:]))
		if sent[0] == 23 && len(sent) >= size {
			if !first {
				n += size - header - overhead
			}
			first = false
		}
		sent = sent[min(size, len(sent)):]
	}
	return n
}

// begun is what was sent in one piece: after how many bytes, and its media.
type begun struct {
	at    int
	media []byte
}

// begunFrames reads the messages of a websocket, from either side.
func begunFrames(t *testing.T, sent []byte) (all []begun) {
	t.Helper()
	_, rest, _ := bytes.Cut(sent, []byte("\r\n\r\n"))
	for len(rest) > 2 {
		at := len(sent) - len(rest)
		size, header := int(rest[1]&0x7f), 2
		switch {
		case size == 126 && len(rest) >= 4:
			size, header = int(binary.BigEndian.Uint16(rest[2:])), 4
		case size == 127 && len(rest) >= 10:
			size, header = int(binary.BigEndian.Uint64(rest[2:])), 10
		}
		var mask [4]byte
		if rest[1]&0x80 != 0 {
			if header += 4; len(rest) >= header {
				copy(mask[:], rest[header-4:])
			}
		}
		if len(rest) < header+size {
			break // the last one was on its way
		}
		opcode, media := rest[0]&15, bytes.Clone(rest[header:header+size])
		for i := range media {
			media[i] ^= mask[i%4]
		}
		if rest[0]&0xf0 != 0x80 || opcode != opBinary && opcode < opClose {
			t.Fatalf("after %d bytes a frame begins with %x", at, rest[:2])
		}
		if opcode == opBinary {
			all = append(all, begun{at, media})
		}
		rest = rest[header+size:]
	}
	return all
}

// begunPackets reads the packets of an answer in chunks.
func begunPackets(t *testing.T, sent []byte) (all []begun) {
	t.Helper()
	_, rest, _ := bytes.Cut(sent, []byte("\r\n\r\n"))
	var packet []byte
	for {
		line, after, ok := bytes.Cut(rest, []byte("\r\n"))
		size, err := strconv.ParseUint(string(line), 16, 32)
		if !ok || len(after) < int(size)+2 {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		for i, b := range after[:size] {
			if len(packet) == 0 {
				all = append(all, begun{at: len(sent) - len(after) + i})
			}
			if packet = append(packet, b); len(packet) == packetSize {
				all[len(all)-1].media, packet = packet, nil
			}
		}
		rest = after[size+2:]
	}
}

// checkMuted reads what was sent to a reader: between a mark and the next, and so
// on for each two, nothing with sound is begun.
func checkMuted(t *testing.T, sent []begun, marks []int, onFeed bool) {
	t.Helper()
	marks = marks[:len(marks)-len(marks)%2]
	check := newTSCheck()
	hears := func(b []byte) bool { return hasAudio(check, b) }
	var all []byte
	if onFeed {
		hears = func(b []byte) bool { return payloadsByPID(b)[testAudio] > 0 }
	}
	audio, wrong := 0, 0
	for _, m := range sent {
		if onFeed {
			all = append(all, m.media...)
		} else {
			check.read(m.media)
		}
		if !hears(m.media) {
			continue
		}
		audio++
		// marks[i-1] <= at < marks[i]: with i odd, between a mute and the next unmute
		if i, found := slices.BinarySearch(marks, m.at); i%2 == 1 && !found || found && i%2 == 0 && marks[i+1] > m.at {
			wrong++
		}
	}
	if audio < len(marks)/4 {
		t.Errorf("only %d messages of audio were sent: the test shows nothing", audio)
	}
	if wrong > 0 {
		t.Errorf("%d messages of %d were begun while muted", wrong, audio)
	}
	if len(check.problems) > 0 {
		t.Errorf("got %d problems: %q", len(check.problems), check.problems[:min(len(check.problems), 5)])
	}
	for _, pid := range []uint16{testVideo, testAudio} {
		if wrong, _ := breaks(all, pid); wrong > 0 {
			t.Errorf("PID %#x: %d breaks of continuity that are not announced", pid, wrong)
		}
	}
	t.Logf("%d messages of audio", audio)
}

// hasAudio tells whether b has packets of the audio of check's program.
func hasAudio(check *tsCheck, b []byte) bool {
	for p := packet(b); len(p) > 0; p = p[packetSize:] {
		if check.types[p.pid()] == 3 {
			return true
		}
	}
	return false
}

// TestMuteSeen is the same as seen by readers on ws, wss, /out and GET: 50 ms
// after the call nothing of the muted track comes, and no packet of the video is
// lost.
func TestMuteSeen(t *testing.T) {
	notUnderRace(t)
	ca := newCerts(t)
	for _, by := range []string{"rule", "switch"} {
		for _, way := range []string{"ws", "wss", "GET", "out"} {
			t.Run(by+" "+way, func(t *testing.T) {
				t.Parallel()
				r, ctx, tasks := realRules(t, io.Discard)
				relay := &chaosRelay{t: t, rcvbuf: 64 << 10}
				if way == "wss" {
					relay.tls = ca.server
					r.dialer.roots = ca.roots
				}
				check := newTSCheck()
				var since atomic.Pointer[time.Time] // of the mute in force
				var audio, late atomic.Int64
				relay.see = func(b []byte) {
					check.read(b)
					if hasAudio(check, b) {
						audio.Add(1)
						if at := since.Load(); at != nil && time.Since(*at) > 50*time.Millisecond {
							late.Add(1)
						}
					}
				}
				relay.start()
				mute := byRule(r)
				if by == "switch" {
					mute = bySwitch(t, r)
				}
				if err := mute(false); err != nil {
					t.Fatal(err)
				}
				switch way {
				case "GET":
					relay.get(newServer(ctx, r, "", discardLog), "/ts/stream/x")
				case "out":
					relay.view(newServer(ctx, r, "", discardLog), "/out/stream/x")
				default:
					r.to(t, "0", "stream/x", way+"://"+relay.addr)
					waitFor(t, "the connection", func() bool { return relay.conns.Load() == 1 })
				}
				tasks.Go(func() { load(ctx, r, "video0") })
				tasks.Go(func() { load(ctx, r, "audio0") })
				waitFor(t, "audio", func() bool { return audio.Load() > 0 })
				rounds := scaled(5, 20, 1000)
				slowest := mutes(t, mute, rounds, 150*time.Millisecond, 150*time.Millisecond, func(muted bool) {
					if now := time.Now(); muted {
						since.Store(&now)
					} else {
						since.Store(nil)
					}
				})
				relay.end()
				if slowest > 100*time.Millisecond {
					t.Errorf("a call took %v, want 100 ms at most", slowest)
				}
				if late.Load() > 0 || audio.Load() < int64(rounds) {
					t.Errorf("%d messages of %d with audio came late", late.Load(), audio.Load())
				}
				if len(check.problems) > 0 {
					t.Errorf("got %d problems: %q", len(check.problems), check.problems[:min(len(check.problems), 5)])
				}
				t.Logf("the slowest of %d calls took %v; %d messages of audio", 2*rounds, slowest, audio.Load())
			})
		}
	}
}

// TestDeleteStalled: when a delete returns, nothing of the media reaches a
// stalled relay beyond what its kernel already held.
func TestDeleteStalled(t *testing.T) {
	r, ctx, tasks := realRules(t, io.Discard)
	tasks.Go(func() { load(ctx, r, "video0") })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	l.(*net.TCPListener).SetDeadline(time.Now().Add(time.Minute))
	var worst time.Duration
	for i := range scaled(20, 100, 100) {
		r.to(t, "0", "video0", "ws://"+l.Addr().String())
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := accept(conn); err != nil {
			t.Fatal(err)
		}
		held := func() int {
			n := 0
			c, _ := conn.(*net.TCPConn).SyscallConn()
			c.Control(func(fd uintptr) { n = inQueue(fd) })
			return n
		}
		d := r.destinations["0"]
		last := -1
		waitFor(t, "the relay to be full", func() bool { // not only a feed that pauses
			time.Sleep(5 * time.Millisecond)
			d.mu.Lock()
			defer d.mu.Unlock()
			n := held()
			full := n == last && d.link != nil && d.link.wire.unsent() > 0
			last = n
			return full
		})
		start := time.Now()
		if err := r.deleteDestination("0"); err != nil {
			t.Fatal(err)
		}
		worst = max(worst, time.Since(start))
		atReturn := held()
		conn.SetReadDeadline(time.Now().Add(2 * time.Second))
		n, _ := io.Copy(io.Discard, conn)
		conn.Close()
		const closeFrame = 2 + 4 + 2
		if int(n) > atReturn+closeFrame {
			t.Errorf("delete %d: %d bytes came, %d were held", i, n, atReturn)
		}
	}
	if worst > 100*time.Millisecond {
		t.Errorf("a delete took %v, want 100 ms at most", worst)
	}
	t.Logf("the slowest delete took %v", worst)
}

// TestThousand: a thousand destinations at 1 Mbit/s are all live, in less than
// 96 MB. It is one of the long ones.
func TestThousand(t *testing.T) {
	if !*long {
		return
	}
	v := startVW(t)
	_, relay, _ := benchChild(t, "receivers")
	for i := range 1000 {
		v.call(t, http.StatusOK, "POST", "/api/destinations", fmt.Sprintf(`{"id":%d,"stream":"video0","destination":"ws://%s"}`, i, relay))
	}
	startFFmpeg(t, realTime, videoInput, videoCodec, []string{"-t", "12", v.url + "/ts/video0"}).endsItself(t, time.Minute)
	rss, err := v.rss()
	if err != nil || mb(rss) > 96 {
		t.Errorf("got %.0f MB, %v, want 96 at most", mb(rss), err)
	}
	if out := v.out.String(); strings.Contains(out, "level=WARN") {
		t.Errorf("a destination fell more than 500 ms behind, or was lost:\n%s", out)
	}
	t.Logf("%.0f MB", mb(rss))
}

// TestPathDown: the link to a relay in a network namespace goes down, and
// comes back. It is the relay's end that goes down: ours keeps its route, so
// that nothing is sent elsewhere. It needs root, so it is one of the long ones.
func TestPathDown(t *testing.T) {
	if !*long {
		return
	}
	sh := func(command string) {
		t.Helper()
		if out, err := exec.Command("sh", "-c", command).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", command, err, out)
		}
	}
	sh("ip netns add vwtest && ip link add vwtest0 type veth peer name vwtest1 netns vwtest")
	t.Cleanup(func() { sh("ip netns del vwtest") })
	sh("ip addr add 198.51.100.1/30 dev vwtest0 && ip link set vwtest0 up")
	sh("ip -n vwtest addr add 198.51.100.2/30 dev vwtest1 && ip -n vwtest link set vwtest1 up")
	relay := start(t, "relay", exec.Command(needs(t, "ip"), "netns", "exec", "vwtest", build(t, "relay"), "-listen", "198.51.100.2:8080", "-index", t.TempDir()+"/index"))
	relay.expect(t, 0, 5*time.Second, `198\.51`)

	var log logBuffer
	r, ctx, tasks := realRules(t, &log)
	c := ffmpegClip(t, 1000, 40)
	c.film(ctx, r.mux, "video0", tasks)
	r.to(t, "0", "video0", "ws://198.51.100.2:8080")
	delivered := func() uint64 {
		d, _ := r.destinations["0"].count()
		return d.delivered
	}
	for _, away := range []time.Duration{9 * time.Second, 12 * time.Second} {
		n := delivered()
		waitFor(t, "video", func() bool { return delivered() > n+25 })
		told := len(log.String())
		sh("ip -n vwtest link set vwtest1 down")
		down := time.Now()
		for !strings.Contains(log.String()[told:], "no connection") {
			if time.Since(down) > 7*time.Second {
				t.Fatal("not noticed within 7 s")
			}
			time.Sleep(time.Millisecond)
		}
		noticed := time.Since(down)
		time.Sleep(away - noticed)
		sh("ip -n vwtest link set vwtest1 up")
		up := time.Now()
		n = delivered()
		waitFor(t, "video again", func() bool { return delivered() > n })
		t.Logf("noticed after %v, video %v after the path's return", noticed, time.Since(up))
		if d := time.Since(up); d > 1500*time.Millisecond { // 1 s, and what a dial that met the dead path waits
			t.Errorf("video %v after the path's return", d)
		}
	}
}
