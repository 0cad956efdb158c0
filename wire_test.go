package main

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
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

// countedConn counts how often it is asked.
type countedConn struct {
	syscall.RawConn
	asked int
}

func (c *countedConn) Control(f func(fd uintptr)) error {
	c.asked++
	return c.RawConn.Control(f)
}

// TestPaceCalm: a link that takes everything at once is rarely asked, and one that
// does not for each message again.
func TestPaceCalm(t *testing.T) {
	client, server := newConnected(t)
	count := &countedConn{RawConn: newWire(tcpBelow(client)).conn}
	w := wire{count}
	var p pace
	now := time.Now()
	const every = 40 * time.Millisecond
	ask := func(d time.Duration) int {
		before := count.asked
		for end := now.Add(d); now.Before(end); now = now.Add(every) {
			p.look(w, now)
		}
		return count.asked - before
	}
	for i := 0; p.rate == 0 || p.matters(); i++ {
		if i == 1000 {
			t.Fatalf("%.0f bytes a second on loopback", p.rate)
		}
		client.Write(make([]byte, 100_000))
		if _, err := io.ReadFull(server, make([]byte, 100_000)); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "the acknowledgement", func() bool { return w.unacked() == 0 })
		ask(every)
	}
	ask(calmEvery)
	if n, most := ask(10*time.Second), int(10*time.Second/calmEvery+10*time.Second/rateEvery); n > most || n < 10 {
		t.Errorf("asked %d times in 10 s, want 10 to %d", n, most)
	}
	client.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	for err := error(nil); err == nil; {
		_, err = client.Write(make([]byte, 100_000))
	}
	ask(calmEvery)
	if n, least := ask(10*time.Second), int(10*time.Second/every); n < least {
		t.Errorf("asked %d times in 10 s while bytes wait, want at least %d", n, least)
	}
}

// TestAskAllocates: to ask a socket allocates nothing, as it is done for each message.
func TestAskAllocates(t *testing.T) {
	notUnderRace(t)
	client, _ := newConnected(t)
	w := newWire(tcpBelow(client))
	if n := testing.AllocsPerRun(1000, func() { w.unacked(); w.acked() }); n != 0 {
		t.Errorf("got %v allocations", n)
	}
}
