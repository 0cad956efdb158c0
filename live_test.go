package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	rand2 "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// clip is what ffmpeg makes of a test picture, a message a frame.
type clip struct {
	frames [][]byte
	pts    map[ticks]int // frame by PTS
}

// ffmpegClip makes n seconds of 25 frames/s, keyframes every 480 ms.
func ffmpegClip(t *testing.T, kbit, n int) clip {
	t.Helper()
	rate := fmt.Sprint(kbit, "k")
	// Noise makes ffmpeg need the bits.
	out, err := exec.Command("ffmpeg", "-v", "error", "-f", "lavfi", "-i", "testsrc2=size=640x480:rate=25,noise=alls=40:allf=t", "-t", fmt.Sprint(n),
		"-codec:v", "mpeg1video", "-b:v", rate, "-minrate", rate, "-maxrate", rate, "-bufsize", "400k", "-bf", "0", "-g", "12", "-f", "mpegts", "-").Output()
	if err != nil {
		t.Fatal("ffmpeg: ", err)
	}
	c := clip{pts: make(map[ticks]int)}
	all, err := frames(splitUp(out, packetSize))
	if err != nil {
		t.Fatal(err)
	}
	for i, m := range all {
		c.frames = append(c.frames, m.payload())
		for p := packet(m.payload()); len(p) > 0; p = p[packetSize:] {
			if pts, _ := timestamps(p.payload()); p.unitStart() && pts != nil {
				c.pts[readTime(pts)] = i
			}
		}
	}
	return c
}

// film posts the clip to a feed in real time, through the framer, in a
// goroutine that ends with the clip or ctx. It returns when the first was.
func (c clip) film(ctx context.Context, x *mux, name string, tasks *sync.WaitGroup) time.Time {
	start := time.Now()
	r, w := io.Pipe()
	tasks.Go(func() {
		defer w.Close()
		for i, frame := range c.frames {
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Until(start.Add(time.Duration(i) * 40 * time.Millisecond))):
			}
			w.Write(frame)
		}
	})
	tasks.Go(func() { x.publish(name, &publisher{interrupt: func() { r.Close() }}, r) })
	return start
}

// arrival is a frame that a relay got.
type arrival struct {
	frame int
	at    time.Time
	key   bool
}

// chaosRelay is a relay on real sockets that can stall, vanish and return.
type chaosRelay struct {
	t      *testing.T
	clip   clip
	rcvbuf int
	addr   string
	tls    *tls.Config
	see    func([]byte) // called with each message; nil: not

	conns atomic.Int64
	stall sync.RWMutex // held by a test: nothing is read

	mu   sync.Mutex
	all  []byte // every message
	got  []arrival
	last net.Conn
	end  func()
}

func (r *chaosRelay) start() {
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) {
			if r.rcvbuf > 0 {
				syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, r.rcvbuf)
			}
		})
	}}
	addr := r.addr
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	var l net.Listener
	waitFor(r.t, "the port of the relay", func() (ok bool) {
		var err error
		l, err = config.Listen(context.Background(), "tcp", addr)
		return err == nil
	})
	r.addr = l.Addr().String()
	var conns sync.WaitGroup
	var open sync.Map
	conns.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			if r.tls != nil {
				conn = tls.Server(conn, r.tls)
			}
			open.Store(conn, true)
			r.conns.Add(1)
			r.mu.Lock()
			r.last = conn
			r.mu.Unlock()
			conns.Go(func() {
				defer open.Delete(conn)
				defer conn.Close()
				serveRelay(&stalling{conn, r}, r.message)
			})
		}
	})
	r.end = sync.OnceFunc(func() {
		l.Close()
		open.Range(func(c, _ any) bool { c.(net.Conn).Close(); return true })
		conns.Wait()
	})
	r.t.Cleanup(r.end)
}

// stalling reads only while nobody holds the relay's stall.
type stalling struct {
	net.Conn
	r *chaosRelay
}

func (s *stalling) Read(p []byte) (int, error) {
	n, err := s.Conn.Read(p[:min(len(p), 4096)])
	s.r.stall.RLock()
	defer s.r.stall.RUnlock()
	return n, err
}

func (r *chaosRelay) message(b []byte) {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.see != nil {
		r.see(b)
	}
	r.all = append(r.all, b...)
	for p := packet(b); len(p) > 0; p = p[packetSize:] {
		if pts, _ := timestamps(p.payload()); p.unitStart() && pts != nil {
			if i, ok := r.clip.pts[readTime(pts)]; ok {
				r.got = append(r.got, arrival{i, now, p.randomAccess()})
			}
		}
	}
}

func (r *chaosRelay) arrivals() []arrival {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.got)
}

// record is all that the relay got so far.
func (r *chaosRelay) record() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.all)
}

// decodes fails the test when ffmpeg finds anything wrong with b.
func decodes(t *testing.T, b []byte) {
	t.Helper()
	name := filepath.Join(t.TempDir(), "record.ts")
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("ffmpeg", "-v", "error", "-i", name, "-f", "null", "-").CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("ffmpeg on %d bytes: %v: %s", len(b), err, out)
	}
}

// realRules are rules on real sockets that end with the test.
func realRules(t *testing.T, log io.Writer) (*rules, context.Context, *sync.WaitGroup) {
	ctx, end := context.WithCancelCause(t.Context())
	r := newRules(ctx, newMux(), 500*time.Millisecond, slog.New(slog.NewTextHandler(log, nil)))
	var tasks sync.WaitGroup
	t.Cleanup(func() {
		end(errShutdown)
		tasks.Wait()
		r.tasks.Wait()
	})
	return r, ctx, &tasks
}

func (r *rules) to(t *testing.T, id id, source, url string) {
	t.Helper()
	if _, err := r.setDestination(destinationRule{ID: id, Stream: source, Destination: url}); err != nil {
		t.Fatal(err)
	}
}

// TestStall: a relay that stops reading for 4 s, at 1, 4 and 8 Mbit/s.
func TestStall(t *testing.T) {
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
			decodes(t, stalls.record())
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

// watch is a connection at which the test sees which messages are begun: it
// keeps what is written.
type watch struct {
	net.Conn
	slow time.Duration // what one write in twenty takes
	mu   sync.Mutex
	sent []byte
}

func (w *watch) Write(p []byte) (int, error) {
	if rand.N(20) == 0 {
		time.Sleep(w.slow)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	n, err := w.Conn.Write(p)
	w.sent = append(w.sent, p[:n]...)
	return n, err
}

func (w *watch) len() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.sent)
}

// load publishes a feed at 1,000 frames/s until ctx is done.
func load(ctx context.Context, r *rules, name string) {
	c := newCamera()
	if strings.HasPrefix(name, "audio") {
		c = newMicrophone()
	}
	p := &publisher{interrupt: func() {}}
	f := r.mux.attach(name, p)
	defer r.mux.detach(f, p)
	for first := true; ctx.Err() == nil; first = false {
		all, _ := frames(bytes.NewReader(c.next()))
		for _, m := range all {
			m.first = first
			f.publish(p, m)
		}
		time.Sleep(time.Millisecond)
	}
}

// mutes alternates between a stream with audio and without, each for at most
// so long, and returns the slowest call.
func mutes(t *testing.T, r *rules, times int, most time.Duration, muted func(bool)) (slowest time.Duration) {
	for range times {
		for _, feeds := range [][]string{{"video0"}, {"video0", "audio0"}} {
			time.Sleep(rand.N(most))
			if len(feeds) == 2 {
				muted(false)
			}
			start := time.Now()
			if _, err := r.setStream(streamRule{"stream/x", feeds}); err != nil {
				t.Fatal(err)
			}
			slowest = max(slowest, time.Since(start))
			if len(feeds) == 1 {
				muted(true)
			}
		}
	}
	return slowest
}

// TestMute holds I6 at the connection: mute under full load with a slow relay,
// 1,000 times. After the call no message with the muted track is begun, and
// framing and video are whole.
func TestMute(t *testing.T) {
	r, ctx, tasks := realRules(t, io.Discard)
	var conn atomic.Pointer[watch]
	dial := r.dial
	r.dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := dial(ctx, network, address)
		w := &watch{Conn: c, slow: 2 * time.Millisecond}
		conn.Store(w)
		return w, err
	}
	relay := &chaosRelay{t: t, rcvbuf: 64 << 10}
	relay.start()
	r.to(t, "0", "stream/x", "ws://"+relay.addr)
	waitFor(t, "the connection", func() bool { return relay.conns.Load() == 1 })
	tasks.Go(func() { load(ctx, r, "video0") })
	tasks.Go(func() { load(ctx, r, "audio0") })
	var marks []int // bytes written when a mute returned, when unmute was called, and so on
	slowest := mutes(t, r, 1000, 5*time.Millisecond, func(bool) { marks = append(marks, conn.Load().len()) })
	marks = marks[:len(marks)-len(marks)%2]
	if slowest > 100*time.Millisecond {
		t.Errorf("a call took %v, want 100 ms at most", slowest)
	}
	w := conn.Load()
	w.mu.Lock()
	sent := bytes.Clone(w.sent)
	w.mu.Unlock()
	head, rest, _ := bytes.Cut(sent, []byte("\r\n\r\n"))
	read := bytes.NewReader(rest)
	check := newTSCheck()
	audio, wrong := 0, 0
	for {
		at := len(head) + 4 + len(rest) - read.Len()
		opcode, b, err := readFrame(read)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			break // the last one was on its way
		} else if err != nil {
			t.Fatal(err)
		}
		if opcode != opBinary {
			continue
		}
		check.read(b)
		if !hasAudio(check, b) {
			continue
		}
		audio++
		// marks[i-1] <= at < marks[i]: with i odd, between a mute and the next unmute
		if i, found := slices.BinarySearch(marks, at); i%2 == 1 && !found || found && i%2 == 0 && marks[i+1] > at {
			wrong++
		}
	}
	if audio < 500 {
		t.Errorf("only %d messages of audio were sent: the test shows nothing", audio)
	}
	if wrong > 0 {
		t.Errorf("%d messages of %d were begun while muted", wrong, audio)
	}
	if len(check.problems) > 0 {
		t.Errorf("got %d problems: %q", len(check.problems), check.problems[:min(len(check.problems), 5)])
	}
	t.Logf("the slowest of 2000 calls took %v; %d messages of audio", slowest, audio)
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

// TestMuteSeen is the same as seen by readers on ws, wss and GET: 50 ms after
// the call nothing of the muted track comes, and no packet of the video is lost.
func TestMuteSeen(t *testing.T) {
	ca := newTestCA(t)
	for _, way := range []string{"ws", "wss", "GET"} {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			r, ctx, tasks := realRules(t, io.Discard)
			relay := &chaosRelay{t: t, rcvbuf: 64 << 10}
			if way == "wss" {
				relay.tls = ca.server
				r.roots = ca.roots
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
			if _, err := r.setStream(streamRule{"stream/x", []string{"video0", "audio0"}}); err != nil {
				t.Fatal(err)
			}
			if way == "GET" {
				relay.get(newServer(ctx, r, "", discardLog), "/ts/stream/x")
			} else {
				r.to(t, "0", "stream/x", way+"://"+relay.addr)
				waitFor(t, "the connection", func() bool { return relay.conns.Load() == 1 })
			}
			tasks.Go(func() { load(ctx, r, "video0") })
			tasks.Go(func() { load(ctx, r, "audio0") })
			waitFor(t, "audio", func() bool { return audio.Load() > 0 })
			rounds := 20
			if *long {
				rounds = 1000
			}
			slowest := mutes(t, r, rounds, 150*time.Millisecond, func(muted bool) {
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
			if late.Load() > 0 || audio.Load() < 100 {
				t.Errorf("%d messages of %d with audio came late", late.Load(), audio.Load())
			}
			if len(check.problems) > 0 {
				t.Errorf("got %d problems: %q", len(check.problems), check.problems[:min(len(check.problems), 5)])
			}
			t.Logf("the slowest of %d calls took %v; %d messages of audio", 2*rounds, slowest, audio.Load())
		})
	}
}

// get makes the relay a reader of a path of s.
func (r *chaosRelay) get(s *server, path string) {
	h := httptest.NewServer(s)
	end := r.end
	body := make(chan io.Closer, 1)
	var reading sync.WaitGroup
	reading.Go(func() {
		a, err := http.Get(h.URL + path)
		if err != nil {
			r.t.Error(err)
			body <- io.NopCloser(nil)
			return
		}
		body <- a.Body
		buf := make([]byte, packetSize)
		for {
			if _, err := io.ReadFull(a.Body, buf); err != nil {
				return
			}
			r.see(buf)
		}
	})
	r.end = sync.OnceFunc(func() {
		(<-body).Close()
		reading.Wait()
		h.Close()
		end()
	})
	r.t.Cleanup(r.end)
}

// testCA is a certificate authority of a test, and a server that it vouches for.
type testCA struct {
	roots  *x509.CertPool
	server *tls.Config
}

func newTestCA(t *testing.T) testCA {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand2.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand2.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	return testCA{roots, &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}}
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
	for i := range 100 {
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
			full := n == last && d.link != nil && unsent(d.link.tcp) > 0
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

// TestConcurrentChanges: 50 callers change, mute and delete rules; in the end
// what runs is what GET says, and I7 holds.
func TestConcurrentChanges(t *testing.T) {
	r, ctx, tasks := realRules(t, io.Discard)
	relay := &chaosRelay{t: t}
	relay.start()
	tasks.Go(func() { load(ctx, r, "video0") })
	tasks.Go(func() { load(ctx, r, "audio0") })
	until := time.Now().Add(3 * time.Second)
	if *long {
		until = time.Now().Add(time.Minute)
	}
	s := newServer(ctx, r, "", discardLog)
	var callers sync.WaitGroup
	var calls atomic.Int64
	for range 50 {
		callers.Go(func() {
			for time.Now().Before(until) {
				i, feeds := rand.N(10), []string{`[]`, `["video0"]`, `["audio0","video0"]`}[rand.N(3)]
				request := []string{
					fmt.Sprintf(`POST /api/streams {"stream":"stream/%d","feeds":%s}`, i%3, feeds),
					fmt.Sprintf(`POST /api/destinations {"id":%d,"stream":"stream/%d","destination":"ws://%s/%d"}`, i, i%3, relay.addr, rand.N(3)),
					fmt.Sprintf(`POST /api/destinations {"id":%d,"stream":"video0","destination":"ws://127.0.0.1:1"}`, i),
					fmt.Sprintf(`DELETE /api/streams/stream/%d`, i%3),
					fmt.Sprintf(`DELETE /api/destinations/%d`, i),
					`GET /api/destinations/all`, `GET /api/streams/all`,
				}[rand.N(7)]
				if got := ask(s, request); got[:3] != "200" && got[:3] != "404" {
					t.Errorf("%s: got %s", request, got)
				}
				calls.Add(1)
			}
		})
	}
	callers.Wait()
	for name, d := range r.destinations {
		if string(d.rule.ID) != name || d.ended() {
			t.Errorf("destination %s: rule %v, ended %v", name, d.rule, d.ended())
		}
		d.mu.Lock()
		if d.sub != nil {
			sum(t, d.sub)
		}
		d.mu.Unlock()
	}
	r.mux.mu.Lock()
	for name, st := range r.mux.streams {
		var feeds []string
		for _, f := range st.feeds {
			feeds = append(feeds, f.name)
			if !slices.Contains(f.streams, st) {
				t.Errorf("%s has %s, which does not publish to it", name, f.name)
			}
		}
		if want, ok := r.streams[name]; ok != st.ruled || !slices.Equal(feeds, want) {
			t.Errorf("%s: %v runs, the rule is %v", name, feeds, want)
		}
	}
	r.mux.mu.Unlock()
	t.Logf("%d calls, %d connections", calls.Load(), relay.conns.Load())
	r.deleteDestinations()
	r.deleteStreams()
	waitFor(t, "every subscriber to leave", func() bool {
		r.mux.mu.Lock()
		defer r.mux.mu.Unlock()
		return len(r.mux.streams) == 0 && len(r.mux.feeds) == 2
	})
}
