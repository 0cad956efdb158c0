package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log"
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
		{"closes with a status", func(conn net.Conn) bool { write(conn, frame(0x88, "\x03\xf0"+testToken)); return true }, 9, 15, "token: closed by the other side with status 1008"},
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
		}, 9, 15, "longer than 16384 bytes"},
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
	ca := newTestCA(t)
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
		r.roots = ca.roots
		set("known")
		waitFor(t, "a connection", func() bool { return strings.Contains(log.String(), "msg=connected dest=known") })
		r.deleteDestinations()
	}
	if got := seen.Load(); got != 2 {
		t.Errorf("got %d tokens, want 2", got)
	}
}

// TestAllowed: a code that was asked for over TLS is not sent in the clear.
func TestAllowed(t *testing.T) {
	tests := []struct{ access, uri, want string }{ // want: in the error
		{"http://a", "ws://b/?code=1", ""},
		{"http://a", "wss://b/?code=1", ""},
		{"https://a", "wss://b/?code=1", ""},
		{"https://a", "ws://b/?code=1", "not wss"},
		{"https://a", "https://b/?code=1", "not the URL of a websocket"},
		{"https://a", "//b/?code=1", "not the URL of a websocket"},
		{"https://a", "wss://b/?code=1#x", "not the URL of a websocket"},
	}
	for _, tt := range tests {
		u, err := url.Parse(tt.access)
		if err != nil {
			t.Fatal(err)
		}
		d := &destination{url: u}
		got, err := d.allowed([]byte(`{"uri":"` + tt.uri + `"}`))
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
