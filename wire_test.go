package main

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"
)

// newConnected returns both ends of a connection, of which vw's is the first.
func newConnected(t *testing.T) (client, server net.Conn) {
	t.Helper()
	l := listenLoopback(t)
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	return client, server
}

// newSecured is newConnected on TLS.
func newSecured(t *testing.T) (client, server *tls.Conn) {
	t.Helper()
	certs := newCerts(t)
	conn, accepted := newConnected(t)
	server = tls.Server(accepted, certs.server)
	handshake := make(chan error, 1)
	go func() { handshake <- server.Handshake() }()
	client, err := secure(t.Context(), conn, "127.0.0.1", certs.roots)
	if err = errors.Join(err, <-handshake); err != nil {
		t.Fatal(err)
	}
	return client, server
}

// TestTransport: below TLS no write waits; what the other side does not take is
// kept, in its order, and sent by flush, also after a deadline that ended one.
func TestTransport(t *testing.T) {
	t.Parallel()
	for _, direct := range []bool{true, false} {
		client, server := newSecured(t)
		below := client.NetConn().(*transport)
		var writer *directWriter
		if direct {
			writer = newDirectWriter(newWire(tcpBelow(client)))
		}
		woken := 0
		below.keep(writer, func() { woken++ })
		var sent []byte
		for !below.holds() || len(sent) < 100_000 {
			b := make([]byte, 10_000)
			rand.Read(b)
			if n, err := client.Write(b); n != len(b) || err != nil {
				t.Fatalf("write: got %d, %v", n, err)
			}
			if sent = append(sent, b...); len(sent) > 64<<20 {
				t.Fatal("64 MB are written, and nobody reads")
			}
			if direct && below.holds() {
				break
			}
		}
		if woken == 0 {
			t.Error("bytes are kept, and nobody is woken")
		}
		client.SetWriteDeadline(past)
		if n, err := below.flush(); n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) || !below.holds() {
			t.Errorf("flush after the deadline: got %d, %v", n, err)
		}
		client.SetWriteDeadline(time.Now().Add(5 * time.Second))
		flushed := make(chan error, 1)
		go func() {
			_, err := below.flush()
			flushed <- err
		}()
		got := make([]byte, len(sent))
		if _, err := io.ReadFull(server, got); err != nil || !bytes.Equal(got, sent) {
			t.Errorf("the other side got something else, or %v", err)
		}
		if err := <-flushed; err != nil || below.holds() {
			t.Errorf("flush: got %v, and bytes kept: %v", err, below.holds())
		}
	}
}
