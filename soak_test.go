// Soaks: rules, feeds, readers and relays come and go for a long time, and
// nothing grows. TestSoak24 is a day of virtual time in which every timer of
// vw is the real one; TestSoak is real sockets in real time, for as long as
// -soak says.
//
// The rules: I7 holds for every destination there was. What ends leaves
// nothing: goroutines and descriptors are as before, to the last one, and the
// heap is flat (see checkGrowth). What a soak chooses follows from its seed; vw's own
// jitter and the scheduler do not.

package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"golang.org/x/net/websocket"
)

var (
	soakTime = flag.Duration("soak", 20*time.Second, "how long TestSoak lasts")
	soakSeed = flag.Uint64("seed", 0, "what the soaks choose by; 0: another one each time")
)

// behaviours are what relays do; each is the host of its URL.
var behaviours = []string{"well", "refuses", "away", "denies", "hangs-up", "closes", "dies", "stalls", "vanishes"}

// soak is what both forms share: relays, accounts and samples.
type soak struct {
	t     *testing.T
	rules *rules
	seed  uint64

	cycles   atomic.Uint64 // rules, feeds and readers that came and went
	accepted atomic.Int64  // connections, by relays of TestSoak
	received atomic.Uint64 // messages, by relays that are well

	mu     sync.Mutex
	open   []*destination // whose counters may still change
	closed counters       // of all others
	toWell uint64         // closed.delivered, to relays that are well

	samples []soakSample
}

// soakSample is what there was after so many cycles.
type soakSample struct {
	cycles, goroutines, heap float64 // bytes in use after a collection
}

func newSoak(t *testing.T, r *rules) *soak {
	s := &soak{t: t, rules: r, seed: *soakSeed}
	if s.seed == 0 {
		s.seed = rand.Uint64()
	}
	t.Logf("-seed %d", s.seed)
	return s
}

// dice is what the n-th part of a soak chooses by.
func (s *soak) dice(n int64) *rand.Rand { return rand.New(rand.NewPCG(s.seed, uint64(n))) }

// relay is the n-th connection to a relay, until ctx is done or vw closes it.
func (s *soak) relay(ctx context.Context, n int64, behaviour string, conn net.Conn) {
	dice := s.dice(n)
	switch behaviour {
	case "well":
		serveRelay(conn, s.message)
	case "denies":
		code := []int{401, 404, 500, 503}[dice.IntN(4)]
		fmt.Fprintf(conn, "HTTP/1.1 %d %s\r\n\r\n", code, http.StatusText(code))
	case "closes":
		accept(conn)
	case "dies": // in the middle of something, without a FIN
		life := time.Duration(dice.ExpFloat64() * float64(2*time.Second))
		defer time.AfterFunc(life, func() {
			if tcp, ok := conn.(*net.TCPConn); ok {
				tcp.SetLinger(0)
			}
			conn.Close()
		}).Stop()
		serveRelay(conn, func([]byte) {})
	case "stalls":
		if _, err := accept(conn); err == nil {
			select {
			case <-ctx.Done():
			case <-time.After(8 * time.Second):
			}
		}
	case "vanishes": // its kernel takes what comes
		if r, err := accept(conn); err == nil {
			io.Copy(io.Discard, r)
		}
	}
}

// message is what a relay that is well got.
func (s *soak) message(b []byte) {
	s.received.Add(1)
	for p := packet(b); len(p) > 0; p = p[packetSize:] {
		if len(p) < packetSize || p[0] != syncByte {
			s.t.Errorf("I1: a message of %d bytes has % x at %d", len(b), p[:min(len(p), 4)], len(b)-len(p))
			return
		}
	}
}

// track enters the destination of an id into the accounts.
func (s *soak) track(name string) {
	s.rules.mu.RLock()
	d := s.rules.destinations[name]
	s.rules.mu.RUnlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if d != nil && !slices.Contains(s.open, d.destination) {
		s.open = append(s.open, d.destination)
	}
}

// account holds I7 for every destination, and returns what they counted.
func (s *soak) account() (all counters) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open = slices.DeleteFunc(s.open, func(d *destination) bool {
		d.mu.Lock()
		over := d.ended() && d.sub == nil
		d.mu.Unlock()
		c, queued := d.count()
		sum := c.delivered + uint64(queued)
		for _, n := range c.dropped {
			sum += n
		}
		if c.published != sum {
			s.t.Errorf("I7: %s to %s: published %d, but delivered, dropped and queued are %d: %+v", d.rule.ID, d.url, c.published, sum, c)
			return true // told once
		}
		if !over {
			all.add(c)
			return false
		}
		s.closed.add(c)
		if d.url.Hostname() == "well" {
			s.toWell += c.delivered
		}
		return true
	})
	all.add(s.closed)
	return all
}

// members are what a mux has.
type members struct{ feeds, streams, readers int }

func (s *soak) members() members {
	x := s.rules.mux
	x.mu.Lock()
	defer x.mu.Unlock()
	m := members{feeds: len(x.feeds), streams: len(x.streams)}
	for _, f := range x.feeds {
		f.mu.Lock()
		m.readers += len(f.subs)
		f.mu.Unlock()
	}
	for _, st := range x.streams {
		st.mu.Lock()
		m.readers += len(st.subs)
		st.mu.Unlock()
	}
	return m
}

// sample takes one, and returns it as a text.
func (s *soak) sample() string {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // what a sync.Pool keeps lives through one
	runtime.ReadMemStats(&m)
	s.samples = append(s.samples, soakSample{float64(s.cycles.Load()), float64(runtime.NumGoroutine()), float64(m.HeapAlloc)})
	c := s.account()
	return fmt.Sprintf("%d cycles, %d goroutines, %d bytes; %d published, %d delivered, dropped %d",
		s.cycles.Load(), runtime.NumGoroutine(), m.HeapAlloc, c.published, c.delivered, c.dropped[1:])
}

// checkGrowth fails the test when goroutines or heap grow, by the least-squares slope
// over the samples but the first quarter, in which maps and pools find their
// size. What must be seen is one leak in 200 cycles: of a goroutine; or of
// what least can leak with the media, a message of one frame of size bytes.
func (s *soak) checkGrowth(frame int) {
	if s.t.Failed() {
		return // there may be too few samples
	}
	const leaks = 5 // in 1,000 cycles
	message := float64(int(unsafe.Sizeof(message{})) + frame)
	late := s.samples[len(s.samples)/4:]
	goroutines := 1000 * slope(late, func(s soakSample) float64 { return s.goroutines })
	heap := 1000 * slope(late, func(s soakSample) float64 { return s.heap })
	s.t.Logf("in 1,000 cycles: %+.2f goroutines (of %d), %+.0f bytes (of %.0f), by %d samples", goroutines, leaks, heap, leaks*message, len(late))
	if goroutines >= leaks {
		s.t.Errorf("got %.1f goroutines more in 1,000 cycles, want less than %d", goroutines, leaks)
	}
	if heap >= leaks*message {
		s.t.Errorf("got %.0f bytes more in 1,000 cycles, want less than %.0f", heap, leaks*message)
	}
}

// slope is the least-squares slope of y over the cycles.
func slope(all []soakSample, y func(soakSample) float64) float64 {
	var meanX, meanY, xy, xx float64
	for _, s := range all {
		meanX += s.cycles / float64(len(all))
		meanY += y(s) / float64(len(all))
	}
	for _, s := range all {
		xy += (s.cycles - meanX) * (y(s) - meanY)
		xx += (s.cycles - meanX) * (s.cycles - meanX)
	}
	return xy / xx
}

// liveBody is the body of a publisher: a frame every so often, until ctx is done.
type liveBody struct {
	ctx   context.Context
	every time.Duration
	from  *camera
	end   error // what it ends with
	rest  []byte
}

func (l *liveBody) Read(p []byte) (int, error) {
	if len(l.rest) == 0 {
		time.Sleep(l.every)
		if l.ctx.Err() != nil {
			return 0, l.end
		}
		l.rest = l.from.next()
	}
	n := copy(p, l.rest)
	l.rest = l.rest[n:]
	return n, nil
}

// inOwnProcess runs t in a process of its own, whose goroutines and memory t may then
// count, beside other tests. It returns whether it did: in that process it does not.
func inOwnProcess(t *testing.T) bool {
	notShort(t, "a soak")
	if os.Getenv("VW_TEST_ALONE") != "" {
		return false
	}
	limit := time.Duration(0)
	if deadline, ok := t.Deadline(); ok {
		limit = time.Until(deadline)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.v", "-test.run=^"+t.Name()+"$", fmt.Sprint("-test.timeout=", limit),
		fmt.Sprint("-soak=", *soakTime), fmt.Sprint("-seed=", *soakSeed), fmt.Sprint("-long=", *long))
	cmd.Env = append(os.Environ(), "VW_TEST_ALONE=1", "GOMAXPROCS=1") // and a processor is left to the others
	cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Parallel()
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	return true
}

// TestSoak24: 86,400 streams with a feed and a destination of their own, each
// for one second of a day, beside two destinations that are well for all of it,
// and one of another behaviour each hour.
// The race detector gets 4 hours, unless -long, and a frame a second in place of
// 25. The video's PTS wrap at half time.
func TestSoak24(t *testing.T) {
	if inOwnProcess(t) {
		return
	}
	const kept = 3
	hours, frame := 24, 40*time.Millisecond
	if underRace { // all of it is 7 minutes
		hours, frame = scaled(4, 4, 24), time.Second
	}
	synctest.Test(t, func(t *testing.T) {
		before := runtime.NumGoroutine()
		l := newLab(t, nil)
		l.rules.log = discardLog
		s := newSoak(t, l.rules)
		l.relay = func(n int64, host string, conn net.Conn) {
			behaviour, _, _ := net.SplitHostPort(host)
			s.relay(t.Context(), n, behaviour, conn)
		}
		pipe := l.dialer.dial
		l.dialer.dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			switch l.names.host(address) {
			case "refuses:80":
				return nil, errors.New("connection refused")
			case "away:80":
				<-ctx.Done()
				return nil, ctx.Err()
			}
			return pipe(ctx, network, address)
		}
		set := func(stream string, feeds ...string) {
			if _, err := l.setStream(streamRule{stream, append([]string{}, feeds...)}); err != nil {
				t.Error(err)
			}
		}
		send := func(name, stream, url string) {
			if _, err := l.setDestination(destinationRule{ID: id(name), Stream: stream, Destination: url}); err != nil {
				t.Error(err)
			}
			s.track(name)
		}

		ctx, cancel := context.WithCancel(t.Context())
		c := newCamera()
		c.size = 500
		c.step = toTicks(frame)
		if frame == time.Second {
			c.gop = 2
		}
		c.n = int((wrap - ticks(hours)*3600*second/2) / c.step)
		c.n -= c.n % c.gop
		size := len(c.next())
		var feeds sync.WaitGroup
		feeds.Go(func() {
			l.mux.publish("video0", &publisher{interrupt: cancel}, &liveBody{ctx: ctx, every: frame, from: c, end: io.EOF})
		})
		time.Sleep(time.Second)

		set("stream/kept", "video0", "audio0")
		send("kept/well", "video0", "ws://well")
		send("kept/moves", "stream/kept", "ws://well/0")
		dice := s.dice(-1)
		start := time.Now()
		for i := 0; i < hours*3600 && !t.Failed(); i++ {
			stream, feed, name := fmt.Sprint("stream/", i), fmt.Sprint("audio", i), fmt.Sprint(i)
			set(stream, "video0", feed)
			send(name, stream, "ws://"+behaviours[dice.IntN(len(behaviours))])
			if i%10 == 0 {
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				feeds.Go(func() {
					defer cancel()
					l.mux.publish(feed, &publisher{interrupt: cancel}, &liveBody{ctx: ctx, every: 240 * time.Millisecond, from: newMicrophone(), end: io.ErrUnexpectedEOF})
				})
			}
			if hour := i / 3600; i%3600 == 0 {
				ill := behaviours[1:]
				send("kept/ill", []string{"video0", "stream/kept"}[hour/len(ill)%2], "ws://"+ill[hour%len(ill)])
			}
			switch i % 60 {
			case 10:
				set("stream/kept")
			case 11:
				set("stream/kept", "video0", "audio0")
			case 40:
				send("kept/moves", "stream/kept", fmt.Sprint("ws://well/", i))
			}
			time.Sleep(time.Until(start.Add(time.Duration(i+1) * time.Second)))
			ends := []func() error{
				func() error { return l.deleteDestination(name) },
				func() error { return l.deleteStream(stream) },
			}
			for _, j := range dice.Perm(2) {
				if err := ends[j](); err != nil {
					t.Error(err)
				}
			}
			s.account()
			s.cycles.Add(1)
			if (i+1)%900 == 0 {
				synctest.Wait()
				if m := s.members(); m.feeds > 3 || m.streams > 2 || m.readers > kept+2 { // what ended last may have yet to leave
					t.Errorf("got %+v with %d destinations for good", m, kept)
				}
				if n := runtime.NumGoroutine(); n > before+10*(kept+1) { // those of the relays among them
					t.Errorf("got %d goroutines with %d destinations for good", n, kept)
				}
				if text := s.sample(); (i+1)%3600 == 0 {
					t.Logf("hour %d: %s", (i+1)/3600, text)
				}
			}
		}

		l.deleteDestinations()
		l.deleteStreams()
		time.Sleep(10 * time.Second) // the longest stall of a relay
		synctest.Wait()
		s.account()
		if got, want := s.members(), (members{feeds: 1}); got != want {
			t.Errorf("got %+v, want %+v: video0", got, want)
		}
		if len(s.open) > 0 {
			t.Errorf("got %d destinations that have not ended", len(s.open))
		}
		if got := s.received.Load(); got != s.toWell || got == 0 {
			t.Errorf("the relays that are well received %d messages, %d were delivered to them", got, s.toWell)
		}
		if d := s.closed.dropped; d[dropGate] == 0 || d[dropLag] == 0 || d[dropMuted] == 0 || d[dropEnd] == 0 {
			t.Errorf("got %+v, want drops of each cause but bytes", s.closed)
		}
		s.checkGrowth(size)
		cancel()
		feeds.Wait()
		l.close()
		synctest.Wait()
		if n := runtime.NumGoroutine(); n > before { // fewer: those of an earlier test ended
			t.Errorf("got %d goroutines, want %d as before", n, before)
		}
	})
}

// soakRelays is the relays of one round of TestSoak, on loopback.
type soakRelays struct {
	addrs map[string]string // by behaviour
	ends  []func() error
	conns sync.WaitGroup
}

// startRelays starts a relay of each behaviour that can be connected to.
func (s *soak) startRelays(ctx context.Context) *soakRelays {
	f := &soakRelays{addrs: map[string]string{"refuses": "127.0.0.1:1"}}
	for _, behaviour := range behaviours {
		if behaviour == "refuses" || behaviour == "away" {
			continue
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			s.t.Fatal(err)
		}
		f.addrs[behaviour] = l.Addr().String()
		f.ends = append(f.ends, l.Close)
		f.conns.Go(func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				conn.(*net.TCPConn).SetReadBuffer(16 << 10) // what stalls is soon full
				f.conns.Go(func() {
					defer conn.Close()
					s.relay(ctx, s.accepted.Add(1), behaviour, conn)
				})
			}
		})
	}
	return f
}

// wait ends the relays. They wait for vw to close their connections.
func (f *soakRelays) wait() {
	for _, end := range f.ends {
		end()
	}
	f.conns.Wait()
}

// resources is what a process has.
type resources struct{ goroutines, files int }

func (s *soak) resources() resources {
	files, err := os.ReadDir("/dev/fd")
	if err != nil {
		s.t.Fatal(err)
	}
	return resources{runtime.NumGoroutine(), len(files)}
}

// awaitNoMoreThan waits until the process has no more than before.
func (s *soak) awaitNoMoreThan(before resources) {
	s.t.Helper()
	eventually(s.t, time.Minute, func() error {
		if h := s.resources(); h.goroutines > before.goroutines || h.files > before.files {
			return fmt.Errorf("%+v, want %+v as before", h, before)
		}
		return nil
	})
}

// soakClients is vw as callers, publishers and readers see it.
type soakClients struct {
	*soak
	web     *httptest.Server
	changes sync.RWMutex // held to delete a destination that another caller may be about to note
}

// outage is what befalls a disk, or the reader of the log, for a while. A nil
// one is none.
type outage struct {
	over <-chan struct{} // writes hang until it is closed; nil: they do not
	err  error           // and fail with it
}

func (o *outage) write() error {
	if o == nil {
		return nil
	}
	if o.over != nil {
		<-o.over
	}
	return o.err
}

// outages returns those of the n-th round, which is over with ctx.
func outages(ctx context.Context, n int) (disk, log *outage) {
	kinds := []*outage{nil, {over: ctx.Done()}, {err: syscall.ENOSPC}}
	return kinds[n%3], kinds[(n+n/3)%3]
}

// outageWriter is a log that nobody reads while log has an outage.
type outageWriter struct{ log *atomic.Pointer[outage] }

func (w outageWriter) Write(b []byte) (int, error) { return len(b), w.log.Load().write() }

// maxTaking is how long a call may take that only takes something away (I6); it
// is less than a disk hangs in the long rounds.
const maxTaking = 2 * time.Second

// ask does one call of the API; it must be answered with 200 or 404, or with 202
// where the disk is slow, or say that the disk has an outage.
func (s *soakClients) ask(method, path, body string) {
	r, err := http.NewRequest(method, s.web.URL+path, strings.NewReader(body))
	if err != nil {
		s.t.Error(err)
		return
	}
	start := time.Now()
	a, err := s.web.Client().Do(r)
	if err != nil {
		s.t.Error(err)
		return
	}
	defer a.Body.Close()
	text, _ := io.ReadAll(a.Body)
	excused := bytes.Contains(text, []byte("no space left")) || bytes.Contains(text, []byte("the disk does not answer"))
	if a.StatusCode != http.StatusOK && a.StatusCode != http.StatusAccepted && (a.StatusCode != http.StatusNotFound || method != "DELETE") && !excused {
		s.t.Errorf("%s %s %s: got %s %s", method, path, body, a.Status, text)
	}
	takes := method == "DELETE" || path == "/api/mute" && !strings.Contains(body, "false")
	if took := time.Since(start); takes && took > maxTaking {
		s.t.Errorf("%s %s %s took %v, want at most %v", method, path, body, took, maxTaking)
	}
	s.cycles.Add(1)
}

// send sets a destination, and enters it into the accounts.
func (s *soakClients) send(id, stream, url string) {
	s.changes.RLock()
	defer s.changes.RUnlock()
	s.ask("POST", "/api/destinations", fmt.Sprintf(`{"id":%q,"stream":%q,"destination":%q}`, id, stream, url))
	s.track(id)
}

// drop deletes destinations.
func (s *soakClients) drop(id string) {
	s.changes.Lock()
	defer s.changes.Unlock()
	s.ask("DELETE", "/api/destinations/"+id, "")
}

// call changes rules until ctx is done. The streams are everybody's; ids
// begin with the caller's number, but everybody may delete them. It deletes
// all only if all is set.
func (s *soakClients) call(ctx context.Context, n int, all bool, dice *rand.Rand) {
	for ; ctx.Err() == nil; time.Sleep(time.Duration(dice.Int64N(int64(20 * time.Millisecond)))) {
		stream, sub := fmt.Sprint("stream/", dice.IntN(3)), dice.IntN(3)
		switch k := dice.IntN(200); {
		case k == 0 && all:
			s.drop("all")
		case k == 1 && all:
			s.ask("DELETE", "/api/streams/all", "")
		case k < 10:
			s.ask("DELETE", "/api/streams/"+stream, "")
		case k < 20:
			s.drop(fmt.Sprint(dice.IntN(4), "/", sub))
		case k < 50:
			s.drop(fmt.Sprint(n, "/", sub))
		case k < 56:
			kind := []string{"audio", "video"}[dice.IntN(2)]
			s.ask("PUT", "/api/mute", fmt.Sprintf(`{%q:%t}`, kind, dice.IntN(3) == 0))
		case k < 120:
			feeds := []string{`[]`, `["video0"]`, `["audio0"]`, `["audio0","video0"]`}[dice.IntN(4)]
			s.ask("POST", "/api/streams", fmt.Sprintf(`{"stream":%q,"feeds":%s}`, stream, feeds))
		default:
			source := []string{stream, fmt.Sprint("stream/", sub), "video0"}[dice.IntN(3)]
			s.send(fmt.Sprint(n, "/", sub), source, fmt.Sprintf("ws://%s/%d", behaviours[dice.IntN(len(behaviours))], dice.IntN(3)))
		}
		s.account()
	}
}

// dial connects to vw; nil, and the test fails, if it can't.
func (s *soakClients) dial() *net.TCPConn {
	conn, err := net.Dial("tcp", s.web.Listener.Addr().String())
	if err != nil {
		s.t.Error(err)
		return nil
	}
	return conn.(*net.TCPConn)
}

// websocket opens one on conn; nil, and the test fails, if it can't.
func (s *soakClients) websocket(conn net.Conn, path string) *websocket.Conn {
	config, err := websocket.NewConfig("ws"+strings.TrimPrefix(s.web.URL, "http")+path, s.web.URL)
	if err != nil {
		s.t.Error(err)
		return nil
	}
	ws, err := websocket.NewClient(config, conn)
	if err != nil {
		s.t.Error(err)
		return nil
	}
	ws.PayloadType = websocket.BinaryFrame
	return ws
}

// post publishes feeds until ctx is done, each for a moment: as a body or as
// websocket messages, to a proper end or until the connection is reset. A
// second publisher takes a feed over; one body in ten is not MPEG-TS.
func (s *soakClients) post(ctx context.Context, dice *rand.Rand) {
	for ctx.Err() == nil {
		name, c := "video0", newCamera()
		c.size = 5000
		if dice.IntN(2) == 0 {
			name, c = "audio0", newMicrophone()
		}
		ctx, cancel := context.WithTimeout(ctx, time.Duration(dice.Int64N(int64(time.Second))))
		var body io.Reader = &liveBody{ctx: ctx, every: 10 * time.Millisecond, from: c, end: []error{io.EOF, io.ErrUnexpectedEOF}[dice.IntN(2)]}
		if dice.IntN(10) == 0 {
			body = strings.NewReader(strings.Repeat("no video ", 10000))
		}
		if dice.IntN(2) == 0 {
			if a, err := s.web.Client().Post(s.web.URL+"/ts/"+name, "", body); err == nil { // else it was cut off, on purpose
				a.Body.Close()
			}
		} else if conn := s.dial(); conn != nil {
			if ws := s.websocket(conn, "/in/"+name); ws != nil {
				if _, err := io.Copy(ws, body); err == nil {
					ws.Close()
				}
			}
			conn.SetLinger(0)
			conn.Close()
		}
		cancel()
		s.cycles.Add(1)
	}
}

// watch reads feeds and streams until ctx is done, each for a moment; one in
// three takes nothing.
func (s *soakClients) watch(ctx context.Context, dice *rand.Rand) {
	for ctx.Err() == nil {
		name := []string{"video0", "stream/0", "stream/1"}[dice.IntN(3)]
		ctx, cancel := context.WithTimeout(ctx, time.Duration(dice.Int64N(int64(time.Second))))
		takes := dice.IntN(3) > 0
		read := func(r io.Reader) {
			if takes {
				io.Copy(io.Discard, r)
			}
			<-ctx.Done()
		}
		if dice.IntN(2) == 0 {
			r, err := http.NewRequestWithContext(ctx, "GET", s.web.URL+"/ts/"+name, nil)
			if err != nil {
				s.t.Error(err)
			} else if a, err := s.web.Client().Do(r); err == nil { // else its moment is over
				read(a.Body)
				a.Body.Close()
			}
		} else if conn := s.dial(); conn != nil {
			if ws := s.websocket(conn, "/out/"+name); ws != nil {
				stop := context.AfterFunc(ctx, func() { conn.SetDeadline(past) })
				read(ws)
				stop()
			}
			conn.Close()
		}
		cancel()
		s.cycles.Add(1)
	}
}

// TestSoak goes in rounds of 1 s, each tenth of 8 s, in which everything comes
// and goes; a destination of each behaviour stays for the round. After each,
// nothing is left. In some rounds the disk of the state file hangs, or is full,
// or nobody reads the log. The collector, which would close connections that vw
// forgot, runs only then.
func TestSoak(t *testing.T) {
	if inOwnProcess(t) {
		return
	}
	ctx, end := context.WithCancelCause(t.Context())
	listenLoopback(t).Close() // opens what the runtime polls with
	var disk, log atomic.Pointer[outage]
	s := &soakClients{soak: newSoak(t, nil)}
	before := s.resources()
	logger, lines := newLog(nil, outageWriter{&log}, slog.LevelDebug)
	r := newRules(ctx, newMux(), 500*time.Millisecond, logger)
	s.rules = r
	if err := r.keep(filepath.Join(t.TempDir(), "state")); err != nil {
		t.Fatal(err)
	}
	save := r.file.save
	r.file.save = func(name string, b []byte) error { return cmp.Or(disk.Load().write(), save(name, b)) }
	var now atomic.Pointer[soakRelays]
	var names labNames
	dial := r.dialer.dial
	r.dialer.lookup = names.lookup
	r.dialer.dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		behaviour, _, _ := net.SplitHostPort(names.host(address))
		if behaviour == "away" {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		return dial(ctx, network, now.Load().addrs[behaviour])
	}
	h := newServer(ctx, r, "", logger)
	s.web = httptest.NewServer(h)
	idle := s.resources()
	start, told := time.Now(), time.Duration(0)
	text := ""
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	for n := 0; (n < 12 || time.Since(start) < *soakTime) && !t.Failed(); n++ {
		life := time.Second
		if n%10 == 0 {
			life = 8 * time.Second
		}
		ctx, cancel := context.WithTimeout(t.Context(), life)
		f := s.startRelays(ctx)
		now.Store(f)
		d, l := outages(ctx, n)
		disk.Store(d)
		log.Store(l)
		s.ask("POST", "/api/streams", `{"stream":"stream/kept","feeds":["video0","audio0"]}`)
		for i, behaviour := range behaviours {
			s.send("kept/"+behaviour, []string{"video0", "stream/kept"}[i%2], "ws://"+behaviour)
		}
		var people sync.WaitGroup
		for i := range 4 {
			dice := func(kind int) *rand.Rand { return s.dice(-int64(100*n + 10*kind + i + 1)) }
			people.Go(func() { s.call(ctx, i, life == time.Second, dice(0)) })
			people.Go(func() { s.post(ctx, dice(1)) })
			people.Go(func() { s.watch(ctx, dice(2)) })
		}
		people.Wait()
		disk.Store(nil)
		log.Store(nil)
		s.drop("all")
		s.ask("DELETE", "/api/streams/all", "")
		s.ask("PUT", "/api/mute", `{"audio":false,"video":false}`)
		cancel()
		f.wait()
		s.web.Client().CloseIdleConnections()
		s.awaitNoMoreThan(idle)
		s.account()
		if m := s.members(); m != (members{}) {
			t.Errorf("got %+v, want none", m)
		}
		if len(s.open) > 0 {
			t.Errorf("got %d destinations that have not ended", len(s.open))
		}
		if got := s.received.Load(); got > s.toWell {
			t.Errorf("the relays that are well received %d messages, %d were delivered to them", got, s.toWell)
		}
		text = fmt.Sprintf("%d descriptors, %s, %d received", s.resources().files, s.sample(), s.received.Load())
		if d := time.Since(start); n == 0 || d-told >= time.Minute {
			told = d
			t.Logf("%v, round %d: %s", d.Round(time.Second), n+1, text)
		}
	}
	t.Logf("at the end: %s", text)
	s.web.Close()
	end(errShutdown)
	h.tasks.Wait()
	r.wait()
	lines.close()
	s.awaitNoMoreThan(before)
	c := newCamera()
	c.size = 5000
	s.checkGrowth(len(c.next()))
}
