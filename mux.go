// Feeds and streams: how the messages of publishers reach the queues of readers.
//
// The rules: publishing never blocks, does I/O or logs (I2). Locks are taken
// in the order mux, feed, stream, subscriber, and cover walks and queue
// operations only. A message is immutable once it is published (I1).

package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// How often, and how much, a publisher writes of a chunk itself, at most: for so long it
// holds the locks of its feed and stream, for which a mute waits. More readers have it
// from the goroutines of their links. Other processors share what takes more than a
// millisecond, but not where chunks come so soon after each other that none is idle.
const (
	maxWrites  = 256
	maxWritten = 2560 << 10 // bytes
	writeShare = 64         // writes for each processor
	soon       = 10 * time.Millisecond
)

const maxPublishers = 256 // feeds that are published; each holds up to 2 MiB

// errFull says that vw has as many of something as it can have. Wrapped, it says of
// what.
var errFull = errors.New("limit reached")

// mux holds the feeds and streams that somebody publishes, reads or has a
// rule for. Safe for concurrent use.
type mux struct {
	epoch time.Time // when vw's clock was 0

	mu        sync.Mutex
	muting    muting
	feeds     map[string]*feed
	streams   map[string]*stream
	published int // feeds that have a publisher
}

func newMux() *mux {
	// A DTS may be before the arrival of its frame: the clock starts at 10 s.
	return &mux{epoch: time.Now().Add(-10 * time.Second), feeds: make(map[string]*feed), streams: make(map[string]*stream)}
}

// now returns the time on vw's clock.
func (x *mux) now(at time.Time) ticks { return toTicks(at.Sub(x.epoch)) }

// publish reads r until it ends, and publishes what it carries as the feed of
// that name from its first whole frame on. It returns nil at the proper end, else
// errNotTS, errReplaced, errFull or the error of r.
func (x *mux) publish(name string, p *publisher, r io.Reader) error {
	var f *feed
	full, stop := false, func() {}
	fr := newFramer(func(m *message) {
		if f == nil && m.info.frames == 0 && x.isPublished(name) {
			m.release() // it takes over with a frame
			return
		}
		if f == nil && !full { // it has shown that it is MPEG-TS: now it may take over
			f = x.attach(name, p)
			m.first = true
			if full = f == nil; !full && p.begun != nil {
				p.begun()
			}
		}
		if full {
			m.release()
			return
		}
		if f.publish(p, m, x.now(m.at)) {
			stop()
			stop = x.settleLater(f, p)
		}
	})
	defer func() {
		stop()
		if f != nil {
			x.detach(f, p)
		}
	}()
	for {
		err := fr.read(r)
		if f != nil {
			if news := f.account(p, fr, x.now(fr.at)); news != "" && p.warn != nil {
				p.warn(news)
			}
		}
		switch {
		case p.replaced.Load():
			return errReplaced
		case full:
			return fmt.Errorf("feed %q: %d feeds are published: %w", name, maxPublishers, errFull)
		case err == io.EOF:
			return nil
		case err == errNotTS:
			return fmt.Errorf("%w: no %d packets of 188 bytes that begin with 0x47 in its first %d bytes", errNotTS, lockAfter, min(len(fr.buf), maxHunt))
		case err != nil:
			return err
		}
	}
}

// settleLater makes what waits for the clock of f wait for settleMost at most, and
// for nothing that pub may never send. stop ends that, and waits for its end.
func (x *mux) settleLater(f *feed, pub *publisher) (stop func()) {
	done := make(chan struct{})
	t := time.AfterFunc(settleMost.duration(), func() {
		defer close(done)
		at := time.Now()
		f.settle(pub, at, x.now(at))
	})
	return func() {
		if !t.Stop() {
			<-done
		}
	}
}

// isPublished reports whether a feed has a publisher.
func (x *mux) isPublished(name string) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	f := x.feeds[name]
	if f == nil {
		return false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.pub != nil
}

// attach makes pub the publisher of a feed, and tells the one before it to end.
// It returns nil when maxPublishers other feeds are being published.
func (x *mux) attach(name string, pub *publisher) *feed {
	x.mu.Lock()
	defer x.mu.Unlock()
	if f := x.feeds[name]; x.published == maxPublishers && (f == nil || f.pub == nil) {
		return nil
	}
	f := x.feed(name)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.pub != nil {
		f.pub.replace()
	} else {
		x.published++
	}
	f.pub, pub.since = pub, time.Now()
	f.forgetHeld()
	return f
}

// detach ends pub's publishing.
func (x *mux) detach(f *feed, pub *publisher) {
	x.mu.Lock()
	defer x.mu.Unlock()
	f.mu.Lock()
	if f.pub == pub {
		at := time.Now()
		f.publishHeld(at, x.now(at))
		f.pub, f.figures.left = nil, time.Now()
		x.published--
	}
	f.mu.Unlock()
	x.forgetIdleFeed(f)
}

// join makes s a reader of the feed or stream of that name, which need not
// exist yet.
func (x *mux) join(name string, s *subscriber) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if isStream(name) {
		at := time.Now()
		x.stream(name).join(s, at, x.now(at))
		return
	}
	x.feed(name).join(s)
}

// leave undoes join. Once it returns, nothing is offered to s.
func (x *mux) leave(name string, s *subscriber) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if st := x.streams[name]; st != nil {
		st.leave(s)
		x.forgetIdleStream(st)
	}
	if f := x.feeds[name]; f != nil {
		f.leave(s)
		x.forgetIdleFeed(f)
	}
}

// refresh makes the stream of that name send its program map and a PCR, unless it
// did so a moment ago. It reports whether it has a program map.
func (x *mux) refresh(name string) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	st := x.streams[name]
	at := time.Now()
	return st != nil && st.refresh(at, x.now(at))
}

// setStream makes feeds those of a stream. When the channels it returns are
// closed, no message of a feed that was removed will be begun (I6). Without ruled
// the stream ends with its last reader.
func (x *mux) setStream(name string, feeds []string, ruled bool) (ended []<-chan struct{}) {
	x.mu.Lock()
	defer x.mu.Unlock()
	st := x.stream(name)
	st.ruled = ruled
	old := st.feeds
	st.feeds = nil
	for _, n := range feeds {
		st.feeds = append(st.feeds, x.feed(n))
	}
	var removed []string
	for _, f := range old {
		if !slices.Contains(feeds, f.name) {
			removed = append(removed, f.name)
			f.removeStream(st)
			x.forgetIdleFeed(f)
		}
	}
	st.muted = slices.DeleteFunc(append(st.muted, removed...), func(name string) bool { return slices.Contains(feeds, name) })
	st.muted = st.muted[max(0, len(st.muted)-maxFeeds):]
	at := time.Now()
	ended = st.setFeeds(feeds, removed, at, x.now(at))
	for _, f := range st.feeds {
		if !slices.Contains(old, f) {
			f.addStream(st)
		}
	}
	x.forgetIdleStream(st)
	return ended
}

// setMute makes muted the kinds of tracks that are muted. When the channels it
// returns are closed, no message that holds any of them will be begun (I6).
func (x *mux) setMute(muted kindSet) (ended []<-chan struct{}) {
	x.mu.Lock()
	defer x.mu.Unlock()
	at := time.Now()
	var queued *sift // nil: nothing that is queued is to go
	if x.muting.set(muted, x.now(at)) {
		queued = newSift(x.muting.blocked)
	}
	for _, f := range x.feeds {
		ended = append(ended, f.setMuting(x.muting, queued)...)
	}
	for _, st := range x.streams {
		ended = append(ended, st.setMuting(x.muting, queued, at, x.now(at))...)
	}
	return ended
}

// feed returns the feed of that name, which it makes if it does not exist; mu is
// held.
func (x *mux) feed(name string) *feed {
	f := x.feeds[name]
	if f == nil {
		f = &feed{name: name}
		f.filter.setMuting(x.muting)
		x.feeds[name] = f
	}
	return f
}

// stream returns the stream of that name, which it makes if it does not exist; mu
// is held.
func (x *mux) stream(name string) *stream {
	st := x.streams[name]
	if st == nil {
		st = &stream{name: name}
		st.remux.block(x.muting.blocked)
		x.streams[name] = st
	}
	return st
}

// forgetIdleFeed forgets a feed without publisher, readers and streams; mu is held.
func (x *mux) forgetIdleFeed(f *feed) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if x.feeds[f.name] == f && f.pub == nil && len(f.subs) == 0 && len(f.streams) == 0 {
		delete(x.feeds, f.name)
	}
}

// forgetIdleStream forgets a stream without rule and readers; mu is held.
func (x *mux) forgetIdleStream(st *stream) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if len(st.subs) == 0 && !st.ruled {
		delete(x.streams, st.name)
	}
}

// tryLocks takes each lock on the way of video once, so it does not return while
// one of them is stuck.
func (x *mux) tryLocks() {
	x.mu.Lock()
	defer x.mu.Unlock()
	through := func(mu *sync.Mutex, subs *[]*subscriber) {
		mu.Lock()
		defer mu.Unlock()
		for _, s := range *subs {
			s.drained()
		}
	}
	for _, f := range x.feeds {
		through(&f.mu, &f.subs)
	}
	for _, st := range x.streams {
		through(&st.mu, &st.subs)
	}
}

// stats returns the figures of all feeds, and of all streams that have a rule.
func (x *mux) stats(now time.Time) (map[string]*feedStats, map[string]*streamStats) {
	x.mu.Lock()
	all := slices.Collect(maps.Values(x.feeds))
	streams := make(map[string]*streamStats)
	for name, st := range x.streams {
		if !st.ruled {
			continue
		}
		s := &streamStats{Feeds: []string{}, Present: []string{}, Muted: append([]string{}, st.muted...)}
		for _, f := range st.feeds {
			s.Feeds = append(s.Feeds, f.name)
		}
		bytes, perSecond := st.rates(now)
		s.Bytes, s.BitRate = bytes, 8*perSecond
		streams[name] = s
	}
	x.mu.Unlock()
	feeds := make(map[string]*feedStats)
	for _, f := range all {
		feeds[f.name] = f.stats(now)
	}
	for _, s := range streams {
		for _, f := range s.Feeds {
			if feeds[f].Publisher != nil {
				s.Present = append(s.Present, f)
			}
		}
	}
	return feeds, streams
}

// feed is one publisher's MPEG-TS, and who reads it.
type feed struct {
	name string

	mu        sync.Mutex
	pub       *publisher // nil if nobody publishes
	kinds     kindReader
	filter    muteFilter
	clock     clock
	held      []*message // wait for the clock to be ready, before streams get them
	heldBytes int
	heard     time.Time // when the last chunk arrived
	subs      []*subscriber
	streams   []*stream
	figures   feedFigures
}

// publish hands m, which arrived now, to the readers of f and releases it. It
// drops m if pub is no longer the publisher. It does not block (I2). It reports
// whether m is the first that waits for the clock to be ready.
func (f *feed) publish(pub *publisher, m *message, now ticks) (waits bool) {
	m.feed = f.name
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.pub != pub {
		m.release()
		return false
	}
	f.kinds.note(m)
	m.writes = ownWrites{min(maxWrites, maxWritten/max(m.size, 1)), writeShare}
	if m.at.Sub(f.heard) < soon {
		m.writes.share = maxWrites
	}
	f.heard = m.at
	if !f.filter.used() {
		f.offer(m)
	}
	m.stamps = f.clock.read(m.payload(), m.info.program, m.stamps)
	ready := f.clock.note(m.stamps, now, m.first, m.info.hasVideo)
	f.held = append(f.held, m)
	f.heldBytes += m.size
	if ready || f.heldBytes > messageLimit { // as much as this is no start-up
		f.publishHeld(m.at, now)
		return false
	}
	return len(f.held) == 1
}

// settle publishes what waits for the clock, if pub is still the publisher.
func (f *feed) settle(pub *publisher, at time.Time, now ticks) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.pub == pub {
		f.publishHeld(at, now)
	}
}

// publishHeld hands what was held, if anything was, to the streams, as of now; mu
// is held.
func (f *feed) publishHeld(at time.Time, now ticks) {
	if len(f.held) == 0 {
		return
	}
	anew := f.clock.settle()
	for i, m := range f.held {
		f.clock.place(m.stamps, m.info.key, now-toTicks(at.Sub(m.at)), now)
		if f.filter.used() {
			writes := m.writes
			m = f.filter.apply(m, m.stamps, now)
			f.held[i], m.writes = m, writes
			f.offer(m)
		}
		for _, st := range f.streams {
			st.publish(m, at, now, anew && i == 0)
		}
	}
	f.forgetHeld()
}

// offer hands m to the readers of f that have not had it; mu is held.
func (f *feed) offer(m *message) {
	if m.offered {
		return
	}
	m.offered = true
	if m.size == 0 {
		countMuted(f.subs)
		return
	}
	m.writes = offer(f.subs, m.writes, m)
}

// offer hands messages to readers. To as many of them as w allows it writes itself:
// last, so that other processors write to the others meanwhile. It returns what is left
// of w.
func offer(subs []*subscriber, w ownWrites, messages ...*message) ownWrites {
	own := min(w.left, len(subs))
	for _, s := range subs[own:] {
		s.offer(messages...)
	}
	subs = subs[:own]
	if n := own / max(w.share, 1); n > 1 {
		w.left -= offerTogether(subs, n, slices.Clone(messages)) // else none could stay on the stack
		return w
	}
	for _, s := range subs {
		if s.offerNow(messages...) {
			w.left--
		}
	}
	return w
}

// offerTogether writes to subs on up to so many processors, and returns how often.
func offerTogether(subs []*subscriber, processors int, messages []*message) int {
	var next, tried atomic.Int32
	share := func() {
		for i := next.Add(1); int(i) <= len(subs); i = next.Add(1) {
			if subs[i-1].offerNow(messages...) {
				tried.Add(1)
			}
		}
	}
	var others sync.WaitGroup
	for range min(processors, runtime.GOMAXPROCS(0)) - 1 {
		others.Go(share)
	}
	share()
	others.Wait()
	return int(tried.Load())
}

// countMuted counts a message of which all is muted.
func countMuted(subs []*subscriber) {
	for _, s := range subs {
		s.countMuted()
	}
}

// setMuting makes f obey m, and its readers drop what is queued and muted. The
// channels are closed when no write holds any (I6).
func (f *feed) setMuting(m muting, queued *sift) (ended []<-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.filter.setMuting(m)
	return muteQueued(f.subs, queued)
}

// muteQueued takes what is muted out of the queues of subs.
func muteQueued(subs []*subscriber, queued *sift) (ended []<-chan struct{}) {
	if queued == nil {
		return nil
	}
	for _, s := range subs {
		if w := s.mute(queued); w != nil {
			ended = append(ended, w)
		}
	}
	return ended
}

// forgetHeld releases what was held; mu is held.
func (f *feed) forgetHeld() {
	for _, m := range f.held {
		m.release()
	}
	clear(f.held)
	f.held, f.heldBytes = f.held[:0], 0
}

func (f *feed) join(s *subscriber) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.subs = append(f.subs, s)
}

func (f *feed) leave(s *subscriber) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.subs = slices.DeleteFunc(f.subs, func(o *subscriber) bool { return o == s })
}

// addStream makes st get what f publishes.
func (f *feed) addStream(st *stream) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.streams = append(f.streams, st)
}

// removeStream undoes addStream. Once it returns, f publishes nothing to st.
func (f *feed) removeStream(st *stream) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.streams = slices.DeleteFunc(f.streams, func(o *stream) bool { return o == st })
}

// account adds what the framer of pub has counted since the last call, up to now.
// It returns what the log should say of the feed's clock; mostly "".
func (f *feed) account(pub *publisher, fr *framer, now ticks) (news string) {
	n := fr.counts
	fr.counts = feedCounts{}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.pub != pub {
		return ""
	}
	g := &f.figures
	g.meter.add(g.sample(fr.at))
	g.total.add(n)
	g.tracks, g.video = fr.tracks(), fr.video >= 0
	if fr.health.lacksSets && !g.health.lacksSets {
		g.setless = fr.at
	}
	g.health = fr.health
	if n.keyframes > 0 {
		g.keyframe = fr.at
	}
	if n.continuityErrors+n.damaged+n.resyncs > 0 {
		g.damage = fr.at
	}
	f.figures.counted = now
	return f.clock.news(now)
}

// state returns the state of f in words, and since when it has been that; mu is
// held.
func (f *feed) state(now time.Time) (string, time.Time) {
	g, h := &f.figures, &f.figures.health
	if f.pub == nil {
		return "absent", g.left
	}
	began := func(t time.Time) time.Time { // t, unless that was of an older publisher
		if t.Before(f.pub.since) {
			return f.pub.since
		}
		return t
	}
	switch {
	case h.heard.isSilent(now, f.pub.since):
		return "silent", h.heard.last
	case now.Sub(g.damage) < damagedFor:
		return "damaged", g.damage
	case h.frames.isSilent(now, f.pub.since) && h.program == 0:
		return "no program map", began(h.frames.last)
	case h.frames.isSilent(now, f.pub.since):
		return fmt.Sprintf("program %d is off air", h.program), began(h.frames.last)
	case h.scrambled:
		return "scrambled", f.pub.since
	case g.video && h.pictures.isSilent(now, f.pub.since):
		return "no video", began(h.pictures.last)
	case g.video && h.pictures.last.Sub(began(g.keyframe)) > keylessFor:
		return "no keyframe", began(g.keyframe)
	case h.lacksSets:
		return "no parameter sets", began(g.setless)
	}
	if wrong, ago := f.clock.state(g.counted); wrong != "" {
		return wrong, began(now.Add(-ago.duration()))
	}
	return "live", f.pub.since
}

// stats returns the figures of f.
func (f *feed) stats(now time.Time) *feedStats {
	f.mu.Lock()
	defer f.mu.Unlock()
	g := &f.figures
	s := &feedStats{
		Bytes: g.total.bytes, Packets: g.total.packets, Frames: g.total.frames, Keyframes: g.total.keyframes,
		ContinuityErrors: g.total.continuityErrors, Damaged: g.total.damaged, Resyncs: g.total.resyncs,
		Tracks: []trackStats{}, Clock: f.clock.stats(),
	}
	state, since := f.state(now)
	s.State = state
	if !since.IsZero() {
		s.Since = &since
	}
	bytes, frames, keyframes := g.meter.rates(g.sample(now))
	s.BitRate, s.FrameRate, s.KeyframeRate = 8*bytes, frames, keyframes
	if f.pub != nil {
		s.Publisher = &publisherStats{f.pub.remote, f.pub.agent, f.pub.since}
		s.Tracks = append(s.Tracks, g.tracks...)
	}
	return s
}

// stream is a named set of feeds as one program, and who reads it. It exists
// while it has a rule or a reader.
type stream struct {
	name string

	// guarded by mux.mu
	ruled bool
	feeds []*feed
	muted []string // feeds that the rule had and has no more

	mu    sync.Mutex
	remux remuxer
	subs  []*subscriber
	bytes uint64
	meter meter
}

// publish puts a message of one of the stream's feeds into its program, at a
// time that is now on vw's clock. It begins anew if its publisher is a new one.
func (st *stream) publish(m *message, at time.Time, now ticks, anew bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	src := st.remux.source(m.feed)
	if src == nil || m.info.program == nil || m.at.Before(src.since) {
		return // the last: it was held while the feed was not in the stream
	}
	if m.first {
		src.gate = gate{since: m.at}
	}
	if m.has == 0 {
		st.publishMuted(src, m, at, now, anew)
		return
	}
	info := m.info
	opens, passes, opened := false, src.gate.open, false
	if info.key = m.info.key && keyGoesOut(m.stamps); info.key == m.info.key { // else its keyframe is left out
		opens = src.gate.opens(m)
		passes, opened = src.gate.pass(m)
	} else {
		info.sets = nil
	}
	if !passes {
		return
	}
	if opened || anew || m.info.lost {
		src.renew()
		src.replay.clear()
	}
	info.hasPAT, info.anew = true, opened
	messages := make([]*message, 0, 2)
	if st.remux.follow(src, m.info.program) || m.info.key || now-st.remux.sent >= psiEvery {
		messages = append(messages, st.remux.newPSI(at, now))
	}
	if opens {
		info.marks = st.remux.marks(src)
	}
	if b := st.remux.remux(src, m.payload(), m.stamps); len(b) > 0 {
		out := newMessage(b, m.at, info)
		out.feed, out.has, out.kinds.program = m.feed, m.has, m.info.program
		src.kinds(&m.kinds, &out.kinds)
		out.opening = src.opening(out)
		src.keep(out, m)
		messages = append(messages, out)
	}
	if len(messages) > 0 {
		m.writes = st.offer(m.writes, messages...)
	}
}

// publishMuted is publish for a message with nothing for the program; mu is held.
func (st *stream) publishMuted(src *source, m *message, at time.Time, now ticks, anew bool) {
	if anew || m.info.lost {
		src.renew()
		src.replay.clear()
	}
	if now-st.remux.sent >= psiEvery && len(st.remux.psi) > 0 {
		st.sendPSI(at, now)
	}
	if m.muted {
		countMuted(st.subs)
	}
}

// sendPSI sends the program map and a PCR, as of now; mu is held.
func (st *stream) sendPSI(at time.Time, now ticks) { st.offer(ownWrites{}, st.remux.newPSI(at, now)) }

// refresh sends the program map and a PCR to readers who get nothing else. It
// reports whether there is a program map.
func (st *stream) refresh(at time.Time, now ticks) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	if len(st.remux.psi) == 0 {
		return false
	}
	if now-st.remux.sent >= second {
		st.sendPSI(at, now)
	}
	return true
}

// offer hands messages to the readers as w allows, and releases them. It returns what
// is left of w; mu is held.
func (st *stream) offer(w ownWrites, messages ...*message) ownWrites {
	for _, m := range messages {
		st.meter.add(sample{at: m.at, bytes: st.bytes})
		st.bytes += uint64(m.size)
	}
	w = offer(st.subs, w, messages...)
	for _, m := range messages {
		m.release()
	}
	return w
}

// setFeeds makes feeds those of the stream, in their order. Every reader drops
// what it holds of those in removed, which publish to st no more; the channels
// are closed when no write holds any (I6).
func (st *stream) setFeeds(feeds, removed []string, at time.Time, now ticks) (ended []<-chan struct{}) {
	st.mu.Lock()
	defer st.mu.Unlock()
	for _, s := range st.subs {
		for _, f := range removed {
			if w := s.removeFeed(f); w != nil {
				ended = append(ended, w)
			}
		}
	}
	st.forgetReplays()
	if st.remux.arrange(feeds, at) && len(st.remux.psi) > 0 {
		st.sendPSI(at, now)
	}
	return ended
}

// setMuting makes st obey m, and its readers drop what is queued and muted. The
// feeds obey already. The channels are closed when no write holds any (I6).
func (st *stream) setMuting(m muting, queued *sift, at time.Time, now ticks) (ended []<-chan struct{}) {
	st.mu.Lock()
	defer st.mu.Unlock()
	ended = muteQueued(st.subs, queued)
	st.forgetReplays()
	if st.remux.block(m.blocked) && len(st.remux.psi) > 0 {
		st.sendPSI(at, now)
	}
	return ended
}

// join makes s a reader, which gets the last PSI first, and a new one the first
// picture of each video.
func (st *stream) join(s *subscriber, at time.Time, now ticks) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if len(st.remux.psi) > 0 {
		m := newMessage(appendPCR(slices.Clip(st.remux.psi), st.remux.pcr), at, chunkInfo{start: true, hasPAT: true})
		s.offer(m)
		m.release()
	}
	isNew := s.isNew()
	for _, src := range st.remux.sources {
		if src.gate.open {
			s.expect(src.feed)
		}
		if !isNew {
			continue
		}
		if pictures := src.replays(at, now); pictures != nil {
			s.replay(src.feed, pictures, at)
		}
	}
	st.subs = append(st.subs, s)
}

// forgetReplays makes nothing be replayed that came until now; mu is held.
func (st *stream) forgetReplays() {
	for _, src := range st.remux.sources {
		src.replay.clear()
	}
}

func (st *stream) leave(s *subscriber) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.subs = slices.DeleteFunc(st.subs, func(o *subscriber) bool { return o == s })
}

// rates returns the bytes so far, and per second lately.
func (st *stream) rates(now time.Time) (bytes uint64, perSecond float64) {
	st.mu.Lock()
	defer st.mu.Unlock()
	perSecond, _, _ = st.meter.rates(sample{at: now, bytes: st.bytes})
	return st.bytes, perSecond
}

// feedFigures are what is known of a feed. Guarded by feed.mu.
type feedFigures struct {
	total   feedCounts // since the feed is known, of all its publishers
	counted ticks      // when it was, on vw's clock
	meter   meter
	tracks  []trackStats // immutable
	video   bool

	health           feedHealth
	keyframe, damage time.Time // the last of each
	setless          time.Time // when keyframes began to lack parameter sets
	left             time.Time // when the last publisher did
}

func (g *feedFigures) sample(at time.Time) sample {
	return sample{at, g.total.bytes, g.total.frames, g.total.keyframes}
}

type feedStats struct {
	State            string          `json:"state"` // live, or what is wrong, in words
	Since            *time.Time      `json:"since,omitempty"`
	Publisher        *publisherStats `json:"publisher"`
	Bytes            uint64          `json:"bytes"`
	Packets          uint64          `json:"packets"`
	BitRate          float64         `json:"bitRate"`
	Frames           uint64          `json:"frames"` // of the video; without one, of all tracks
	Keyframes        uint64          `json:"keyframes"`
	FrameRate        float64         `json:"frameRate"`
	KeyframeRate     float64         `json:"keyframeRate"`
	Tracks           []trackStats    `json:"tracks"`
	ContinuityErrors uint64          `json:"continuityErrors"`
	Damaged          uint64          `json:"damagedPackets"`
	Resyncs          uint64          `json:"resyncs"`
	Clock            clockStats      `json:"clock"`
}

type publisherStats struct {
	Remote string    `json:"remote"`
	Agent  string    `json:"agent"`
	Since  time.Time `json:"since"`
}

type streamStats struct {
	Feeds   []string `json:"feeds"`
	Present []string `json:"present"`
	Muted   []string `json:"muted"` // feeds that the rule had and has no more
	Bytes   uint64   `json:"bytes"`
	BitRate float64  `json:"bitRate"`
}

const (
	damagedFor = 5 * time.Second
	keylessFor = 10 * time.Second
)

// sample is where counters stood at a time.
type sample struct {
	at                       time.Time
	bytes, frames, keyframes uint64
}

// meter measures rates over the last 4 to 5 s. The zero value is ready for use.
type meter struct {
	ring [6]sample // one a second
	last int
}

// add notes where the counters stood before what came at s.at.
func (m *meter) add(s sample) {
	switch gap := s.at.Sub(m.ring[m.last].at); {
	case gap > meterGap:
		*m = meter{}
		m.ring[0] = s
	case gap >= time.Second:
		m.last = (m.last + 1) % len(m.ring)
		m.ring[m.last] = s
	}
}

// rates returns what came per second until s.
func (m *meter) rates(s sample) (bytes, frames, keyframes float64) {
	oldest := m.ring[(m.last+1)%len(m.ring)]
	if oldest.at.IsZero() {
		oldest = m.ring[0]
	}
	t := s.at.Sub(oldest.at).Seconds()
	if s.at.Sub(m.ring[m.last].at) > meterGap || t < 0.5 {
		return 0, 0, 0
	}
	return float64(s.bytes-oldest.bytes) / t, float64(s.frames-oldest.frames) / t, float64(s.keyframes-oldest.keyframes) / t
}

// meterGap is a pause after which older samples say nothing about the rate.
const meterGap = 5 * time.Second
