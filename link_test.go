package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// gathered keeps what is written.
type gathered struct {
	net.Conn
	b []byte
}

func (g *gathered) Write(b []byte) (int, error) {
	g.b = append(g.b, b...)
	return len(b), nil
}

// readConn is a connection that is only read.
type readConn struct {
	net.Conn
	io.Reader
}

func (c readConn) Read(p []byte) (int, error)      { return c.Reader.Read(p) }
func (c readConn) SetReadDeadline(time.Time) error { return nil }

// TestEarly: frames that come with the relay's answer, and with a publisher's
// request. What is no frame is answered with status 1002.
func TestEarly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, func(_ int64, _ string, conn net.Conn) {
			r := bufio.NewReader(conn)
			request, err := http.ReadRequest(r)
			if err != nil {
				t.Error(err)
				return
			}
			answer := &gathered{}
			upgradeTo(answer, request)
			var reading sync.WaitGroup
			defer reading.Wait()
			var media atomic.Int64
			reading.Go(func() { serveOn(conn, r, &media) })
			conn.Write(append(answer.b, frame(0x81, `{"authorised":true}`)...))
		})
		if _, err := l.setDestination(destinationRule{ID: "0", Stream: "video0", Destination: "ws://relay", Token: testToken}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if log := l.log.String(); !strings.Contains(log, "msg=connected") {
			t.Errorf("got the log\n%swant a connection", log)
		}
		l.close()
	})

	h := httptest.NewServer(newTestServer(t, ""))
	defer h.Close()
	conn, err := net.Dial("tcp", h.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	ask := "GET /in/video0 HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nOrigin: http://localhost\r\n\r\n"
	conn.Write(appendFrame([]byte(ask), opPing, []byte("early"), masked))
	r := bufio.NewReader(conn)
	if a, err := http.ReadResponse(r, nil); err != nil || a.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("got %v, %v", a, err)
	}
	got := make([]byte, 7)
	if _, err := io.ReadFull(r, got); err != nil || string(got) != "\x8a\x05early" {
		t.Errorf("got %q, %v, want the pong", got, err)
	}
	conn.Write([]byte("\xc2\x81abcdx"))
	if got, err := io.ReadAll(r); err != nil || string(got) != "\x88\x02\x03\xea" {
		t.Errorf("got %q, %v, want a close frame with status 1002", got, err)
	}
}

// TestMuchRead: what a relay sends is read at 4 MB/s at most.
func TestMuchRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLink(readConn{Reader: bytes.NewReader(make([]byte, 1<<20))}, newInbox(nil, nil, bare, 512), discardLog)
		start := time.Now()
		if n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{l}, make([]byte, 1000)); n != 1<<20 || err != nil {
			t.Errorf("got %d bytes, %v", n, err)
		}
		if d := time.Since(start); d < 200*time.Millisecond || d > 256*time.Millisecond {
			t.Errorf("took %v, want a millisecond for 4 KiB", d)
		}
	})
}

// seen is a frame as a relay got it.
type seen struct {
	frame int
	age   time.Duration
	key   bool
}

// camera of a given rate whose keyframes are bigger than its other frames.
type bornCamera struct {
	*camera
	key, other int // bytes of a frame
	mu         sync.Mutex
	born       []time.Time // of each frame
}

// film publishes 25 frames/s until ctx is done.
func (c *bornCamera) film(ctx context.Context, x *mux, name string) {
	p := &publisher{interrupt: func() {}}
	pr, pw := io.Pipe()
	var publishing sync.WaitGroup
	defer publishing.Wait()
	publishing.Go(func() { x.publish(name, p, pr) })
	defer pw.Close()
	tick := time.NewTicker(40 * time.Millisecond)
	defer tick.Stop()
	for ctx.Err() == nil {
		c.size = c.other
		if c.n%c.gop == 0 {
			c.size = c.key
		}
		b := c.next()
		c.mu.Lock()
		c.born = append(c.born, time.Now())
		c.mu.Unlock()
		pw.Write(b)
		<-tick.C
	}
}

// arrived returns the frames that begin in a message.
func (c *bornCamera) arrived(b []byte) (all []seen) {
	now := time.Now()
	for p := packet(b); len(p) > 0; p = p[packetSize:] {
		if pts, _ := timestamps(p.payload()); p.unitStart() && p.pid() == c.pid && pts != nil {
			n := int((readTime(pts) - 126000) / c.step)
			c.mu.Lock()
			all = append(all, seen{n, now.Sub(c.born[n]), p.randomAccess()})
			c.mu.Unlock()
		}
	}
	return all
}

// narrow makes what is sent to ports of 192.0.2.1 in this namespace go at so many
// kbit/s in all, behind a queue of so long.
func narrow(t *testing.T, kbit int, queue time.Duration, ports ...int) {
	t.Helper()
	class := fmt.Sprintf("1:%x", ports[0])
	commands := []string{
		"ip link set lo mtu 1500",
		"tc qdisc show dev lo | grep -q htb || tc qdisc add dev lo root handle 1: htb",
		"tc class add dev lo parent 1: classid " + class + " htb rate 10gbit",
		fmt.Sprintf("tc qdisc add dev lo parent %s tbf rate %dkbit burst 6kb latency %dms", class, kbit, queue.Milliseconds()),
	}
	for _, port := range ports {
		commands = append(commands, fmt.Sprintf("tc filter add dev lo parent 1: protocol ip prio 1 u32 match ip dport %d 0xffff flowid %s", port, class))
	}
	for _, c := range commands {
		if out, err := exec.Command("sh", "-c", c).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", c, err, out)
		}
	}
}

// TestNarrowLink: over a link that is narrower than its feed, what arrives is
// fresh, gaps end at keyframes, and the neighbour's relay gets everything.
//
// Not beside other tests: where the kernel waits for a processor, it takes longer to
// make good what the link's queue dropped.
func TestNarrowLink(t *testing.T) {
	notUnderRace(t)
	if !inNamespace(t) {
		return
	}
	for _, tt := range []struct {
		name       string
		key, other int
		queue      time.Duration
	}{
		{"4 Mbit/s", 60_000, 16_300, 200 * time.Millisecond},
		{"4 Mbit/s, deep queue", 60_000, 16_300, time.Second},
		{"8 Mbit/s", 200_000, 25_000, 200 * time.Millisecond},
		{"8 Mbit/s, deep queue", 200_000, 25_000, time.Second},
		{"1 Mbit/s fits", 20_000, 3000, 200 * time.Millisecond},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := &bornCamera{camera: newCamera(), key: tt.key, other: tt.other}
			var mu sync.Mutex
			var slow, fast []seen
			listen := func(got *[]seen) net.Listener {
				l, err := net.Listen("tcp", "192.0.2.1:0")
				if err != nil {
					t.Fatal(err)
				}
				serveEach(t, l, func(conn net.Conn) {
					conn.(*net.TCPConn).SetReadBuffer(64 << 10)
					serveRelay(conn, func(b []byte) {
						mu.Lock()
						defer mu.Unlock()
						*got = append(*got, c.arrived(b)...)
					})
				})
				return l
			}
			a, b := listen(&slow), listen(&fast)
			narrow(t, 2000, tt.queue, a.Addr().(*net.TCPAddr).Port)
			t.Parallel()
			var log logBuffer
			r, ctx, tasks := realRules(t, &log)
			r.to(t, "slow", "video0", "ws://"+a.Addr().String())
			r.to(t, "fast", "video0", "ws://"+b.Addr().String())
			waitFor(t, "connections", func() bool { return strings.Count(log.String(), "msg=connected") == 2 })
			length := scaled(6, 6, 60) // seconds
			ctx, cancel := context.WithTimeout(ctx, time.Duration(length)*time.Second)
			defer cancel()
			tasks.Go(func() { c.film(ctx, r.mux, "video0") })
			<-ctx.Done()
			time.Sleep(2 * time.Second)
			mu.Lock()
			defer mu.Unlock()
			keyTime := time.Duration(float64(tt.key) * 8 / 2e6 * float64(time.Second))
			limit := max(time.Second, keyTime+300*time.Millisecond)
			if queued := 2e6 / 8 * tt.queue.Seconds(); float64(tt.key) > queued {
				// The queue drops some of it: what TCP sends again at the end
				// waits in the queue once more.
				limit = max(limit, keyTime+300*time.Millisecond+tt.queue)
			}
			var ages []time.Duration
			for i, s := range slow {
				ages = append(ages, s.age)
				if s.age > limit {
					t.Errorf("frame %d (key %t) is %v old, want %v at most", s.frame, s.key, s.age, limit)
				}
				if i > 0 && s.frame != slow[i-1].frame+1 && !s.key {
					t.Errorf("frame %d follows frame %d and is no keyframe", s.frame, slow[i-1].frame)
				}
			}
			carried := 0
			for _, s := range slow {
				carried += map[bool]int{true: tt.key, false: tt.other}[s.key]
			}
			if most := 2e6 / 8 * length; len(fast) < len(c.born) || tt.key >= 60_000 && carried < most*6/10 {
				t.Errorf("got %d bytes on the narrow link, which carries %d, and %d frames beside it, of %d", carried, most, len(fast), len(c.born))
			}
			if tt.key < 60_000 && len(slow) != len(c.born) {
				t.Errorf("got %d frames of %d over a link that is wide enough", len(slow), len(c.born))
			}
			slices.Sort(ages)
			t.Logf("%d of %d frames, age %v in the median, %v at most (limit %v)", len(slow), len(c.born), ages[len(ages)/2], ages[len(ages)-1], limit)
			if n := strings.Count(log.String(), "no connection"); n > 0 {
				t.Errorf("got the log\n%s", log.String())
			}
		})
	}
}

// TestControlBetweenMessages: a control frame never goes into the middle of a message
// that a publisher began to write and the kernel did not take whole.
func TestControlBetweenMessages(t *testing.T) {
	for _, secure := range []bool{false, true} {
		t.Run(fmt.Sprintf("TLS %t", secure), func(t *testing.T) {
			ca := newCerts(t)
			l := listenLoopback(t)
			raw, err := l.(*net.TCPListener).SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			limitReceived(raw, 16<<10)
			url := "ws://" + l.Addr().String()
			if secure {
				l, url = tls.NewListener(l, ca.server), "wss"+url[2:]
			}
			var messages atomic.Int64
			serveEach(t, l, func(conn net.Conn) {
				br, err := accept(conn)
				if err != nil {
					return
				}
				var pinging sync.WaitGroup
				defer pinging.Wait()
				pinging.Go(func() {
					for err := error(nil); err == nil; time.Sleep(time.Millisecond) {
						_, err = conn.Write(frame(0x89, "ping"))
					}
				})
				for {
					opcode, b, err := readFrame(br)
					switch whole := len(b) > 0 && b[0] == syncByte && len(b)%packetSize == 0; {
					case err != nil || opcode == opClose:
						if err != nil && !errors.As(err, new(net.Error)) && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
							t.Error(err)
						}
						conn.Close()
						return
					case opcode == opBinary && !whole || opcode != opBinary && opcode != opPing && opcode != opPong:
						t.Errorf("got %d bytes with opcode %d in the place of a message", len(b), opcode)
						conn.Close()
						return
					case opcode == opBinary:
						if messages.Add(1)%8 == 0 {
							time.Sleep(8 * time.Millisecond) // and the kernel cannot take all
						}
					}
				}
			})
			var log logBuffer
			r, ctx, tasks := realRules(t, &log)
			r.dialer.roots = ca.roots
			r.to(t, "0", "video0", url)
			waitFor(t, "a connection", func() bool { return strings.Contains(log.String(), "msg=connected") })
			ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
			defer cancel()
			c := newCamera()
			c.size = 40_000
			tasks.Go(func() { film(ctx, r.mux, "video0", c, time.Millisecond) })
			<-ctx.Done()
			if n := messages.Load(); n < 200 || strings.Contains(log.String(), "no connection") {
				t.Errorf("got %d messages and the log\n%s", n, log.String())
			}
		})
	}
}

// TestLateness: what comes next when the first is too old has its own time on a
// narrow link, by which it may be too old as well.
func TestLateness(t *testing.T) {
	const maxAge = 500 * time.Millisecond
	for _, tt := range []struct {
		keyAge time.Duration
		want   int // messages sent
	}{{150 * time.Millisecond, 1}, {250 * time.Millisecond, 0}} {
		now := time.Now()
		l := &link{pace: pace{rate: 250_000, looked: now}}
		s := newSubscriber(raw, maxAge, nil)
		offer := func(size int, age time.Duration) {
			m := newMessage(make([]byte, size), now.Add(-age), chunkInfo{start: true, key: true, hasVideo: true, hasPAT: true})
			s.offer(m)
			m.release()
		}
		offer(25_000, maxAge+10*time.Millisecond)
		offer(200_000, tt.keyAge)
		if got := s.take(nil, maxBatch, false, now.Add(l.lateness(s, now))); len(got) != tt.want {
			t.Errorf("got %d messages with a keyframe of %v, want %d", len(got), tt.keyAge, tt.want)
		}
		s.wrote(0)
		s.end()
	}
}

// TestSlowReader: a relay that reads slowly but steadily is kept, however long one
// message takes, and gets whole messages that are as old as they take.
func TestSlowReader(t *testing.T) {
	notUnderRace(t)
	notShort(t, "a message takes 10 s")
	t.Parallel()
	c := &bornCamera{camera: newCamera(), key: 1_000_000, other: 1000}
	var mu sync.Mutex
	var got []seen
	keys, wanted := 0, scaled(0, 2, 6) // keyframes
	enough := make(chan struct{})
	var conns atomic.Int64
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		return limitReceived(raw, 32<<10)
	}}
	l, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	const rate = 100_000
	serveEach(t, l, func(conn net.Conn) {
		conns.Add(1)
		serveRelay(&rated{Conn: conn, rate: rate}, func(b []byte) {
			mu.Lock()
			defer mu.Unlock()
			for _, s := range c.arrived(b) {
				got = append(got, s)
				if s.key {
					if keys++; keys == wanted {
						close(enough)
					}
				}
			}
		})
	})
	var log logBuffer
	r, ctx, tasks := realRules(t, &log)
	r.to(t, "0", "video0", "ws://"+l.Addr().String())
	waitFor(t, "a connection", func() bool { return strings.Contains(log.String(), "msg=connected") })
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	tasks.Go(func() { c.film(ctx, r.mux, "video0") })
	select {
	case <-enough:
	case <-time.After(time.Duration(wanted) * 12 * time.Second):
	}
	mu.Lock()
	defer mu.Unlock()
	for _, s := range got {
		if limit := 11500 * time.Millisecond; s.age > limit { // 10 s, what the relay's kernel holds, and 0.3 s
			t.Errorf("frame %d (key %t) is %v old, want %v at most", s.frame, s.key, s.age, limit)
		}
	}
	if n := conns.Load(); n != 1 || keys < wanted {
		t.Errorf("got %d keyframes on %d connections, want %d on one:\n%s", keys, n, wanted, log.String())
	}
	t.Logf("%v", got)
}

// TestRecord: what publishers write goes into TLS records that are full, but for the
// last, in its order.
func TestRecord(t *testing.T) {
	for _, sizes := range [][]int{{1}, {maxRecord}, {maxRecord + 1}, {600, 5000}, {600, 40_000}, {20_000, 20_000, 7}, {1, maxRecord - 1, 1}} {
		var l link
		var want []byte
		for i, n := range sizes {
			b := bytes.Repeat([]byte{byte(i)}, n)
			l.iov = append(l.iov, b)
			want = append(want, b...)
		}
		var got []byte
		for len(got) < len(want) {
			b := l.record(len(got))
			if len(b) != min(maxRecord, len(want)-len(got)) {
				t.Fatalf("%v: got a record of %d bytes at %d of %d", sizes, len(b), len(got), len(want))
			}
			got = append(got, b...)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%v: got other bytes", sizes)
		}
	}
}

// TestWriteNowKept: while TLS has something of its own that the kernel does not take, as
// the answer to a KeyUpdate, a publisher leaves its message to the send loop, whole.
func TestWriteNowKept(t *testing.T) {
	client, _ := newSecured(t)
	l := newLink(client, newInbox(client, nil, bare, 512), discardLog)
	s := l.subscribe(time.Minute)
	for !l.below.holds() {
		if _, err := client.Write(make([]byte, maxRecord)); err != nil {
			t.Fatal(err)
		}
	}
	l.pingOnRequest()
	s.letWrite(l.writeNow)
	s.offerNow(testMessage("video0", time.Now(), true, 188))
	if s.inFlight != 0 || s.begun != 0 || len(s.items) != 1 || l.sealed != 0 || len(s.wakeups()) != 1 {
		t.Errorf("got %d messages in flight, %d bytes begun, %d queued, %d bytes sealed, %d wake-ups; want one message queued, and a wake-up",
			s.inFlight, s.begun, len(s.items), l.sealed, len(s.wakeups()))
	}
}

// TestPingAhead: a publisher writes the ping that is due before its message, and the
// send loop goes on where the kernel took a part: neither begins in the other.
func TestPingAhead(t *testing.T) {
	t.Parallel()
	const ping, whole = 2 + 4 + 8, math.MaxInt // header, key and payload
	for _, tt := range []struct {
		since  time.Duration // the last ping
		taken  int           // bytes, at the first write
		remove bool          // what is queued then
		want   string        // what the relay gets
	}{
		{pingEvery * 9 / 10, whole, false, "1 2"},
		{pingEvery, whole, false, "ping 1 2"},
		{pingEvery, 0, false, "ping 1 2"},
		{pingEvery, 1, false, "ping 1 2"},
		{pingEvery, ping - 1, false, "ping 1 2"},
		{pingEvery, ping, false, "ping 1 2"},
		{pingEvery, ping + 1, false, "ping 1 2"},
		{pingEvery, ping + 100, false, "ping 1 2"},
		{pingEvery, 0, true, "ping 2"},
		{pingEvery, ping - 1, true, "ping 2"},
		{pingEvery, ping + 1, true, "ping 1 2"}, // what is begun is not torn
	} {
		client, server := newConnected(t)
		l := newLink(client, newInbox(client, nil, bare, 512), discardLog)
		s := l.subscribe(time.Minute)
		write := l.direct.send
		l.direct.send = func(fd uintptr) {
			if tt.taken < whole {
				first := l.direct.parts
				l.direct.parts = [][]byte{slices.Concat(first...)[:tt.taken]}
				tt.taken = whole
			}
			write(fd)
		}
		l.pinged = time.Now().Add(-tt.since)
		l.pinger = time.AfterFunc(pingEvery, s.wake)
		s.letWrite(l.writeNow)
		for i := range byte(2) {
			m := newMessage(bytes.Repeat([]byte{i + 1}, 188), time.Now(), chunkInfo{start: true, key: true, hasVideo: true, hasPAT: true})
			m.feed = "video0"
			s.offerNow(m)
			if i == 0 && tt.remove {
				s.removeFeed("video0")
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		var sending sync.WaitGroup
		sending.Go(func() { l.send(ctx, s) })
		server.SetReadDeadline(time.Now().Add(settleTime))
		var got []string
		for len(got) < strings.Count(tt.want, " ")+1 {
			opcode, b, err := readFrameInto(nil, server)
			switch {
			case err != nil:
				t.Fatal(err)
			case opcode == opPing:
				got = append(got, "ping")
			default:
				got = append(got, strconv.Itoa(int(b[0])))
			}
		}
		if got := strings.Join(got, " "); got != tt.want {
			t.Errorf("%+v: the relay got %q", tt, got)
		}
		cancel()
		sending.Wait()
	}
}
