// Hostile clients and relays: what they do costs vw a bounded amount of
// memory, and its neighbours nothing. Holds I2, I3 and I8.

package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"
)

// Secrets that no log may show.
const (
	secretToken = "tok3n-of-the-tests"
	secretUser  = "hunter2"
)

// besieged is a vw with a neighbour of those who attack it: a feed that is
// posted, and a relay that gets it.
type besieged struct {
	*vwProcess
	relay  *relayProcess
	idle   int // descriptors that vw has then
	memory func() []int
}

func besiege(t *testing.T, env ...string) *besieged {
	t.Helper()
	b := &besieged{relay: startRelay(t, "127.0.0.1:0", "-record", "")}
	b.vwProcess = startVW(t, append(env, "VW_LOGLEVEL=debug", "VW_TOKEN="+secretToken)...)
	b.call(t, http.StatusOK, "POST", "/api/streams", `{"stream":"stream/neighbour","feeds":["neighbour"]}`)
	b.send(t, "neighbour", "stream/neighbour", "ws://user:"+secretUser+"@"+b.relay.addr+"/?code="+secretUser)
	stop := startCamera(t, b.addr, "neighbour")
	t.Cleanup(func() {
		stop()
		checkLog(t, b.out.String())
	})
	b.flows(t)
	b.idle = b.descriptors(t)
	b.memory = b.sampleRSS(t, 20*time.Millisecond)
	return b
}

// startCamera posts 25 frames a second until stop.
func startCamera(t *testing.T, vw, feed string) (stop func()) {
	t.Helper()
	p := startPost(t, vw, feed)
	end := make(chan struct{})
	var posting sync.WaitGroup
	posting.Go(func() {
		frames := time.NewTicker(40 * time.Millisecond)
		defer frames.Stop()
		for c := newCamera(); ; {
			select {
			case <-end:
				return
			case <-frames.C:
				if _, err := p.chunks.Write(c.next()); err != nil {
					t.Errorf("the post of %s: %v", feed, err)
					return
				}
			}
		}
	})
	stop = sync.OnceFunc(func() {
		close(end)
		posting.Wait()
	})
	t.Cleanup(stop)
	return stop
}

// flows waits until the neighbour's relay got 10 more messages.
func (b *besieged) flows(t *testing.T) {
	t.Helper()
	b.relay.flows(t)
}

// answers mutes the neighbour, and lets it be heard again.
func (b *besieged) answers(t *testing.T) {
	t.Helper()
	for _, feeds := range []string{`[]`, `["neighbour"]`} {
		rule := `{"stream":"stream/neighbour","feeds":` + feeds + `}`
		if got := b.call(t, http.StatusOK, "POST", "/api/streams", rule); got != rule {
			t.Errorf("got %s, want %s", got, rule)
		}
	}
}

func (b *besieged) descriptors(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", b.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// recovers waits until vw holds nothing of an attack that is over, and judges
// the most memory that it had.
func (b *besieged) recovers(t *testing.T, most int) {
	t.Helper()
	eventually(t, startupTime, func() error {
		if got := b.descriptors(t); got > b.idle+2 { // a call under way
			return fmt.Errorf("vw has %d descriptors, before the attack %d", got, b.idle)
		}
		return nil
	})
	peak := 0
	for _, n := range b.memory() {
		peak = max(peak, n)
	}
	t.Logf("resident: %.0f MB at most", mb(peak))
	if peak > most {
		t.Errorf("resident: got %.0f MB, want at most %.0f", mb(peak), mb(most))
	}
}

// checkLog: each line is one of ours, printable, and without secrets.
func checkLog(t *testing.T, text string) {
	t.Helper()
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if !strings.HasPrefix(line, "time=") || !utf8.ValidString(line) || strings.ContainsFunc(line, func(r rune) bool { return !strconv.IsPrint(r) }) {
			t.Errorf("the log has the line %.300q", line)
		}
		for _, secret := range []string{secretToken, secretUser} {
			if strings.Contains(line, secret) {
				t.Errorf("the log has a secret: %.300q", line)
			}
		}
	}
}

// crowd opens n connections that each say something. It returns when all have,
// or after a second, while some go on.
func (b *besieged) crowd(t *testing.T, n int, say func(i int, conn net.Conn)) []net.Conn {
	t.Helper()
	conns := make([]net.Conn, n)
	var saying sync.WaitGroup
	t.Cleanup(saying.Wait)
	for i := range conns {
		conn, err := net.DialTimeout("tcp", b.addr, startupTime)
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		t.Cleanup(func() { conn.Close() })
		conns[i] = conn
		conn.SetDeadline(time.Now().Add(3 * startupTime))
		saying.Go(func() { say(i, conn) })
	}
	said := make(chan struct{})
	go func() {
		saying.Wait()
		close(said)
	}()
	select {
	case <-said:
	case <-time.After(time.Second):
	}
	return conns
}

// statusLine reads the first line of an answer, "" when the connection ended.
func statusLine(conn net.Conn) string {
	buf := make([]byte, 512)
	n, err := io.ReadAtLeast(conn, buf, 12)
	if err != nil {
		return ""
	}
	line, _, _ := strings.Cut(string(buf[:n]), "\r\n")
	return strings.TrimPrefix(line, "HTTP/1.1 ")
}

// TestHostileClients: while they do their worst, video flows and mutes work;
// when they are gone, nothing of them is left.
//
// Not parallel: each takes as many connections as there may be.
func TestHostileClients(t *testing.T) {
	t.Parallel()
	say := func(format string) func(int, net.Conn) {
		return func(i int, conn net.Conn) { fmt.Fprintf(conn, format, i) }
	}
	tinyHeaders := func(_ int, conn net.Conn) {
		var h bytes.Buffer
		h.WriteString("GET /healthcheck HTTP/1.1\r\nHost: localhost\r\n")
		for i := 0; h.Len() < maxHeaders; i++ {
			fmt.Fprintf(&h, "%s:\r\n", strconv.FormatInt(int64(i), 36))
		}
		conn.Write(h.Bytes())
	}
	clip := testClip(6, 500)
	post := func(i int, conn net.Conn) {
		fmt.Fprintf(conn, "POST /ts/f%d HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999\r\n\r\n%s", i, clip)
	}
	const upgrade = "GET /%s HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" +
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
	frames := func(path string, bytes ...string) func(int, net.Conn) {
		return func(i int, conn net.Conn) {
			fmt.Fprintf(conn, upgrade, path)
			for range 1000 {
				io.WriteString(conn, bytes[i%len(bytes)])
			}
		}
	}
	for _, tt := range []struct {
		name string
		n    int // connections
		say  func(i int, conn net.Conn)
		want string // what one more is answered, as it begins; "": nothing is looked at
		stay int    // connections that may be more than callers
	}{
		{name: "nothing is said", n: 10000},
		{name: "slow headers", n: 1000, say: say("GET /%d HTTP/1.1\r\nHost: l")},
		{name: "thousands of headers, and no end", n: 1000, say: tinyHeaders},
		{name: "endless headers", n: 20, want: "431", say: func(_ int, conn net.Conn) {
			io.WriteString(conn, "GET / HTTP/1.1\r\n")
			for err := error(nil); err == nil; {
				_, err = io.WriteString(conn, "A: "+strings.Repeat("a", 1000)+"\r\n")
			}
		}},
		{name: "endless first line", n: 20, want: "431", say: func(_ int, conn net.Conn) {
			for err := error(nil); err == nil; {
				_, err = io.WriteString(conn, strings.Repeat("A", 1000))
			}
		}},
		{name: "a rule that never comes", n: 1000, say: say("POST /api/streams HTTP/1.1\r\nHost: localhost\r\nContent-Length: 6%04d\r\n\r\n{")},
		{name: "a rule that trickles", n: 100, want: "408", say: func(_ int, conn net.Conn) {
			io.WriteString(conn, "POST /api/streams HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60000\r\n\r\n")
			for err := error(nil); err == nil; time.Sleep(100 * time.Millisecond) {
				_, err = io.WriteString(conn, " ")
			}
		}},
		{name: "a feed that never comes", n: 1000, say: say("POST /ts/f%d HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")},
		{name: "feeds by the thousand", n: 1000, say: post, want: "503", stay: maxPublishers},
		{name: "readers by the thousand", n: 1500, say: say("GET /ts/f%d HTTP/1.1\r\nHost: localhost\r\n\r\n"), want: "503", stay: maxReaders},
		{name: "a reader with a body", n: 20, say: say("GET /ts/f%d HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"), want: "400"},
		{name: "all is asked, nothing is read", n: 100, say: func(_ int, conn net.Conn) {
			io.WriteString(conn, strings.Repeat("GET /api/streams/all HTTP/1.1\r\nHost: localhost\r\n\r\n", 2000))
		}},
		{name: "names for the log", n: 50, want: "400", say: func(i int, conn net.Conn) {
			fmt.Fprintf(conn, "POST /ts/a%%0atime=1%%1b[31m%%ff%%e2%%80%%ae HTTP/1.1\r\nHost: localhost\r\nUser-Agent: \x1b[2J\xff\xe2\x80\xae\r\nContent-Length: 9\r\n\r\n")
		}},
		{name: "agents for the log", n: 50, say: func(i int, conn net.Conn) {
			fmt.Fprintf(conn, "GET /ts/a%d HTTP/1.1\r\nHost: localhost\r\nUser-Agent: x\ttime=1\xff\xe2\x80\xae%s\r\n\r\n", i, strings.Repeat("\xe2\x80\xae", 2000))
		}},
		{name: "frames of a publisher", n: 300, say: frames("in/f",
			"\x82\xff\x7f\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00", // as long as can be
			"\x82\x05hello",                                            // not masked
			"\xf2\x81\x00\x00\x00\x00x",                                // reserved bits
			"\x8f\x81\x00\x00\x00\x00x",                                // an opcode that is none
			"\x89\x80\x00\x00\x00\x00",                                 // pings
			"\x02\x81\x00\x00\x00\x00x",                                // fragments without an end
			"\x89\xff\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00", // a long ping
			"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
		)},
		{name: "frames of a viewer", n: 40, say: frames("out/f",
			"\x82\xff\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00"+strings.Repeat("\x00", 1<<16),
			"\x89\x80\x00\x00\x00\x00",
			"\x82\x05hello",
			"\x88\x80\x00\x00\x00\x00",
		)},
		{name: "not the token", n: 100, want: "401", say: func(_ int, conn net.Conn) {
			io.WriteString(conn, "GET /api/streams/all HTTP/1.1\r\nHost: localhost\r\nVia: x\r\nAuthorization: Bearer "+secretToken+"x\r\n\r\n")
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := besiege(t)
			if tt.say == nil {
				tt.say = func(int, net.Conn) {}
			}
			conns := b.crowd(t, tt.n, tt.say)
			b.answers(t)
			b.flows(t)
			if got, most := b.descriptors(t), b.idle+maxCallers+tt.stay+2; got > most {
				t.Errorf("vw has %d descriptors, want at most %d", got, most)
			}
			if tt.want != "" {
				last := b.crowd(t, 1, func(_ int, conn net.Conn) { tt.say(tt.n, conn) })
				conns = append(conns, last...)
				if got := statusLine(last[0]); !strings.HasPrefix(got, tt.want) {
					t.Errorf("got %q, want %s", got, tt.want)
				}
			}
			for _, c := range conns {
				c.Close()
			}
			b.recovers(t, 200<<20)
		})
	}
}

// TestFewDescriptors: who holds all that vw may have does not lock others out.
func TestFewDescriptors(t *testing.T) {
	t.Parallel()
	v := startVWCommand(t, exec.Command(needs(t, "sh"), "-c", `ulimit -n 40 && exec "$0" stream`, build(t, "linux/amd64")))
	for i := range 200 {
		conn, err := net.Dial("tcp", v.addr)
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		defer conn.Close()
	}
	if got := v.call(t, http.StatusOK, "GET", "/healthcheck", ""); got != `"ok"` {
		t.Errorf("got %s, want ok", got)
	}
}

// TestReadersShareDescriptors: more readers than vw has descriptors leave what
// cameras, rules, mutes and relays need: they alone are refused, and the log says so
// once. vw uses all that the hard limit allows.
func TestReadersShareDescriptors(t *testing.T) {
	t.Parallel()
	relay := startRelay(t, "127.0.0.1:0", "-record", "")
	v := startVWCommand(t, exec.Command(needs(t, "sh"), "-c", `ulimit -S -n 256 && ulimit -H -n 1024 && exec "$0" stream`, build(t, "linux/amd64")))
	v.call(t, http.StatusOK, "POST", "/api/streams", `{"stream":"stream/front","feeds":["video0"]}`)
	v.send(t, "0", "stream/front", "ws://"+relay.addr)
	stop := startCamera(t, v.addr, "video0")
	relay.flows(t)

	const readers = 1100
	answers := make(chan *http.Response, readers)
	waiting := make(chan struct{}, 100) // of 256 callers who are no readers yet
	for range readers {
		waiting <- struct{}{}
		conn, err := net.DialTimeout("tcp", v.addr, startupTime)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(time.Minute))
		go func() {
			io.WriteString(conn, "GET /ts/stream/front HTTP/1.1\r\nHost: localhost\r\n\r\n")
			a, err := http.ReadResponse(bufio.NewReader(conn), nil)
			<-waiting
			if err != nil {
				t.Errorf("a reader: %v", err)
				a = &http.Response{}
			}
			answers <- a
		}()
	}
	count := make(map[int]int)
	for range readers {
		a := <-answers
		if count[a.StatusCode]++; a.StatusCode != http.StatusServiceUnavailable {
			continue
		}
		b, err := io.ReadAll(a.Body)
		if err != nil || !strings.Contains(string(b), "readers") || a.Header.Get("Retry-After") == "" {
			t.Errorf("a reader too many: got %v, %s, %v", a.Header, b, err)
		}
	}
	t.Logf("the readers got %v", count)
	if seen, refused := count[http.StatusOK], count[http.StatusServiceUnavailable]; seen < readers/3 || refused < readers/10 || seen+refused != readers {
		t.Errorf("got %v", count)
	}

	stop()
	startCamera(t, v.addr, "video0")
	relay.flows(t)
	const muted = `{"stream":"stream/front","feeds":[]}`
	if got := v.call(t, http.StatusOK, "POST", "/api/streams", muted); got != muted {
		t.Errorf("got %s, want %s", got, muted)
	}
	v.call(t, http.StatusOK, "PUT", "/api/mute", `{"audio":true}`)
	v.call(t, http.StatusOK, "POST", "/api/streams", `{"stream":"stream/front","with":["video0"]}`)
	relay.flows(t)
	relay.kill(t)
	v.expect(t, 0, startupTime, `connection refused`)
	relay = startRelay(t, relay.addr, "-record", "")
	relay.flows(t)
	for i := range 100 { // and as many new ones
		v.call(t, http.StatusOK, "POST", "/api/destinations", fmt.Sprintf(`{"id":"n%d","stream":"stream/front","destination":"ws://%s"}`, i, relay.addr))
	}
	eventually(t, startupTime, func() error {
		if n := strings.Count(v.out.String(), "msg=connected dest=n"); n != 100 {
			return fmt.Errorf("%d of 100 destinations are connected", n)
		}
		return nil
	})
	if n := strings.Count(v.out.String(), "a reader is refused"); n != 1 {
		t.Errorf("the log tells %d times of readers, want once", n)
	}
}

// TestHostileRelays: all at once, beside a relay that is as it should be. Each
// is met again and again, and each is left when its rule is deleted.
func TestHostileRelays(t *testing.T) {
	t.Parallel()
	again := func(frame string) func(net.Conn) {
		return func(conn net.Conn) {
			if _, err := accept(conn); err != nil {
				return
			}
			var reading sync.WaitGroup
			defer reading.Wait()
			reading.Go(func() { io.Copy(io.Discard, conn) }) // else it counts as stalled
			b := []byte(strings.Repeat(frame, 1+(32<<10)/len(frame)))
			for err := error(nil); err == nil; time.Sleep(5 * time.Millisecond) { // 6 MB/s: the machine is for others too
				_, err = conn.Write(b)
			}
		}
	}
	once := func(frame string) func(net.Conn) {
		return func(conn net.Conn) {
			if _, err := accept(conn); err == nil {
				io.WriteString(conn, frame)
				io.Copy(io.Discard, conn)
			}
		}
	}
	answer := func(text string) func(net.Conn) {
		return func(conn net.Conn) {
			io.WriteString(conn, text)
			io.Copy(io.Discard, conn)
		}
	}
	endless := func(begin, more string, wait time.Duration) func(net.Conn) {
		return func(conn net.Conn) {
			_, err := io.WriteString(conn, begin)
			for ; err == nil; time.Sleep(wait) {
				_, err = io.WriteString(conn, more)
			}
		}
	}
	zeros := strings.Repeat("\x00", 64<<10)
	tests := []struct {
		name  string
		relay func(net.Conn)
		lost  string // in the log, of the connection; "": it opens
	}{
		{"huge message", func(conn net.Conn) {
			if _, err := accept(conn); err == nil {
				var reading sync.WaitGroup
				defer reading.Wait()
				reading.Go(func() { io.Copy(io.Discard, conn) })
				endless("\x82\x7f\x7f\xff\xff\xff\xff\xff\xff\xff", zeros, 5*time.Millisecond)(conn)
			}
		}, ""},
		{"endless messages", again("\x82\x7e\x10\x00" + zeros[:4096]), ""},
		{"text", again("\x81\x05time="), ""},
		{"empty messages", again("\x82\x00"), ""},
		{"fragments without an end", again("\x00\x01x"), ""},
		{"pings by the thousand", again("\x89\x00"), ""},
		{"long pings", again("\x89\x7d" + zeros[:125]), ""},
		{"pongs that nobody asked for", again("\x8a\x00"), ""},
		{"a masked message", once("\x82\x81\x00\x00\x00\x00x"), "err="},
		{"an opcode that is none", once("\x8f\x01x"), "err="},
		{"reserved bits", once("\xf2\x01x"), "err="},
		{"a close frame, and no end", once("\x88\x04\x03\xe8\x1b["), "err="},
		{"a handshake byte by byte", endless("HTTP/1.1 101 Switching Protocols\r\n", "A", 50*time.Millisecond), "no answer within"},
		{"endless handshake", endless("HTTP/1.1 101 Switching Protocols\r\n", "A: "+zeros[:1000]+"\r\n", 0), "err="},
		{"endless status line", endless("HTTP/1.1 500 ", strings.Repeat("\x1b[31m", 1000), 0), "err="},
		{"no handshake", answer(""), "no answer within"},
		{"a status for the log", answer("HTTP/1.1 500 \x1b[2Jx\rtime=1 level=ERROR\xff\xe2\x80\xae\r\n\r\n"), "500"},
		{"no HTTP", answer("\x1b[2J\ntime=1 level=ERROR\r\n\r\n"), "err="},
		{"another key", answer("HTTP/1.1 101 x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: x\r\n\r\n"), "err="},
		{"a redirect", answer("HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n"), "302"},
		{"closes at once", func(net.Conn) {}, "err="},
	}
	b := besiege(t)
	for i, tt := range tests {
		l := listenLoopback(t)
		serveEach(t, l, tt.relay)
		b.call(t, http.StatusOK, "POST", "/api/destinations", fmt.Sprintf(`{"id":%d,"stream":"neighbour","destination":"ws://u:%s@%s"}`, i, secretUser, l.Addr()))
	}
	for i, tt := range tests {
		if tt.lost != "" {
			b.expect(t, 0, 3*startupTime, fmt.Sprintf(`no connection, trying again" dest=%d .*%s`, i, tt.lost))
		} else {
			b.expect(t, 0, startupTime, fmt.Sprintf(`msg=connected dest=%d `, i))
		}
	}
	b.answers(t)
	b.flows(t)
	time.Sleep(2 * time.Second)
	b.answers(t)
	b.flows(t)
	for i := range tests {
		b.call(t, http.StatusOK, "DELETE", fmt.Sprintf("/api/destinations/%d", i), "")
	}
	b.recovers(t, 100<<20)
}

// intrusion is what a page tries, in a browser. results has a line of each.
const intrusion = `
var results = {}
const attempt = (name, promise) => promise.then(v => results[name] = v, e => results[name] = 'failed: ' + e)
const ok = r => { if (!r.ok) throw r.status; return r }
const socket = (path, event) => new Promise((done, fail) => {
	const ws = new WebSocket('ws://TARGET' + path)
	ws['on' + event] = () => done('done')
	ws.onerror = () => fail('error')
})
attempt('read a rule', fetch('http://TARGET/api/streams/all').then(ok).then(r => r.text()).then(t => 'done'))
attempt('read video', fetch('http://TARGET/ts/neighbour').then(ok).then(r => r.body.getReader().read()).then(b => 'done'))
attempt('add a rule', fetch('http://TARGET/api/streams', {method: 'PUT', body: '{"stream":"stream/put","feeds":[]}'}).then(ok).then(r => 'done'))
// What a form can do: the page does not see the answer, but it need not.
attempt('add a rule, unseen', fetch('http://TARGET/api/streams', {method: 'POST', mode: 'no-cors', body: '{"stream":"stream/form","feeds":[]}'}).then(r => r.type == 'basic' ? ok(r) : r).then(r => 'done'))
attempt('delete a rule', fetch('http://TARGET/api/destinations/victim', {method: 'DELETE'}).then(ok).then(r => 'done'))
attempt('watch', socket('/out/neighbour', 'message'))
attempt('publish', socket('/in/intruder', 'open'))
`

// TestHostilePage: what a page of another origin tries in Chromium fails, and
// so it does when that has given its own name to this machine (DNS rebinding).
// A page of vw's own address can do all of it.
func TestHostilePage(t *testing.T) {
	t.Parallel()
	other := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(other.Close)
	_, otherPort, _ := net.SplitHostPort(other.Listener.Addr().String())
	chromium := startBrowser(t, "--host-resolver-rules=MAP *.example 127.0.0.1")
	for _, tt := range []struct {
		name string
		page func(vw, port string) (page, target string)
		may  bool
	}{
		{"own address", func(vw, _ string) (string, string) { return vw, vw }, true},
		{"another site", func(vw, _ string) (string, string) { return "intruder.example:" + otherPort, vw }, false},
		{"another port", func(vw, _ string) (string, string) { return "127.0.0.1:" + otherPort, vw }, false},
		{"another name of loopback", func(vw, port string) (string, string) { return "127.0.0.1:" + otherPort, "localhost:" + port }, false},
		{"rebinding", func(_, port string) (string, string) {
			return "intruder.example:" + port, "intruder.example:" + port
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := besiege(t)
			b.call(t, http.StatusOK, "POST", "/api/destinations", `{"id":"victim","stream":"none","destination":"ws://`+b.relay.addr+`"}`)
			before := b.call(t, http.StatusOK, "GET", "/api/streams/all", "")
			_, port, _ := net.SplitHostPort(b.addr)
			page, target := tt.page(b.addr, port)
			chromium.session = ""
			chromium.open(t, "http://"+page+"/healthcheck")
			eventually(t, startupTime, func() error {
				var at string
				if chromium.evaluate(t, "location.host + ' ' + document.readyState", &at); at != page+" complete" {
					return fmt.Errorf("the page is %q", at)
				}
				return nil
			})
			chromium.evaluate(t, strings.ReplaceAll(intrusion, "TARGET", target)+";0", new(int))
			var results map[string]string
			eventually(t, startupTime, func() error {
				if chromium.evaluate(t, "results", &results); len(results) != strings.Count(intrusion, "\nattempt(") {
					return fmt.Errorf("got only %v", results)
				}
				return nil
			})
			for attempt, got := range results {
				if (got == "done") != tt.may && (tt.may || attempt != "add a rule, unseen") { // unseen even when it was refused
					t.Errorf("%s: got %q, want it done %v", attempt, got, tt.may)
				}
			}
			if after := b.call(t, http.StatusOK, "GET", "/api/streams/all", ""); (after != before) != tt.may {
				t.Errorf("the streams were %s and are %s", before, after)
			}
			if !tt.may {
				b.call(t, http.StatusOK, "GET", "/api/destinations/victim", "")
				if got := b.out.find(0, `feed=intruder|reader arrived`); got != nil {
					t.Errorf("the log has %q", got)
				}
			}
			t.Log(results)
		})
	}
}
