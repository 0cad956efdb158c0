package main

import (
	"bufio"
	"crypto/sha1"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// acceptKey is what a relay answers to the key of a request. RFC 6455 4.2.2
func acceptKey(r *http.Request) string {
	sum := sha1.Sum([]byte(r.Header.Get("Sec-WebSocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	return base64.StdEncoding.EncodeToString(sum[:])
}

// TestUpgrade: what relays, and proxies on the way to them, may answer to the
// handshake. KEY is the right Sec-WebSocket-Accept.
func TestUpgrade(t *testing.T) {
	t.Parallel()
	const good = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: KEY\r\n"
	for _, tt := range []struct{ name, headers, answer, want string }{ // want: in the error; "": none
		{"as the standard has it", "", good, ""},
		{"a list in Connection", "", "HTTP/1.1 101 x\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\nSec-WebSocket-Accept: KEY\r\n", ""},
		{"another order and case", "", "HTTP/1.1 101 x\r\nupgrade: WebSocket\r\nconnection: upgrade,Keep-Alive\r\nsec-websocket-accept: KEY\r\n", ""},
		{"several lines", "", "HTTP/1.1 101 x\r\nUpgrade: h2c\r\nUpgrade: websocket\r\nConnection: keep-alive\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: KEY\r\n", ""},
		{"no reason phrase", "", "HTTP/1.1 101\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: KEY\r\n", ""},
		{"early hints", "", "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + good, ""},
		{"endless hints", "", strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", 1000), "longer than 16384 bytes"},
		{"no Upgrade", "", "HTTP/1.1 101 x\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: KEY\r\n", `"Upgrade" is not "websocket"`},
		{"no Connection", "", "HTTP/1.1 101 x\r\nUpgrade: websocket\r\nConnection: close\r\nSec-WebSocket-Accept: KEY\r\n", `"Connection" is not "Upgrade"`},
		{"part of a word", "", "HTTP/1.1 101 x\r\nUpgrade: websockets\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: KEY\r\n", `"Upgrade" is not "websocket"`},
		{"another's key", "", "HTTP/1.1 101 x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n", "does not belong to our key"},
		{"an extension", "", good + "Sec-WebSocket-Extensions: permessage-deflate\r\n", "a websocket extension that nobody asked for"},
		{"a protocol", "", good + "Sec-WebSocket-Protocol: video\r\n", `the subprotocol "video", which nobody asked for`},
		{"the protocol asked for", "audio, video", good + "Sec-WebSocket-Protocol: video\r\n", ""},
		{"another protocol", "audio, video", good + "Sec-WebSocket-Protocol: chat\r\n", `the subprotocol "chat", which nobody asked for`},
		{"a protocol not taken up", "video", good, ""},
		{"text", "", "HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain\r\nContent-Length: 31\r\n\r\nnot from your network,\x1b[31m sir", `the relay answered "403 Forbidden": "not from your network,?[31m sir"`},
		{"JSON", "", "HTTP/1.1 403 Forbidden\r\nContent-Length: 36\r\n\r\n{\"code\":403,\"message\":\"no such lab\"}", `"403 Forbidden": "no such lab"`},
		{"a page", "", "HTTP/1.1 404 Not Found\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n<html><head><title>404 Not Found</title></head>\n<body><center><h1>404 Not Found</h1></center><hr>nginx/1.22</body></html>", `"404 Not Found": "404 Not Found nginx/1.22"`},
		{"a long text", "", "HTTP/1.1 500 Oops\r\nConnection: close\r\n\r\n" + strings.Repeat("x", 100000), `": "` + strings.Repeat("x", 200) + `"`},
		{"a text that does not come", "", "HTTP/1.1 500 Oops\r\nContent-Length: 100\r\n\r\nsome", `"500 Oops": "some"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLab(t, func(_ int64, _ string, conn net.Conn) {
					r, err := http.ReadRequest(bufio.NewReader(conn))
					if err != nil {
						return
					}
					if got := r.Header.Get("Sec-WebSocket-Protocol"); got != tt.headers {
						t.Errorf("got the subprotocols %q, want %q", got, tt.headers)
					}
					answer := strings.ReplaceAll(tt.answer, "KEY", acceptKey(r))
					if !strings.Contains(answer, "\r\n\r\n") || strings.HasSuffix(answer, "\n") && strings.Contains(answer, "101 ") {
						answer += "\r\n"
					}
					io.WriteString(conn, answer)
					io.Copy(io.Discard, conn)
				})
				defer l.close()
				header := make(http.Header)
				if tt.headers != "" {
					header.Set("Sec-WebSocket-Protocol", tt.headers)
				}
				u, _ := cleanURL("ws://relay/in/x")
				conn, _, err := l.dialer.open(t.Context(), target{url: u, header: header})
				if err == nil {
					conn.Close()
				}
				if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
					t.Errorf("got %v, want %q", err, tt.want)
				}
			})
		})
	}
}

// TestOrigin: neither Host nor Origin has the zone of an address.
func TestOrigin(t *testing.T) {
	for _, tt := range []struct{ url, host, origin string }{
		{"ws://[fe80::1%25eth0]:8080/a", "[fe80::1]:8080", "http://[fe80::1]:8080"},
		{"wss://[fe80::1%25eth0]/a", "[fe80::1]", "https://[fe80::1]"},
		{"wss://relay.example/a?b=c", "relay.example", "https://relay.example"},
		{"ws://192.0.2.1:81", "192.0.2.1:81", "http://192.0.2.1:81"},
	} {
		u, err := cleanURL(tt.url)
		if err != nil {
			t.Fatal(err)
		}
		r := newUpgrade(u, nil, "key")
		if got := r.Header.Get("Origin"); r.Host != tt.host || got != tt.origin {
			t.Errorf("%s: got Host %s and Origin %s, want %s and %s", tt.url, r.Host, got, tt.host, tt.origin)
		}
	}
}

// TestRedirect: which redirects are followed; of others it is told where they lead.
func TestRedirect(t *testing.T) {
	t.Parallel()
	secret := destinationRule{Token: "s3cr3t-token"}
	for _, tt := range []struct {
		name     string
		rule     destinationRule
		url      string
		status   int
		location string
		want     string // the host that the websocket is at, or what the error has
		portal   bool
	}{
		{"another path", destinationRule{}, "ws://relay/a", 302, "/b", "relay:80/b", false},
		{"another host", destinationRule{}, "ws://relay/a", 301, "ws://other/b", "other:80/b", false},
		{"of HTTP", destinationRule{}, "ws://relay/a", 307, "http://other:81/b", "other:81/b", false},
		{"three", destinationRule{}, "ws://relay/3", 308, "COUNT", "relay:80/0", false},
		{"four", destinationRule{}, "ws://relay/4", 308, "COUNT", "after 3 others", false},
		{"303", destinationRule{}, "ws://relay/a", 303, "/b", `answered "303 See Other"`, false},
		{"with a token on the same host", secret, "ws://relay/a", 302, "/b", "relay:80/b", false},
		{"with a token to another host", secret, "ws://relay/a", 302, "ws://other/b?code=1", "a redirect to ws://other/b (not followed: the secrets of the rule are for another host)", true},
		{"with a token to another port", secret, "ws://relay/a", 302, "ws://relay:81/b", "for another host", false},
		{"with headers to another host", destinationRule{Headers: "X-Key: s3cr3t\n"}, "ws://relay/a", 302, "ws://other/b", "for another host", true},
		{"with a user to another host", destinationRule{}, "ws://me:s3cr3t@relay/a", 302, "ws://other/b", "for another host", true},
		{"to this machine", destinationRule{}, "ws://relay/a", 302, "ws://127.0.0.1/b", "an address of this network", true},
		{"to localhost", destinationRule{}, "ws://relay/a", 302, "ws://localhost/b", "an address of this network", true},
		{"to a private address", destinationRule{}, "ws://relay/a", 302, "http://10.1.2.3/login", "an address of this network", true},
		{"to a link-local address", destinationRule{}, "ws://relay/a", 302, "http://[fe80::1]/login", "an address of this network", true},
		{"to a mapped address", destinationRule{}, "ws://relay/a", 302, "http://[::ffff:192.168.0.1]/login", "an address of this network", true},
		{"with a user", destinationRule{}, "ws://relay/a", 302, "ws://a:s3cr3t@other/b", "redirect to … (not the URL of a relay)", false},
		{"to something else", destinationRule{}, "ws://relay/a", 302, "ftp://other/b", "not the URL of a relay", true},
		{"to a login page", destinationRule{}, "ws://relay/a", 302, "http://portal/login", `answered "200 OK"`, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var at atomic.Value
				l := newLab(t, func(_ int64, host string, conn net.Conn) {
					br := bufio.NewReader(conn)
					r, err := http.ReadRequest(br)
					if err != nil {
						return
					}
					location := tt.location
					switch n := r.URL.Path[1] - '0'; {
					case host == "portal:80":
						io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nlogin")
						return
					case location == "COUNT" && n > 0:
						location = fmt.Sprintf("/%d", n-1)
					case r.URL.Path != "/a":
						at.Store(host + r.URL.Path)
						upgradeTo(conn, r)
						if _, _, err := readFrame(br); err == nil {
							conn.Write(frame(0x81, `{"authorised":true}`))
						}
						io.Copy(io.Discard, conn)
						return
					}
					fmt.Fprintf(conn, "HTTP/1.1 %d %s\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n", tt.status, http.StatusText(tt.status), location)
				})
				defer l.close()
				tt.rule.Destination = tt.url
				up := newUplink(tt.rule, l.dialer, discardLog)
				conn, _, err := up.dialer.open(t.Context(), up.target())
				got := fmt.Sprint(at.Load())
				if err != nil {
					got = err.Error()
				} else {
					conn.Close()
				}
				if !strings.Contains(got, tt.want) || strings.Contains(got, "s3cr3t") || strings.Contains(got, "code=") {
					t.Errorf("got %s, want %s", got, tt.want)
				}
				if err != nil {
					if portal := strings.Contains(advise(err, up.url), "captive portal"); portal != tt.portal {
						t.Errorf("got the advice %q, want a captive portal: %t", advise(err, up.url), tt.portal)
					}
				}
			})
		})
	}
}

// TestRedirectTLS: from TLS no redirect leads into the clear, whatever it is.
func TestRedirectTLS(t *testing.T) {
	u, _ := cleanURL("wss://relay/a")
	for _, location := range []string{"ws://relay/b", "http://relay/b", "ws://relay:443/a"} {
		to, err := redirect(u, statusError{status: 302, location: location}, 0, false)
		if err == nil || !strings.Contains(err.Error(), "it leaves TLS") {
			t.Errorf("%s: got %v, %v", location, to, err)
		}
	}
	access, _ := cleanURL("https://relay/a")
	if to, err := redirect(access, statusError{status: 308, location: "http://relay:443/b"}, 0, true); err == nil || !strings.Contains(err.Error(), "it leaves TLS") {
		t.Errorf("from https: got %v, %v", to, err)
	}
	if to, err := redirect(u, statusError{status: 302, location: "https://relay/b"}, 0, false); err != nil || to.String() != "wss://relay/b" {
		t.Errorf("got %v, %v", to, err)
	}
}

// TestRedirectFromLocal: a relay of this network may redirect within it.
func TestRedirectFromLocal(t *testing.T) {
	other := listenLoopback(t)
	serveEach(t, other, good)
	first := listenLoopback(t)
	serveEach(t, first, reply("HTTP/1.1 302 Found\r\nLocation: ws://"+other.Addr().String()+"/b\r\nContent-Length: 0\r\n\r\n"))
	u, _ := cleanURL("ws://" + first.Addr().String() + "/a")
	conn, _, err := newDialer().open(t.Context(), target{url: u, header: make(http.Header)})
	if err != nil || conn.RemoteAddr().String() != other.Addr().String() {
		t.Fatalf("got %v, want a connection to %v", err, other.Addr())
	}
	conn.Close()
}

func TestIsLocal(t *testing.T) {
	for addr, want := range map[string]bool{
		"127.0.0.1": true, "127.9.9.9": true, "::1": true, "::ffff:127.0.0.1": true, "10.0.0.1": true, "172.16.0.1": true, "192.168.1.1": true,
		"169.254.1.1": true, "fe80::1": true, "fe80::1%eth0": true, "fd00::1": true, "0.0.0.0": true, "::": true, "224.0.0.1": true, "100.64.0.1": true,
		"192.0.2.1": false, "2001:db8::1": false, "172.32.0.1": false, "::ffff:8.8.8.8": false,
	} {
		if got := isLocal(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s: got %t, want %t", addr, got, want)
		}
	}
}

// TestRetryAfter: what an answer may say, and how long the next try waits.
func TestRetryAfter(t *testing.T) {
	date := func(d time.Duration) string { return time.Now().Add(d).UTC().Format(http.TimeFormat) }
	for _, tt := range []struct {
		status      int
		value, date string
		least, most time.Duration
	}{
		{503, "30", "", 30 * time.Second, 36 * time.Second},
		{429, "7", "", 7 * time.Second, 10 * time.Second},
		{502, " 10 ", "", 10 * time.Second, 13 * time.Second},
		{504, "3600", "", maxRetryAfter, maxRetryAfter},
		{503, "99999999999999999999", "", 0, maxReturn},
		{503, date(time.Minute), "", 58 * time.Second, 70 * time.Second},
		{503, "Sat, 01 Jan 2000 00:01:00 GMT", "Sat, 01 Jan 2000 00:00:00 GMT", time.Minute, 70 * time.Second}, // by its own clock
		{503, date(-time.Minute), "", 0, maxReturn},
		{503, "0", "", 0, maxReturn},
		{503, "soon", "", 0, maxReturn},
		{503, "", "", 0, maxReturn},
		{429, "", "", 125 * time.Millisecond, 250 * time.Millisecond},
		{403, "1", "", 9 * time.Second, 11 * time.Second},
	} {
		e := newStatusError(&http.Response{StatusCode: tt.status, Header: http.Header{"Retry-After": {tt.value}, "Date": {tt.date}}}, nil)
		for range 100 {
			if got := new(backoff).next(fmt.Errorf("x: %w", e), false, time.Now()); got < tt.least || got > tt.most {
				t.Fatalf("%d %q: got %v, want %v to %v", tt.status, tt.value, got, tt.least, tt.most)
			}
		}
		if waits := strings.Contains(e.Error(), "asks to wait"); waits != (tt.least > 5*time.Second && tt.status != 403) {
			t.Errorf("%d %q: got the error %v", tt.status, tt.value, e)
		}
	}
}

// FuzzAnswer: whatever answers the handshake, an error is short and printable, and
// no redirect leads to a secret's loss.
func FuzzAnswer(f *testing.F) {
	f.Add("HTTP/1.1 302 Found\r\nLocation: ws://a:b@c/%zz\r\n\r\n")
	f.Add("HTTP/1.1 302 \nLocation:\xff\n\n")
	f.Add("HTTP/1.1 503 x\r\nRetry-After: -1\r\nContent-Type: text/html\r\n\r\n<script>\x00")
	f.Add("HTTP/1.1 103 a\r\n\r\nHTTP/1.1 101 x\r\nUpgrade: websocket\r\n\r\n")
	f.Add("HTTP/1.1 403 \xff\r\nContent-Length: 9\r\n\r\n{\"error\":\"\u202e\"}")
	f.Fuzz(func(t *testing.T, answer string) {
		ours, theirs := net.Pipe()
		go func() {
			http.ReadRequest(bufio.NewReader(theirs))
			io.WriteString(theirs, answer)
			theirs.Close()
		}()
		u, _ := cleanURL("ws://relay/in/x")
		in, err := upgrade(t.Context(), ours, u, nil)
		ours.Close()
		if err == nil {
			t.Fatalf("%q opens a websocket: %v", answer, in)
		}
		if text := err.Error(); len(text) > 1200 || strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r > '~' }) && !errors.As(err, new(briefError)) {
			t.Errorf("got the error %q", text)
		}
		var status statusError
		if errors.As(err, &status) && status.location != "" {
			if to, err := redirect(u, status, 0, true); err == nil && (to.Host != u.Host || to.User != nil) {
				t.Errorf("got %v", to)
			}
		}
	})
}
