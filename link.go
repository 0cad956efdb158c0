// A link: one connection to one reader, and its only writer (I4).
//
// One goroutine owns a connection's writes, the send loop, and one its reads;
// what the reader answers is queued for the send loop.

package main

import (
	"bytes"
	"context"
	crand "crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	pingEvery = 2 * time.Second
	// A relay that stalls for 4 s just before it answers a ping is silent for
	// 6 s and lives on; one that has vanished is noticed within 7 s.
	maxSilence   = 6500 * time.Millisecond
	maxStall     = 5 * time.Second // without progress of a write
	stallStep    = time.Second     // how often progress is looked at
	closeTimeout = 100 * time.Millisecond
	maxTakeOver  = 2 * time.Second

	maxRead   = 4 << 10  // bytes from a relay in a millisecond
	maxBatch  = 64 << 10 // bytes in one writev
	maxRecord = 16 << 10 // bytes in one TLS record. RFC 8446 5.1
)

// Why a link ends, other than by its network.
var (
	errRemoved    = errors.New("rule removed")
	errChanged    = errors.New("rule changed")
	errTakenOver  = errors.New("taken over by the new URL")
	errPeerClosed = errors.New("closed by the other side")
	errShutdown   = errors.New("vw is shutting down") // ends everything that runs
)

// link is a connection to one reader. Only its send loop writes.
type link struct {
	net.Conn // a *tls.Conn for wss, a *response for GET /ts

	// static after construction
	log     *slog.Logger
	tcp     *net.TCPConn // below Conn; nil when there is none
	masks   bool         // we are the client. RFC 6455 5.3
	batch   int          // bytes in a write
	resumes bool         // a write that a deadline ends can go on: TCP, but not TLS
	pings   time.Duration
	silence time.Duration // most between two reads; 0: any

	// owned by the goroutine that does the handshake, static after it
	opening bool
	answer  []byte // of the relay
	budget  int    // bytes that the answer may still have

	control chan []byte // frames that go between two messages
	wake    func()      // makes the send loop look at them

	read int // bytes since the last sleep. Owned by the goroutine that reads

	ping      atomic.Pointer[sentPing] // that waits for its pong; nil: none
	roundTrip atomic.Int64             // nanoseconds that the last one took; 0: not known

	// owned by the send loop
	iov     [][]byte
	vec     net.Buffers
	buf     []byte    // one TLS record
	armed   time.Time // when the write deadline was set; zero: it must be set again
	stalled time.Time // since when no write made progress; zero: the last did
	torn    bool      // a control frame is begun and not whole
}

// sentPing is a ping on its way.
type sentPing struct {
	at      time.Time
	payload [8]byte
}

func newLink(conn net.Conn, log *slog.Logger) *link {
	tcp, _ := conn.(*net.TCPConn)
	l := &link{
		Conn: conn, tcp: tcp, log: log, batch: maxBatch, resumes: true, pings: pingEvery,
		control: make(chan []byte, 16),
	}
	if secure, ok := conn.(*tls.Conn); ok { // to a proxy
		l.tcp, _ = secure.NetConn().(*net.TCPConn)
		l.cannotResume()
	}
	return l
}

// cannotResume: the connection is lost when a deadline ends a write.
func (l *link) cannotResume() {
	l.batch, l.resumes = maxRecord, false
}

// subscribe returns a queue for what l is to send.
func (l *link) subscribe(f form, maxAge time.Duration) *subscriber {
	var interrupt func()
	if l.resumes {
		interrupt = func() { l.SetWriteDeadline(past) }
	}
	s := newSubscriber(f, maxAge, interrupt)
	l.wake = s.wake
	return s
}

// Read reads for x/net while it does the handshake, and then for an inbox.
func (l *link) Read(p []byte) (int, error) {
	if !l.opening {
		if l.silence > 0 {
			l.SetReadDeadline(time.Now().Add(l.silence))
		}
		n, err := l.Conn.Read(p)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = fmt.Errorf("nothing read for %v", l.silence)
		}
		if l.read += n; l.masks && l.read >= maxRead {
			l.read = 0
			time.Sleep(time.Millisecond) // a relay that says so much is not worth a processor
		}
		return n, plain(err)
	}
	if l.budget == 0 {
		return 0, fmt.Errorf("the answer is longer than %d bytes", maxHandshake)
	}
	n, err := l.Conn.Read(p[:min(len(p), l.budget)])
	l.budget -= n
	l.answer = append(l.answer, p[:n]...)
	return n, err
}

// reply leaves a control frame to the send loop, or writes it where there is
// none yet. When too many wait it is dropped: who sends pings by the thousand
// may miss a pong.
func (l *link) reply(opcode byte, payload []byte) {
	if len(l.control) == cap(l.control) {
		return
	}
	frame := appendFrame(nil, opcode, payload, l.masks)
	if l.opening {
		l.Conn.Write(frame)
		return
	}
	select {
	case l.control <- frame:
		l.wake()
	default:
	}
}

// serve runs an open websocket until ctx is done or one of its sides ends:
// read in a goroutine of its own, which must return when the connection
// closes, and the send loop in this one. It calls quiet when nothing of the
// media will be written any more, closes the connection, and returns why.
func (l *link) serve(ctx context.Context, s *subscriber, read func() error, quiet func()) error {
	removed := ctx.Done()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var reader sync.WaitGroup
	defer reader.Wait()
	gone := make(chan struct{})
	reader.Go(func() {
		defer close(gone)
		err := read()
		if err == nil || err == io.EOF {
			err = errPeerClosed
		}
		cancel(err)
	})
	cancel(l.send(ctx, s))
	why := context.Cause(ctx)
	l.close(why, s, gone, removed, quiet)
	return why
}

// discard reads what a relay or viewer sends, until the connection ends.
func discard(in *inbox) error {
	for {
		if _, err := in.next(); err != nil {
			return err
		}
	}
}

// send writes what s queues, control frames and pings, until ctx is done or a
// write ends the connection; never nil. One channel says that there may be
// something to do: a select over the reasons costs more than the queue.
func (l *link) send(ctx context.Context, s *subscriber) error {
	defer onDone(ctx, func() {
		l.SetWriteDeadline(past)
		s.wake()
	})()
	pinged := time.Now()
	ping := time.AfterFunc(l.pings, s.wake)
	defer ping.Stop()
	for {
		<-s.wakeups()
		now := time.Now()
		var frame []byte // one a turn: who pings us by the thousand does not hold up the media
		if l.pings > 0 && now.Sub(pinged) >= l.pings {
			frame = l.newPing(now)
			pinged = now
			ping.Reset(l.pings)
			s.wake() // there may be others
		} else {
			select {
			case frame = <-l.control:
				s.wake()
			default:
			}
		}
		if frame != nil {
			if err := l.sendControl(ctx, frame); err != nil {
				return err
			}
			now = time.Now() // it may have blocked
		}
		if err := l.sendBatch(ctx, s, now); err != nil {
			return err
		}
	}
}

// newPing returns the frame of a ping that can be told from others, or of the
// one that is waited for.
func (l *link) newPing(now time.Time) []byte {
	p := l.ping.Load()
	if p == nil {
		p = &sentPing{at: now}
		crand.Read(p.payload[:])
		l.ping.Store(p)
	}
	return appendFrame(nil, opPing, p.payload[:], l.masks)
}

// hear takes the payload of a pong.
func (l *link) hear(payload []byte) {
	if p := l.ping.Load(); p != nil && bytes.Equal(payload, p.payload[:]) {
		l.roundTrip.Store(int64(time.Since(p.at)))
		l.ping.CompareAndSwap(p, nil)
	}
}

// sendControl writes one control frame, between two messages.
func (l *link) sendControl(ctx context.Context, frame []byte) error {
	l.SetWriteDeadline(time.Now().Add(maxStall))
	l.armed = time.Time{}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if n, err := l.Conn.Write(frame); err != nil {
		l.torn = n > 0
		return plain(err)
	}
	l.stalled = time.Time{}
	return nil
}

// sendBatch writes what is queued up to one batch, and the rest of a message
// that is begun. I6: it re-arms the deadline if that is due, then looks at ctx
// and at what may be sent, then writes; a deadline set in between is met by
// the write.
func (l *link) sendBatch(ctx context.Context, s *subscriber, start time.Time) error {
	for ; ; start = time.Now() {
		if start.Sub(l.armed) > l.patience()/4 { // each time would cost as much as the queue does
			l.SetWriteDeadline(start.Add(l.patience()))
			l.armed = start
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		l.iov = s.take(l.iov[:0], l.batch, !l.resumes, start)
		if len(l.iov) == 0 {
			if s.drained() {
				return errTakenOver
			}
			return nil
		}
		n, err := l.write()
		p := s.wrote(n)
		if err != nil || p.stopped {
			l.armed = time.Time{}
		}
		if p.lagged > 0 {
			l.log.Warn("the reader was too slow and has caught up", "dropped", p.lagged)
		}
		if err != nil && (!l.resumes || !errors.Is(err, os.ErrDeadlineExceeded)) {
			return plain(err)
		}
		switch {
		case err == nil || n > 0:
			l.stalled = time.Time{}
		case p.stopped:
		case l.stalled.IsZero():
			l.stalled = start
		case time.Since(l.stalled) >= maxStall:
			return fmt.Errorf("write: no progress for %v", maxStall)
		}
		if !p.partial {
			return nil
		}
	}
}

// patience is how long one write may take.
func (l *link) patience() time.Duration {
	if l.resumes {
		return stallStep
	}
	return maxStall * 4 / 3 // of which a quarter may be over
}

// write hands l.iov to the connection: one writev, or one write of a record.
func (l *link) write() (int, error) {
	if len(l.iov) == 1 {
		return l.Conn.Write(l.iov[0])
	}
	if l.resumes {
		l.vec = l.iov
		n, err := l.vec.WriteTo(l.Conn)
		return int(n), err
	}
	l.buf = l.buf[:0]
	for _, b := range l.iov {
		l.buf = append(l.buf, b...)
	}
	return l.Conn.Write(l.buf)
}

// close ends the connection: with a close frame where one can be read soon,
// else so that the kernel sends nothing more.
func (l *link) close(why error, s *subscriber, gone, removed <-chan struct{}, quiet func()) {
	defer l.Conn.Close()
	code := closeCode(why)
	l.SetWriteDeadline(time.Now().Add(closeTimeout))
	torn := l.torn
	if l.iov = s.unfinished(l.iov[:0]); len(l.iov) > 0 {
		torn = torn || code != 1001 || !l.resumes
		if !torn {
			_, err := l.write()
			torn = err != nil
		}
	}
	stuck := code != 1001 && why != errTakenOver && l.tcp != nil && unsent(l.tcp) > 0
	if code == 0 || torn || stuck || l.sendClose(code) != nil {
		if l.tcp != nil {
			l.tcp.SetLinger(0)
			l.tcp.Close()
		}
		quiet()
		return
	}
	quiet()
	wait := closeTimeout
	if why == errTakenOver {
		wait = maxTakeOver // what the kernel holds is on no other connection
	} else {
		removed = nil
	}
	timeout := time.NewTimer(wait)
	defer timeout.Stop()
	select {
	case <-gone:
		return
	case <-removed:
	case <-timeout.C:
	}
	if l.tcp != nil {
		l.tcp.SetLinger(0)
		l.tcp.Close()
	}
}

// sendClose writes a close frame. RFC 6455 5.5.1.
func (l *link) sendClose(code uint16) error {
	_, err := l.Conn.Write(appendFrame(nil, opClose, binary.BigEndian.AppendUint16(nil, code), l.masks))
	return err
}

// past is a deadline that interrupts at once.
var past = time.Unix(1, 0)

// onDone calls f when ctx is done. The function it returns undoes that, or
// waits for f; then f is not running and will not.
func onDone(ctx context.Context, f func()) (release func()) {
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		f()
	})
	return func() {
		if !stop() {
			<-done
		}
	}
}

// plain leaves the addresses out of an error of a connection: what the log is
// told once must read the same the next time.
func plain(err error) error {
	var op *net.OpError
	var call *os.SyscallError
	switch {
	case errors.As(err, &call):
		return call
	case errors.As(err, &op):
		return fmt.Errorf("%s: %w", op.Op, op.Err)
	}
	return err
}
