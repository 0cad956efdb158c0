// Egress: a destination is a rule at work. Its uplink keeps a link to the relay
// up; what the rule names is delivered over it. A new URL is opened beside the old
// one, which ends when viewers could watch the new one.

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
)

const (
	healthyAfter = 5 * time.Second
	maxReturn    = 400 * time.Millisecond // of a wait for a relay that was there lately
	maxAway      = 10 * time.Second       // of a wait for one that was not
	lately       = 30 * time.Second
	longAgo      = 10 * time.Minute
	maxTold      = 16 // causes of an episode that the log is told
)

// uplink keeps a link to a relay up: it dials, waits and dials again.
type uplink struct {
	// static after construction
	rule   destinationRule
	url    *url.URL
	dialer dialer
	log    *slog.Logger

	mu     sync.Mutex
	link   *link // the open one; nil: there is none
	status status
}

// newUplink returns an uplink for a rule, which is clean.
func newUplink(rule destinationRule, d dialer, log *slog.Logger) *uplink {
	u, err := url.Parse(rule.Destination)
	if err != nil {
		panic(err) // a rule is clean
	}
	up := &uplink{rule: rule, url: u, dialer: d}
	up.log = log.With("url", up.shown())
	up.status.set("connecting")
	return up
}

// keepUp connects to the relay, lets use have each link until it ends, and does so
// again until ctx is done. The log is told once of each cause, until a connection
// has been healthy.
func (u *uplink) keepUp(ctx context.Context, use func(ctx context.Context, l *link) error) {
	var b backoff
	told := make(map[string]bool) // causes
	for {
		healthy, err := u.connect(ctx, use, len(told) == 0)
		if why := context.Cause(ctx); why != nil {
			err = why
		}
		if errors.Is(err, errTakenOver) || ctx.Err() != nil {
			u.log.Info("destination ended", "err", err)
			return
		}
		if healthy {
			clear(told)
		}
		wait := b.next(err, healthy, time.Now())
		if c := causeOf(err); !told[c] && len(told) < maxTold {
			told[c] = true
			u.log.Warn("no connection, trying again", "err", err)
		}
		u.setWaiting(wait, err)
		u.log.Debug("waiting", "wait", wait, "err", err)
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// connect opens one connection and uses it. healthy reports whether it was open
// for 5 s; the error, never nil, is why it ended. The log is told of the connection
// at once if tell is set, else when it has proved healthy.
func (u *uplink) connect(ctx context.Context, use func(context.Context, *link) error, tell bool) (healthy bool, err error) {
	l, err := u.open(ctx)
	if err != nil {
		return false, err
	}
	defer u.setOpen(l, tell)()
	opened := time.Now()
	err = use(ctx, l)
	return time.Since(opened) >= healthyAfter, lostError{err}
}

// open opens one connection.
func (u *uplink) open(ctx context.Context) (l *link, err error) {
	var opening sync.WaitGroup
	opening.Go(func() { // in a goroutine of its own, so that its large TLS stack is freed: an uplink lives for months
		var conn net.Conn
		var in *inbox
		if conn, in, err = u.dialer.open(ctx, u.target()); err == nil {
			l = newLink(conn, in, u.log)
		}
	})
	opening.Wait()
	return l, err
}

// target returns where u leads, and what it shows there.
func (u *uplink) target() target {
	return target{u.url, u.rule.Token, u.rule.Headers.http(), u.rule.secrets()}
}

// setOpen notes that l is open, until the function that it returns is called.
func (u *uplink) setOpen(l *link, tell bool) (closed func()) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.link = l
	u.status.set("open")
	u.status.opened++
	said := time.AfterFunc(healthyAfter, func() { u.log.Info("connected again") })
	if tell {
		said.Stop()
		u.log.Info("connected")
	}
	return func() {
		said.Stop()
		u.mu.Lock()
		defer u.mu.Unlock()
		u.link = nil
	}
}

// setWaiting notes why there is no connection, and when the next is tried.
func (u *uplink) setWaiting(wait time.Duration, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.status.err, u.status.retryAt = err, time.Now().Add(wait)
	if isRefusal(err) {
		u.status.set("refused")
	} else {
		u.status.set("waiting")
	}
}

// stats returns what there is to say of an uplink on which nothing is sent.
func (u *uplink) stats() *destinationStats {
	u.mu.Lock()
	defer u.mu.Unlock()
	s := &destinationStats{
		ID: u.rule.ID, Stream: u.rule.Stream, Destination: u.shown(),
		State: u.status.state, Since: u.status.since,
		Dropped:    new(counters).drops(),
		Reconnects: max(u.status.opened, 1) - 1,
	}
	if u.link != nil {
		s.RoundTrip = u.link.lastRoundTrip().Seconds()
	}
	if at := u.status.retryAt; s.State == "waiting" || s.State == "refused" {
		s.RetryAt = &at
	}
	if err := u.status.err; err != nil {
		s.Error, s.Advice = err.Error(), advise(err, u.url)
	}
	return s
}

// shown returns the URL without what may be secret.
func (u *uplink) shown() string {
	return u.url.Scheme + "://" + u.url.Host + u.url.EscapedPath()
}

// status is how an uplink is. Guarded by uplink.mu.
type status struct {
	state   string
	since   time.Time
	retryAt time.Time // while it waits
	err     error     // why the last connection ended, or could not be opened
	opened  uint64    // connections
}

func (s *status) set(state string) {
	if s.state != state {
		s.state, s.since = state, time.Now()
	}
}

// destination sends a feed or stream to a relay until it is stopped.
type destination struct {
	*uplink
	mux    *mux
	maxLag time.Duration

	cancel   context.CancelCauseFunc
	quiet    chan struct{} // closed when nothing will be written any more
	live     chan struct{} // closed when a viewer at the relay could begin to watch
	setQuiet func()        // closes quiet, once
	setLive  func()        // closes live, once

	mu   sync.Mutex
	seen bool        // viewers at the relay have seen what came since the keyframe
	sub  *subscriber // the queue of the open connection; nil: there is none
	past counters    // of the connections before it
}

func newDestination(up *uplink, x *mux, maxLag time.Duration) *destination {
	d := &destination{uplink: up, mux: x, maxLag: maxLag, quiet: make(chan struct{}), live: make(chan struct{})}
	d.setQuiet = sync.OnceFunc(func() { close(d.quiet) })
	d.setLive = sync.OnceFunc(func() { close(d.live) })
	return d
}

// start makes d run, in a goroutine of tasks, until ctx is done or stop is called.
func (d *destination) start(ctx context.Context, tasks *sync.WaitGroup) {
	ctx, d.cancel = context.WithCancelCause(ctx)
	tasks.Go(func() {
		defer d.setQuiet()
		d.keepUp(ctx, d.send)
	})
}

// send delivers over one link.
func (d *destination) send(ctx context.Context, l *link) error {
	s := l.subscribe(d.maxLag)
	s.whenLive(d.setLive)
	d.mu.Lock()
	if !d.seen {
		s.wantReplay()
	}
	d.sub, d.seen = s, true
	d.mu.Unlock()
	c, err := l.deliver(ctx, d.mux, d.rule.Stream, s, func() {
		if ctx.Err() != nil {
			d.setQuiet()
		}
	})
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sub = nil
	d.past.add(c)
	return err
}

// stop ends d, and says why. When it returns, nothing more is written to the relay
// (I6). It waits for our own goroutine, never for the relay.
func (d *destination) stop(why error) {
	d.cancel(why)
	<-d.quiet
}

// drain ends d once it has sent what is queued. It does not wait for that.
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

// ended reports whether nothing more will be written for d.
func (d *destination) ended() bool {
	select {
	case <-d.quiet:
		return true
	default:
		return false
	}
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

// stats returns what there is to say of a destination.
func (d *destination) stats(now time.Time) *destinationStats {
	s := d.uplink.stats()
	c, queued := d.count()
	s.Bytes, s.Frames, s.Messages = c.bytes, c.frames, c.delivered
	s.Dropped, s.Queued = c.drops(), queued
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.sub != nil {
		s.QueueAge = d.sub.age(now).Seconds()
	}
	return s
}

// running is the destination of a rule, and those that it takes over from, in the
// order in which they were set.
type running struct {
	*destination
	old []*destination
}

// startBeside makes d run. Those of was end when d could be watched, and at the
// latest 2 s after they were replaced; was may be nil.
func startBeside(ctx context.Context, tasks *sync.WaitGroup, was *running, d *destination) *running {
	is := &running{destination: d}
	if was != nil {
		d.seen = was.url.Host == d.url.Host && was.url.Path == d.url.Path
	}
	d.start(ctx, tasks)
	if was == nil {
		return is
	}
	for _, old := range append(was.old, was.destination) {
		if !old.ended() {
			is.old = append(is.old, old)
		}
	}
	if len(is.old) > maxOld { // the first is what viewers see, the others have not yet taken over
		is.old[1].stop(errChanged)
		is.old = append(is.old[:1:1], is.old[2:]...)
	}
	old := is.old
	tasks.Go(func() { handOver(old, was.destination, d) })
	return is
}

// handOver ends all of old when next could be watched: what is queued for them by
// then is sent. The one that next replaces ends after 2 s at the latest; those
// before it have been waited for by others.
func handOver(old []*destination, replaced, next *destination) {
	late, cancel := context.WithTimeout(context.Background(), maxTakeOver)
	defer cancel()
	select {
	case <-next.live:
		for _, d := range old {
			d.drain()
		}
	case <-next.quiet:
	case <-late.Done():
	}
	select {
	case <-replaced.quiet:
	case <-late.Done():
	}
	replaced.stop(errChanged)
}

// end makes the destination and those before it end, without waiting for them. The
// channels are closed when nothing more is written for them.
func (d *running) end(why error) (ended []<-chan struct{}) {
	d.cancel(why)
	ended = append(ended, d.quiet)
	for _, old := range d.old {
		old.cancel(why)
		ended = append(ended, old.quiet)
	}
	return ended
}

// stop ends the destination and those before it (I6).
func (d *running) stop(why error) {
	d.end(why)
	d.destination.stop(why)
	for _, old := range d.old {
		old.stop(why)
	}
}

type destinationStats struct {
	ID          id         `json:"id"`
	Stream      string     `json:"stream"`
	Destination string     `json:"destination"` // without what may be secret
	State       string     `json:"state"`       // connecting (the first time), open, waiting, refused
	Since       time.Time  `json:"since"`
	RetryAt     *time.Time `json:"retryAt,omitempty"`
	Problem     string     `json:"problem,omitempty"` // why there is nothing to send
	Error       string     `json:"error,omitempty"`   // why the last connection ended, or could not be opened
	Advice      string     `json:"advice,omitempty"`  // what to do about the error
	Bytes       uint64     `json:"bytes"`
	Frames      uint64     `json:"frames"`
	Messages    uint64     `json:"messages"`
	Dropped     dropStats  `json:"dropped"` // messages
	Queued      int        `json:"queued"`  // messages
	QueueAge    float64    `json:"queueAge"`
	RoundTrip   float64    `json:"roundTrip"` // of a ping; 0: not known
	Reconnects  uint64     `json:"reconnects"`
}

// lostError is why an open connection ended.
type lostError struct{ error }

func (e lostError) Unwrap() error { return e.error }

// causeOf names the kind of a failure, for the log: an open connection can be lost,
// and a relay refuse, in many words, and times, ports and addresses in an error's
// text do not make it another one.
func causeOf(err error) string {
	var status statusError
	var closed closeError
	switch {
	case errors.As(err, new(lostError)):
		return "lost"
	case errors.As(err, &closed):
		return "closed " + strconv.Itoa(closed.status)
	case errors.As(err, &status):
		return strconv.Itoa(status.status)
	case errors.As(err, new(tokenRefusedError)):
		return "token"
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsLetter(r) {
			return -1
		}
		return r
	}, err.Error())
}

// backoff says how long to wait after a failure. The zero value is ready for use.
type backoff struct {
	lost time.Duration // before the next try after a lost connection
	away time.Time     // since when the relay cannot be reached; zero: it could
}

// next draws the wait after err, at now. A relay that cannot be reached may be on
// its way back: with at most 0.4 s, and keyframes twice a second, there is video
// within 1 s of its return. One that stays away is tried less and less often.
// One that refuses will not mend by itself. Everything else doubles, from 0.25 s to
// 10 s, until a connection was healthy.
func (b *backoff) next(err error, healthy bool, now time.Time) time.Duration {
	var status statusError
	errors.As(err, &status)
	switch {
	case status.retryAfter > 0:
		return min(status.retryAfter+rand.N(status.retryAfter/8+time.Second), maxRetryAfter)
	case errors.As(err, new(unreachableError)), isAway(status.status):
		if b.away.IsZero() {
			b.away = now
		}
		return rand.N(maxWait(now.Sub(b.away)))
	}
	b.away = time.Time{}
	if isRefusal(err) {
		return 9*time.Second + rand.N(2*time.Second)
	}
	if healthy || b.lost == 0 {
		b.lost = 250 * time.Millisecond
	}
	wait := b.lost/2 + rand.N(b.lost/2)
	b.lost = min(2*b.lost, 10*time.Second)
	return wait
}

// maxWait is the longest wait for a relay that has been away for so long.
func maxWait(away time.Duration) time.Duration {
	share := float64(min(max(away, lately), longAgo)-lately) / float64(longAgo-lately)
	return maxReturn + time.Duration(share*float64(maxAway-maxReturn))
}

// isRefusal reports whether err will not mend by itself.
func isRefusal(err error) bool {
	var status statusError
	var refusal refusalError
	code := 0
	switch {
	case errors.As(err, &status):
		code = status.status
	case errors.As(err, &refusal):
		code = refusal.status
	}
	return code == 401 || code == 403 || code == 404 || code == 407 ||
		errors.As(err, new(*tls.CertificateVerificationError)) || errors.As(err, new(tokenRefusedError))
}
