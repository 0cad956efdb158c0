package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/websocket"
)

const testToken = "eyJhbGciOiJIUzI1NiJ9.eyJhdWQiOiJ4In0.c2lnbmF0dXJl"

// counted notes what a count was when the last write began.
type counted struct {
	net.Conn
	count *atomic.Int64
	n     int64
}

func (c *counted) Write(b []byte) (int, error) {
	c.n = c.count.Load()
	return c.Conn.Write(b)
}

// TestToken: what relays may answer to a token on ws, how often they are
// dialled in 60 s, and what the log says of them.
func TestToken(t *testing.T) {
	t.Parallel()
	const yes = `{"topic":"/in/x","token":"` + testToken + `","authorised":true,"reason":"ok"}`
	no := func(reason string) []byte {
		return frame(0x81, `{"topic":"/in/x","token":"`+testToken+`","authorised":false,"reason":"`+reason+`"}`)
	}
	tests := []struct {
		name        string
		answer      func(conn net.Conn) (open bool)
		least, most int64
		log         string
	}{
		{"good", func(conn net.Conn) bool { write(conn, frame(0x81, yes)); return true }, 1, 1, "msg=connected"},
		{"good, after 4 s", func(conn net.Conn) bool {
			time.Sleep(4 * time.Second)
			write(conn, frame(0x81, yes))
			return true
		}, 1, 1, "msg=connected"},
		{"pings before it", func(conn net.Conn) bool {
			write(conn, frame(0x89, "a"), frame(0x89, ""), frame(0x81, yes))
			return true
		}, 1, 1, "msg=connected"},
		{"binary before it", func(conn net.Conn) bool {
			write(conn, frame(0x82, yes), frame(0x82, "x"), frame(0x81, yes))
			return true
		}, 1, 1, "msg=connected"},
		{"in fragments", func(conn net.Conn) bool {
			write(conn, frame(0x01, yes[:10]), frame(0x8a, "pong"), frame(0x00, yes[10:11]), frame(0x80, yes[11:]))
			return true
		}, 1, 1, "msg=connected"},
		{"closes with a status", func(conn net.Conn) bool { write(conn, frame(0x88, "\x03\xf0"+testToken)); return true }, 9, 15, "token: closed by the other side with status 1008 (policy violation): ***"},
		{"refused", func(conn net.Conn) bool { write(conn, no("too old")); return false }, 6, 8, `the relay refuses the token: \"too old\"`},
		{"refused, and stays open", func(conn net.Conn) bool { write(conn, no("")); return true }, 6, 8, `refuses the token: \"\"`},
		{"refused with the token", func(conn net.Conn) bool { write(conn, no("bad: "+testToken+"!")); return false }, 6, 8, `\"bad: ***!\"`},
		{"refused at length", func(conn net.Conn) bool {
			write(conn, no(strings.Repeat("x", 180)+testToken))
			return false
		}, 6, 8, `x***\"`},
		{"refused in several lines", func(conn net.Conn) bool { write(conn, no(`a\nb\u001b[31m`)); return false }, 6, 8, `\"a\\nb\\x1b[31m\"`},
		{"no answer", func(conn net.Conn) bool { return true }, 5, 12, "token: no answer within 5s"},
		{"an answer after 6 s", func(conn net.Conn) bool {
			time.Sleep(6 * time.Second)
			write(conn, frame(0x81, yes))
			return true
		}, 5, 12, "token: no answer within 5s"},
		{"closes", func(conn net.Conn) bool { return false }, 9, 15, "token: closed without an answer"},
		{"half an answer", func(conn net.Conn) bool { write(conn, frame(0x81, yes)[:50]); return false }, 9, 15, "token: closed without an answer"},
		{"another text", func(conn net.Conn) bool { write(conn, frame(0x81, "hello")); return true }, 9, 15, "first text message is not"},
		{"null", func(conn net.Conn) bool { write(conn, frame(0x81, "null")); return true }, 9, 15, "first text message is not"},
		{"not a truth", func(conn net.Conn) bool { write(conn, frame(0x81, `{"authorised":"true"}`)); return true }, 9, 15, "first text message is not"},
		{"1 MB of text", func(conn net.Conn) bool {
			write(conn, frame(0x81, strings.Repeat("x", 1<<20)))
			return false
		}, 9, 15, "longer than 16384 bytes"},
		{"binary without end", func(conn net.Conn) bool {
			for range 1000 {
				write(conn, frame(0x82, strings.Repeat("x", 1000)))
			}
			return false
		}, 9, 15, "token: closed without an answer"},
		{"video of others before it", func(conn net.Conn) bool {
			for range 1000 {
				write(conn, frame(0x82, strings.Repeat("x", 1000)), frame(0x82, strings.Repeat("x", 20000)))
			}
			write(conn, frame(0x81, yes))
			return true
		}, 1, 1, "msg=connected"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var media atomic.Int64
				l := newLab(t, func(_ int64, _ string, conn net.Conn) {
					r, err := accept(conn)
					if err != nil {
						return
					}
					opcode, b, err := readFrame(r)
					if err != nil {
						return // the test has ended
					}
					if opcode != opText || string(b) != testToken {
						t.Errorf("the first message is %d %q, want the token", opcode, b)
					}
					var reading sync.WaitGroup
					defer reading.Wait()
					defer conn.Close()
					var early atomic.Int64
					reading.Go(func() { serveOn(conn, r, &early) })
					before := &counted{Conn: conn, count: &early}
					ok := tt.answer(before)
					if before.n > 0 {
						t.Errorf("got %d messages before the answer was whole", before.n)
					}
					if ok {
						reading.Wait()
					}
					media.Add(early.Load())
				})
				ctx, cancel := context.WithCancel(t.Context())
				l.tasks.Go(func() { l.film(ctx, "video0", 500) })
				if _, err := l.setDestination(destinationRule{ID: "0", Stream: "video0", Destination: "ws://relay/in/x", Token: testToken}); err != nil {
					t.Fatal(err)
				}
				time.Sleep(60 * time.Second)
				if got := l.dials.Load(); got < tt.least || got > tt.most {
					t.Errorf("got %d dials, want %d to %d", got, tt.least, tt.most)
				}
				log := l.log.String()
				if strings.Count(log, tt.log) != 1 || strings.Contains(log, testToken[:8]) || len(log) > 2000 {
					t.Errorf("got the log\n%swant %q once, and no token", log, tt.log)
				}
				cancel()
				l.close()
				if got, want := media.Load() > 0, tt.most == 1; got != want {
					t.Errorf("got %d messages of media, want some: %t", media.Load(), want)
				}
			})
		})
	}
}

// TestAccessPoint: what access points may answer to a POST on http, and what the
// websocket may do that they allow.
func TestAccessPoint(t *testing.T) {
	t.Parallel()
	reply := func(status, body string) func(int) string {
		return func(int) string {
			return fmt.Sprintf("HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", status, len(body), body)
		}
	}
	uri := func(s string) func(int) string { return reply("200 OK", `{"uri":"`+s+`"}`) }
	allow := func(n int) string { return uri(fmt.Sprintf("ws://media/session/x?code=code-%d", n))(0) }
	const pong, silent, closes = "pong", "silent", "closes after 2 s"
	tests := []struct {
		name        string
		answer      func(n int) string // to the nth POST; "": none
		websocket   string
		least, most int // POSTs in 60 s
		log         string
	}{
		{"good", allow, pong, 1, 1, "msg=connected"},
		{"a code for each connection", allow, closes, 5, 12, "level=WARN"},
		{"a code that is not good", allow, silent, 5, 12, "access: ping: no answer within 5s"},
		{"bad token", reply("500 Internal Server Error", `{"code":500,"message":"token invalid"}`), "", 6, 8, `\"500 Internal Server Error\": \"token invalid\"`},
		{"wrong topic", reply("401 Unauthorized", `"Token Wrong Topic"`+"\n"), "", 6, 8, `\"401 Unauthorized\": \"Token Wrong Topic\"`},
		{"an error that quotes the token", reply("400 "+testToken, "you said "+testToken), "", 6, 8, `\"400 ***\": \"you said ***\"`},
		{"redirect", reply("302 Found\r\nLocation: http://relay/other", ""), "", 6, 8, "302 Found"},
		{"503", reply("503 Busy", ""), "", 150, 750, "503 Busy"},
		{"no JSON", reply("200 OK", "ws://media/?code=code-1"), "", 9, 15, "the answer is not"},
		{"no uri", reply("200 OK", "{}"), "", 9, 15, "not the URL of a websocket"},
		{"not a websocket", uri("http://media/?code=code-1"), "", 9, 15, "not the URL of a websocket"},
		{"with a user", uri("ws://me:code-1@media/"), "", 9, 15, "not the URL of a websocket"},
		{"to this machine", uri("ws://127.0.0.1/?code=code-1"), "", 9, 15, "an address of this network"},
		{"to localhost", uri("ws://localhost:81/?code=code-1"), "", 9, 15, "an address of this network"},
		{"to a private address", uri("wss://10.1.2.3/?code=code-1"), "", 9, 15, "an address of this network"},
		{"to a link-local address", uri("ws://[fe80::1]/?code=code-1"), "", 9, 15, "an address of this network"},
		{"100 KB", reply("200 OK", strings.Repeat("x", 100000)), "", 9, 15, "longer than 65536 bytes"},
		{"1 MB of header", func(int) string { return "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("y", 1<<20) }, "", 9, 15, "access: "},
		{"SSH", func(int) string { return "SSH-2.0-OpenSSH_9.2\r\n" }, "", 9, 15, "malformed HTTP response"},
		{"closes", func(int) string { return " " }, "", 9, 15, "access: "},
		{"no answer", func(int) string { return "" }, "", 4, 9, "access: no answer within 7s"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var mu sync.Mutex
				var codes []string
				posts := 0
				var media atomic.Int64
				l := newLab(t, func(_ int64, host string, conn net.Conn) {
					r := bufio.NewReader(conn)
					request, err := http.ReadRequest(r)
					if err != nil {
						return
					}
					got := request.Method + " " + host + request.URL.Path + " " + request.Header.Get("Authorization") + request.Header.Get("X-Key")
					if request.Method == http.MethodPost {
						mu.Lock()
						posts++
						answer := tt.answer(posts)
						mu.Unlock()
						if want := "POST relay:80/session/x " + testToken + "key"; got != want {
							t.Errorf("got %s, want %s", got, want)
						}
						if answer == "" {
							io.Copy(io.Discard, conn)
						}
						io.WriteString(conn, answer)
						return
					}
					if want := "GET media:80/session/x key"; got != want {
						t.Errorf("got %s, want %s", got, want)
					}
					mu.Lock()
					codes = append(codes, request.URL.Query().Get("code"))
					mu.Unlock()
					upgradeTo(conn, request)
					switch tt.websocket {
					case silent:
						io.Copy(io.Discard, conn)
					case closes:
						defer time.AfterFunc(2*time.Second, func() { conn.Close() }).Stop()
					}
					serveOn(conn, r, &media)
				})
				ctx, cancel := context.WithCancel(t.Context())
				l.tasks.Go(func() { l.film(ctx, "video0", 500) })
				rule := destinationRule{ID: "0", Stream: "video0", Destination: "http://relay/session/x", Token: testToken, Headers: "X-Key: key\n"}
				if _, err := l.setDestination(rule); err != nil {
					t.Fatal(err)
				}
				time.Sleep(60 * time.Second)
				if advice := l.destinations["0"].stats(time.Now()).Advice; strings.HasPrefix(tt.name, "to ") && !strings.Contains(advice, "The access point at relay:80 sends vw to ") {
					t.Errorf("got the advice %q", advice)
				}
				mu.Lock()
				if posts < tt.least || posts > tt.most {
					t.Errorf("got %d POSTs, want %d to %d", posts, tt.least, tt.most)
				}
				if n := len(slices.Compact(slices.Sorted(slices.Values(codes)))); n != len(codes) || tt.websocket != "" && n != posts {
					t.Errorf("got the codes %q for %d POSTs, want each once", codes, posts)
				}
				mu.Unlock()
				log := l.log.String()
				if strings.Count(log, tt.log) != 1 || strings.Contains(log, testToken[:8]) || strings.Contains(log, "code-") || len(log) > 2500 {
					t.Errorf("got the log\n%swant %q once, and no token or code", log, tt.log)
				}
				cancel()
				l.close()
				if got, want := media.Load() > 0, tt.websocket == pong || tt.websocket == closes; got != want {
					t.Errorf("got %d messages of media, want some: %t", media.Load(), want)
				}
			})
		})
	}
}

// TestAccessPointLocal: an access point of this network may name a relay in it.
func TestAccessPointLocal(t *testing.T) {
	relay, access := listenLoopback(t), listenLoopback(t)
	serveEach(t, relay, good)
	answer := fmt.Sprintf(`{"uri":"ws://%s/?code=1"}`, relay.Addr())
	serveEach(t, access, reply(fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(answer), answer)))
	u, _ := cleanURL("http://" + access.Addr().String() + "/session/x")
	conn, _, err := newDialer().open(t.Context(), target{url: u, token: testToken, header: make(http.Header)})
	if err != nil || conn.RemoteAddr().String() != relay.Addr().String() {
		t.Fatalf("got %v, want a connection to %v", err, relay.Addr())
	}
	conn.Close()
}

// TestTokenTLS: both dialects over TLS, with the roots that vouch for relays;
// without them no token is sent.
func TestTokenTLS(t *testing.T) {
	var seen atomic.Int64 // tokens
	var addr string
	serve := websocket.Handler(func(ws *websocket.Conn) {
		if ws.Request().URL.Query().Get("code") == "" {
			var token string
			websocket.Message.Receive(ws, &token)
			if token != testToken {
				return
			}
			seen.Add(1)
			websocket.JSON.Send(ws, map[string]any{"authorised": true})
		}
		io.Copy(io.Discard, ws)
	})
	relay := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost && r.Header.Get("Authorization") == testToken {
			seen.Add(1)
			fmt.Fprintf(w, `{"uri":"wss://%s/?code=1"}`, addr)
			return
		}
		serve.ServeHTTP(w, r)
	}))
	relay.Config.ErrorLog = log.New(io.Discard, "", 0)
	ca := newCerts(t)
	relay.TLS = ca.server
	relay.StartTLS()
	defer relay.Close()
	addr = relay.Listener.Addr().String()
	for _, scheme := range []string{"wss", "https"} {
		var log logBuffer
		r, _, _ := realRules(t, &log)
		set := func(id id) {
			t.Helper()
			if _, err := r.setDestination(destinationRule{ID: id, Stream: "video0", Destination: scheme + "://" + addr + "/", Token: testToken}); err != nil {
				t.Fatal(err)
			}
		}
		before := seen.Load()
		set("unknown")
		waitFor(t, "a refusal", func() bool { return strings.Contains(log.String(), "certificate signed by unknown authority") })
		if n := seen.Load() - before; n > 0 {
			t.Errorf("%s: got %d tokens without a good certificate", scheme, n)
		}
		r.dialer.roots = ca.roots
		set("known")
		waitFor(t, "a connection", func() bool { return strings.Contains(log.String(), "msg=connected dest=known") })
		r.deleteDestinations()
	}
	if got := seen.Load(); got != 2 {
		t.Errorf("got %d tokens, want 2", got)
	}
}

// TestAllowedURL: a code that was asked for over TLS is not sent in the clear.
func TestAllowedURL(t *testing.T) {
	tests := []struct{ access, uri, want string }{ // want: in the error
		{"http://a", "ws://b/?code=1", ""},
		{"http://a", "wss://b/?code=1", ""},
		{"https://a", "wss://b/?code=1", ""},
		{"https://a", "ws://b/?code=1", "not wss"},
		{"wss://a", "ws://b/?code=1", "not wss"}, // https, after a redirect
		{"https://a", "https://b/?code=1", "not the URL of a websocket"},
		{"https://a", "//b/?code=1", "not the URL of a websocket"},
		{"https://a", "wss://b/?code=1#x", "not the URL of a websocket"},
	}
	for _, tt := range tests {
		u, err := url.Parse(tt.access)
		if err != nil {
			t.Fatal(err)
		}
		got, err := allowedURL(u, []byte(`{"uri":"`+tt.uri+`"}`))
		switch {
		case tt.want == "" && (err != nil || got.String() != tt.uri):
			t.Errorf("%s, %s: got %v, %v", tt.access, tt.uri, got, err)
		case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
			t.Errorf("%s, %s: got %v, want %s", tt.access, tt.uri, err, tt.want)
		}
	}
}

// TestOpenEnds: a rule that is deleted while its token is looked at does not
// wait for the relay.
func TestOpenEnds(t *testing.T) {
	for _, url := range []string{"ws://relay/", "http://relay/"} {
		synctest.Test(t, func(t *testing.T) {
			l := newLab(t, func(_ int64, _ string, conn net.Conn) {
				if strings.HasPrefix(url, "ws") {
					accept(conn)
				}
				io.Copy(io.Discard, conn)
			})
			defer l.close()
			if _, err := l.setDestination(destinationRule{ID: "0", Stream: "video0", Destination: url, Token: testToken}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			start := time.Now()
			l.deleteDestination("0")
			if d := time.Since(start); d > 0 {
				t.Errorf("%s: deleting took %v", url, d)
			}
		})
	}
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
				l.dialer.proxy = proxyAt(t, "http://any:secret@10.0.0.1:3128")
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
		l.dialer.proxy = proxyAt(t, "socks4://any:secret@10.0.0.1:1080")
		defer l.close()
		l.send("video0", "ws://relay")
		time.Sleep(10 * time.Second)
		const want = `proxy 10.0.0.1:1080: the scheme is \"socks4\", it must be http, https or socks5`
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

// TestProxyTunnel: video reaches relays with and without TLS, through proxies
// with and without TLS.
func TestProxyTunnel(t *testing.T) {
	t.Parallel()
	ca := newCerts(t)
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
			r.dialer.roots = ca.roots
			r.dialer.proxy = proxyAt(t, tt.proxy+"://lab:s3cr%3At@"+proxy.Addr().String())
			tasks.Go(func() { load(ctx, r, "video0") })
			r.to(t, "0", "video0", tt.relay+"://"+relay.Addr().String())
			waitFor(t, "video", func() bool { return messages.Load() > 20 })
			if got := tunnels.Load(); got != 1 {
				t.Errorf("got %d tunnels, want 1", got)
			}
		})
	}
}

// TestE2EProxy: video goes to the relay through tinyproxy, and again when the
// relay was away.
func TestE2EProxy(t *testing.T) {
	t.Parallel()
	if !inNamespace(t) {
		return
	}
	certs := newCerts(t, func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(192, 0, 2, 1)} })
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

// TestE2ETokens: both dialects with a relay that is not ours: good, bad and
// expired tokens, and its restart; the control link needs tokens too.
func TestE2ETokens(t *testing.T) {
	r, relay := startTokenRelay(t, "127.0.0.1:0", "-secret", relaySecret)
	v := startVW(t, "VW_API=http://"+relay+"/session/control", "VW_API_TOKEN="+relayToken("/session/control", time.Hour))
	v.expect(t, 0, startupTime, `msg=connected dest=apiRule `)
	tests := []struct{ id, url, token, want string }{
		{"good", "ws://" + relay + "/in/a", relayToken("/in/a", time.Hour), `msg=connected dest=good `},
		{"bad", "ws://" + relay + "/in/a", "a.b.c", `dest=bad .* err="the relay refuses the token: \\"its signature is wrong\\""`},
		{"old", "ws://" + relay + "/in/a", relayToken("/in/a", -time.Minute), `dest=old .* err="the relay refuses the token: \\"it has expired\\""`},
		{"other", "ws://" + relay + "/in/a", relayToken("/in/b", time.Hour), `dest=other .* err="the relay refuses the token: \\"it is for /in/b, not /in/a\\""`},
		{"http-good", "http://" + relay + "/session/a", relayToken("/session/a", time.Hour), `msg=connected dest=http-good `},
		{"http-bad", "http://" + relay + "/session/a", "a.b.c", `dest=http-bad .*500 Internal Server Error\\": \\"its signature is wrong\\""`},
		{"http-old", "http://" + relay + "/session/a", relayToken("/session/a", -time.Minute), `dest=http-old .*500 Internal Server Error\\": \\"it has expired\\""`},
	}
	for _, tt := range tests {
		v.call(t, http.StatusOK, "POST", "/api/destinations", fmt.Sprintf(`{"id":%q,"stream":"video0","destination":%q,"token":%q}`, tt.id, tt.url, tt.token))
		v.expect(t, 0, startupTime, tt.want)
	}
	for _, path := range []string{"/in/a", "/session/a", "/session/control"} {
		r.expect(t, 0, startupTime, `open `+path+`\n`)
	}
	watch := func(url, token string) {
		t.Helper()
		if strings.HasPrefix(url, "http") {
			access, err := cleanURL(url)
			if err != nil {
				t.Fatal(err)
			}
			u, err := (&attempt{dialer: newDialer()}).access(t.Context(), target{url: access, token: token, header: make(http.Header)})
			if err != nil {
				t.Fatal(err)
			}
			url, token = u.String(), ""
		}
		c := newController(t, url)
		if token != "" && !strings.Contains(c.ask(t, token), `"authorised":true`) {
			t.Fatalf("%s: the viewer is refused", url)
		}
		p := startPost(t, v.addr, "video0")
		defer p.end(t)
		ended := make(chan struct{})
		defer func() { <-ended }()
		stop, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() {
			defer close(ended)
			for clip := testClip(12, 500); stop.Err() == nil; time.Sleep(20 * time.Millisecond) {
				p.write(t, clip)
			}
		}()
		video := websocket.Codec{Unmarshal: func(b []byte, opcode byte, _ any) error {
			if opcode != opBinary || !bytes.HasPrefix(b, []byte{syncByte}) {
				return fmt.Errorf("opcode %d, %d bytes", opcode, len(b))
			}
			return nil
		}}
		if err := video.Receive(c.Conn, nil); err != nil {
			t.Errorf("%s: the viewer got %v", url, err)
		}
	}
	watch("ws://"+relay+"/in/a", relayToken("/in/a", time.Hour))
	watch("http://"+relay+"/session/a", relayToken("/session/a", time.Hour))

	seen := v.out.len()
	r.kill(t)
	v.expect(t, seen, startupTime, `dest=good .*connection refused`)
	r, _ = startTokenRelay(t, relay, "-secret", relaySecret)
	for _, path := range []string{"/in/a", "/session/a", "/session/control"} {
		r.expect(t, 0, startupTime, `open `+path+`\n`)
	}
	watch("ws://"+relay+"/in/a", relayToken("/in/a", time.Hour))
	watch("http://"+relay+"/session/a", relayToken("/session/a", time.Hour))
	for _, tt := range tests {
		if strings.Contains(v.out.String(), tt.token) {
			t.Errorf("the token of %s is in the log", tt.id)
		}
	}
	if strings.Contains(v.out.String(), "code=") {
		t.Error("a code is in the log")
	}
}

// FuzzRelay: whatever a relay answers, or sends once it has answered well, the
// connection ends with it, and the log is what we wrote.
func FuzzRelay(f *testing.F) {
	f.Add([]byte("HTTP/1.1 101 x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: x\r\n\r\n"), []byte{})
	f.Add([]byte("HTTP/1.1 500 \x1b[2J\xff\r\n\r\n"), []byte{})
	f.Add([]byte{}, []byte("\x89\x02ab\x82\x7e\x00\x04abcd\x01\x01a\x80\x00\x88\x02\x03\xe8"))
	f.Add([]byte{}, []byte("\x82\x7f\xff\xff\xff\xff\xff\xff\xff\xff\xf2\x81abcde"))
	f.Fuzz(func(t *testing.T, answer, after []byte) {
		log := &logBuffer{}
		l := newLab(t, func(_ int64, _ string, conn net.Conn) {
			if len(answer) == 0 {
				if _, err := accept(conn); err != nil {
					t.Error(err)
				}
				answer = after
			} else if _, err := http.ReadRequest(bufio.NewReader(conn)); err != nil {
				t.Error(err)
			}
			var reading sync.WaitGroup
			defer reading.Wait()
			reading.Go(func() { io.Copy(io.Discard, conn) })
			conn.Write(answer)
			conn.Close()
		})
		defer l.close()
		rule := destinationRule{Stream: "video0", Destination: "ws://u:" + secretUser + "@relay/in"}
		d := newDestination(newUplink(rule, l.dialer, slog.New(slog.NewTextHandler(log, nil))), l.mux, time.Second)
		_, err := d.connect(t.Context(), d.send, true)
		d.log.Info("ended", "err", err)
		checkLog(t, log.String())
		if len(err.Error()) > 300 {
			t.Errorf("the error has %d bytes: %v", len(err.Error()), err)
		}
	})
}
