package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/websocket"
)

// TestBackoff: how often relays that do not work are dialled in 60 s, and
// what the log says of them.
func TestBackoff(t *testing.T) {
	tests := []struct {
		name        string
		relay       func(n int64, host string, conn net.Conn)
		least, most int64
		log         string
	}{
		{"refuses", nil, 150, 750, "connection refused"},
		{"closes at once", replies(""), 9, 15, "closed without an answer"},
		{"accepts, then closes", func(_ int64, _ string, conn net.Conn) { accept(conn) }, 9, 15, "closed by the other side"},
		{"closes for a reason", func(n int64, _ string, conn net.Conn) {
			accept(conn)
			conn.Write(frame(0x88, fmt.Sprintf("\x03\xf0token expired, request %d", n)))
			silent(conn)
		}, 9, 15, "status 1008 (policy violation): token expired, request 1"},
		{"401", replies("HTTP/1.1 401 Unauthorized\r\n\r\n"), 6, 8, "401 Unauthorized"},
		{"404", replies("HTTP/1.1 404 Not Found\r\n\r\n"), 6, 8, "404 Not Found"},
		{"503", replies("HTTP/1.1 503 Busy\r\n\r\n"), 150, 750, "503 Busy"},
		{"500", replies("HTTP/1.1 500 Oops\r\n\r\n"), 9, 15, "500 Oops"},
		{"never answers", func(_ int64, _ string, conn net.Conn) { io.Copy(io.Discard, conn) }, 5, 9, "no answer within 5s"},
		{"1 MB of header", replies("HTTP/1.1 101 Switching Protocols\r\n" + strings.Repeat("X: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n", 20000)), 9, 15, "longer than 16384 bytes"},
		{"one endless line", replies("HTTP/1.1 101 " + strings.Repeat("y", 1<<20)), 9, 15, "longer than 16384 bytes"},
		{"SSH", replies("SSH-2.0-OpenSSH_9.2\r\n"), 9, 15, "SSH-2.0-OpenSSH_9.2"},
		{"a line for the log", replies("HTTP/1.1 500 a\x1b[31mb\r\n\r\n"), 9, 15, `\\x1b`},
		{"not a websocket", replies("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"), 9, 15, "200 OK"},
		{"a wrong accept", replies("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: x\r\n\r\n"), 9, 15, "does not belong to our key"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLab(t, tt.relay)
				defer l.close()
				l.send("video0", "ws://relay/in/x")
				time.Sleep(60 * time.Second)
				if got := l.dials.Load(); got < tt.least || got > tt.most {
					t.Errorf("got %d dials, want %d to %d", got, tt.least, tt.most)
				}
				if log := l.log.String(); strings.Count(log, tt.log) != 1 || strings.Count(log, "level=WARN") != 1 || len(log) > 2000 {
					t.Errorf("got the log\n%swant %q once", log, tt.log)
				}
			})
		})
	}
}

// TestRelayReturns: video within 1 s of a relay's return, however long it was
// away, when keyframes come every 480 ms.
func TestRelayReturns(t *testing.T) {
	for _, away := range []time.Duration{2 * time.Second, 3 * time.Second, 12 * time.Second, 20 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			var video atomic.Int64 // frames
			var conn atomic.Value
			l := newLab(t, func(_ int64, _ string, c net.Conn) {
				conn.Store(c)
				serveRelay(c, func(b []byte) { video.Add(1) })
			})
			ctx, cancel := context.WithCancel(t.Context())
			l.tasks.Go(func() { l.film(ctx, "video0", 5000) })
			defer func() { cancel(); l.close() }()
			l.send("video0", "ws://relay")
			time.Sleep(10 * time.Second)
			synctest.Wait()
			if video.Load() < 200 {
				t.Fatalf("got %d frames in 10 s", video.Load())
			}
			l.away.Store(true)
			conn.Load().(net.Conn).Close()
			time.Sleep(away)
			synctest.Wait()
			video.Store(0)
			l.away.Store(false)
			time.Sleep(time.Second)
			synctest.Wait()
			if video.Load() == 0 {
				t.Errorf("away %v: no video after 1 s", away)
			}
		})
	}
}

// TestAway: how often a relay that stays away is dialled, and how soon there is
// video when one is back that was away for a short while.
func TestAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, nil)
		defer l.close()
		l.send("video0", "ws://relay")
		was := int64(0)
		for _, tt := range []struct {
			until       time.Duration
			least, most int64 // dials since the one before
		}{{30 * time.Second, 100, 250}, {10 * time.Minute, 250, 600}, {time.Hour, 450, 800}} {
			time.Sleep(tt.until - time.Since(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)))
			n := l.dials.Load()
			if n-was < tt.least || n-was > tt.most {
				t.Errorf("until %v: got %d dials, want %d to %d", tt.until, n-was, tt.least, tt.most)
			}
			was = n
		}
		if was > 1500 {
			t.Errorf("got %d dials in an hour, want 1500 at most", was)
		}
		if log := l.log.String(); strings.Count(log, "level=WARN") != 1 {
			t.Errorf("got the log\n%swant one warning", log)
		}
	})
}

// TestOneLineAnEpisode: causes that take turns, and texts with another time or
// port in them each time, are told once.
func TestOneLineAnEpisode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, nil)
		defer l.close()
		var dials atomic.Int64
		l.dialer.dial = func(context.Context, string, string) (net.Conn, error) {
			n := dials.Add(1)
			return nil, fmt.Errorf("%s at %v from port %d", []string{"refused", "no route"}[n%2], time.Now(), 40000+n)
		}
		l.send("video0", "ws://relay")
		time.Sleep(time.Minute)
		if log := l.log.String(); strings.Count(log, "level=WARN") != 2 || dials.Load() < 100 {
			t.Errorf("got %d dials and the log\n%swant each cause once", dials.Load(), log)
		}
	})
}

// TestSeveralChanges: of several URLs in a row, the one that opens first ends all
// before it: two relays get video side by side for a hand-over, never longer.
func TestSeveralChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		last := make(map[string]time.Time) // when each relay got video
		l := newLab(t, func(_ int64, host string, conn net.Conn) {
			switch {
			case strings.HasPrefix(host, "dead"):
				io.Copy(io.Discard, conn)
				return
			case strings.HasPrefix(host, "slow"):
				time.Sleep(1500 * time.Millisecond)
			}
			serveRelay(conn, func([]byte) {
				mu.Lock()
				defer mu.Unlock()
				last[host] = time.Now()
			})
		})
		ctx, cancel := context.WithCancel(t.Context())
		l.tasks.Go(func() { l.film(ctx, "video0", 5000) })
		defer func() { cancel(); l.close() }()
		for _, urls := range [][]string{{"ws://dead1", "ws://c"}, {"ws://slow1", "ws://dead2", "ws://d"}, {"ws://e", "ws://slow2"}, {"ws://f", "ws://g", "ws://h"}} {
			l.send("video0", "ws://a")
			time.Sleep(5 * time.Second)
			var changed time.Time
			for _, u := range urls {
				l.send("video0", u)
				time.Sleep(50 * time.Millisecond)
				changed = time.Now()
			}
			time.Sleep(5 * time.Second)
			mu.Lock()
			newest := strings.TrimPrefix(urls[len(urls)-1], "ws://") + ":80"
			for host, at := range last {
				// e, which opens at once, may go on until slow2 is there.
				if host != newest && at.After(changed.Add(700*time.Millisecond)) && !(host == "e:80" && at.Before(changed.Add(maxTakeOver+100*time.Millisecond))) {
					t.Errorf("%v: %s got video until %v after the last change", urls, host, at.Sub(changed))
				}
			}
			if time.Since(last[newest]) > 100*time.Millisecond {
				t.Errorf("%v: the last one gets no video", urls)
			}
			clear(last)
			mu.Unlock()
		}
	})
}

// TestLiveness: a relay that says nothing is replaced after 6.5 s, one that
// does not read after 5 to 6 s, one that stalls for 4 s is kept.
func TestLiveness(t *testing.T) {
	tests := []struct {
		name        string
		relay       func(conn net.Conn)
		least, most time.Duration // until it is dialled again; 0: it is not
		why         string
	}{
		{"healthy", func(conn net.Conn) { serveRelay(conn, func([]byte) {}) }, 0, 0, ""},
		{"silent", func(conn net.Conn) {
			if r, err := accept(conn); err == nil {
				io.Copy(io.Discard, r)
			}
		}, 6 * time.Second, 7 * time.Second, "nothing read for 6.5s"},
		{"does not read", func(conn net.Conn) {
			if _, err := accept(conn); err == nil {
				time.Sleep(20 * time.Second)
			}
		}, 5 * time.Second, 7 * time.Second, ""},
		{"stalls for 4 s before each pong", func(conn net.Conn) {
			r, err := accept(conn)
			for err == nil {
				var opcode byte
				if opcode, _, err = readFrame(r); opcode == opPing {
					time.Sleep(4 * time.Second)
					_, err = conn.Write([]byte{0x8a, 0})
				}
			}
		}, 0, 0, ""},
		{"pings by the thousand", func(conn net.Conn) {
			r, err := accept(conn)
			var pinging sync.WaitGroup
			defer pinging.Wait()
			pinging.Go(func() {
				for range 5000 {
					conn.Write([]byte{0x89, 4, 'p', 'i', 'n', 'g'})
				}
			})
			for err == nil {
				var opcode byte
				if opcode, _, err = readFrame(r); opcode == opPing {
					_, err = conn.Write([]byte{0x8a, 0})
				}
			}
		}, 0, 0, ""},
		{"masks its frames", func(conn net.Conn) {
			if r, err := accept(conn); err == nil {
				conn.Write([]byte{0x8a, 0x80, 1, 2, 3, 4})
				io.Copy(io.Discard, r)
			}
		}, 0, time.Second, "a server masks a frame"},
		{"sends endlessly", func(conn net.Conn) {
			if r, err := accept(conn); err == nil {
				var reading sync.WaitGroup
				defer reading.Wait()
				reading.Go(func() { io.Copy(io.Discard, r) })
				conn.Write([]byte{0x82, 127, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
				for range 100 {
					time.Sleep(300 * time.Millisecond)
					if _, err := conn.Write(make([]byte, 100000)); err != nil {
						return
					}
				}
			}
		}, 0, 0, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var opened, again time.Time
				l := newLab(t, func(n int64, _ string, conn net.Conn) {
					switch n {
					case 1:
						opened = time.Now()
						tt.relay(conn)
					case 2:
						again = time.Now()
					}
				})
				ctx, cancel := context.WithCancel(t.Context())
				l.tasks.Go(func() { l.film(ctx, "video0", 5000) })
				defer func() { cancel(); l.close() }()
				l.send("video0", "ws://relay")
				time.Sleep(25 * time.Second)
				synctest.Wait()
				if tt.most == 0 {
					if !again.IsZero() {
						t.Errorf("dialled again after %v: %s", again.Sub(opened), l.log)
					}
					return
				}
				const wait = 250 * time.Millisecond
				if d := again.Sub(opened); again.IsZero() || d < tt.least || d > tt.most+wait {
					t.Errorf("dialled again after %v, want %v to %v: %s", d, tt.least, tt.most, l.log)
				}
				if !strings.Contains(l.log.String(), tt.why) {
					t.Errorf("got the log\n%swant %q", l.log, tt.why)
				}
			})
		})
	}
}

// TestClose: the code of the close frame, and how long the end takes, whether
// the relay reads or is stuck.
func TestClose(t *testing.T) {
	tests := []struct {
		name  string
		stuck bool
		end   func(l *lab)
		want  int64
	}{
		{"removed", false, func(l *lab) { l.deleteDestination("0") }, 1000},
		{"shutdown", false, func(l *lab) { l.end(errShutdown) }, 1001},
		{"removed, stuck", true, func(l *lab) { l.deleteDestination("0") }, 0},
		{"shutdown, stuck", true, func(l *lab) { l.end(errShutdown) }, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var code atomic.Int64
				l := newLab(t, func(_ int64, _ string, conn net.Conn) {
					if tt.stuck {
						accept(conn)
						time.Sleep(time.Minute)
						return
					}
					c, _ := serveRelay(conn, func([]byte) {})
					code.Store(int64(c))
				})
				ctx, cancel := context.WithCancel(t.Context())
				var filming sync.WaitGroup
				filming.Go(func() { l.film(ctx, "video0", 50000) })
				l.send("video0", "ws://relay")
				time.Sleep(3 * time.Second)
				cancel()
				filming.Wait()
				start := time.Now()
				tt.end(l)
				l.tasks.Wait()
				if d := time.Since(start); d > 100*time.Millisecond {
					t.Errorf("the end took %v, want 100 ms at most", d)
				}
				l.close()
				if got := code.Load(); got != tt.want {
					t.Errorf("got close code %d, want %d", got, tt.want)
				}
			})
		})
	}
}

// TestSameRule: an identical rule again does nothing to the connection;
// another stream on the same URL replaces it at once.
func TestSameRule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, func(_ int64, _ string, conn net.Conn) { serveRelay(conn, func([]byte) {}) })
		defer l.close()
		l.send("video0", "ws://relay")
		for range 10 {
			time.Sleep(time.Second)
			l.send("video0", "ws://relay")
			l.send("/video0", "ws://relay")
		}
		if got := l.dials.Load(); got != 1 {
			t.Errorf("got %d dials, want 1", got)
		}
		l.send("video1", "ws://relay")
		time.Sleep(time.Second)
		l.mux.mu.Lock()
		defer l.mux.mu.Unlock()
		if got := l.dials.Load(); got != 2 || len(l.mux.feeds) != 1 {
			t.Errorf("got %d dials and %d feeds, want 2 and 1", got, len(l.mux.feeds))
		}
	})
}

// TestHandOver: between two healthy relays, 100 times, every frame reaches at
// least one; the new one begins with a PAT and a keyframe. A new relay that is
// dead costs the old one its connection after 2 s.
func TestHandOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		got := make(map[ticks]bool) // frames, by PTS as it was posted
		first := ticks(-1)
		var dead atomic.Bool
		relay := func(_ int64, host string, conn net.Conn) {
			if dead.Load() && strings.HasPrefix(host, "dead") {
				io.Copy(io.Discard, conn)
				return
			}
			begun := false
			serveRelay(conn, func(b []byte) {
				time.Sleep(45 * time.Millisecond) // a little too slow: some frames wait in the queue
				mu.Lock()
				defer mu.Unlock()
				for p := packet(b); len(p) > 0; p = p[packetSize:] {
					if !begun && p.pid() != patPID {
						t.Errorf("%s: the first packet has PID %#x, want PAT", host, p.pid())
					}
					if pts, _ := timestamps(p.payload()); p.unitStart() && p.pid() == 0x100 && pts != nil {
						if at := readTime(pts); first < 0 {
							first = at
						} else {
							got[at] = true
						}
					}
					begun = true
				}
			})
		}
		l := newLab(t, relay)
		ctx, cancel := context.WithCancel(t.Context())
		l.tasks.Go(func() { l.film(ctx, "video0", 5000) })
		defer func() { cancel(); l.close() }()
		l.send("video0", "ws://a")
		for i := range 100 {
			time.Sleep(time.Second + time.Duration(i)*7*time.Millisecond)
			l.send("video0", []string{"ws://b", "ws://a"}[i%2])
		}
		time.Sleep(3 * time.Second)
		mu.Lock()
		last := ticks(0)
		for at := range got {
			last = max(last, at)
		}
		missing := 0
		for at := first + 3600; at <= last; at += 3600 {
			if !got[at] {
				missing++
			}
		}
		mu.Unlock()
		if n := l.dials.Load(); missing > 0 || n != 101 || last-first < 100*second {
			t.Errorf("%d frames of %d reached no relay, in %d dials", missing, (last-first)/3600, n)
		}

		dead.Store(true)
		old := l.destinations["0"].destination
		start := time.Now()
		l.send("video0", "ws://dead")
		<-old.quiet
		if d := time.Since(start); d < maxTakeOver || d > maxTakeOver+closeTimeout {
			t.Errorf("beside a dead one the old relay was kept for %v, want 2 s", d)
		}
	})
}

// TestCounters holds I7 for a destination across connections that end.
func TestCounters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := 0
		l := newLab(t, func(_ int64, _ string, conn net.Conn) {
			serveRelay(conn, func([]byte) {
				if n++; n%100 == 0 {
					time.Sleep(1500 * time.Millisecond) // and the queue overflows
				}
				if n%350 == 0 {
					conn.Close()
				}
			})
		})
		ctx, cancel := context.WithCancel(t.Context())
		l.tasks.Go(func() { l.film(ctx, "video0", 5000) })
		defer func() { cancel(); l.close() }()
		l.send("video0", "ws://relay")
		for range 100 {
			time.Sleep(777 * time.Millisecond)
			synctest.Wait()
			c, queued := l.destinations["0"].count()
			total := c.delivered + uint64(queued)
			for _, d := range c.dropped {
				total += d
			}
			if c.published != total {
				t.Fatalf("I7: got %+v, %d queued", c, queued)
			}
		}
		c, _ := l.destinations["0"].count()
		if c.dropped[dropLag] == 0 || c.dropped[dropGate] == 0 || c.dropped[dropEnd] == 0 || c.delivered < 500 {
			t.Errorf("got %+v, want drops of each cause", c)
		}
	})
}

// TestManyURLs: a destination that is sent elsewhere faster than it can go
// there has few connections.
func TestManyURLs(t *testing.T) {
	var open, most atomic.Int64
	l := newLab(t, func(_ int64, _ string, conn net.Conn) { // it never answers
		most.Store(max(most.Load(), open.Add(1)))
		io.Copy(io.Discard, conn)
		open.Add(-1)
	})
	defer l.close()
	for i := range 500 {
		l.send("video0", fmt.Sprintf("ws://relay/%d", i))
	}
	if got := most.Load(); got > 3*maxOld { // those that are ending as well
		t.Errorf("got %d connections at once, want at most %d", got, 3*maxOld)
	}
	if err := l.deleteDestination("0"); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "all connections to end", func() bool { return open.Load() == 0 })
}

// TestTakeOverToken: a new token for the same path, ten times, while somebody else sends
// 3 Mbit/s there, which comes back to us: a viewer gets every frame once or twice,
// and none late.
func TestTakeOverToken(t *testing.T) {
	notUnderRace(t)
	notShort(t, "it takes 10 s")
	_, relay := startTokenRelay(t, "127.0.0.1:0", "-secret", relaySecret)
	member := func() *controller {
		c := newController(t, "ws://"+relay+"/in/a")
		if got := c.ask(t, relayToken("/in/a", time.Hour)); !strings.Contains(got, `"authorised":true`) {
			t.Fatalf("got %s", got)
		}
		return c
	}
	viewer, other := member(), member()
	var log logBuffer
	r, ctx, tasks := realRules(t, &log)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	tasks.Go(func() { // what it gets is discarded
		for {
			if _, err := io.CopyN(io.Discard, other.Conn, 1<<20); err != nil {
				return
			}
		}
	})
	defer other.SetDeadline(past)
	tasks.Go(func() {
		foreign := newMicrophone()
		foreign.size, foreign.pid = 3700, 0x200
		for ctx.Err() == nil {
			if websocket.Message.Send(other.Conn, foreign.next()) != nil {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	})
	c := &bornCamera{camera: newCamera(), key: 20000, other: 6000}
	var mu sync.Mutex
	var all []seen
	var at []time.Time
	tasks.Go(func() {
		br := bufio.NewReader(viewer.Conn) // x/net reads one fragment after the other
		for {
			b := make([]byte, packetSize)
			if _, err := io.ReadFull(br, b); err != nil {
				return
			}
			mu.Lock()
			for _, s := range c.arrived(b) {
				all, at = append(all, s), append(at, time.Now())
			}
			mu.Unlock()
		}
	})
	defer viewer.SetDeadline(past)
	set := func(lasts time.Duration) {
		t.Helper()
		rule := destinationRule{ID: "0", Stream: "video0", Destination: "ws://" + relay + "/in/a", Token: relayToken("/in/a", lasts)}
		if _, err := r.setDestination(rule); err != nil {
			t.Fatal(err)
		}
	}
	set(time.Hour)
	waitFor(t, "a connection", func() bool { return strings.Contains(log.String(), "msg=connected") })
	tasks.Go(func() { c.film(ctx, r.mux, "video0") })
	time.Sleep(time.Second)
	for i := range 10 {
		set(time.Hour + time.Duration(i+1)*time.Minute)
		time.Sleep(900 * time.Millisecond)
	}
	cancel()
	mu.Lock()
	defer mu.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	times := make(map[int]int)
	first, last := all[0].frame, 0
	var gap time.Duration
	for i, s := range all {
		times[s.frame]++
		if s.frame > last && i > 0 { // that the camera was late is not the gap's
			gap = max(gap, at[i].Sub(at[i-1])-max(0, c.born[s.frame].Sub(c.born[s.frame-1])-40*time.Millisecond))
		}
		last = max(last, s.frame)
	}
	const maxGap = 80 * time.Millisecond
	twice := 0
	for n := first; n <= last; n++ {
		if times[n] != 1 && times[n] != 2 {
			t.Errorf("frame %d came %d times", n, times[n])
		}
		twice += times[n] - 1
	}
	if n := strings.Count(log.String(), "level=WARN"); n > 0 || gap > maxGap || strings.Count(log.String(), `"destination set"`) != 11 {
		t.Errorf("got a gap of %v, want %v at most, and the log\n%s", gap, maxGap, log.String())
	}
	t.Logf("%d frames, %d of them twice; the longest gap is %v", last-first+1, twice, gap)
}
