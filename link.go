// A link: one connection to one reader, and its only writer (I4).
//
// One goroutine owns a connection's writes, the send loop, and one its reads;
// what the reader answers is queued for the send loop. While that has nothing to
// write and the link is fast, it lets publishers write what comes while nothing is
// queued: still one writer at a time (I4).

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

	maxRead = 4 << 10 // bytes from a relay in a millisecond
)

// Why a link ends, other than by its network.
var (
	errRemoved   = errors.New("rule removed")
	errChanged   = errors.New("rule changed")
	errTakenOver = errors.New("taken over by the new URL")
	errOnlyReads = errors.New("this address sends media and takes none: publish on /in")
	errShutdown  = errors.New("vw is shutting down") // ends everything that runs
)

// link is a connection to one reader. Its send loop writes, and publishers while that lets them.
type link struct {
	net.Conn // a *tls.Conn for wss, a *response for GET /ts

	// static after construction
	log     *slog.Logger
	in      *inbox        // what the other side sends; nil if the link only sends
	out     form          // of the frames that it sends
	tcp     *net.TCPConn  // below Conn; nil if there is none
	below   *transport    // below TLS; nil: none
	plain   bool          // Conn is no TLS, nor HTTP
	resumes bool          // a write that a deadline ends can go on: all but TLS in TLS, and HTTP
	pings   time.Duration // how often the other side, and proxies on the way, get a sign of life; 0: never
	refresh func() bool   // sends what a stream can send without media, or reports false; nil but on GET /ts
	silence time.Duration // the longest time between two reads; 0: any

	control chan []byte // frames that go between two messages
	wake    func()      // makes the send loop look at them

	wire    wire          // below Conn
	direct  *directWriter // for publishers; nil: none
	maxAge  time.Duration // of what is queued
	written atomic.Uint64 // bytes of unfinished messages that the kernel took: progress where the wire tells of none

	// owned by the goroutine that reads
	read    int       // bytes since the last sleep
	alive   time.Time // the last sign of life
	looked  time.Time // when progress was last looked at
	moved   uint64    // what progress was then
	pressed int       // times in a row that the kernel had something unsent then

	ping      atomic.Pointer[sentPing] // that waits for its pong; nil: none
	roundTrip atomic.Int64             // nanoseconds that the last one took; 0: not known

	// owned by the send loop, and, while they may write, by publishers
	iov    [][]byte
	buf    []byte      // one TLS record
	sealed int         // bytes of what was taken that TLS has, and the kernel not all of
	rest   []byte      // of a ping that is begun
	pinged time.Time   // when the last ping was due
	pinger *time.Timer // wakes the send loop when the next one is
	pace   pace

	// owned by the send loop
	sent    time.Time // when media was last written
	vec     net.Buffers
	armed   time.Time // when the write deadline was set; zero: it must be set again
	stalled time.Time // since when no write made progress; zero: the last did
	stuckAt uint64    // progress when it stalled
	torn    bool      // a control frame is begun and not whole
}

// sentPing is a ping on its way.
type sentPing struct {
	at      time.Time
	payload [8]byte
}

// newLink returns a link over conn on which in has read so far; a nil in is for
// a connection that takes packets alone and is not read.
func newLink(conn net.Conn, in *inbox, log *slog.Logger) *link {
	tcp := tcpBelow(conn)
	l := &link{Conn: conn, in: in, out: raw, tcp: tcp, wire: newWire(tcp), log: log, alive: time.Now(), control: make(chan []byte, 16)}
	if in == nil {
		return l
	}
	secured, secure := conn.(*tls.Conn)
	if secure {
		l.below, _ = secured.NetConn().(*transport)
	}
	l.plain, l.resumes = !secure, !secure || l.below != nil
	if l.resumes {
		l.direct = newDirectWriter(l.wire)
	}
	l.pings, l.out = pingEvery, bare
	if in.from == bare { // a server
		l.out, l.silence = masked, maxSilence
	}
	in.source = l
	in.ping = func(payload []byte) { l.reply(opPong, payload) }
	in.pong = l.takePong
	return l
}

// tcpBelow returns the TCP connection that carries conn, or nil.
func tcpBelow(conn net.Conn) *net.TCPConn {
	for {
		switch c := conn.(type) {
		case *net.TCPConn:
			return c
		case *tls.Conn:
			conn = c.NetConn()
		case *transport:
			conn = c.Conn
		default:
			return nil
		}
	}
}

// subscribe returns a queue for what l is to send.
func (l *link) subscribe(maxAge time.Duration) *subscriber {
	var interrupt func()
	if l.plain {
		interrupt = func() { l.SetWriteDeadline(past) }
	}
	l.maxAge = maxAge
	s := newSubscriber(l.out, maxAge, interrupt)
	l.wake = s.wake
	if l.below != nil {
		l.below.keep(l.direct, s.wake)
	}
	return s
}

// deliver sends what the feed or stream called name has, until ctx is done or
// one of the sides ends. What a relay sends is discarded; a viewer may send no media.
// s is the queue of l; it has ended then. quiet is called
// when nothing more will be written; it may be nil. deliver returns why it ended.
func (l *link) deliver(ctx context.Context, x *mux, name string, s *subscriber, quiet func()) (counters, error) {
	x.join(name, s)
	var err error
	if l.in == nil {
		l.pings, l.refresh = pingEvery, func() bool { return x.refresh(name) }
		err = l.send(ctx, s)
	} else {
		read := l.discard
		if l.in.from == masked {
			read = l.refuseMedia
		}
		err = l.serve(ctx, s, read, quiet)
	}
	x.leave(name, s)
	return s.end(), err
}

// Read reads for the inbox. It fails when the other side has shown no sign of life
// for too long.
func (l *link) Read(p []byte) (int, error) {
	for {
		if l.silence > 0 {
			l.SetReadDeadline(l.lookAlive())
		}
		n, err := l.Conn.Read(p)
		if n > 0 {
			l.alive = time.Now()
		}
		if n == 0 && l.silence > 0 && errors.Is(err, os.ErrDeadlineExceeded) {
			if time.Since(l.alive) < l.silence {
				continue
			}
			err = fmt.Errorf("nothing read for %v", l.silence)
		}
		if l.read += n; l.out == masked && l.read >= maxRead {
			l.read = 0
			time.Sleep(time.Millisecond) // a relay that sends this much is not worth a processor
		}
		return n, withoutAddresses(err)
	}
}

// lookAlive takes it for a sign of life that the other side acknowledges what it is
// sent, while there is more than it takes: it may be too slow to come to our pings.
// Where it takes everything at once it must answer them: something on the way may
// take what it does not pass on. It returns when to look again: not while pings are
// answered, since that would wake each link for nothing.
func (l *link) lookAlive() time.Time {
	now := time.Now()
	if next := l.alive.Add(quietAfter); now.Before(next) {
		l.looked = time.Time{}
		return next
	}
	if next := l.looked.Add(lookEvery); now.Before(next) {
		return next
	}
	moved := l.progress()
	if l.looked.IsZero() {
		l.moved, l.pressed = moved, 0
	}
	l.looked = now
	if l.pressed++; l.wire.known() && l.wire.unsent() == 0 {
		l.pressed = 0
	}
	if moved != l.moved {
		l.moved = moved
		if !l.wire.known() || l.pressed >= pressedLooks {
			l.alive = now
		}
	}
	return now.Add(lookEvery)
}

// progress returns a number that changes when the other side takes something.
func (l *link) progress() uint64 {
	if n, ok := l.wire.acked(); ok {
		return n
	}
	return l.written.Load()
}

// reply leaves a control frame to the send loop, or drops it when too many
// wait: who sends pings by the thousand may miss a pong. It does not block.
func (l *link) reply(opcode byte, payload []byte) {
	if len(l.control) == cap(l.control) {
		return
	}
	select {
	case l.control <- appendFrame(nil, opcode, payload, l.out):
		l.wake()
	default:
	}
}

// sendText leaves a text message to the send loop. It blocks while too much
// waits there.
func (l *link) sendText(ctx context.Context, text []byte) error {
	select {
	case l.control <- appendFrame(nil, opText, text, l.out):
		l.wake()
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// serve runs an open websocket until ctx is done or one of its sides ends:
// read in a goroutine of its own, which must return when the connection
// closes or its context is done, and the send loop in this one. It calls quiet,
// if that is not nil, when nothing of the media will be written any more, closes
// the connection, and returns why.
func (l *link) serve(ctx context.Context, s *subscriber, read func(context.Context) error, quiet func()) error {
	removed := ctx.Done()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var reader sync.WaitGroup
	defer reader.Wait()
	gone := make(chan struct{})
	reader.Go(func() {
		defer close(gone)
		err := read(ctx)
		if err == nil || err == io.EOF {
			err = closeError{}
		}
		if l.in != nil {
			err = hide(err, l.in.secret)
		}
		cancel(err)
	})
	cancel(l.send(ctx, s))
	why := context.Cause(ctx)
	l.close(why, s, gone, removed, quiet)
	return why
}

// discard reads what the other side sends, until the connection ends.
func (l *link) discard(context.Context) error {
	for {
		if _, err := l.in.next(); err != nil {
			return err
		}
	}
}

// refuseMedia reads what a viewer sends, until the connection ends or that is media,
// which would go nowhere.
func (l *link) refuseMedia(context.Context) error {
	for {
		opcode, err := l.in.next()
		if err == nil && opcode == opBinary {
			err = errOnlyReads
		}
		if err != nil {
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
	l.pinged = time.Now()
	l.pinger = time.AfterFunc(l.pings, s.wake)
	defer l.pinger.Stop()
	defer s.letWrite(nil)
	var write directWrite
	if l.direct != nil {
		write = l.writeNow
	}
	for {
		<-s.wakeups()
		s.letWrite(nil)
		if len(l.rest) > 0 {
			if err := l.sendControl(ctx, l.rest); err != nil {
				return err
			}
			l.rest = nil
		}
		now := time.Now()
		if l.sealed > 0 || s.isBegun() { // by a publisher: nothing goes into the middle of a message
			if err := l.sendBatch(ctx, s, now); err != nil {
				return err
			}
			now = time.Now()
		}
		var frame []byte // one a turn: who pings us by the thousand does not hold up the media
		if l.pings > 0 && now.Sub(l.pinged) >= l.pings {
			frame = l.signOfLife(now)
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
		s.letWrite(write)
	}
}

// signOfLife returns a ping, or what a reader of GET /ts gets while nothing flows,
// lest a proxy cuts it off; nil if nothing is to be written.
func (l *link) signOfLife(now time.Time) []byte {
	l.pinged = now
	l.pinger.Reset(l.pings)
	switch {
	case l.in != nil:
		return appendFrame(nil, opPing, l.newPing(now), l.out)
	case now.Sub(l.sent) < l.pings/2, l.refresh():
		return nil
	}
	return nullPacket
}

// newPing returns the payload of a ping that can be told from others, or of the
// one that is waited for.
func (l *link) newPing(now time.Time) []byte {
	p := l.ping.Load()
	if p == nil {
		p = &sentPing{at: now}
		crand.Read(p.payload[:])
		l.ping.Store(p)
	}
	return p.payload[:]
}

// takePong takes the payload of a pong.
func (l *link) takePong(payload []byte) {
	if p := l.ping.Load(); p != nil && bytes.Equal(payload, p.payload[:]) {
		l.roundTrip.Store(int64(time.Since(p.at)))
		l.ping.CompareAndSwap(p, nil)
	}
}

// pingOnRequest makes l send no pings but those of measureRoundTrip.
func (l *link) pingOnRequest() { l.pings = 0 }

// measureRoundTrip sends a ping and waits at most 5 s for its pong. ended yields
// why the connection has ended.
func (l *link) measureRoundTrip(ended <-chan error) (time.Duration, error) {
	l.reply(opPing, l.newPing(time.Now()))
	timeout := time.After(maxStall)
	for l.ping.Load() != nil {
		select {
		case err := <-ended:
			return 0, err
		case <-timeout:
			return 0, fmt.Errorf("no answer to a ping within %v", maxStall)
		case <-time.After(time.Millisecond):
		}
	}
	return l.lastRoundTrip(), nil
}

// lastRoundTrip returns how long the last ping and its pong took; 0 if none has.
func (l *link) lastRoundTrip() time.Duration { return time.Duration(l.roundTrip.Load()) }

// sendControl writes one control frame, between two messages.
func (l *link) sendControl(ctx context.Context, frame []byte) error {
	l.SetWriteDeadline(time.Now().Add(maxStall))
	l.armed = time.Time{}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if n, err := l.writeFrame(frame); err != nil {
		l.torn = n > 0
		return withoutAddresses(err)
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
		if l.iov = l.iov[:0]; l.sealed == 0 && !l.below.holds() {
			if s.isReplaying() && s.holdsReplay(l.wire.unacked(), start) {
				time.AfterFunc(replayLook, s.wake)
				return nil
			}
			l.iov = s.take(l.iov, l.batch(), !l.plain, start.Add(l.lateness(s, start)))
			if len(l.iov) == 0 {
				if s.drained() {
					return errTakenOver
				}
				return nil
			}
		}
		n, p, err := l.writeTaken(s)
		if err != nil || p.stopped {
			l.armed = time.Time{}
		}
		if p.lagged > 0 {
			l.log.Warn("the reader was too slow and has caught up", "dropped", p.lagged)
		}
		if err != nil && (!l.resumes || !errors.Is(err, os.ErrDeadlineExceeded)) {
			return withoutAddresses(err)
		}
		switch {
		case err == nil || n > 0:
			l.stalled, l.sent = time.Time{}, start
			if p.partial {
				l.written.Add(uint64(n))
			}
		case p.stopped:
		case l.stalled.IsZero() || l.progress() != l.stuckAt:
			l.stalled, l.stuckAt = start, l.progress()
		case time.Since(l.stalled) >= maxStall:
			return fmt.Errorf("write: no progress for %v", maxStall)
		}
		if !p.partial {
			return nil
		}
	}
}

// writeTaken writes l.iov, or goes on with what TLS has of it, and returns how many
// bytes went. Only what the kernel has counts as written: who waits for a write to
// end does so while some is kept below TLS.
func (l *link) writeTaken(s *subscriber) (n int, p progress, err error) {
	if len(l.iov) > 0 {
		n, err = l.write()
		if l.below == nil || err != nil {
			return n, s.wrote(n), err
		}
		l.sealed = n
	}
	if n, err = l.below.flush(); l.below.holds() {
		return n, progress{partial: true}, err
	}
	n, l.sealed = l.sealed, 0
	return n, s.wrote(n), err
}

// patience is how long one write may take.
func (l *link) patience() time.Duration {
	if l.resumes {
		return stallStep
	}
	return maxStall * 4 / 3 // of which a quarter may be over
}

// lateness returns how much later than now what s holds would arrive, if it were
// written now. It drops what would be too old: what comes next then may be longer.
func (l *link) lateness(s *subscriber, now time.Time) time.Duration {
	if l.isFast(now) {
		return 0
	}
	late := l.pace.delay
	for size := -1; ; {
		next := s.nextSize(now.Add(late))
		if next == size {
			return late
		}
		size, late = next, l.pace.lateness(next, s.maxAge)
	}
}

// isFast reports whether whatever is written next does not take long.
func (l *link) isFast(now time.Time) bool {
	l.pace.look(l.wire, now)
	return l.pace.delay == 0 && l.pace.time(messageLimit) < l.maxAge/2
}

// writeNow writes for a publisher what the connection takes of items at once, and
// returns how many bytes that is; not done if the send loop has to go on with it.
func (l *link) writeNow(items []item, now time.Time) (n int, done bool) {
	size := 0
	for _, it := range items {
		size += it.wireSize(l.out)
	}
	if size > maxDirect || len(l.rest) > 0 || !l.isFast(now) {
		return 0, true
	}
	l.iov = l.iov[:0]
	if l.pings > 0 && now.Sub(l.pinged) >= l.pings*19/20 { // alone it would wake the send loop
		l.rest = l.signOfLife(time.Now())
		l.iov = append(l.iov, l.rest)
	}
	for _, it := range items {
		l.iov = append(l.iov, it.wire(l.out))
	}
	if l.plain {
		n = l.direct.write(l.iov)
	} else {
		n = l.writeRecords(len(l.rest) + size)
	}
	ping := min(n, len(l.rest))
	n, l.rest = n-ping, l.rest[ping:]
	if n > 0 && l.below.holds() {
		l.sealed = n
		return 0, false
	}
	return n, true
}

// writeRecords hands size bytes of l.iov to TLS, as long as it keeps none.
func (l *link) writeRecords(size int) (n int) {
	for n < size && !l.below.holds() {
		took, err := l.Conn.Write(l.record(n))
		if n += took; err != nil {
			break
		}
	}
	return n
}

// record returns what goes into one TLS record: of l.iov, from byte from on.
func (l *link) record(from int) []byte {
	l.buf = l.buf[:0]
	for i, b := range l.iov {
		skip := min(from, len(b))
		from, b = from-skip, b[skip:]
		b = b[:min(len(b), maxRecord-len(l.buf))]
		if len(l.buf) == 0 && (len(b) == maxRecord || i == len(l.iov)-1) {
			return b // as it is
		}
		l.buf = append(l.buf, b...)
	}
	return l.buf
}

// batch returns the most bytes in one write: less where these would take long.
func (l *link) batch() int {
	if !l.plain || l.pace.delay > 0 {
		return maxRecord
	}
	return maxBatch
}

// writeFrame writes a frame, and waits until the kernel has it.
func (l *link) writeFrame(b []byte) (int, error) {
	n, err := l.Conn.Write(b)
	if err == nil {
		_, err = l.below.flush()
	}
	return n, err
}

// write hands l.iov to the connection: one writev, or one write of a record.
func (l *link) write() (int, error) {
	if len(l.iov) == 1 {
		return l.Conn.Write(l.iov[0])
	}
	if l.plain {
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
	ok := l.finish(why, s)
	if !ok {
		l.abort()
	}
	if quiet != nil {
		quiet()
	}
	if !ok {
		return
	}
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
	l.abort()
}

// finish writes the rest of a message that is begun where that is due, then a
// close frame. It reports whether the other side can be expected to read that.
func (l *link) finish(why error, s *subscriber) bool {
	status := closeStatus(why)
	l.SetWriteDeadline(time.Now().Add(closeTimeout))
	torn := l.torn || len(l.rest) > 0 || l.below.holds() && status != 1001
	if l.sealed > 0 {
		s.wrote(l.sealed)
	}
	if l.iov = s.unfinished(l.iov[:0]); len(l.iov) > 0 {
		torn = torn || status != 1001 || !l.resumes
		if !torn {
			_, err := l.write()
			torn = err != nil
		}
	}
	stuck := status != 1001 && why != errTakenOver && l.wire.unsent() > 0
	return status != 0 && !torn && !stuck && l.sendClose(status) == nil
}

// abort closes the connection so that the kernel sends nothing more.
func (l *link) abort() {
	if l.tcp != nil {
		l.tcp.SetLinger(0)
		l.tcp.Close()
	}
}

// sendClose writes a close frame. RFC 6455 5.5.1.
func (l *link) sendClose(status uint16) error {
	_, err := l.writeFrame(appendFrame(nil, opClose, binary.BigEndian.AppendUint16(nil, status), l.out))
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

// withoutAddresses leaves the addresses out of an error of a connection: errors
// must compare equal across attempts, so that the log is told of each once.
func withoutAddresses(err error) error {
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

// closeStatus returns the status of our close frame; 0 for none. RFC 6455 7.4.1.
func closeStatus(why error) uint16 {
	switch {
	case errors.Is(why, errRemoved), errors.Is(why, errChanged), errors.Is(why, errTakenOver), errors.As(why, new(closeError)):
		return 1000
	case errors.Is(why, errShutdown):
		return 1001 // going away
	case errors.Is(why, errProtocol):
		return 1002 // protocol error
	case errors.Is(why, errNotTS):
		return 1003
	case errors.Is(why, errReplaced), errors.Is(why, errOnlyReads):
		return 1008
	}
	return 0
}
