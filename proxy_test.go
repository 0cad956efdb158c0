package main

import (
	"fmt"
	"io"
	"net"
	"net/url"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestCheckProxies(t *testing.T) {
	for _, tt := range []struct{ variable, want string }{ // want: in the error; "": none
		{"HTTPS_PROXY=http://proxy:3128", ""},
		{"https_proxy=https://user:pass@proxy", ""},
		{"HTTP_PROXY=proxy:3128", ""},
		{"HTTP_PROXY=proxy", ""},
		{"http_proxy=socks5://user:p%40ss@192.0.2.1:1080", ""},
		{"HTTPS_PROXY=socks5h://[2001:db8::1]:1080", ""},
		{"HTTPS_PROXY=", ""},
		{"NO_PROXY=%%%", ""},
		{"FTP_PROXY=%%%", ""},
		{"HTTPS_PROXY=http://user:100%sure@proxy:3128", `HTTPS_PROXY="…": it must be a URL`},
		{"HTTP_PROXY=http://proxy:port", `HTTP_PROXY="http://proxy:port": it must be`},
		{"http_proxy=http://", `http_proxy="http://": it must be`},
		{"https_proxy=ftp://proxy", `https_proxy="ftp://proxy": it must be`},
		{"HTTPS_PROXY=http://proxy:0", `it must be`},
		{"HTTP_PROXY=a b", `it must be`},
	} {
		err := checkProxies([]string{"PATH=/bin", tt.variable})
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: got %v, want %q", tt.variable, err, tt.want)
		}
		if err != nil && strings.Contains(err.Error(), "sure") {
			t.Errorf("%s: got %v, with a password in it", tt.variable, err)
		}
	}
}

// serveSOCKS is a SOCKS5 proxy for lab:s3cr:t that answers reply, and connects if
// that is 0. RFC 1928, RFC 1929
func serveSOCKS(t *testing.T, reply byte, asked *atomic.Value) func(net.Conn) {
	return func(conn net.Conn) {
		b := make([]byte, 512)
		if _, err := io.ReadFull(conn, b[:2]); err != nil || b[0] != 5 {
			return
		}
		io.ReadFull(conn, b[:b[1]])
		conn.Write([]byte{5, 2})
		io.ReadFull(conn, b[:2])
		n := b[1]
		io.ReadFull(conn, b[:n+1])
		user, m := string(b[:n]), b[n]
		io.ReadFull(conn, b[:m])
		if user+":"+string(b[:m]) != "lab:s3cr:t" {
			conn.Write([]byte{1, 1})
			return
		}
		conn.Write([]byte{1, 0})
		io.ReadFull(conn, b[:4])
		var host string
		switch b[3] {
		case 1:
			io.ReadFull(conn, b[:4])
			host = net.IP(b[:4]).String()
		case 3:
			io.ReadFull(conn, b[:1])
			n := b[0]
			io.ReadFull(conn, b[:n])
			host = string(b[:n])
		}
		io.ReadFull(conn, b[:2])
		port := int(b[0])<<8 | int(b[1])
		asked.Store(fmt.Sprintf("%s:%d", host, port))
		conn.Write([]byte{5, reply, 0, 1, 0, 0, 0, 0, 0, 0})
		if reply != 0 {
			return
		}
		relay, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			t.Error(err)
			return
		}
		var back sync.WaitGroup
		back.Go(func() { io.Copy(conn, relay); conn.Close() })
		io.Copy(relay, conn)
		relay.Close()
		back.Wait()
	}
}

// TestSOCKS: video goes through a SOCKS5 proxy, which is told the relay's name;
// and what it may answer else.
func TestSOCKS(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, scheme, user string
		reply              byte
		want               string // in the error; "": video
		refused            bool   // it will not mend by itself
	}{
		{"good", "socks5", "lab:s3cr%3At@", 0, "", false},
		{"good by the other name", "socks5h", "lab:s3cr%3At@", 0, "", false},
		{"wrong password", "socks5", "lab:s3cret@", 0, "authentication failed", true},
		{"not allowed", "socks5", "lab:s3cr%3At@", 2, "connection not allowed by ruleset", true},
		{"unreachable", "socks5", "lab:s3cr%3At@", 4, "host unreachable", false},
		{"refused", "socks5", "lab:s3cr%3At@", 5, "connection refused", false},
		{"failure", "socks5", "lab:s3cr%3At@", 1, "general SOCKS server failure", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var asked atomic.Value
			var messages atomic.Int64
			p, relay := listenLoopback(t), listenLoopback(t)
			serveEach(t, p, serveSOCKS(t, tt.reply, &asked))
			serveEach(t, relay, func(conn net.Conn) { serveRelay(conn, func([]byte) { messages.Add(1) }) })
			var log logBuffer
			r, ctx, tasks := realRules(t, &log)
			r.dialer.proxy = proxyAt(t, tt.scheme+"://"+tt.user+p.Addr().String())
			tasks.Go(func() { load(ctx, r, "video0") })
			port := relay.Addr().(*net.TCPAddr).Port
			r.to(t, "0", "video0", fmt.Sprintf("ws://relay.invalid:%d", port))
			if tt.want == "" {
				waitFor(t, "video", func() bool { return messages.Load() > 20 })
			} else {
				waitFor(t, "an error", func() bool { return strings.Contains(log.String(), tt.want) })
				state := "waiting"
				if tt.refused {
					state = "refused"
				}
				if got := r.destinations["0"].stats(time.Now()); tt.refused && got.State != state {
					t.Errorf("got %s, want %s: %s", got.State, state, got.Error)
				}
			}
			if got := fmt.Sprint(asked.Load()); tt.user == "lab:s3cr%3At@" && got != fmt.Sprintf("relay.invalid:%d", port) {
				t.Errorf("the proxy was asked for %s", got)
			}
			if strings.Contains(log.String(), "s3cr") {
				t.Errorf("got the log\n%swant no password in it", log.String())
			}
		})
	}
}

// TestE2ESOCKS: the same through a proxy that is not ours.
func TestE2ESOCKS(t *testing.T) {
	microsocks := needs(t, "microsocks")
	t.Parallel()
	if !inNamespace(t) {
		return
	}
	start(t, "microsocks", exec.Command(microsocks, "-i", "192.0.2.1", "-p", "1080", "-u", "lab", "-P", "secret"))
	eventually(t, startupTime, func() error {
		conn, err := net.Dial("tcp", "192.0.2.1:1080")
		if err == nil {
			conn.Close()
		}
		return err
	})
	r := startRelay(t, "192.0.2.1:0")
	for _, scheme := range []string{"socks5", "socks5h"} {
		v := startVW(t, "HTTP_PROXY="+scheme+"://lab:secret@192.0.2.1:1080")
		v.send(t, "0", "video0", "ws://"+r.addr)
	}
	v := startVW(t, "HTTP_PROXY=socks5://lab:wrong@192.0.2.1:1080")
	v.call(t, 200, "POST", "/api/destinations", `{"id":"0","stream":"video0","destination":"ws://`+r.addr+`"}`)
	v.expect(t, 0, settleTime, `err="proxy 192\.0\.2\.1:1080: .*authentication`)
	if u, err := url.Parse(v.url); err != nil || strings.Contains(v.out.String(), "wrong") {
		t.Errorf("%v: got the log\n%swant no password in it", u, v.out.String())
	}
}
