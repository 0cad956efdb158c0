// Benchmarks: what vw costs beside a raw relay, the latency that it adds, and
// what it costs to cut a feed into frames.
//
// vw, the raw relay and the receivers are processes of their own, so that the
// CPU time of each is its own. The latter two are this test binary, started
// again with VW_TEST_ROLE set.

package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/websocket"
)

func init() {
	role := map[string]func(){"raw": rawRelay, "x/net": netRelay, "receivers": receivers}[os.Getenv("VW_TEST_ROLE")]
	if role != nil {
		role()
		os.Exit(0)
	}
}

// rawRelay is what vw is measured against: the body of a POST goes to each of
// os.Args[2] connections to os.Args[1] with one plain Write.
func rawRelay() {
	dial := func() (net.Conn, error) { return net.Dial("tcp", os.Args[1]) }
	if os.Args[3] == "wss" {
		dial = func() (net.Conn, error) { return tls.Dial("tcp", os.Args[1], nil) }
	}
	relayBody(dial, func(c net.Conn, b []byte) { must(c.Write(b)) })
}

// netRelay is the same with x/net's own Send, to websockets.
func netRelay() {
	relayBody(func() (*websocket.Conn, error) {
		return websocket.Dial(os.Args[3]+"://"+os.Args[1], "", "http://localhost")
	}, func(c *websocket.Conn, b []byte) {
		if err := websocket.Message.Send(c, b); err != nil {
			panic(err)
		}
	})
}

// relayBody sends the body of a POST, read by 64 KiB, on to os.Args[2]
// connections, until its standard input ends.
func relayBody[C any](dial func() (C, error), send func(C, []byte)) {
	readers := make([]C, must(strconv.Atoi(os.Args[2])))
	for i := range readers {
		readers[i] = must(dial())
	}
	l := must(net.Listen("tcp", "127.0.0.1:0"))
	fmt.Println(l.Addr())
	go http.Serve(l, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		buf := make([]byte, 64<<10)
		for {
			n, err := r.Body.Read(buf)
			for _, c := range readers {
				send(c, buf[:n])
			}
			if err != nil {
				return
			}
		}
	}))
	io.Copy(io.Discard, os.Stdin)
}

// receivers accepts connections, plain or websocket, and discards what they
// carry, on TLS if os.Args names a certificate and its key. For each line of
// its standard input it says how many bytes that was.
func receivers() {
	l := must(net.Listen("tcp", "127.0.0.1:0"))
	fmt.Println(l.Addr())
	if len(os.Args) > 1 {
		cert := must(tls.LoadX509KeyPair(os.Args[1], os.Args[2]))
		l = tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{cert}})
	}
	var total atomic.Int64
	go func() {
		for {
			conn := must(l.Accept())
			go func() {
				r := bufio.NewReader(conn)
				ws := false
				if b, _ := r.Peek(4); string(b) == "GET " {
					ws = true
					upgradeTo(conn, must(http.ReadRequest(r)))
				}
				total.Add(int64(r.Buffered()))
				buf := make([]byte, 64<<10)
				var pong time.Time
				for {
					n, err := conn.Read(buf)
					total.Add(int64(n))
					if err != nil {
						return
					}
					if ws && time.Since(pong) > pongEvery {
						pong = sendPong(conn)
					}
				}
			}()
		}
	}()
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		fmt.Println(total.Load())
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

const pongEvery = 1800 * time.Millisecond // a little more often than vw pings

// sendPong shows that somebody is there, asked or not. RFC 6455 5.5.3.
func sendPong(w io.Writer) time.Time {
	w.Write([]byte{0x8a, 0})
	return time.Now()
}

// benchChild starts a process that plays a role until the test ends. ask
// reads the next line that it says, after the first, which is its address.
func benchChild(b testing.TB, role string, args ...string) (pid int, addr string, ask func() string) {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), "VW_TEST_ROLE="+role)
	return benchStart(b, role, cmd)
}

// benchStart is benchChild for any command.
func benchStart(b testing.TB, role string, cmd *exec.Cmd) (pid int, addr string, ask func() string) {
	cmd.Stderr = os.Stderr
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	if err := cmd.Start(); err != nil || err1 != nil || err2 != nil {
		b.Fatal(err, err1, err2)
	}
	b.Cleanup(func() {
		in.Close()
		cmd.Wait()
	})
	lines := bufio.NewScanner(out)
	say := func() string {
		if !lines.Scan() {
			b.Fatalf("%s ended: %v", role, lines.Err())
		}
		return lines.Text()
	}
	return cmd.Process.Pid, say(), func() string {
		in.Write([]byte("\n"))
		return say()
	}
}

// benchVW starts vw, which sends the feed "bench", as it is or as a stream, to n
// destinations at relay. In the end it shows what vw warned of.
func benchVW(b *testing.B, name string, n int, relay string) *vwProcess {
	v := startVW(b, os.Environ()...)
	b.Cleanup(func() {
		for line := range strings.Lines(v.out.String()) {
			if strings.Contains(line, "level=WARN") {
				fmt.Fprint(os.Stderr, line)
			}
		}
	})
	if isStream(name) {
		v.call(b, http.StatusOK, "POST", "/api/streams", fmt.Sprintf(`{"stream":%q,"feeds":["bench"]}`, name))
	}
	benchRules(b, v, name, n, relay)
	return v
}

// benchRules adds n destinations.
func benchRules(b *testing.B, v *vwProcess, stream string, n int, relay string) {
	for i := range n {
		v.call(b, http.StatusOK, "POST", "/api/destinations", fmt.Sprintf(`{"id":%d,"stream":%q,"destination":"%s/"}`, i, stream, relay))
	}
}

// cpuTime is what the threads of a process have used. Linux only.
func cpuTime(b *testing.B, pid int) (d time.Duration) {
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if len(threads) == 0 {
		b.Skip("no schedstat: the CPU time of a process is not known here")
	}
	for _, name := range threads {
		var ns int64
		line, _ := os.ReadFile(name)
		fmt.Sscan(string(line), &ns)
		d += time.Duration(ns)
	}
	return d
}

// benchClip makes a valid feed, with one video track as ffmpeg would write it:
// PSI before each keyframe, PES that do not say their length, stuffing in the
// last packet of each.
type benchClip struct {
	packets int           // of one frame
	every   time.Duration // from frame to frame

	frames  int
	tables  tsMaker
	videoCC byte
	buf     []byte
}

var benchNoise = func() (b [packetSize]byte) {
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	return b
}()

// next returns the next frame; it is valid until the one after it. Its last 8
// bytes are its number.
func (c *benchClip) next() []byte {
	b := c.buf[:0]
	pts := 126000 + uint64(c.every*time.Duration(c.frames)*9/100000)
	pcr := pts - 63000
	field := []byte{7, 0x10, byte(pcr >> 25), byte(pcr >> 17), byte(pcr >> 9), byte(pcr >> 1), byte(pcr<<7) | 0x7e, 0}
	if c.frames%12 == 0 {
		c.tables.Reset()
		c.tables.tables(testVideo, 0x01)
		b = append(b, c.tables.Bytes()...)
		field[1] |= 0x40
	}
	for i := range c.packets {
		head := append(make([]byte, 0, 32), syncByte, 0x01, 0x00, 0x10|c.videoCC&15)
		c.videoCC++
		switch i {
		case 0:
			head[1] |= 0x40
			head[3] |= 0x20
			head = append(append(head, field...), 0, 0, 1, 0xe0, 0, 0, 0x80, 0x80, 5,
				0x21|byte(pts>>29)&0x0e, byte(pts>>22), byte(pts>>14)|1, byte(pts>>7), byte(pts<<1)|1)
		case c.packets - 1:
			head[3] |= 0x20
			head = append(head, 3, 0, 0xff, 0xff)
		}
		b = append(append(b, head...), benchNoise[len(head):]...)
	}
	binary.BigEndian.PutUint64(b[len(b)-8:], uint64(c.frames))
	c.frames++
	c.buf = b
	return b
}

// benchPost is a chunked POST that is written as ffmpeg does: a frame is one
// chunk, or more where it has more than 32,768 bytes.
type benchPost struct {
	net.Conn
	clip  benchClip
	chunk []byte
	ended time.Time // when the last frames were posted
}

func newBenchPost(b *testing.B, addr string, frame int, every time.Duration) *benchPost {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { conn.Close() })
	fmt.Fprintf(conn, "POST /ts/bench HTTP/1.1\r\nHost: %s\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n", addr)
	return &benchPost{Conn: conn, clip: benchClip{packets: frame/packetSize + 1, every: every}}
}

// feed posts frames in real time, and returns how many bytes they had. Between two
// calls the camera sees nothing.
func (p *benchPost) feed(b *testing.B, frames int, sending func(frame int)) (n int64) {
	start := time.Now()
	if !p.ended.IsZero() {
		p.clip.frames += int(start.Sub(p.ended) / p.clip.every)
	}
	defer func() { p.ended = time.Now() }()
	for i := range frames {
		time.Sleep(time.Until(start.Add(time.Duration(i) * p.clip.every)))
		frame := p.clip.next()
		n += int64(len(frame))
		for part := range slices.Chunk(frame, 32768) {
			p.chunk = fmt.Appendf(p.chunk[:0], "%x\r\n%s\r\n", len(part), part)
			sending(p.clip.frames - 1)
			if _, err := p.Write(p.chunk); err != nil {
				b.Fatal(err)
			}
		}
	}
	return n
}

// BenchmarkRelay: CPU seconds per delivered GB, to 16 readers, of vw and of a
// raw relay, which are fed the same post in turns.
func BenchmarkRelay(b *testing.B) {
	for _, c := range []struct {
		name  string
		frame int // bytes
		every time.Duration
	}{
		{"8Mbit", 40_000, 40 * time.Millisecond},
		{"400Mbit", 100_000, 2 * time.Millisecond},
	} {
		for _, name := range []string{"bench", "stream/bench"} {
			b.Run(c.name+"/"+name, func(b *testing.B) {
				m := newComparison(b, name, 16, "ws")
				m.add("raw")
				m.run(c.frame, c.every, 5*time.Second)
			})
		}
	}
}

// BenchmarkFanOut: the same by number of destinations and size of a frame, at
// 40 MB/s in all, and beside relays that use x/net's Send and gorilla's
// WriteMessage; the same over TLS.
func BenchmarkFanOut(b *testing.B) {
	for _, n := range []int{1, 4, 16, 64, 256} {
		for _, frame := range []int{1_316, 5_264, 16_356} { // whole packets
			every := time.Duration(n) * time.Duration(frame) * time.Second / 40e6
			b.Run(fmt.Sprintf("destinations=%d/frame=%d", n, frame), func(b *testing.B) {
				m := newComparison(b, "bench", n, "ws")
				m.add("raw", "x/net", "gorilla")
				m.run(frame, every, 400*time.Millisecond)
			})
			b.Run(fmt.Sprintf("TLS/destinations=%d/frame=%d", n, frame), func(b *testing.B) {
				m := newComparison(b, "bench", n, "wss")
				m.add("raw", "x/net", "gorilla")
				m.run(frame, every, 400*time.Millisecond)
			})
		}
	}
}

// comparison is vw and other relays, which send to the same receivers.
type comparison struct {
	b      *testing.B
	n      int    // of receivers of each
	scheme string // ws or wss
	addr   string // of the receivers
	count  func() string
	vw     *vwProcess
	relays []benchRelay // vw is the first
}

type benchRelay struct {
	kind, addr string
	pid        int
	costs      []float64 // CPU seconds per GB
}

func newComparison(b *testing.B, name string, n int, scheme string) *comparison {
	m := &comparison{b: b, n: n, scheme: scheme}
	var args []string
	certs := newCerts(b)
	b.Setenv("SSL_CERT_FILE", certs.ca)
	if scheme == "wss" {
		args = []string{certs.cert, certs.key}
	}
	_, m.addr, m.count = benchChild(b, "receivers", args...)
	m.vw = benchVW(b, name, n, scheme+"://"+m.addr)
	m.relays = []benchRelay{{kind: "vw", pid: m.vw.cmd.Process.Pid, addr: m.vw.addr}}
	return m
}

// add adds relays that are programs of their own.
func (m *comparison) add(kinds ...string) {
	for _, kind := range kinds {
		r, n := benchRelay{kind: kind}, strconv.Itoa(m.n)
		if kind == "gorilla" {
			r.pid, r.addr, _ = benchStart(m.b, kind, exec.Command(build(m.b, kind), m.scheme+"://"+m.addr, n))
		} else {
			r.pid, r.addr, _ = benchChild(m.b, kind, m.addr, n, m.scheme)
		}
		m.relays = append(m.relays, r)
	}
}

// run feeds all of them the same in turns, nine times for a window, and reports the
// medians of what they cost and of the ratios of vw to the others, and how far the
// middle half of the ratios is spread.
func (m *comparison) run(frame int, every, window time.Duration) {
	const rounds = 9
	total := func() (n int64) {
		fmt.Sscan(m.count(), &n)
		return n
	}
	posts := make([]*benchPost, len(m.relays))
	// cost is for what is fed in d, from quiet to quiet.
	cost := func(i int, d time.Duration) float64 {
		cpu, before := cpuTime(m.b, m.relays[i].pid), total()
		fed := posts[i].feed(m.b, max(1, int(d/every)), func(int) {})
		time.Sleep(200 * time.Millisecond)
		cpu, got := cpuTime(m.b, m.relays[i].pid)-cpu, total()-before
		if want := fed * int64(m.n); got < want*999/1000 {
			m.b.Errorf("%s delivered %d of %d bytes", m.relays[i].kind, got, want)
		}
		return cpu.Seconds() / float64(got) * 1e9
	}
	for i, r := range m.relays {
		posts[i] = newBenchPost(m.b, r.addr, frame, every)
		cost(i, window/5)
	}
	for m.b.Loop() {
		for range rounds {
			for i := range m.relays {
				m.relays[i].costs = append(m.relays[i].costs, cost(i, window))
			}
		}
	}
	m.b.ReportMetric(0, "ns/op")
	m.b.ReportMetric(quantile(m.relays[0].costs, 0.5), "vw-CPU-s/GB")
	for _, r := range m.relays[1:] {
		var ratios []float64
		for i, c := range r.costs {
			ratios = append(ratios, m.relays[0].costs[i]/c)
		}
		m.b.ReportMetric(quantile(r.costs, 0.5), r.kind+"-CPU-s/GB")
		m.b.ReportMetric(quantile(ratios, 0.5), "vw/"+r.kind)
		m.b.ReportMetric(quantile(ratios, 0.75)-quantile(ratios, 0.25), "vw/"+r.kind+"-spread")
	}
}

func quantile(v []float64, q float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[int(q*float64(len(v)-1))]
}

// BenchmarkLatency: from before the write of the last byte of a frame, until its last
// byte is read at a receiver, at 25 frames/s, of vw and of a raw relay in turns; and the
// part of a processor that each needs for it.
func BenchmarkLatency(b *testing.B) {
	for _, c := range []struct {
		destinations, mbit int
	}{{1, 1}, {20, 1}, {200, 1}, {1000, 1}, {1, 8}, {20, 8}, {200, 8}} {
		for _, name := range []string{"bench", "stream/bench"} {
			b.Run(fmt.Sprintf("destinations=%d/%dMbit/%s", c.destinations, c.mbit, name), func(b *testing.B) { benchLatency(b, name, c.destinations, c.mbit*5_000) })
		}
	}
}

func benchLatency(b *testing.B, name string, destinations, size int) {
	const rounds, frames, every = 5, 75, 40 * time.Millisecond
	relays := []*latencies{{kind: "vw"}, {kind: "raw"}}
	for _, r := range relays {
		l := listenLoopback(b)
		var conns atomic.Int64
		serveEach(b, l, func(conn net.Conn) {
			conns.Add(1)
			if r.kind == "raw" {
				eachPacket(bufio.NewReaderSize(conn, 64<<10), r.arrived)
				return
			}
			readFrames(conn, r.arrived)
		})
		addr := l.Addr().String()
		if r.kind == "raw" {
			r.pid, addr, _ = benchChild(b, r.kind, addr, strconv.Itoa(destinations), "ws")
		} else {
			v := benchVW(b, name, destinations, "ws://"+addr)
			r.pid, addr = v.cmd.Process.Pid, v.addr
		}
		waitFor(b, "all destinations", func() bool { return conns.Load() == int64(destinations) })
		time.Sleep(100 * time.Millisecond) // the handshakes
		r.post = newBenchPost(b, addr, size, every)
		r.feed(b, 25, destinations)
		r.took, r.cpu, r.span = nil, 0, 0
	}
	for b.Loop() {
		for range rounds {
			for _, r := range relays {
				r.feed(b, frames, destinations)
			}
		}
	}
	b.ReportMetric(0, "ns/op")
	for _, r := range relays {
		b.ReportMetric(100*r.cpu.Seconds()/r.span.Seconds(), r.kind+"-%CPU")
		for _, p := range []int{50, 95, 99} {
			b.ReportMetric(quantile(r.took, float64(p)/100), fmt.Sprintf("%s-p%d-us", r.kind, p))
		}
	}
}

// latencies are those of one relay.
type latencies struct {
	kind      string
	pid       int
	post      *benchPost
	took      []float64     // microseconds, of each frame and receiver
	cpu, span time.Duration // that they cost, and in which they were fed

	mu  sync.Mutex
	got map[int][]time.Time // by frame
}

func (r *latencies) arrived(frame int, at time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.got[frame] = append(r.got[frame], at)
}

// feed posts frames, and notes when they arrived.
func (r *latencies) feed(b *testing.B, frames, destinations int) {
	r.mu.Lock()
	r.got = make(map[int][]time.Time)
	r.mu.Unlock()
	sent := make(map[int]time.Time)
	cpu, start := cpuTime(b, r.pid), time.Now()
	r.post.feed(b, frames, func(frame int) { sent[frame] = time.Now() })
	time.Sleep(100 * time.Millisecond)
	r.cpu += cpuTime(b, r.pid) - cpu
	r.span += time.Since(start)
	r.mu.Lock()
	defer r.mu.Unlock()
	for frame, at := range sent {
		if n := len(r.got[frame]); n != destinations {
			b.Errorf("%s: frame %d arrived %d times, want %d", r.kind, frame, n, destinations)
		}
		for _, t := range r.got[frame] {
			r.took = append(r.took, float64(t.Sub(at))/1e3)
		}
	}
}

// readFrames is a relay: it calls arrived for each frame of what vw sends,
// with the time at which its message was whole.
func readFrames(conn net.Conn, arrived func(frame int, at time.Time)) {
	r := bufio.NewReaderSize(conn, 64<<10)
	upgradeTo(conn, must(http.ReadRequest(r)))
	var payload []byte
	pong := time.Now()
	for {
		opcode, b, err := readFrameInto(payload, r)
		if err != nil {
			return
		}
		if payload = b; opcode == opBinary {
			eachPacket(bytes.NewReader(payload), arrived)
		}
		if time.Since(pong) > pongEvery {
			pong = sendPong(conn)
		}
	}
}

// eachPacket calls arrived for the last packet of each frame.
func eachPacket(r io.Reader, arrived func(frame int, at time.Time)) {
	p := make(packet, packetSize)
	for {
		if _, err := io.ReadFull(r, p); err != nil {
			return
		}
		if p.stuffed() {
			arrived(int(binary.BigEndian.Uint64(p[packetSize-8:])), time.Now())
		}
	}
}

// BenchmarkFramer: what it costs to cut a feed into messages, and how often
// the time of a plain copy that is.
func BenchmarkFramer(b *testing.B) {
	for _, size := range []int{5_000, 40_000} {
		b.Run(fmt.Sprintf("frame=%d", size), func(b *testing.B) {
			clip := benchClip{packets: size/packetSize + 1, every: 40 * time.Millisecond}
			var all []byte
			for len(all) < 4<<20 {
				all = append(all, clip.next()...)
			}
			got := 0
			f := newFramer(func(m *message) { got += m.size })
			r := bytes.NewReader(nil)
			b.SetBytes(int64(len(all)))
			b.ReportAllocs()
			for b.Loop() {
				for r.Reset(all); r.Len() > 0; {
					if err := f.read(r); err != nil {
						b.Fatal(err)
					}
				}
			}
			if got != b.N*len(all) {
				b.Fatalf("got %d bytes, want %d", got, b.N*len(all))
			}
			took := b.Elapsed()
			buf := make([]byte, readSize)
			start := time.Now()
			for range b.N {
				for r.Reset(all); r.Len() > 0; {
					r.Read(buf)
				}
			}
			b.ReportMetric(float64(took)/float64(time.Since(start)), "ratio")
		})
	}
}

// BenchmarkMemory: resident memory per destination, with 1,000 of them that
// get 1 Mbit/s.
func BenchmarkMemory(b *testing.B) {
	const n = 1000
	for _, scheme := range []string{"ws", "wss"} {
		b.Run(scheme, func(b *testing.B) {
			m := newComparison(b, "bench", 0, scheme)
			resident := func() int {
				n, err := m.vw.rss()
				if err != nil {
					b.Fatal(err)
				}
				return n
			}
			post := newBenchPost(b, m.vw.addr, 5_000, 40*time.Millisecond)
			post.feed(b, 50, func(int) {})
			before := resident()
			benchRules(b, m.vw, "bench", n, scheme+"://"+m.addr)
			for b.Loop() {
				post.feed(b, 500, func(int) {})
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(float64(resident()-before)/n/1024, "KiB/destination")
		})
	}
}

// BenchmarkRules: mutes and unmutes, each by a call over HTTP, of a stream that
// goes to 16 destinations at 1 Mbit/s.
func BenchmarkRules(b *testing.B) {
	m := newComparison(b, "bench", 0, "ws")
	set := func(feeds string) {
		r, err := http.Post(m.vw.url+"/api/streams", "", strings.NewReader(`{"stream":"stream/x","feeds":[`+feeds+`]}`))
		if err != nil || r.StatusCode != http.StatusOK {
			b.Fatal(err, r)
		}
		io.Copy(io.Discard, r.Body)
		r.Body.Close()
	}
	set(`"bench"`)
	benchRules(b, m.vw, "stream/x", 16, "ws://"+m.addr)
	post := newBenchPost(b, m.vw.addr, 5_000, 40*time.Millisecond)
	var feeding sync.WaitGroup
	stop := make(chan struct{})
	feeding.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				post.feed(b, 1, func(int) {})
				time.Sleep(post.clip.every)
			}
		}
	})
	for i := 0; b.Loop(); i++ {
		set([]string{``, `"bench"`}[i&1])
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "changes/s")
	close(stop)
	feeding.Wait()
}
