// What tests share: the programs that they start, vw itself, publishers,
// logs and waiting.

package main

import (
	"bufio"
	"bytes"
	"context"
	"flag"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// httpCall returns the body of the answer, whatever its status.
func httpCall(t *testing.T, method, url, body string) string {
	t.Helper()
	r, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	a, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Body.Close()
	b, err := io.ReadAll(a.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestMain fails the run when goroutines are left behind (I3).
func TestMain(m *testing.M) {
	flag.Parse()
	parallel := false
	flag.Visit(func(f *flag.Flag) { parallel = parallel || f.Name == "test.parallel" })
	if !parallel {
		flag.Set("test.parallel", "5") // most of them wait, for relays that are silent
	}
	status := m.Run()
	if dir, err := buildDir(); err == nil { // beside a binary of go test -c it would stay
		os.RemoveAll(dir)
	}
	http.DefaultClient.CloseIdleConnections()
	if left := leaked(); left != "" && status == 0 {
		fmt.Fprintf(os.Stderr, "goroutines left behind:\n%s\n", left)
		status = 1
	}
	os.Exit(status)
}

// leaked returns the stacks of goroutines that run our code outside a test;
// it gives them 5 s to end.
func leaked() string {
	for deadline := time.Now().Add(5 * time.Second); ; {
		var left []string
		buf := make([]byte, 1<<20)
		for _, g := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
			if !strings.Contains(g, "TestMain") && strings.Contains(g, "\nmain.") || strings.Contains(g, "vw.(") {
				left = append(left, g)
			}
		}
		if len(left) == 0 || time.Now().After(deadline) {
			return strings.Join(left, "\n\n")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

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

// discardLog is a logger for what no test reads.
var discardLog = slog.New(slog.DiscardHandler)

// notUnderRace is for tests of limits in real time, and for long ones whose
// goroutines share nothing: the race detector makes vw and the tests several times slower, so
// test.sh runs these without it.
func notUnderRace(t *testing.T) {
	t.Helper()
	if underRace {
		t.Skip("test.sh runs it without the race detector")
	}
}

// waitFor waits at most 5 s for ok.
func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited 5 s for %s", what)
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

// scaled returns how much a test does: under -short, as a rule, or with -long.
func scaled[T any](short, usual, most T) T {
	switch {
	case *long:
		return most
	case testing.Short():
		return short
	}
	return usual
}

// notShort skips the test under -short, which is for what needs Go alone and
// little time.
func notShort(t testing.TB, why string) {
	t.Helper()
	if testing.Short() {
		t.Skip("left out with -short: ", why)
	}
}

// needs returns the path of a program that the test starts. Under -short no
// such test runs; without it, a program that is missing is a failure.
func needs(t testing.TB, name string) string {
	t.Helper()
	notShort(t, name)
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// buildDir is beside the test binary, where go test removes it even when a
// test panics.
var buildDir = sync.OnceValues(func() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	return os.MkdirTemp(filepath.Dir(self), "e2e")
})

// builds has a function for each target, which builds it once.
var builds sync.Map

// build returns the path of a binary, built as it is shipped. Under -short only
// vw for this machine is built: other modules are downloaded, and other systems
// take their time.
func build(t testing.TB, target string) string {
	t.Helper()
	if target != "linux/amd64" {
		notShort(t, "go build of "+target)
	}
	once, _ := builds.LoadOrStore(target, sync.OnceValues(func() (string, error) { return goBuild(target) }))
	name, err := once.(func() (string, error))()
	if err != nil {
		t.Fatal(err)
	}
	return name
}

// goBuild builds vw for linux/amd64 and the like, or a module of testdata.
func goBuild(target string) (string, error) {
	out, err := buildDir()
	if err != nil {
		return "", err
	}
	name, dir := filepath.Join(out, strings.ReplaceAll(target, "/", "-")), "testdata/"+target
	env := append(os.Environ(), "CGO_ENABLED=0")
	if system, arch, ok := strings.Cut(target, "/"); ok {
		dir, env = ".", append(env, "GOOS="+system, "GOARCH="+arch)
	}
	c := exec.Command("go", "build", "-C", dir, "-ldflags", "-s -w", "-o", name, ".")
	c.Env = env
	if text, err := c.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build for %s: %w\n%s", target, err, text)
	}
	return name, nil
}

// logBuffer is what vw has logged, or another program printed, so far.
type logBuffer struct {
	mu   sync.Mutex
	text []byte
	more chan struct{} // closed when there is more; nil: nobody waits
}

func (o *logBuffer) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.text = append(o.text, p...)
	if o.more != nil {
		close(o.more)
		o.more = nil
	}
	return len(p), nil
}

func (o *logBuffer) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return string(o.text)
}

func (o *logBuffer) len() int { return len(o.String()) }

// find returns the first match of the expression from a byte on, and its
// groups; nil without one.
func (o *logBuffer) find(from int, expr string) []string {
	return regexp.MustCompile(expr).FindStringSubmatch(o.String()[from:])
}

// changed returns a channel that is closed at the next Write.
func (o *logBuffer) changed() <-chan struct{} {
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
	out  logBuffer     // stdout and stderr
	done chan struct{} // closed when it has ended
	err  error         // how, once done is closed
}

func start(t testing.TB, name string, cmd *exec.Cmd) *process {
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

func (p *process) signal(t testing.TB, s os.Signal) {
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
func (p *process) stop(t testing.TB) {
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
func (p *process) kill(t testing.TB) {
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
func (p *process) expect(t testing.TB, from int, within time.Duration, expr string) []string {
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

// vwProcess is a vw that listens.
type vwProcess struct {
	*process
	addr, url string
}

// startVW starts the vw that is shipped, with nothing in its environment but
// env and a free port.
func startVW(t testing.TB, env ...string) *vwProcess {
	t.Helper()
	return startVWCommand(t, exec.Command(build(t, "linux/amd64"), "stream"), env...)
}

func startVWCommand(t testing.TB, cmd *exec.Cmd, env ...string) *vwProcess {
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
	v.addr = v.expect(t, 0, startupTime, `msg="listening; page: http://localhost:\d+/" addr=(127\.0\.0\.1:\d+)\n`)[1]
	v.url = "http://" + v.addr
	return v
}

// call asks the API and returns the body of the answer.
func (v *vwProcess) call(t testing.TB, want int, method, path, body string) string {
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

func mb(bytes int) float64 { return float64(bytes) / (1 << 20) }

// runVW runs the program in this process, on a free port, until the test
// ends. It returns its address.
func runVW(t testing.TB, env ...string) (addr string, log *logBuffer, stop func() int) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	log = &logBuffer{}
	status := make(chan int, 1)
	go func() { status <- run(ctx, []string{"stream"}, append([]string{"VW_PORT=0"}, env...), io.Discard, log) }()
	stop = sync.OnceValue(func() int {
		cancel()
		return <-status
	})
	t.Cleanup(func() { stop() })
	waitFor(t, "vw to listen", func() bool {
		_, rest, ok := strings.Cut(log.String(), `/" addr=`)
		addr, _, _ = strings.Cut(rest, "\n")
		return ok && strings.Contains(rest, "\n")
	})
	return addr, log, stop
}

// newTestServer is a server without a listener, whose destinations cannot dial.
func newTestServer(t *testing.T, token string) *server {
	r := newRules(t.Context(), newMux(), 500*time.Millisecond, discardLog)
	r.dialer = deadEnd
	t.Cleanup(func() {
		r.deleteDestinations()
		r.tasks.Wait()
	})
	return newServer(t.Context(), r, token, discardLog)
}

// ask does "METHOD path [body]" from loopback, and returns the answer as
// "status body".
func ask(h http.Handler, request string, header ...string) string {
	method, rest, _ := strings.Cut(request, " ")
	path, body, _ := strings.Cut(rest, " ")
	r := httptest.NewRequest(method, path, strings.NewReader(body))
	r.RemoteAddr, r.Host = "127.0.0.1:50000", "localhost:8888"
	if body == "" {
		r.Body, r.ContentLength = http.NoBody, 0
	}
	for i := 0; i < len(header); i += 2 {
		switch header[i] {
		case "Host":
			r.Host = header[i+1]
		case "remote":
			r.RemoteAddr = header[i+1]
		default:
			r.Header.Set(header[i], header[i+1])
		}
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return fmt.Sprint(w.Code, " ", w.Body)
}

// tap stands between ffmpeg and vw and keeps a copy of what ffmpeg says. It
// passes bytes on as they are, so that vw meets ffmpeg's own HTTP.
type tap struct {
	addr string
	done chan struct{} // closed when its one connection has ended

	mu   sync.Mutex
	said bytes.Buffer
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

func (a *tap) Write(p []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.said.Write(p)
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

// inNamespace runs the rest of the test in a network namespace of its own,
// where 192.0.2.1 is an address of this machine that is not loopback: to those
// no program goes through a proxy. It returns false in the outer test.
func inNamespace(t *testing.T) bool {
	t.Helper()
	const address = "192.0.2.1/32"
	if os.Getenv("VW_TEST_NAMESPACE") != "" {
		for _, command := range []string{"ip link set lo up", "ip addr add " + address + " dev lo"} {
			if out, err := exec.Command("sh", "-c", command).CombinedOutput(); err != nil {
				t.Fatalf("%s: %v: %s", command, err, out)
			}
		}
		return true
	}
	unshare := needs(t, "unshare")
	for _, target := range []string{"relay", "linux/amd64"} {
		build(t, target) // in there, nothing can be downloaded
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	inner := exec.Command(unshare, "--map-root-user", "--net", "--mount", self, "-test.run", "^"+t.Name()+"$", "-test.v", "-test.timeout", "5m", fmt.Sprintf("-long=%t", *long))
	inner.Env = append(os.Environ(), "VW_TEST_NAMESPACE=1")
	out, err := inner.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("in the namespace: %v\n%s", err, out)
	} else if testing.Verbose() {
		t.Logf("in the namespace:\n%s", out)
	}
	return false
}
