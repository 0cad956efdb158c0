package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

// runCheck runs vw check, in this process, or with env as the vw that is
// shipped: Go reads proxies and authorities once in a process.
func runCheck(t *testing.T, url string, env ...string) (status int, out string) {
	t.Helper()
	if env == nil {
		var stdout, stderr bytes.Buffer
		status = run(t.Context(), []string{"check", url}, nil, &stdout, &stderr)
		return status, stdout.String() + stderr.String()
	}
	cmd := exec.CommandContext(t.Context(), build(t, "linux/amd64"), "check", url)
	cmd.Env = env
	b, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), string(b)
}

// listenFull returns an address where no connection comes about: what is sent
// there is dropped, as firewalls do.
func listenFull(t *testing.T) string {
	t.Helper()
	l := listenLoopback(t)
	raw, err := l.(*net.TCPListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	err = limitBacklog(raw)
	for range 100 {
		conn, dialErr := net.DialTimeout("tcp", l.Addr().String(), 200*time.Millisecond)
		if dialErr != nil {
			return l.Addr().String()
		}
		t.Cleanup(func() { conn.Close() })
	}
	t.Fatalf("%s takes 100 connections (%v)", l.Addr(), err)
	return ""
}

// closing opens a websocket and closes it with a close frame.
func closing(payload string) func(net.Conn) {
	return func(conn net.Conn) {
		accept(conn)
		conn.Write(frame(0x88, payload))
		silent(conn)
	}
}

// TestCheckToken: vw check shows the token of VW_CHECK_TOKEN, in both dialects, and
// the headers of VW_CHECK_HEADERS.
func TestCheckToken(t *testing.T) {
	t.Parallel()
	l := listenLoopback(t)
	addr := l.Addr().String()
	serveEach(t, l, func(conn net.Conn) {
		br := bufio.NewReader(conn)
		r, err := http.ReadRequest(br)
		if err != nil {
			return
		}
		switch {
		case r.Header.Get("X-Key") != "k":
			io.WriteString(conn, "HTTP/1.1 403 Forbidden\r\n\r\n")
		case r.Method == http.MethodPost && r.URL.Path != "/session/x":
			io.WriteString(conn, "HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 0\r\n\r\n")
		case r.Method == http.MethodPost && r.Header.Get("Authorization") != "secret":
			io.WriteString(conn, "HTTP/1.1 401 Unauthorized\r\nContent-Length: 9\r\n\r\nbad token")
		case r.Method == http.MethodPost:
			uri := `{"uri":"ws://` + addr + `/x?code=secret"}`
			fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(uri), uri)
		default:
			upgradeTo(conn, r)
			if r.URL.RawQuery == "" {
				_, b, _ := readFrame(br)
				conn.Write(frame(0x81, fmt.Sprintf(`{"authorised":%t,"reason":"no %s"}`, string(b) == "secret", b)))
			}
			for opcode, b, err := readFrame(br); err == nil; opcode, b, err = readFrame(br) {
				if opcode == opPing {
					conn.Write(frame(0x8a, string(b)))
				}
			}
		}
	})
	const key = `VW_CHECK_HEADERS={"X-Key":"k"}`
	for _, tt := range []struct{ url, token, headers, step, want string }{
		{"ws://" + addr + "/in/x", "secret", key, "", "All is well"},
		{"ws://" + addr + "/in/x", "secret2", key, "authorised", "does not accept the token"},
		{"ws://" + addr + "/in/x", "secret", "", "authorised", "does not let everybody in"},
		{"http://" + addr + "/session/x", "secret", key, "", "All is well"},
		{"http://" + addr + "/session/x", "secret2", key, "authorised", "does not accept the token"},
		{"http://" + addr + "/in/x", "secret", key, "authorised", "takes no tokens: it may be one for websockets"},
	} {
		var out bytes.Buffer
		status := run(t.Context(), []string{"check", tt.url}, []string{"VW_CHECK_TOKEN=" + tt.token, tt.headers}, &out, &out)
		checkOutput(t, status, out.String(), tt.step, tt.want)
	}
}

// TestCheck: the step that fails, and the sentence, of each wrong state. HOST
// is the address of what serve serves, with TLS when there is a certificate;
// CLOSED refuses connections, and FULL drops them.
func TestCheck(t *testing.T) {
	t.Parallel()
	const day = 24 * time.Hour
	date := func(d time.Duration) string { return time.Now().Add(d).UTC().Format(time.DateOnly) }
	for _, tt := range []struct {
		name  string
		url   string
		cert  func(*x509.Certificate)
		serve func(net.Conn)
		step  string // that fails; "": none does
		want  string // in the sentence
	}{
		{"good", "ws://HOST/in/x", nil, good, "", `All is well: video can go from here to HOST.`},
		{"refused port", "ws://CLOSED/in/x", nil, good, "tcp", `The connection to CLOSED is refused`},
		{"dropped", "ws://FULL/in/x", nil, good, "tcp", `Nothing answers at FULL: it is down, or a firewall drops what is sent there; if this network has a proxy`},
		{"another name", "wss://HOST/in/x", func(c *x509.Certificate) { c.IPAddresses, c.DNSNames = nil, []string{"other.example"} }, good,
			"tls", `The certificate is for other.example, not for 127.0.0.1`},
		{"expired", "wss://HOST/in/x", func(c *x509.Certificate) { c.NotBefore, c.NotAfter = time.Now().Add(-9*day), time.Now().Add(-3*day) }, good,
			"tls", `The certificate of 127.0.0.1 expired on ` + date(-3*day)},
		{"not yet valid", "wss://HOST/in/x", func(c *x509.Certificate) { c.NotBefore, c.NotAfter = time.Now().Add(3*day), time.Now().Add(9*day) }, good,
			"tls", `The certificate of 127.0.0.1 is valid from ` + date(3*day) + ` on: this machine's clock may be wrong`},
		{"unknown CA", "wss://HOST/in/x", func(*x509.Certificate) {}, good, "tls", `from an authority that this machine does not know`},
		{"no TLS", "wss://HOST/in/x", nil, reply("HTTP/1.1 400 Bad Request\r\n\r\n"), "tls", `What answers at HOST does not speak TLS`},
		{"401", "ws://HOST/in/x", nil, reply("HTTP/1.1 401 Unauthorized\r\n\r\n"), "authorised", `The relay at HOST does not let everybody in`},
		{"429", "ws://HOST", nil, reply("HTTP/1.1 429 Too Many Requests\r\nRetry-After: 30\r\n\r\n"), "upgrade", `has had too many connections from here`},
		{"511", "ws://HOST", nil, reply("HTTP/1.1 511 Network Authentication Required\r\n\r\n"), "upgrade", `This network has a captive portal`},
		{"moved", "ws://HOST/in/x", nil, reply("HTTP/1.1 302 Found\r\nLocation: ws://me:secret@HOST/\r\n\r\n"), "upgrade", `redirects to …: if that is the relay, put it into the URL`},
		{"portal", "ws://HOST/in/x", nil, reply("HTTP/1.1 302 Found\r\nLocation: ftp://portal.example/?secret\r\n\r\n"), "upgrade", `This network has a captive portal, or the relay has moved: HOST is answered by ftp://portal.example/.`},
		{"too big", "ws://HOST", nil, closing("\x03\xf1"), "ping", `The relay at HOST does not take messages of this size: it must allow 1 MiB`},
		{"policy", "ws://me:secret@HOST", nil, closing("\x03\xf0\x1bno secret"), "ping", `The relay at HOST closes the websocket by its policy`},
		{"protocol error", "ws://HOST", nil, closing("\x03\xea"), "ping", `The relay at HOST says that vw breaks the rules of websockets`},
		{"later", "ws://HOST", nil, closing("\x03\xf5"), "ping", `The relay at HOST is busy or starts again`},
		{".local", "ws://nowhere-at-all.local/", nil, good, "name", `names in .local are found by multicast DNS`},
		{"401 with credentials", "ws://any:secret@HOST/in/x", nil, reply("HTTP/1.1 401 Unauthorized\r\n\r\n"), "authorised", `The relay at HOST does not accept the credentials`},
		{"404", "ws://HOST/in/x?code=secret", nil, reply("HTTP/1.1 404 Not Found\r\n\r\n"), "upgrade", `There is nothing at /in/x on HOST`},
		{"not a websocket", "ws://HOST?code=secret", nil, reply("HTTP/1.1 200 OK\r\n\r\n"), "upgrade", `What answers at HOST is a web server, but opens no websocket at /.`},
		{"not HTTP", "ws://HOST", nil, reply("SSH-2.0-\x1b[31mOpenSSH\r\n"), "upgrade", `What answers at HOST is no websocket server`},
		{"front without relay", "ws://HOST", nil, reply("HTTP/1.1 502 Bad Gateway\r\n\r\n"), "upgrade", `What stands in front of the relay at HOST answers`},
		{"closes", "ws://HOST", nil, reply(""), "upgrade", `What listens at HOST accepts the connection and closes it`},
		{"accepts, then closes", "ws://HOST", nil, func(conn net.Conn) { accept(conn) }, "ping", `The relay at HOST opens the websocket and closes it again`},
		{"accepts, then sends no frames", "ws://HOST", nil, func(conn net.Conn) { accept(conn); conn.Write([]byte("SSH-2.0-\x1b")); silent(conn) }, "ping", `What answers at HOST breaks the rules of websockets`},
		{"silent", "ws://HOST", nil, silent, "upgrade", `What listens at HOST accepts the connection and is silent`},
		{"accepts, then silent", "ws://HOST", nil, func(conn net.Conn) { accept(conn); silent(conn) }, "ping", `The websocket opens, but nothing comes back through it`},
		{"slow", "ws://HOST", nil, func(conn net.Conn) {
			conn.(*net.TCPConn).SetReadBuffer(4096)
			serveRelay(&rated{Conn: conn, rate: 40_000}, func([]byte) {})
		}, "send", `The way to HOST is too slow for video: a camera needs 1.5 Mbit/s.`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			l := listenLoopback(t)
			addr := l.Addr().String()
			switch {
			case strings.Contains(tt.url, "CLOSED"):
				addr = fmt.Sprintf("127.0.0.1:%d", holdPort(t))
			case strings.Contains(tt.url, "FULL"):
				addr = listenFull(t)
			}
			fill := strings.NewReplacer("HOST", addr, "CLOSED", addr, "FULL", addr).Replace
			if tt.cert != nil {
				l = tls.NewListener(l, newCerts(t, tt.cert).server)
			}
			serveEach(t, l, tt.serve)
			status, out := runCheck(t, fill(tt.url))
			checkOutput(t, status, out, tt.step, fill(tt.want))
		})
	}
}

// checkOutput judges what vw check printed.
func checkOutput(t *testing.T, status int, out, step, want string) {
	t.Helper()
	wantStatus, failed := 0, ""
	if step != "" {
		wantStatus = 1
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	for _, l := range lines[:len(lines)-1] {
		f := regexp.MustCompile(`^(\w+) +(ok|FAILED) +\d+\.\d ms  .+$`).FindStringSubmatch(l)
		if f == nil {
			t.Fatalf("got the line %q in\n%s", l, out)
		}
		if f[2] == "FAILED" {
			failed += f[1]
		}
	}
	if last := lines[len(lines)-1]; status != wantStatus || failed != step || !strings.Contains(last, want) {
		t.Errorf("got status %d, the step %q and\n%swant %d, %q and %q", status, failed, out, wantStatus, step, want)
	}
	if strings.Contains(out, "secret") || strings.Contains(out, "\x1b") {
		t.Errorf("got %q, want no secret and no escape in it", out)
	}
}

// TestCheckEnvironment: what Go reads from the environment of the process.
func TestCheckEnvironment(t *testing.T) {
	t.Parallel()
	proxy := func(s string) func(net.Conn) { return reply("HTTP/1.1 " + s + "\r\n\r\n") }
	certs := newCerts(t)
	for _, tt := range []struct {
		name, url, env string
		serve          func(net.Conn)
		step, want     string
	}{
		{"good", "wss://HOST", "SSL_CERT_FILE=" + certs.ca, good, "", "All is well"},
		{"no DNS", "ws://relay.invalid/in/x", "NO_PROXY=*", good, "name", `The name relay.invalid was not found`},
		{"proxy refuses", "ws://relay.invalid", "HTTP_PROXY=http://HOST", proxy("407 Who are you"), "proxy", `The proxy HOST wants a user and password`},
		{"proxy refuses credentials", "wss://relay.invalid", "HTTPS_PROXY=http://any:secret@HOST", proxy("407 Who are you"), "proxy", `The proxy HOST does not accept its user and password.`},
		{"proxy forbids", "wss://relay.invalid:22", "https_proxy=http://HOST", proxy("403 No"), "proxy", `The proxy HOST forbids connections to relay.invalid:22.`},
		{"proxy without a way", "ws://relay.invalid", "http_proxy=http://HOST", proxy("503 No"), "proxy", `The proxy HOST can't reach relay.invalid:80.`},
		{"proxy that is none", "ws://relay.invalid", "http_proxy=http://HOST", reply("SSH-2.0-\r\n\r\n"), "proxy", `The proxy HOST does not open a tunnel`},
		{"proxy not found", "ws://relay.invalid", "http_proxy=http://any:secret@proxy.invalid", good, "name", `The name proxy.invalid was not found`},
		{"proxy of another kind", "ws://relay.invalid", "http_proxy=socks5://any:secret@HOST", reply("HTTP/1.1 400 Bad Request\r\n\r\n"), "proxy", `The proxy HOST does not open a tunnel: it may not be a proxy of the kind that its URL names (socks5)`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			l := listenLoopback(t)
			fill := strings.NewReplacer("HOST", l.Addr().String()).Replace
			if strings.HasPrefix(tt.url, "wss://HOST") {
				l = tls.NewListener(l, certs.server)
			}
			serveEach(t, l, tt.serve)
			status, out := runCheck(t, fill(tt.url), fill(tt.env))
			checkOutput(t, status, out, tt.step, fill(tt.want))
		})
	}
}

// TestCheckDestination: the API checks a destination as vw check does, one at a
// time, and shows no secret of it.
func TestCheckDestination(t *testing.T) {
	s := newTestServer(t, "")
	l := listenLoopback(t)
	addr := l.Addr().String()
	ask(s, fmt.Sprintf(`POST /api/destinations {"id":"a/silent","stream":"video0","destination":"ws://u:hidden@%s/in/x?code=hidden","token":"hidden1"}`, addr))
	ask(s, `POST /api/destinations {"id":"refused","stream":"video0","destination":"ws://u:hidden@127.0.0.1:1/in/x"}`)
	for _, tt := range []struct{ name, request, want string }{
		{"no such destination", "POST /api/check/x", `404 {"error":"destination \"x\" does not exist`},
		{"no id", "POST /api/check/", `400 {"error":"id`},
		{"another method", "GET /api/check/refused", "405 "},
		{"a refused connection", "POST /api/check/refused", `200 "name `},
	} {
		if got := ask(s, tt.request); !strings.HasPrefix(got, tt.want) || strings.Contains(got, "hidden") {
			t.Errorf("%s: got %s, want %s", tt.name, got, tt.want)
		}
	}
	if got := ask(s, "POST /api/check/refused"); !strings.Contains(got, "FAILED") || !strings.Contains(got, "127.0.0.1:1") {
		t.Errorf("got %s, want the step that failed and the advice", got)
	}
	s.checking.Lock() // as another check does
	if got := ask(s, "POST /api/check/refused"); !strings.HasPrefix(got, "503 ") {
		t.Errorf("beside another check: got %s, want 503", got)
	}
	s.checking.Unlock()
	first := ask(s, "POST /api/check/a/silent")
	if !strings.HasPrefix(first, `200 "`) || !strings.Contains(first, "FAILED") || strings.Contains(first, "hidden") {
		t.Errorf("a silent relay: got %s, want the step that failed, without secrets", first)
	}
}

// TestCheckAbandoned: a check ends when its caller leaves, and another may begin.
func TestCheckAbandoned(t *testing.T) {
	s := newTestServer(t, "")
	h := httptest.NewServer(s)
	defer h.Close()
	l := listenLoopback(t)
	ask(s, fmt.Sprintf(`POST /api/destinations {"id":"silent","stream":"video0","destination":"ws://%s"}`, l.Addr()))
	ctx, leave := context.WithCancel(t.Context())
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, h.URL+"/api/check/silent", nil)
	if err != nil {
		t.Fatal(err)
	}
	var calling sync.WaitGroup
	calling.Go(func() {
		if a, err := http.DefaultClient.Do(r); err == nil {
			a.Body.Close()
			t.Errorf("got %s, want the check to go on", a.Status)
		}
	})
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	leave()
	calling.Wait()
	eventually(t, 3*time.Second, func() error { // the relay's answer would be waited for for 5 s
		if !s.checking.TryLock() {
			return errors.New("it is still being checked")
		}
		return nil
	})
}
