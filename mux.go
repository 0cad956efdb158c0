// Feeds, streams and their publishers: the fan-out of messages.
//
// The rules: publishing never blocks, does I/O or logs (I2). Locks are taken
// in the order mux, feed, stream, subscriber, and cover walks and queue
// operations only. A message is immutable once it is published (I1).

package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"time"
)

// mux holds the feeds and streams that somebody publishes, reads or has a
// rule for. Safe for concurrent use.
type mux struct {
	epoch time.Time // when vw's clock was 0

	mu        sync.Mutex
	feeds     map[string]*feed
	streams   map[string]*stream
	published int // feeds that have a publisher
}

func newMux() *mux {
	// A DTS may be before the arrival of its frame: the clock starts at 10 s.
	return &mux{epoch: time.Now().Add(-10 * time.Second), feeds: make(map[string]*feed), streams: make(map[string]*stream)}
}

// publish reads r until it ends, and publishes what it carries as the feed of
// that name from its first whole frame on. nil means the proper end; else errNotTS, errReplaced, errFull or
// what the reader said.
func (x *mux) publish(name string, p *publisher, r io.Reader) error {
	var f *feed
	full := false
	fr := newFramer(func(m *message) {
		if f == nil && !full { // it has shown that it is MPEG-TS: now it may take over
			f = x.attach(name, p)
			m.first = true
			if full = f == nil; !full && p.begun != nil {
				p.begun()
			}
		}
		if !full {
			f.publish(p, m)
		}
	})
	defer func() {
		if f != nil {
			x.detach(f, p)
		}
	}()
	for {
		err := fr.read(r)
		if f != nil {
			f.account(p, fr)
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

// attach makes pub the publisher of a feed. The one before it is told to end.
// nil: as many other feeds are published as may be.
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
	f.held, f.heldBytes = nil, 0
	return f
}

// detach ends pub's publishing.
func (x *mux) detach(f *feed, pub *publisher) {
	x.mu.Lock()
	defer x.mu.Unlock()
	f.mu.Lock()
	if f.pub == pub {
		if len(f.held) > 0 {
			at := time.Now()
			now := toTicks(at.Sub(f.epoch))
			offset, jumped := f.clock.hurry(f.held[0].info, now)
			f.release(at, now, offset, jumped)
		}
		f.pub, f.figures.left = nil, time.Now()
		x.published--
	}
	f.mu.Unlock()
	x.tidy(f)
}

// join makes s a reader of the feed or stream of that name, which need not
// exist yet.
func (x *mux) join(name string, s *subscriber) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if isStream(name) {
		x.stream(name).join(s)
		return
	}
	f := x.feed(name)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.subs = append(f.subs, s)
}

// leave undoes join. Once it returns, nothing is offered to s.
func (x *mux) leave(name string, s *subscriber) {
	x.mu.Lock()
	defer x.mu.Unlock()
	is := func(o *subscriber) bool { return o == s }
	if st := x.streams[name]; st != nil {
		st.mu.Lock()
		st.subs = slices.DeleteFunc(st.subs, is)
		idle := len(st.subs) == 0 && !st.ruled
		st.mu.Unlock()
		if idle {
			delete(x.streams, name)
		}
	}
	if f := x.feeds[name]; f != nil {
		f.mu.Lock()
		f.subs = slices.DeleteFunc(f.subs, is)
		f.mu.Unlock()
		x.tidy(f)
	}
}

// setStream gives a stream its feeds. When the channels it returns are closed,
// no message of a feed that it had before and has no more will be begun (I6).
func (x *mux) setStream(name string, feeds []string, ruled bool) (words []<-chan struct{}) {
	x.mu.Lock()
	defer x.mu.Unlock()
	st := x.stream(name)
	st.ruled = ruled
	old := st.feeds
	st.feeds = nil
	for _, n := range feeds {
		st.feeds = append(st.feeds, x.feed(n))
	}
	var gone []*feed
	for _, f := range old {
		if !slices.Contains(st.feeds, f) {
			gone = append(gone, f)
			st.muted = append(st.muted, f.name)
			f.mu.Lock()
			f.streams = slices.DeleteFunc(f.streams, func(o *stream) bool { return o == st })
			f.mu.Unlock()
			x.tidy(f)
		}
	}
	st.muted = slices.DeleteFunc(st.muted, func(name string) bool { return slices.Contains(feeds, name) })
	st.muted = st.muted[max(0, len(st.muted)-maxFeeds):]
	words = st.arrange(st.feeds, gone)
	for _, f := range st.feeds {
		if !slices.Contains(old, f) {
			f.mu.Lock()
			f.streams = append(f.streams, st)
			f.mu.Unlock()
		}
	}
	st.mu.Lock()
	idle := len(st.subs) == 0 && !st.ruled
	st.mu.Unlock()
	if idle {
		delete(x.streams, name)
	}
	return words
}

// feed returns the feed of that name, made if need be; mu is held.
func (x *mux) feed(name string) *feed {
	f := x.feeds[name]
	if f == nil {
		f = &feed{name: name, epoch: x.epoch}
		x.feeds[name] = f
	}
	return f
}

// stream returns the stream of that name, made if need be; mu is held.
func (x *mux) stream(name string) *stream {
	st := x.streams[name]
	if st == nil {
		st = &stream{name: name, epoch: x.epoch}
		x.streams[name] = st
	}
	return st
}

// tidy forgets a feed that nobody has a use for; mu is held.
func (x *mux) tidy(f *feed) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if x.feeds[f.name] == f && f.pub == nil && len(f.subs) == 0 && len(f.streams) == 0 {
		delete(x.feeds, f.name)
	}
}

// pass takes each lock on the way of video once, so it does not return while
// one of them is stuck.
func (x *mux) pass() {
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

// stats looks at all feeds and streams.
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
		st.mu.Lock()
		bytes, _, _ := st.meter.rates(sample{at: now, bytes: st.bytes})
		s.Bytes, s.BitRate = st.bytes, 8*bytes
		st.mu.Unlock()
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
	name  string
	epoch time.Time // when vw's clock was 0

	mu        sync.Mutex
	pub       *publisher // nil: nobody publishes
	clock     clock
	held      []*message // what streams get when the clock is ready
	heldBytes int
	subs      []*subscriber
	streams   []*stream
	figures   feedFigures
}

// publish hands m to the readers of f, unless pub is no longer its publisher,
// and releases it. It does not block (I2).
func (f *feed) publish(pub *publisher, m *message) {
	m.feed = f
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.pub != pub {
		return
	}
	for _, s := range f.subs {
		s.offer(m)
	}
	now := toTicks(m.at.Sub(f.epoch))
	offset, jumped, ready := f.clock.follow(m.payload(), m.info, now, m.first)
	f.held = append(f.held, m)
	f.heldBytes += m.size
	if f.heldBytes > maxFrame && !ready { // as much as this is no start-up
		offset, jumped = f.clock.hurry(m.info, now)
		ready = true
	}
	if ready {
		f.release(m.at, now, offset, jumped)
	}
}

// release hands what was held to the streams, as of now; mu is held.
func (f *feed) release(at time.Time, now, offset ticks, jumped bool) {
	for i, m := range f.held {
		for _, st := range f.streams {
			st.publish(m, at, now, offset, jumped && i == 0)
		}
		m.release()
	}
	clear(f.held)
	f.held, f.heldBytes = f.held[:0], 0
}

// account takes what the framer of pub has counted.
func (f *feed) account(pub *publisher, fr *framer) {
	n := fr.counts
	fr.counts = feedCounts{}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.pub != pub {
		return
	}
	g := &f.figures
	g.meter.add(g.sample(fr.at))
	g.total.add(n)
	g.tracks, g.video = fr.tracks(), fr.video >= 0
	g.came = fr.at
	if n.keyframes > 0 {
		g.keyframe = fr.at
	}
	if n.continuityErrors+n.damaged+n.resyncs > 0 {
		g.damage = fr.at
	}
}

// state is how a feed is, in a word, and since when.
func (f *feed) state(now time.Time) (string, time.Time) {
	g := &f.figures
	switch {
	case f.pub == nil:
		return "absent", g.left
	case now.Sub(g.came) > silentAfter:
		return "silent", g.came
	case now.Sub(g.damage) < damagedFor:
		return "damaged", g.damage
	}
	keyless := g.keyframe
	if keyless.Before(f.pub.since) {
		keyless = f.pub.since
	}
	if g.video && now.Sub(keyless) > keylessFor {
		return "no keyframe", keyless
	}
	return "live", f.pub.since
}

// stats looks at feed, which is locked meanwhile.
func (f *feed) stats(now time.Time) *feedStats {
	f.mu.Lock()
	defer f.mu.Unlock()
	g := &f.figures
	s := &feedStats{
		Bytes: g.total.bytes, Packets: g.total.packets, Frames: g.total.frames, Keyframes: g.total.keyframes,
		ContinuityErrors: g.total.continuityErrors, Damaged: g.total.damaged, Resyncs: g.total.resyncs,
		Tracks: []trackStats{},
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
	name  string
	epoch time.Time
	ruled bool     // guarded by mux.mu
	feeds []*feed  // guarded by mux.mu
	muted []string // feeds that the rule had, guarded by mux.mu

	mu    sync.Mutex
	remux remuxer
	subs  []*subscriber
	bytes uint64
	meter meter
}

// publish puts a message of one of the stream's feeds into its program, at a
// time that is now on vw's clock.
func (st *stream) publish(m *message, at time.Time, now, offset ticks, jumped bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	src := st.remux.source(m.feed)
	if src == nil || m.info.program == nil || m.at.Before(src.since) {
		return // or held while the feed was muted
	}
	if m.first {
		src.gate = gate{since: m.at}
	}
	opens := src.gate.opens(m)
	if !src.gate.open && !opens {
		return
	}
	if !src.gate.open || jumped || m.info.lost {
		src.renew()
	}
	anew := !src.gate.open
	src.gate.open = true
	if st.remux.follow(src, m.info.program) || m.info.key || now-st.remux.sent >= psiEvery {
		st.sendPSI(at, now)
	}
	info := m.info
	info.lead, info.anew = true, anew
	if opens {
		info.marks = st.remux.marks(src)
	}
	if b := st.remux.remux(src, m.payload(), offset); len(b) > 0 {
		out := newMessage(b, m.at, info)
		out.feed = m.feed
		st.offer(out)
		out.release()
	}
}

// sendPSI is called with mu held.
func (st *stream) sendPSI(at time.Time, now ticks) {
	info := chunkInfo{start: true, lead: true, marks: st.remux.psiMarks()}
	st.offer(newMessage(st.remux.appendPSI(nil, now), at, info))
}

func (st *stream) offer(m *message) {
	st.meter.add(sample{at: m.at, bytes: st.bytes})
	st.bytes += uint64(m.size)
	for _, s := range st.subs {
		s.offer(m)
	}
}

// arrange makes feeds those of the stream, in their order. Every reader drops
// what it holds of those in gone; the channels tell when no write holds any
// (I6). The feeds in gone no longer publish to st.
func (st *stream) arrange(feeds, gone []*feed) (words []<-chan struct{}) {
	st.mu.Lock()
	defer st.mu.Unlock()
	at := time.Now()
	for _, s := range st.subs {
		for _, f := range gone {
			if w := s.mute(f); w != nil {
				words = append(words, w)
			}
		}
	}
	if st.remux.arrange(feeds, at) && len(st.remux.psi) > 0 {
		st.sendPSI(at, toTicks(at.Sub(st.epoch)))
	}
	return words
}

// join gives s the last PSI, then what comes.
func (st *stream) join(s *subscriber) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if len(st.remux.psi) > 0 {
		s.offer(newMessage(st.remux.psi, time.Now(), chunkInfo{start: true, lead: true}))
	}
	for _, src := range st.remux.sources {
		if src.gate.open {
			s.awaits[src.feed] = true
		}
	}
	st.subs = append(st.subs, s)
}

// feedFigures are what is known of a feed. Guarded by feed.mu.
type feedFigures struct {
	total  feedCounts // since the feed is known, of all its publishers
	meter  meter
	tracks []trackStats // immutable
	video  bool

	came, keyframe, damage time.Time // the last of each
	left                   time.Time // when the last publisher did
}

func (g *feedFigures) sample(at time.Time) sample {
	return sample{at, g.total.bytes, g.total.frames, g.total.keyframes}
}

type feedStats struct {
	State            string          `json:"state"` // live, silent, no keyframe, damaged, absent
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
}

type publisherStats struct {
	Remote string    `json:"remote"`
	Agent  string    `json:"agent"`
	Since  time.Time `json:"since"`
}

type streamStats struct {
	Feeds   []string `json:"feeds"`
	Present []string `json:"present"`
	Muted   []string `json:"muted"` // were in the rule, and are not now
	Bytes   uint64   `json:"bytes"`
	BitRate float64  `json:"bitRate"`
}

const (
	silentAfter = 2 * time.Second
	damagedFor  = 5 * time.Second
	keylessFor  = 10 * time.Second
)

// sample is where counters stood.
type sample struct {
	at                       time.Time
	bytes, frames, keyframes uint64
}

// meter tells rates over the last 4 to 5 s. Its zero value is ready.
type meter struct {
	ring [6]sample // one a second
	last int
}

// add tells m where the counters stood before what came at s.at.
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

// rates returns what came each second until s.
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

const meterGap = 5 * time.Second // without anything; older samples say nothing then
