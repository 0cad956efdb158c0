package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// proxyAt is a proxy on the way to every relay.
func proxyAt(t *testing.T, s string) func(*http.Request) (*url.URL, error) {
	t.Helper()
	u, err := url.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return http.ProxyURL(u)
}

// TestProxyAnswers: how often a proxy that does not open a tunnel is asked in
// 60 s, and what the log says of it.
func TestProxyAnswers(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name        string
		proxy       func(n int64, host string, conn net.Conn)
		least, most int64
		log         string
	}{
		{"is away", nil, 150, 750, "proxy 10.0.0.1:3128: connection refused"},
		{"wants credentials", replies("HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"), 6, 8, "proxy 10.0.0.1:3128: 407 Proxy Authentication Required"},
		{"forbids", replies("HTTP/1.0 403 Filtered\r\n\r\n"), 6, 8, "proxy 10.0.0.1:3128: 403 Filtered"},
		{"can't reach the relay", replies("HTTP/1.1 502 Bad Gateway\r\nContent-Length: 9\r\n\r\nno route"), 150, 750, "502 Bad Gateway"},
		{"waited for the relay", replies("HTTP/1.1 504 Gateway Timeout\r\n\r\n"), 150, 750, "504 Gateway Timeout"},
		{"can't, as tinyproxy says it", replies("HTTP/1.0 500 Unable to connect\r\n\r\n"), 150, 750, "500 Unable to connect"},
		{"is a web server", replies("HTTP/1.1 405 Method Not Allowed\r\n\r\n"), 9, 15, "405 Method Not Allowed"},
		{"closes", replies(""), 9, 15, "closed without an answer"},
		{"is silent", func(_ int64, _ string, conn net.Conn) { io.Copy(io.Discard, conn) }, 5, 9, "no answer within 5s"},
		{"has an endless header", replies("HTTP/1.1 200 OK\r\nX: " + strings.Repeat("y", 1<<20)), 9, 15, "longer than 16384 bytes"},
		{"is an SSH server", replies("SSH-2.0-OpenSSH_9.2\r\n\r\n"), 9, 15, "SSH-2.0-OpenSSH_9.2"},
		{"has a long line", replies("HTTP/1.1 407 " + strings.Repeat("y", 9000) + "\r\n\r\n"), 6, 8, "407 yyyy"},
		{"has a line for the log", replies("HTTP/1.1 407 a\x1b[31mb\r\n\r\n"), 6, 8, `a\\x1b[31mb`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLab(t, tt.proxy)
				l.proxy = proxyAt(t, "http://any:secret@10.0.0.1:3128")
				defer l.close()
				l.send("video0", "ws://relay/in/x")
				time.Sleep(60 * time.Second)
				if got := l.dials.Load(); got < tt.least || got > tt.most {
					t.Errorf("got %d dials, want %d to %d", got, tt.least, tt.most)
				}
				log := l.log.String()
				if strings.Count(log, tt.log) != 1 || strings.Count(log, "level=WARN") != 1 || len(log) > 2000 {
					t.Errorf("got the log\n%swant %q once", log, tt.log)
				}
				if strings.Contains(log, "secret") {
					t.Errorf("got the log\n%swant no password in it", log)
				}
			})
		})
	}
}

// TestProxyScheme: a proxy that vw can't speak to is told, and not gone past.
func TestProxyScheme(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, nil)
		l.proxy = proxyAt(t, "socks5://any:secret@10.0.0.1:1080")
		defer l.close()
		l.send("video0", "ws://relay")
		time.Sleep(10 * time.Second)
		const want = `proxy 10.0.0.1:1080: the scheme is \"socks5\", it must be http or https`
		if log := l.log.String(); !strings.Contains(log, want) || l.dials.Load() > 0 {
			t.Errorf("got %d dials and the log\n%swant none and %q", l.dials.Load(), log, want)
		}
	})
}

// TestReadAnswer: what follows the header of the answer is left to the tunnel.
func TestReadAnswer(t *testing.T) {
	for _, head := range []string{"HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.0 200 Connection established\r\nA: b\r\n\r\n", "HTTP/1.1 200 OK\n\n"} {
		r := strings.NewReader(head + "tunnel")
		a, err := readAnswer(r, &http.Request{Method: http.MethodConnect})
		rest, _ := io.ReadAll(r)
		if err != nil || a.StatusCode != http.StatusOK || string(rest) != "tunnel" {
			t.Errorf("%q: got %v, %v and %q, want 200 and %q", head, a, err, rest, "tunnel")
		}
	}
}

// serveEach accepts on l until the test ends, and serves each connection.
func serveEach(t *testing.T, l net.Listener, serve func(net.Conn)) {
	var serving sync.WaitGroup
	ctx, end := context.WithCancel(t.Context())
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
	t.Cleanup(func() {
		l.Close()
		end()
		serving.Wait()
	})
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

// TestProxyTunnel: video reaches relays with and without TLS, through proxies
// with and without TLS.
func TestProxyTunnel(t *testing.T) {
	t.Parallel()
	ca := newTestCA(t)
	for _, tt := range []struct{ name, proxy, relay string }{
		{"ws", "http", "ws"}, {"wss", "http", "wss"}, {"TLS, then ws", "https", "ws"}, {"TLS in TLS", "https", "wss"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			listen := func(secure bool) net.Listener {
				l := listenLoopback(t)
				if secure {
					return tls.NewListener(l, ca.server)
				}
				return l
			}
			var messages, tunnels atomic.Int64
			relay, proxy := listen(tt.relay == "wss"), listen(tt.proxy == "https")
			serveEach(t, relay, func(conn net.Conn) { serveRelay(conn, func([]byte) { messages.Add(1) }) })
			serveEach(t, proxy, passTunnels(&tunnels))
			var log logBuffer
			r, ctx, tasks := realRules(t, &log)
			r.roots = ca.roots
			r.proxy = proxyAt(t, tt.proxy+"://lab:s3cr%3At@"+proxy.Addr().String())
			film := lab{rules: r, t: t}
			tasks.Go(func() { film.film(ctx, "video0", 50000) })
			r.to(t, "0", "video0", tt.relay+"://"+relay.Addr().String())
			waitFor(t, "video", func() bool { return messages.Load() > 20 })
			if got := tunnels.Load(); got != 1 {
				t.Errorf("got %d tunnels, want 1", got)
			}
		})
	}
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
	for _, target := range []string{"relay", "linux/amd64"} {
		build(t, target) // in there, nothing can be downloaded
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	inner := exec.Command(tool(t, "unshare"), "--map-root-user", "--net", self, "-test.run", "^"+t.Name()+"$", "-test.v", "-test.timeout", "5m")
	inner.Env = append(os.Environ(), "VW_TEST_NAMESPACE=1")
	out, err := inner.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("in the namespace: %v\n%s", err, out)
	}
	return false
}

// startTinyproxy starts a proxy on 192.0.2.1; auth is its line for credentials.
func startTinyproxy(t *testing.T, auth string) (p *process, addr string) {
	t.Helper()
	conf := filepath.Join(t.TempDir(), "tinyproxy.conf")
	text := "Port 3128\nListen 192.0.2.1\nTimeout 600\nMaxClients 20\nLogLevel Connect\n" + auth + "\n"
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	p = start(t, "tinyproxy", exec.Command(tool(t, "tinyproxy"), "-d", "-c", conf))
	eventually(t, startupTime, func() error {
		conn, err := net.Dial("tcp", "192.0.2.1:3128")
		if err == nil {
			conn.Close()
		}
		return err
	})
	return p, "192.0.2.1:3128"
}

// TestE2EProxy: video goes to the relay through tinyproxy, and again when the
// relay was away.
func TestE2EProxy(t *testing.T) {
	t.Parallel()
	if !inNamespace(t) {
		return
	}
	certs := newCerts(t, net.IPv4(192, 0, 2, 1))
	for _, tt := range []struct {
		name, auth, user string
		tls              bool
		variable         string
	}{
		{"ws", "", "", false, "HTTP_PROXY"},
		{"wss", "", "", true, "https_proxy"},
		{"ws with credentials", "BasicAuth lab secret", "lab:secret@", false, "http_proxy"},
		{"wss with credentials", "BasicAuth lab secret", "lab:secret@", true, "HTTPS_PROXY"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var args []string
			scheme := "ws://"
			if tt.tls {
				args, scheme = []string{"-cert", certs.cert, "-key", certs.key}, "wss://"
			}
			proxy, addr := startTinyproxy(t, tt.auth)
			r := startRelay(t, "192.0.2.1:0", args...)
			v := startVW(t, "SSL_CERT_FILE="+certs.ca, tt.variable+"=http://"+tt.user+addr)
			checkReturns(t, v, r, scheme+r.addr, `proxy 192\.0\.2\.1:3128: 500 Unable to connect`, args...)
			proxy.expect(t, 0, settleTime, `CONNECT `+r.addr)
			if strings.Contains(v.out.String(), "secret") {
				t.Errorf("got the log\n%swant no password in it", v.out.String())
			}
		})
	}
	for _, tt := range []struct{ name, user, want string }{
		{"refused", "", "407 Proxy Authentication Required"},
		{"refused with other credentials", "lab:s3cret@", "401 Unauthorized"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, addr := startTinyproxy(t, "BasicAuth lab secret")
			r := startRelay(t, "192.0.2.1:0")
			v := startVW(t, "HTTP_PROXY=http://"+tt.user+addr)
			v.call(t, http.StatusOK, "POST", "/api/destinations", `{"id":"0","stream":"video0","destination":"ws://`+r.addr+`"}`)
			v.expect(t, 0, settleTime, `err="proxy 192\.0\.2\.1:3128: `+tt.want+`"`)
			if strings.Contains(v.out.String(), "s3cret") || r.out.find(0, `open`) != nil {
				t.Errorf("got the log\n%swant no password in it, and no connection", v.out.String())
			}
		})
	}
	t.Run("check", func(t *testing.T) {
		_, addr := startTinyproxy(t, "BasicAuth lab secret")
		r := startRelay(t, "192.0.2.1:0", "-cert", certs.cert, "-key", certs.key)
		status, out := runCheck(t, "wss://"+r.addr, "HTTPS_PROXY=http://lab:secret@"+addr, "SSL_CERT_FILE="+certs.ca)
		checkOutput(t, status, out, "", "All is well: video can go from here to "+r.addr)
		if want := "a tunnel through " + addr; !strings.Contains(out, want) {
			t.Errorf("got\n%swant %q", out, want)
		}
	})
	t.Run("NO_PROXY", func(t *testing.T) {
		r := startRelay(t, "192.0.2.1:0")
		v := startVW(t, "HTTP_PROXY=http://192.0.2.1:1", "NO_PROXY=192.0.2.0/24")
		v.send(t, "0", "video0", "ws://"+r.addr)
	})
}
