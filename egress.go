// Egress: a destination is a rule at work, which keeps a link to its relay up.

package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"
)

const (
	healthyAfter = 5 * time.Second
	maxReturn    = 400 * time.Millisecond
)

// destination sends a feed or stream to a relay until it is stopped.
type destination struct {
	rule   destinationRule
	url    *url.URL
	mux    *mux
	dial   func(ctx context.Context, network, address string) (net.Conn, error)
	proxy  func(*http.Request) (*url.URL, error)
	roots  *x509.CertPool
	maxLag time.Duration
	log    *slog.Logger

	cancel context.CancelCauseFunc
	quiet  chan struct{} // closed when nothing will be written any more
	live   chan struct{} // closed when a viewer at the relay could begin to watch
	hush   func()        // closes quiet, once
	isLive func()        // closes live, once

	mu     sync.Mutex
	link   *link       // the open connection; nil without
	sub    *subscriber // its queue
	past   counters    // of the connections before it
	status status
}

// start makes d run, in a goroutine of tasks, until ctx is done or stop.
func (d *destination) start(ctx context.Context, tasks *sync.WaitGroup) {
	ctx, d.cancel = context.WithCancelCause(ctx)
	d.quiet, d.live = make(chan struct{}), make(chan struct{})
	d.is("connecting")
	d.hush = sync.OnceFunc(func() { close(d.quiet) })
	d.isLive = sync.OnceFunc(func() { close(d.live) })
	tasks.Go(func() { d.run(ctx) })
}

// stop ends d, and says why. When it returns, nothing more is written to the
// relay (I6). It waits for our own goroutine, never for the relay.
func (d *destination) stop(why error) {
	d.cancel(why)
	<-d.quiet
}

// drain ends d once it has sent what is queued.
func (d *destination) drain() {
	d.mu.Lock()
	s := d.sub
	d.mu.Unlock()
	if s == nil {
		d.cancel(errTakenOver)
		return
	}
	s.drain()
}

// ended tells whether nothing more will be written for d.
func (d *destination) ended() bool {
	select {
	case <-d.quiet:
		return true
	default:
		return false
	}
}

// run sends until ctx is done.
func (d *destination) run(ctx context.Context) {
	defer d.hush()
	d.keepUp(ctx, d.connect)
}

// keepUp keeps a connection to the relay up. The log is told of a failure once,
// until a connection has been healthy.
func (d *destination) keepUp(ctx context.Context, connect func(ctx context.Context, tell bool) (healthy bool, err error)) {
	var b backoff
	told := "" // the last failure that the log was told
	for {
		healthy, err := connect(ctx, told == "")
		if why := context.Cause(ctx); why != nil {
			err = why
		}
		if errors.Is(err, errTakenOver) || ctx.Err() != nil {
			d.log.Info("destination ended", "err", err)
			return
		}
		if healthy {
			told = ""
		}
		wait := b.next(err, healthy)
		if kind := failure(err); kind != told {
			told = kind
			d.log.Warn("no connection, trying again", "err", err)
		}
		d.waits(wait, err)
		d.log.Debug("waiting", "wait", wait, "err", err)
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// connect is one connection: open, then send. healthy tells whether it
// was open for 5 s; the error, never nil, why it ended.
func (d *destination) connect(ctx context.Context, tell bool) (healthy bool, err error) {
	var l *link
	var in *inbox
	var opening sync.WaitGroup
	opening.Go(func() { l, in, err = d.open(ctx) }) // the stack that it grows ends with it
	opening.Wait()
	if err != nil {
		return false, err
	}
	s := l.subscribe(masked, d.maxLag)
	s.whenLive(d.isLive)
	d.mu.Lock()
	d.link, d.sub = l, s
	d.mu.Unlock()
	d.mux.join(d.rule.Stream, s)
	opened := time.Now()
	defer d.opens(tell)()
	err = l.serve(ctx, s, func() error { return discard(in) }, func() {
		if ctx.Err() != nil {
			d.hush()
		}
	})
	d.mux.leave(d.rule.Stream, s)
	d.mu.Lock()
	d.link, d.sub = nil, nil
	d.past.add(s.end())
	d.mu.Unlock()
	return time.Since(opened) >= healthyAfter, lost{err}
}

// opens notes that a connection is open. The log is told now, or when it has
// lasted until then without a call of stop: it may be one that closes at once.
func (d *destination) opens(tell bool) (stop func()) {
	d.is("open")
	if tell {
		d.log.Info("connected")
		return func() {}
	}
	t := time.AfterFunc(healthyAfter, func() { d.log.Info("connected again") })
	return func() { t.Stop() }
}

// is sets the state of d.
func (d *destination) is(state string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.status.is(state)
}

// waits sets the state of d until its next try.
func (d *destination) waits(wait time.Duration, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.status.err, d.status.retryAt = err, time.Now().Add(wait)
	state := "waiting"
	if refused(err) {
		state = "refused"
	}
	d.status.is(state)
}

// count returns the counters of all of d's connections, and how many messages
// are queued in the open one.
func (d *destination) count() (c counters, queued int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c = d.past
	if s := d.sub; s != nil {
		now, n := s.count()
		c.add(now)
		queued = n
	}
	return c, queued
}

func (d *destination) stats(now time.Time) *destinationStats {
	c, queued := d.count()
	d.mu.Lock()
	defer d.mu.Unlock()
	s := &destinationStats{
		ID: d.rule.ID, Stream: d.rule.Stream, Destination: d.shown(),
		State: d.status.state, Since: d.status.since,
		Bytes: c.bytes, Frames: c.frames, Messages: c.delivered, Queued: queued,
		Dropped:    c.drops(),
		Reconnects: max(d.status.opened, 1) - 1,
	}
	if d.link != nil {
		s.QueueAge = d.sub.age(now).Seconds()
		s.RoundTrip = time.Duration(d.link.roundTrip.Load()).Seconds()
	}
	if at := d.status.retryAt; s.State == "waiting" || s.State == "refused" {
		s.RetryAt = &at
	}
	if d.status.err != nil {
		s.Error = d.status.err.Error()
	}
	return s
}

// shown is the URL of d without what may be secret.
func (d *destination) shown() string {
	return d.url.Scheme + "://" + d.url.Host + d.url.EscapedPath()
}

// status is how a destination is. Guarded by destination.mu.
type status struct {
	state   string
	since   time.Time
	retryAt time.Time // while it waits
	err     error     // why the last connection ended, or there was none
	opened  uint64    // connections
}

func (s *status) is(state string) {
	if s.state != state {
		s.state, s.since = state, time.Now()
	}
	if state == "open" {
		s.opened++
	}
}

type destinationStats struct {
	ID          id         `json:"id"`
	Stream      string     `json:"stream"`
	Destination string     `json:"destination"` // without what may be secret
	State       string     `json:"state"`       // connecting (the first time), open, waiting, refused
	Since       time.Time  `json:"since"`
	RetryAt     *time.Time `json:"retryAt,omitempty"`
	Error       string     `json:"error,omitempty"` // why the last connection ended, or there was none
	Bytes       uint64     `json:"bytes"`
	Frames      uint64     `json:"frames"`
	Messages    uint64     `json:"messages"`
	Dropped     dropStats  `json:"dropped"` // messages
	Queued      int        `json:"queued"`  // messages
	QueueAge    float64    `json:"queueAge"`
	RoundTrip   float64    `json:"roundTrip"` // of a ping; 0: not known
	Reconnects  uint64     `json:"reconnects"`
}

// lost is why an open connection ended.
type lost struct{ error }

func (e lost) Unwrap() error { return e.error }

// failure is what kind of failure err is, for the log: an open connection can
// be lost, and a relay refuse, in many words.
func failure(err error) string {
	var dns *net.DNSError // it quotes the port of the query
	var status statusError
	switch {
	case errors.As(err, new(lost)):
		return "lost"
	case errors.As(err, &dns):
		return "lookup " + dns.Name
	case errors.As(err, &status):
		return strconv.Itoa(status.code)
	case errors.As(err, new(tokenRefused)):
		return "token"
	}
	return err.Error()
}

// backoff says how long to wait after a failure. The zero value is ready.
type backoff struct {
	b time.Duration // of the next wait after a lost connection
}

// next draws the wait. A relay that can't be reached is on its way back: at
// most 0.4 s, so that with keyframes twice a second there is video within 1 s
// of its return. One that refuses will not mend by itself. Everything else
// doubles, from 0.25 s to 10 s, until a connection was healthy.
func (b *backoff) next(err error, healthy bool) time.Duration {
	var dial unreachable
	var status statusError
	switch {
	case errors.As(err, &dial), errors.As(err, &status) && 502 <= status.code && status.code <= 504:
		return rand.N(maxReturn)
	case refused(err):
		return 9*time.Second + rand.N(2*time.Second)
	}
	if healthy || b.b == 0 {
		b.b = 250 * time.Millisecond
	}
	wait := b.b/2 + rand.N(b.b/2)
	b.b = min(2*b.b, 10*time.Second)
	return wait
}

// refused tells whether err will not mend by itself.
func refused(err error) bool {
	var status statusError
	if errors.As(err, &status) {
		return status.code == 401 || status.code == 403 || status.code == 404 || status.code == 407
	}
	return errors.As(err, new(*tls.CertificateVerificationError)) || errors.As(err, new(tokenRefused))
}

// running is a destination, and those that it is taking over from.
type running struct {
	*destination
	old []*destination
}

// end makes the destination and those before it end, without waiting for them.
func (d *running) end(why error) {
	d.cancel(why)
	for _, old := range d.old {
		old.cancel(why)
	}
}

// stop ends the destination and those before it (I6).
func (d *running) stop(why error) {
	d.end(why)
	d.destination.stop(why)
	for _, old := range d.old {
		old.stop(why)
	}
}

// handOver ends old when its successor could be watched, and at the latest
// after 2 s; what was queued for old by then is sent.
func handOver(old, next *destination) {
	late := time.NewTimer(maxTakeOver)
	defer late.Stop()
	select {
	case <-next.live:
		old.drain()
		select {
		case <-old.quiet:
		case <-late.C:
		}
	case <-old.quiet:
	case <-late.C:
	}
	old.stop(errChanged)
}
