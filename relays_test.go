// Relays and proxies for tests: functions on in-memory connections, servers on
// real sockets, and programs that are not ours; with their certificates.

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/websocket"
)

// accept does the opening handshake as a relay. RFC 6455 4.2.2.
func accept(conn net.Conn) (*bufio.Reader, error) {
	r := bufio.NewReader(conn)
	request, err := http.ReadRequest(r)
	if err != nil {
		return nil, err
	}
	return r, upgradeTo(conn, request)
}

// upgradeTo answers the request of a handshake.
func upgradeTo(conn net.Conn, request *http.Request) error {
	sum := sha1.Sum([]byte(request.Header.Get("Sec-WebSocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	_, err := fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n",
		base64.StdEncoding.EncodeToString(sum[:]))
	return err
}

// readFrame reads one masked frame.
func readFrame(r io.Reader) (opcode byte, payload []byte, err error) {
	return readFrameInto(nil, r)
}

// readFrameInto reads one masked frame, into buf if that is large enough. RFC
// 6455 5.2.
func readFrameInto(buf []byte, r io.Reader) (opcode byte, payload []byte, err error) {
	var h [14]byte
	if _, err := io.ReadFull(r, h[:2]); err != nil {
		return 0, nil, err
	}
	if h[0]&0xf0 != 0x80 || h[1]&0x80 == 0 {
		return 0, nil, fmt.Errorf("frame begins with % x: want it final, without reserved bits, and masked", h[:2])
	}
	size, more := uint64(h[1]&0x7f), 0
	switch size {
	case 126:
		more = 2
	case 127:
		more = 8
	}
	if _, err := io.ReadFull(r, h[2:2+more+4]); err != nil {
		return 0, nil, err
	}
	switch more {
	case 2:
		size = uint64(binary.BigEndian.Uint16(h[2:]))
	case 8:
		size = binary.BigEndian.Uint64(h[2:])
	}
	payload = slices.Grow(buf[:0], int(size))[:size]
	if _, err := io.ReadFull(r, payload); err != nil {
		return 0, nil, err
	}
	for i := range payload {
		payload[i] ^= h[2+more+i%4]
	}
	return h[0] & 15, payload, nil
}

// serveRelay answers pings, hands on messages, and returns the close code.
func serveRelay(conn net.Conn, message func([]byte)) (code int, err error) {
	r, err := accept(conn)
	if err != nil {
		return 0, err
	}
	for {
		opcode, payload, err := readFrame(r)
		if err != nil {
			return 0, err
		}
		switch opcode {
		case opPing:
			conn.Write(append([]byte{0x8a, byte(len(payload))}, payload...))
		case opClose:
			conn.Write([]byte{0x88, 0})
			return int(binary.BigEndian.Uint16(payload)), nil
		default:
			message(payload)
		}
	}
}

// serveOn is serveRelay after the handshake.
func serveOn(conn net.Conn, r io.Reader, media *atomic.Int64) {
	for {
		opcode, _, err := readFrame(r)
		switch {
		case err != nil || opcode == opClose:
			return
		case opcode == opPing:
			conn.Write([]byte{0x8a, 0})
		case opcode == opBinary:
			media.Add(1)
		}
	}
}

// frame is an unmasked frame, as a relay sends it; b0 is its first byte.
func frame(b0 byte, payload string) []byte {
	f := appendHeader(nil, 0, len(payload), nil)
	f[0] = b0
	return append(f, payload...)
}

// write sends frames to a connection that may have been closed.
func write(conn net.Conn, frames ...[]byte) {
	for _, f := range frames {
		conn.Write(f)
	}
}

// replies is a relay or proxy that answers a request with s.
func replies(s string) func(int64, string, net.Conn) {
	return func(_ int64, _ string, conn net.Conn) {
		http.ReadRequest(bufio.NewReader(conn))
		io.WriteString(conn, s)
	}
}

// reply serves a connection with one answer to its first bytes.
func reply(s string) func(net.Conn) {
	return func(conn net.Conn) {
		conn.Read(make([]byte, 4096))
		io.WriteString(conn, s)
	}
}

// good serves a relay.
func good(conn net.Conn) { serveRelay(conn, func([]byte) {}) }

// silent reads, and says nothing.
func silent(conn net.Conn) { io.Copy(io.Discard, conn) }

// rated reads so many bytes a second, and no more than that from the kernel. Where
// the machine made it late, it catches up a little.
type rated struct {
	net.Conn
	rate int
	due  time.Time // when the next may be read
}

func (c *rated) Read(p []byte) (int, error) {
	const maxBehind = 100 * time.Millisecond
	time.Sleep(time.Until(c.due))
	n, err := c.Conn.Read(p[:min(len(p), c.rate/50)])
	if least := time.Now().Add(-maxBehind); c.due.Before(least) {
		c.due = least
	}
	c.due = c.due.Add(time.Duration(n) * time.Second / time.Duration(c.rate))
	return n, err
}

// serveEach accepts on l, and serves each connection, until end is called or
// the test ends.
func serveEach(t testing.TB, l net.Listener, serve func(net.Conn)) (end func()) {
	var serving sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer conn.Close()
				defer context.AfterFunc(ctx, func() { conn.SetDeadline(past) })()
				serve(conn)
			})
		}
	})
	end = sync.OnceFunc(func() {
		l.Close()
		cancel()
		serving.Wait()
	})
	t.Cleanup(end)
	return end
}

// lab is a set of rules whose relays are functions on in-memory connections.
type lab struct {
	*rules
	t     *testing.T
	log   *logBuffer
	end   context.CancelCauseFunc
	names labNames
	dials atomic.Int64
	relay func(n int64, host string, conn net.Conn) // nil: refuse
	away  atomic.Bool                               // refuse
	conns sync.WaitGroup
}

func newLab(t *testing.T, relay func(n int64, host string, conn net.Conn)) *lab {
	ctx, end := context.WithCancelCause(t.Context())
	l := &lab{t: t, log: &logBuffer{}, end: end, relay: relay}
	l.rules = newRules(ctx, newMux(), 500*time.Millisecond, slog.New(slog.NewTextHandler(l.log, nil)))
	l.dialer.lookup = l.names.lookup
	l.dialer.dial = func(ctx context.Context, _, address string) (net.Conn, error) {
		host := l.names.host(address)
		n := l.dials.Add(1)
		if l.relay == nil || l.away.Load() {
			return nil, errors.New("connection refused")
		}
		ours, theirs := net.Pipe()
		l.conns.Go(func() {
			defer theirs.Close()
			l.relay(n, host, theirs)
		})
		return ours, nil
	}
	return l
}

// deadEnd finds no relay.
var deadEnd = dialer{lookup: func(_ context.Context, host string) ([]netip.Addr, error) {
	return nil, lookupError{name: host, cause: "no such host"}
}, dial: func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("none") }}

// labNames gives each name of a lab an address of its own, so that a relay can be
// told by what was dialled.
type labNames struct {
	mu    sync.Mutex
	names []string
}

func (n *labNames) lookup(_ context.Context, host string) ([]netip.Addr, error) {
	if isLocalhost(host) {
		return []netip.Addr{netip.IPv6Loopback()}, nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	i := slices.Index(n.names, host)
	if i < 0 {
		i = len(n.names)
		n.names = append(n.names, host)
	}
	return []netip.Addr{netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)})}, nil // RFC 2544
}

// host returns the name and port that were dialled.
func (n *labNames) host(address string) string {
	host, port, _ := net.SplitHostPort(address)
	if addr := netip.MustParseAddr(host); addr.Is4() && addr.As4()[0] == 198 {
		a := addr.As4()
		n.mu.Lock()
		defer n.mu.Unlock()
		host = n.names[int(a[2])<<8|int(a[3])]
	}
	return net.JoinHostPort(host, port)
}

func (l *lab) close() {
	l.end(errShutdown)
	l.tasks.Wait()
	l.conns.Wait()
}

// send sets destination 0.
func (l *lab) send(source, url string) {
	l.t.Helper()
	l.to(l.t, "0", source, url)
}

// film publishes 25 frames/s on a feed until ctx is done, a keyframe every 12.
func (l *lab) film(ctx context.Context, name string, size int) {
	c := newCamera()
	c.size = size
	film(ctx, l.mux, name, c, 40*time.Millisecond)
}

// film publishes a frame each time on a feed, until ctx is done.
func film(ctx context.Context, x *mux, name string, c *camera, each time.Duration) {
	p := &publisher{interrupt: func() {}}
	f := x.attach(name, p)
	defer x.detach(f, p)
	for first := true; ctx.Err() == nil; first = false {
		all, _ := frames(bytes.NewReader(c.next()))
		for _, m := range all {
			m.first = first
			f.publish(p, m, x.now(m.at))
		}
		time.Sleep(each)
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

// load publishes a feed at 1,000 frames/s until ctx is done.
func load(ctx context.Context, r *rules, name string) {
	c := newCamera()
	switch {
	case strings.HasPrefix(name, "audio"):
		c = newMicrophone()
	case name == "both":
		c.sound = true
	}
	film(ctx, r.mux, name, c, time.Millisecond)
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
	saw    func([]byte) // called with what is read of a connection, under TLS; nil: not

	accepted func(net.Conn) net.Conn // what the server of get and view has in place of a connection; nil: that

	conns atomic.Int64
	stall sync.RWMutex // held by a test: nothing is read

	mu  sync.Mutex
	all []byte // every message
	got []arrival
	end func()
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
	if s.r.saw != nil {
		s.r.saw(p[:n])
	}
	return n, err
}

func (r *chaosRelay) start() {
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		if r.rcvbuf == 0 {
			return nil
		}
		return limitReceived(c, r.rcvbuf)
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
	if r.tls != nil {
		l = tls.NewListener(l, r.tls)
	}
	r.end = serveEach(r.t, l, func(conn net.Conn) {
		r.conns.Add(1)
		serveRelay(&stalling{conn, r}, r.message)
	})
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

// decodes fails the test when ffmpeg finds anything wrong with what came.
func (r *chaosRelay) decodes() {
	r.t.Helper()
	name := filepath.Join(r.t.TempDir(), "record.ts")
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := os.WriteFile(name, r.all, 0o600); err != nil {
		r.t.Fatal(err)
	}
	decodes(r.t, name)
}

// serve makes s listen.
func (r *chaosRelay) serve(s *server) *httptest.Server {
	h := httptest.NewUnstartedServer(s)
	if r.accepted != nil {
		h.Listener = acceptingListener{h.Listener, r.accepted}
	}
	h.Start()
	return h
}

// acceptingListener gives each connection to accepted.
type acceptingListener struct {
	net.Listener
	accepted func(net.Conn) net.Conn
}

func (l acceptingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		c = l.accepted(c)
	}
	return c, err
}

// get makes the relay a reader of a path of s.
func (r *chaosRelay) get(s *server, path string) {
	h := r.serve(s)
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

// view makes r a viewer of path at s.
func (r *chaosRelay) view(s *server, path string) {
	h := r.serve(s)
	c, err := websocket.Dial("ws"+strings.TrimPrefix(h.URL, "http")+path, "", h.URL)
	if err != nil {
		r.t.Fatal(err)
	}
	end := r.end
	var reading sync.WaitGroup
	reading.Go(func() {
		for b := []byte(nil); websocket.Message.Receive(c, &b) == nil; {
			r.see(b)
		}
	})
	r.end = sync.OnceFunc(func() {
		c.Close()
		reading.Wait()
		h.Close()
		end()
	})
	r.t.Cleanup(r.end)
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
	if mathrand.N(20) == 0 {
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

// byRule returns what mutes the sound of stream/x by its rule.
func byRule(r *rules) func(bool) error {
	return func(muted bool) error {
		feeds := []string{"video0", "audio0"}
		if muted {
			feeds = feeds[:1]
		}
		_, err := r.setStream(streamRule{"stream/x", feeds})
		return err
	}
}

// bySwitch returns what mutes all sound, after it has set the rule of stream/x.
func bySwitch(t *testing.T, r *rules) func(bool) error {
	if err := byRule(r)(false); err != nil {
		t.Fatal(err)
	}
	return func(muted bool) error {
		_, err := r.setMute(muteRule{Audio: &muted}, handHere)
		return err
	}
}

// mutes alternates between mute and its opposite, each for at most so long, and
// returns the slowest call.
func mutes(t *testing.T, mute func(bool) error, times int, on, off time.Duration, muted func(bool)) (slowest time.Duration) {
	for range times {
		for _, next := range []bool{true, false} {
			if next {
				time.Sleep(mathrand.N(off))
			} else {
				time.Sleep(mathrand.N(on))
				muted(false)
			}
			start := time.Now()
			if err := mute(next); err != nil {
				t.Fatal(err)
			}
			slowest = max(slowest, time.Since(start))
			if next {
				muted(true)
			}
		}
	}
	return slowest
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

// flows waits until the relay got 10 more messages.
func (r *relayProcess) flows(t *testing.T) {
	t.Helper()
	from := len(r.entries(t))
	eventually(t, startupTime, func() error {
		if n := len(r.entries(t)) - from; n < 10 {
			return fmt.Errorf("the relay got %d messages, want 10", n)
		}
		return nil
	})
}

// total returns how many bytes all connections brought until now.
func (r *relayProcess) total(t *testing.T) (n int) {
	t.Helper()
	for _, e := range r.entries(t) {
		n += e.size
	}
	return n
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

// certificates are a CA of our own and a certificate of it, for 127.0.0.1.
type certificates struct {
	ca, cert, key, both string // files; both: certificate and key, for haproxy
	roots               *x509.CertPool
	server              *tls.Config
}

// newCerts makes certificates; change, if there is one, changes that of the
// server before it is signed.
func newCerts(t testing.TB, change ...func(*x509.Certificate)) (c certificates) {
	t.Helper()
	dir, now := t.TempDir(), time.Now()
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "CA of the tests"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(100 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "a \x1b[31mtest"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(50 * time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, f := range change {
		f(leaf)
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
	write := func(name string, b ...[]byte) string {
		name = filepath.Join(dir, name)
		check(nil, os.WriteFile(name, slices.Concat(b...), 0o600))
		return name
	}
	block := func(kind string, der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}) }
	authority := block("CERTIFICATE", check(x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)))
	cert := block("CERTIFICATE", check(x509.CreateCertificate(rand.Reader, leaf, ca, &leafKey.PublicKey, caKey)))
	key := block("PRIVATE KEY", check(x509.MarshalPKCS8PrivateKey(leafKey)))
	c = certificates{
		ca: write("ca.pem", authority), cert: write("cert.pem", cert), key: write("key.pem", key), both: write("both.pem", cert, key),
		roots: x509.NewCertPool(),
	}
	c.roots.AppendCertsFromPEM(authority)
	pair, err := tls.X509KeyPair(cert, key)
	check(nil, err)
	c.server = &tls.Config{Certificates: []tls.Certificate{pair}}
	return c
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
func listenLoopback(t testing.TB) net.Listener {
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
	cmd := exec.Command(needs(t, "nginx"), "-p", dir, "-c", conf, "-e", "stderr")
	cmd.Env = []string{"NGINX=3;"} // how one nginx leaves its sockets to the next
	return startWith(t, l, "nginx", cmd)
}

// startHAProxyWith starts a haproxy with those options of its front, and that backend;
// it returns its address.
func startHAProxyWith(t *testing.T, timeouts, options, backend string) string {
	t.Helper()
	l := listenLoopback(t)
	conf := filepath.Join(t.TempDir(), "haproxy.cfg")
	if err := os.WriteFile(conf, fmt.Appendf(nil, `
global
	maxconn 64
defaults
	mode http
	retries 0
	timeout connect 5s
	timeout client %[1]s
	timeout server %[1]s
	timeout tunnel %[1]s
frontend front
	bind fd@3 %[2]s
	default_backend back
backend back
	%[3]s
`, timeouts, options, backend), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(needs(t, "haproxy"), "-db", "-f", conf)
	return startWith(t, l, "haproxy", cmd)
}

// startHAProxy puts haproxy with TLS in front of a relay and returns its address.
func startHAProxy(t *testing.T, c certificates, relay string) string {
	t.Helper()
	return startHAProxyWith(t, "30s", "ssl crt "+c.both+" alpn http/1.1", "server relay "+relay)
}

// startCaddy puts caddy with TLS in front of a relay and returns its address.
func startCaddy(t *testing.T, c certificates, relay string) string {
	t.Helper()
	return startCaddyWith(t, "https", "tls "+c.cert+" "+c.key, "reverse_proxy "+relay)
}

// startCaddyWith starts a caddy that serves a scheme with those directives; it
// returns its address. It takes no open port.
func startCaddyWith(t *testing.T, scheme string, directives ...string) string {
	t.Helper()
	dir, port := t.TempDir(), holdPort(t)
	conf := filepath.Join(dir, "Caddyfile")
	if err := os.WriteFile(conf, fmt.Appendf(nil, `
{
	admin off
	auto_https off
}
%s://127.0.0.1:%d {
	bind 127.0.0.1
	%s
}
`, scheme, port, strings.Join(directives, "\n\t")), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(needs(t, "caddy"), "run", "--config", conf, "--adapter", "caddyfile")
	cmd.Env = []string{"HOME=" + dir}
	start(t, "caddy", cmd).expect(t, 0, startupTime, `serving initial configuration`)
	return fmt.Sprintf("127.0.0.1:%d", port)
}

// startTinyproxy starts a proxy on 192.0.2.1; auth is its line for credentials.
func startTinyproxy(t *testing.T, auth string) (p *process, addr string) {
	t.Helper()
	conf := filepath.Join(t.TempDir(), "tinyproxy.conf")
	text := "Port 3128\nListen 192.0.2.1\nTimeout 600\nMaxClients 20\nLogLevel Connect\n" + auth + "\n"
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	p = start(t, "tinyproxy", exec.Command(needs(t, "tinyproxy"), "-d", "-c", conf))
	eventually(t, startupTime, func() error {
		conn, err := net.Dial("tcp", "192.0.2.1:3128")
		if err == nil {
			conn.Close()
		}
		return err
	})
	return p, "192.0.2.1:3128"
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

// relaySecret signs the tokens that testdata/tokenrelay takes.
const relaySecret = "tokenrelay's secret"

func relayToken(path string, lasts time.Duration) string {
	part := func(v any) string {
		b, _ := json.Marshal(v)
		return base64.RawURLEncoding.EncodeToString(b)
	}
	text := part(map[string]string{"alg": "HS256", "typ": "JWT"}) + "." + part(map[string]any{"aud": path, "exp": time.Now().Add(lasts).Unix()})
	h := hmac.New(sha256.New, []byte(relaySecret))
	h.Write([]byte(text))
	return text + "." + base64.RawURLEncoding.EncodeToString(h.Sum(nil))
}

// startTokenRelay starts testdata/tokenrelay on addr.
func startTokenRelay(t *testing.T, addr string, args ...string) (relay *process, at string) {
	t.Helper()
	relay = start(t, "tokenrelay", exec.Command(build(t, "tokenrelay"), append([]string{"-listen", addr}, args...)...))
	return relay, relay.expect(t, 0, startupTime, `^(127\.0\.0\.1:\d+)\n`)[1]
}

// newTokenRelay is a relay that refuses every token, and quotes all secrets.
func newTokenRelay(t *testing.T) (addr string) {
	refuse := websocket.Handler(func(ws *websocket.Conn) {
		var token string
		websocket.Message.Receive(ws, &token)
		r := ws.Request()
		user, password, _ := r.BasicAuth()
		reason := fmt.Sprintf("%s %s %s %q %v", token, user, password, r.Header, "topsecret2")
		websocket.JSON.Send(ws, map[string]any{"topic": "x", "token": token, "authorised": false, "reason": reason})
	})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			http.Error(w, fmt.Sprint(r.Header), http.StatusUnauthorized)
			return
		}
		refuse.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// proxyAt is a proxy on the way to every relay.
func proxyAt(t *testing.T, s string) func(*http.Request) (*url.URL, error) {
	t.Helper()
	u, err := url.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return http.ProxyURL(u)
}

// passTunnels is a proxy for lab:s3cr:t that passes tunnels on to any host.
func passTunnels(tunnels *atomic.Int64) func(net.Conn) {
	return func(conn net.Conn) {
		r, err := http.ReadRequest(bufio.NewReader(conn))
		if err != nil {
			return
		}
		if r.Method != http.MethodConnect || r.Header.Get("Proxy-Authorization") != "Basic bGFiOnMzY3I6dA==" {
			io.WriteString(conn, "HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
			return
		}
		relay, err := net.Dial("tcp", r.Host)
		if err != nil {
			io.WriteString(conn, "HTTP/1.1 502 Bad Gateway\r\n\r\n")
			return
		}
		defer relay.Close()
		tunnels.Add(1)
		io.WriteString(conn, "HTTP/1.1 200 Connection established\r\n\r\n")
		var back sync.WaitGroup
		back.Go(func() {
			io.Copy(conn, relay)
			conn.Close()
		})
		io.Copy(relay, conn)
		relay.Close()
		back.Wait()
	}
}
