// Feeds, streams and their subscribers: the fan-out of messages.
//
// The rules: publishing never blocks, does I/O or logs (I2). Locks are taken
// in the order mux, feed, stream, subscriber, and cover walks and queue
// operations only. A message is immutable once it is published (I1).

package main

import (
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// form is how a message looks on the wire.
type form int

const (
	raw    form = iota // packets alone, for GET /ts
	bare               // an unmasked frame, from server to client. RFC 6455 5.1
	masked             // a masked frame, from client to server
)

// message is a chunk of one feed, or PSI of a stream, as one binary websocket
// message. Immutable but for the masked form, which is made once when it is
// first asked for; every method may be called from several goroutines. Its
// memory is used again once everybody who holds it has released it.
type message struct {
	feed  *feed     // nil: PSI of a stream
	at    time.Time // when its last byte arrived
	first bool      // the first of its publisher
	info  chunkInfo

	frame []byte // header and payload of the bare form
	size  int    // bytes of payload

	once   sync.Once
	masked []byte

	holders atomic.Int32
}

// spare holds messages to use again: their memory is in the cache, and the
// collector has little to do.
var spare = sync.Pool{New: func() any { return new(message) }}

const maxSpare = 256 << 10 // bytes of payload in a message worth keeping

const maxHeader = 14 // bytes. RFC 6455 5.2

// newMessage copies payload. The caller holds the message.
func newMessage(payload []byte, at time.Time, info chunkInfo) *message {
	m := spare.Get().(*message)
	var header [maxHeader]byte
	b := append(append(m.frame[:0], appendHeader(header[:0], opBinary, len(payload), nil)...), payload...)
	*m = message{at: at, info: info, frame: b, size: len(payload), masked: m.masked[:0]}
	m.holders.Store(1)
	return m
}

// release ends one hold of m. One that is never released is left to the
// collector.
func (m *message) release() {
	if m.holders.Add(-1) == 0 && m.size <= maxSpare {
		spare.Put(m)
	}
}

func (m *message) payload() []byte { return m.frame[len(m.frame)-m.size:] }

// wire returns the bytes that a reader of form f gets.
func (m *message) wire(f form) []byte {
	switch f {
	case raw:
		return m.payload()
	case bare:
		return m.frame
	}
	m.once.Do(func() {
		m.masked = appendFrame(slices.Grow(m.masked, maxHeader+m.size), opBinary, m.payload(), true)
	})
	return m.masked
}

// wireSize is len(wire(f)), without making it.
func (m *message) wireSize(f form) int {
	switch f {
	case raw:
		return m.size
	case bare:
		return len(m.frame)
	}
	return len(m.frame) + 4
}

// cause is why a message was dropped.
type cause int

const (
	kept      cause = iota
	dropGate        // waiting for a keyframe
	dropLag         // older than VW_MAXLAG
	dropBytes       // more than maxQueue behind
	dropMuted       // its feed was taken out of the stream
	dropEnd         // still queued when its reader ended
	causes
)

// counters hold I7: published = delivered + dropped + queued, in messages.
// Their zero value is ready; they are guarded by whoever holds them.
type counters struct {
	published, delivered uint64
	bytes, frames        uint64 // in what was delivered
	dropped              [causes]uint64
}

func (c *counters) add(d counters) {
	c.published += d.published
	c.delivered += d.delivered
	c.bytes += d.bytes
	c.frames += d.frames
	for i := range d.dropped {
		c.dropped[i] += d.dropped[i]
	}
}

const (
	maxQueue   = 16 << 20 // bytes queued for one reader
	noKeyframe = 5 * time.Second
)

// item is a message in a queue. dead is set while a write that holds it is
// in progress: it goes if the write did not begin it.
type item struct {
	*message
	dead bool
}

// gate tells whether messages of one feed pass to one reader (I5).
type gate struct {
	open  bool
	since time.Time // when it closed
}

// opens tells whether m may be the first of its feed after a gap.
func (g *gate) opens(m *message) bool {
	return m.info.key || m.info.anew || m.info.start && (!m.info.hasVideo || m.at.Sub(g.since) > noKeyframe)
}

// subscriber is the queue between a feed or stream and one reader, bounded in
// age and bytes (I5). Publishers call offer, rule changes mute and drain, and
// the reader's one goroutine the rest. It has no end of its own: the reader
// leaves the mux, then calls end.
type subscriber struct {
	form      form
	maxAge    time.Duration
	interrupt func()        // makes the write in progress return; nil: nothing does
	live      func()        // called, under mu, when a viewer could begin to watch; nil: nobody asks
	ready     chan struct{} // holds a token when there is something to take

	mu       sync.Mutex
	items    []item
	bytes    int // payload in items
	begun    int // bytes of items[0] that are written
	inFlight int // how many of items the write in progress holds
	gates    map[*feed]*gate
	awaits   map[*feed]bool  // feeds of the stream that a viewer cannot watch yet
	waiting  []chan struct{} // closed when the write in progress is over
	stopped  bool            // mute interrupted the write in progress
	draining bool            // takes nothing new
	lagged   uint64          // dropped since the reader last kept up
	counters counters
}

func newSubscriber(f form, maxAge time.Duration) *subscriber {
	return &subscriber{form: f, maxAge: maxAge, ready: make(chan struct{}, 1), gates: make(map[*feed]*gate), awaits: make(map[*feed]bool)}
}

// offer queues m, or drops it and counts why. It does not block (I2).
func (s *subscriber) offer(m *message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining {
		return
	}
	s.counters.published++
	if !s.passes(m) {
		s.counters.dropped[dropGate]++
		return
	}
	s.push(m)
	s.trim(m.at)
	s.wake()
}

// passes works the gate of m's feed.
func (s *subscriber) passes(m *message) bool {
	g, again := s.gates[m.feed], true
	if g == nil {
		g, again = &gate{since: m.at}, false
		s.gates[m.feed] = g
	}
	if m.first && g.open {
		*g = gate{since: m.at}
	}
	if !g.open && g.opens(m) {
		g.open = true
		if p := m.preface(again); p != nil {
			s.counters.published++
			s.push(p)
			p.release()
		}
	}
	return g.open
}

// preface is what a reader needs before the message that opens a gate: the
// PSI of a feed; in a stream, when it is opened again, that the continuity
// counters do not go on from where they were. nil: nothing.
func (m *message) preface(again bool) *message {
	var p *message
	switch {
	case again && len(m.info.marks) > 0:
		p = newMessage(appendMarks(nil, m.info.marks), m.at, chunkInfo{})
	case !m.info.lead && len(m.info.psi) > 0:
		p = newMessage(m.info.psi, m.at, chunkInfo{})
	default:
		return nil
	}
	p.feed = m.feed
	return p
}

// push queues m, and holds it until it is delivered or dropped.
func (s *subscriber) push(m *message) {
	m.holders.Add(1)
	s.items = append(s.items, item{message: m})
	s.bytes += m.size
}

func (s *subscriber) wake() {
	select {
	case s.ready <- struct{}{}:
	default:
	}
}

// free is the index of the first item that may be dropped: those in the hands
// of a write, and one that is begun, may not.
func (s *subscriber) free() int {
	if s.inFlight == 0 && s.begun > 0 {
		return 1
	}
	return s.inFlight
}

// remove takes out each item from index lo on for which why says so.
func (s *subscriber) remove(lo int, why func(item) cause) {
	rest := s.items[:lo]
	for _, it := range s.items[lo:] {
		if c := why(it); c == kept {
			rest = append(rest, it)
		} else {
			s.counters.dropped[c]++
			s.bytes -= it.size
			it.release()
		}
	}
	clear(s.items[len(rest):])
	s.items = rest
}

// trim drops what is too old or too much, and what a decoder can't use
// without it: up to the feed's next keyframe, in the queue or yet to come.
func (s *subscriber) trim(now time.Time) {
	lo := s.free()
	if lo == len(s.items) || now.Sub(s.items[lo].at) <= s.maxAge && s.bytes <= maxQueue {
		return
	}
	most := maxQueue
	if s.bytes > maxQueue {
		most = maxQueue / 2
	}
	cut := make(map[*feed]*gate) // feeds that lost a message, until a later one opens them again
	rest := s.items[:lo]
	for _, it := range s.items[lo:] {
		why, g := kept, cut[it.feed]
		switch {
		case now.Sub(it.at) > s.maxAge:
			why = dropLag
		case s.bytes > most:
			why = dropBytes
		case g != nil && !g.opens(it.message):
			why = dropGate
		}
		if why == kept {
			if g != nil {
				delete(cut, it.feed)
				if p := it.preface(true); p != nil { // in the place of one that was dropped
					s.counters.published++
					s.bytes += p.size
					rest = append(rest, item{message: p})
				}
			}
			rest = append(rest, it)
			continue
		}
		s.counters.dropped[why]++
		s.bytes -= it.size
		s.lagged++
		if g == nil {
			cut[it.feed] = &gate{since: it.at}
		}
		it.release()
	}
	clear(s.items[len(rest):])
	s.items = rest
	for f, g := range cut {
		if s.gates[f] != nil { // not muted in the meantime
			s.gates[f] = g
		}
	}
}

// take appends to b what to write next, and keeps it in flight until wrote:
// whole messages of at most limit bytes together. When the first alone is
// longer it is that one, cut at limit if cut is set.
func (s *subscriber) take(b [][]byte, limit int, cut bool, now time.Time) [][]byte {
	s.mu.Lock()
	s.trim(now)
	begun, room := s.begun, limit+s.begun
	for _, it := range s.items {
		if room -= it.wireSize(s.form); room < 0 && s.inFlight > 0 {
			break
		}
		s.inFlight++
	}
	// The items in flight stay as they are, but for dead, until wrote.
	batch := s.items[:s.inFlight]
	s.mu.Unlock()
	for i := range batch {
		b = append(b, batch[i].message.wire(s.form)[begun:])
		begun = 0
	}
	if cut && len(b) > 0 && len(b[0]) > limit {
		b[0] = b[0][:limit]
	}
	return b
}

// progress is what wrote has to say.
type progress struct {
	stopped bool   // mute interrupted the write
	partial bool   // a message is begun and not whole
	lagged  uint64 // messages dropped behind a reader that has now caught up
}

// wrote ends the write of what take gave, n bytes of which were written.
func (s *subscriber) wrote(n int) progress {
	s.mu.Lock()
	defer s.mu.Unlock()
	n += s.begun
	done := 0
	for _, it := range s.items[:s.inFlight] {
		size := it.wireSize(s.form)
		if n < size {
			break
		}
		n -= size
		done++
		s.bytes -= it.size
		s.counters.delivered++
		s.counters.bytes += uint64(it.size)
		s.counters.frames += uint64(it.info.frames)
		if s.live != nil && it.feed != nil && (it.info.key || it.info.start && !it.info.hasVideo) {
			if delete(s.awaits, it.feed); len(s.awaits) == 0 {
				s.live()
			}
		}
		it.release()
	}
	s.begun, s.inFlight = n, 0
	s.items = slices.Delete(s.items, 0, done)
	if s.waiting != nil {
		s.remove(s.free(), func(it item) cause {
			if it.dead {
				return dropMuted
			}
			return kept
		})
		s.giveWord()
	}
	p := progress{stopped: s.stopped, partial: s.begun > 0}
	s.stopped = false
	if len(s.items) == 0 {
		p.lagged, s.lagged = s.lagged, 0
	}
	if len(s.items) > 0 || s.draining {
		s.wake()
	}
	return p
}

// mute drops what is queued of a feed, and interrupts the write in progress
// if that holds some. When the channel it returns is closed, or at once when
// that is nil, no message of the feed will be begun (I6). The caller holds
// what keeps new ones from being offered.
func (s *subscriber) mute(f *feed) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.gates, f)
	delete(s.awaits, f)
	s.remove(s.free(), func(it item) cause {
		if it.feed == f {
			return dropMuted
		}
		return kept
	})
	held := false
	for i := range s.items[:s.inFlight] {
		if s.items[i].feed == f {
			s.items[i].dead, held = true, true
		}
	}
	if !held {
		return nil
	}
	word := make(chan struct{})
	s.waiting = append(s.waiting, word)
	if s.interrupt != nil {
		s.stopped = true
		s.interrupt()
	}
	return word
}

// giveWord tells those who wait that no write is in progress.
func (s *subscriber) giveWord() {
	for _, w := range s.waiting {
		close(w)
	}
	s.waiting = nil
}

// drain lets nothing new in; ready tells when the rest may be taken.
func (s *subscriber) drain() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.draining = true
	s.wake()
}

// drained tells whether drain was called and all that was queued is written.
func (s *subscriber) drained() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.draining && len(s.items) == 0
}

// rest appends what is to be written yet of a message that is begun. The
// write must have ended, and there is none after it.
func (s *subscriber) rest(b [][]byte) [][]byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.begun > 0 {
		b = append(b, s.items[0].message.wire(s.form)[s.begun:])
	}
	return b
}

// end drops what is left and returns the final counters. No write may be in
// progress, and the mux must have let go of s.
func (s *subscriber) end() counters {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.inFlight, s.begun = 0, 0
	s.remove(0, func(item) cause { return dropEnd })
	s.giveWord()
	return s.counters
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

// isStream tells whether a valid name is a stream's; else it is a feed's.
func isStream(name string) bool { return strings.HasPrefix(name, "stream/") }

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
