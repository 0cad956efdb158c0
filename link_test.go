package main

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// gathered keeps what is written.
type gathered struct {
	net.Conn
	b []byte
}

func (g *gathered) Write(b []byte) (int, error) {
	g.b = append(g.b, b...)
	return len(b), nil
}

// readConn is a connection that is only read.
type readConn struct {
	net.Conn
	io.Reader
}

func (c readConn) Read(p []byte) (int, error)      { return c.Reader.Read(p) }
func (c readConn) SetReadDeadline(time.Time) error { return nil }

// TestEarly: frames that come with the relay's answer, and with a publisher's
// request. What is no frame is answered with status 1002.
func TestEarly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, func(_ int64, _ string, conn net.Conn) {
			r := bufio.NewReader(conn)
			request, err := http.ReadRequest(r)
			if err != nil {
				t.Error(err)
				return
			}
			answer := &gathered{}
			upgradeTo(answer, request)
			var reading sync.WaitGroup
			defer reading.Wait()
			var media atomic.Int64
			reading.Go(func() { serveOn(conn, r, &media) })
			conn.Write(append(answer.b, frame(0x81, `{"authorised":true}`)...))
		})
		if _, err := l.setDestination(destinationRule{ID: "0", Stream: "video0", Destination: "ws://relay", Token: testToken}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if log := l.log.String(); !strings.Contains(log, "msg=connected") {
			t.Errorf("got the log\n%swant a connection", log)
		}
		l.close()
	})

	h := httptest.NewServer(newTestServer(t, ""))
	defer h.Close()
	conn, err := net.Dial("tcp", h.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	ask := "GET /in/video0 HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nOrigin: http://localhost\r\n\r\n"
	conn.Write(appendFrame([]byte(ask), opPing, []byte("early"), masked))
	r := bufio.NewReader(conn)
	if a, err := http.ReadResponse(r, nil); err != nil || a.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("got %v, %v", a, err)
	}
	got := make([]byte, 7)
	if _, err := io.ReadFull(r, got); err != nil || string(got) != "\x8a\x05early" {
		t.Errorf("got %q, %v, want the pong", got, err)
	}
	conn.Write([]byte("\xc2\x81abcdx"))
	if got, err := io.ReadAll(r); err != nil || string(got) != "\x88\x02\x03\xea" {
		t.Errorf("got %q, %v, want a close frame with status 1002", got, err)
	}
}

// TestMuchRead: what a relay sends is read at 4 MB/s at most.
func TestMuchRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLink(readConn{Reader: bytes.NewReader(make([]byte, 1<<20))}, newInbox(nil, nil, bare, 512), discardLog)
		start := time.Now()
		if n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{l}, make([]byte, 1000)); n != 1<<20 || err != nil {
			t.Errorf("got %d bytes, %v", n, err)
		}
		if d := time.Since(start); d < 200*time.Millisecond || d > 256*time.Millisecond {
			t.Errorf("took %v, want a millisecond for 4 KiB", d)
		}
	})
}
