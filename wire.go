// The wire below a link: what the kernel knows of the bytes that it was given.
//
// What it takes is no sign of life, and not on its way yet: what the other side
// acknowledges is. Where the system does not tell, nothing is known.

package main

import (
	"errors"
	"net"
	"sync"
	"syscall"
	"time"
)

const (
	quietAfter   = pingEvery + lookEvery*2 // without a pong, other signs of life are looked for
	lookEvery    = 250 * time.Millisecond
	pressedLooks = 3        // in a row: not only a keyframe that is on its way
	maxBatch     = 64 << 10 // bytes in one writev
	maxRecord    = 16 << 10 // bytes in one TLS record. RFC 8446 5.1
	maxDirect    = 48 << 10 // bytes that a publisher writes: who has more at once keeps several processors busy

	maxKept = 2 << 20 // bytes below TLS: a message, and what else it may owe

	paceEvery = 20 * time.Millisecond  // for how fast bytes go
	calmEvery = 100 * time.Millisecond // while hardly any waited in the kernel, on a fast link
	rateEvery = time.Second            // for the rate, meanwhile
)

// wire is a TCP connection as the kernel sees it; of the zero value nothing is
// known. Safe for concurrent use.
type wire struct{ conn syscall.RawConn }

func newWire(tcp *net.TCPConn) wire {
	if tcp == nil {
		return wire{}
	}
	conn, err := tcp.SyscallConn()
	if err != nil {
		return wire{}
	}
	return wire{conn}
}

// acked returns how many bytes are acknowledged; ok is false if that is not known.
func (w wire) acked() (n uint64, ok bool) {
	if w.conn == nil {
		return 0, false
	}
	n, _, _, _, ok = tcpInfo(w.conn)
	return n, ok
}

// known reports whether anything is known.
func (w wire) known() bool {
	_, ok := w.acked()
	return ok
}

// unsent returns how many bytes the kernel was not yet able to send.
func (w wire) unsent() int {
	if w.conn == nil {
		return 0
	}
	return unsent(w.conn)
}

// unacked returns how many bytes are not acknowledged, the unsent ones included.
func (w wire) unacked() int {
	if w.conn == nil {
		return 0
	}
	return unacked(w.conn)
}

// directWriter writes to a connection without waiting. One goroutine at a time
// uses it.
type directWriter struct {
	conn  syscall.RawConn
	parts [][]byte
	n     int
	send  func(fd uintptr) // sets n; made once, since a call must allocate nothing
}

// newDirectWriter returns nil where the system cannot do that.
func newDirectWriter(w wire) *directWriter {
	if w.conn == nil || !canSendNow {
		return nil
	}
	d := &directWriter{conn: w.conn}
	d.send = func(fd uintptr) { d.n = sendNow(int(fd), d.parts) }
	return d
}

// write returns how many bytes of parts the kernel took at once, perhaps not of all
// of them. It tells of no error: the next write that waits meets it.
func (d *directWriter) write(parts [][]byte) int {
	d.parts, d.n = parts, 0
	d.conn.Control(d.send)
	d.parts = nil
	return d.n
}

// transport is a connection below TLS. TLS cannot go on after a write that a
// deadline ended, so a transport that keeps never waits in one: what the kernel
// does not take at once it keeps, for flush, which can. Safe for concurrent use:
// TLS writes from the goroutine that reads, too.
type transport struct {
	net.Conn

	mu     sync.Mutex
	keeps  bool
	direct *directWriter // nil: all is kept
	parts  [1][]byte     // for direct
	kept   []byte
	wake   func() // called when something is kept
}

// keep makes t keep from now on, and call wake when it does. Without direct
// everything is kept.
func (t *transport) keep(direct *directWriter, wake func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.keeps, t.direct, t.wake = true, direct, wake
}

// Write is called by TLS, with whole records.
func (t *transport) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.keeps {
		return t.Conn.Write(b)
	}
	n := 0
	if len(t.kept) == 0 && t.direct != nil {
		t.parts[0] = b
		n = t.direct.write(t.parts[:])
		t.parts[0] = nil
	}
	if n < len(b) {
		if len(t.kept) > maxKept {
			return n, errors.New("TLS: too much to answer")
		}
		t.kept = append(t.kept, b[n:]...)
		t.wake()
	}
	return len(b), nil
}

// holds reports whether something is kept; of a nil transport nothing is.
func (t *transport) holds() bool {
	if t == nil {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.kept) > 0
}

// flush writes what is kept, and returns how many bytes of it; a nil transport has
// none. It waits, until the deadline for writes. One goroutine at a time calls it.
func (t *transport) flush() (n int, err error) {
	for t.holds() && err == nil {
		t.mu.Lock()
		b := t.kept
		t.mu.Unlock()
		var done int
		done, err = t.Conn.Write(b) // meanwhile, what TLS writes is kept behind it
		t.mu.Lock()
		t.kept = t.kept[:copy(t.kept, t.kept[done:])]
		t.mu.Unlock()
		n += done
	}
	return n, err
}

// pace estimates how late what is written now will arrive: after all that the
// kernel holds already. The zero value is ready for use.
type pace struct {
	asked  time.Time     // whether bytes wait
	looked time.Time     // at the rate
	calm   bool          // the link is fast, and kept up then
	rate   float64       // bytes a second; 0: not known
	minRTT time.Duration // the shortest way there and back
	mss    int           // bytes in a segment
	delay  time.Duration // of a byte that is written now, beyond the shortest way
}

// look updates the estimate.
func (c *pace) look(w wire, now time.Time) {
	every := paceEvery
	if c.calm {
		every = calmEvery
	}
	if now.Sub(c.asked) >= every {
		c.asked = now
		calm := c.rate > 0 && !c.matters() && c.keepsUp(w)
		if since := now.Sub(c.looked); !calm || !c.calm || since >= rateEvery {
			c.looked = now
			c.lookAtRate(w, since)
		}
		c.calm = calm && !c.matters()
	}
	if c.delay = 0; c.matters() {
		c.delay = max(0, c.time(w.unacked())-c.minRTT)
	}
}

// keepsUp reports whether no more waits than a receiver may leave unacknowledged.
// RFC 5681 4.2
func (c *pace) keepsUp(w wire) bool {
	n := w.unacked()
	return n == 0 || n < 2*c.mss && w.unsent() == 0
}

// matters reports whether the link is so slow that what waits on it makes video
// older.
func (c *pace) matters() bool { return c.time(maxBatch) > paceEvery/2 }

// lookAtRate updates the rate, which was last looked at so long ago.
func (c *pace) lookAtRate(w wire, since time.Duration) {
	if w.conn == nil {
		return
	}
	_, minRTT, rate, mss, ok := tcpInfo(w.conn)
	if !ok || rate == 0 {
		return
	}
	c.minRTT, c.mss = minRTT, mss
	// What a queue took in a burst is no rate: it may fall at once, and rises slowly.
	share := min(float64(since)/float64(2*paceEvery), 1)
	if float64(rate) > c.rate && c.rate > 0 {
		share /= 4
	}
	c.rate += (float64(rate) - c.rate) * share
}

// time returns how long so many bytes take.
func (c *pace) time(bytes int) time.Duration {
	if c.rate == 0 {
		return 0
	}
	return time.Duration(float64(bytes) / c.rate * float64(time.Second))
}

// lateness returns how much older than it is a message of size bytes has to be
// taken for, if it is written now and may be maxAge old. What arrives is then less
// than twice that old, or as old as the message takes and half of maxAge.
func (c *pace) lateness(size int, maxAge time.Duration) time.Duration {
	return c.delay + min(max(c.time(size)-maxAge*3/4, 0), maxAge*3/5)
}
