// A chunk as one immutable message, and the queue of messages before one reader:
// its gate, its bounds and its counters (I5, I7).
//
// Publishers offer messages, rule changes remove and drain, and the reader's one
// goroutine takes what is queued. Nothing here waits (I2): a publisher may write
// to a connection, but only what that takes at once, and only while the reader's
// goroutine has nothing to write (I4).

package main

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// message is a chunk of one feed, or PSI of a stream, as one binary websocket
// message. Immutable but for the masked form, which is made once when it is
// first asked for; every method may be called from several goroutines. Its
// memory is used again once everybody who holds it has released it.
type message struct {
	feed  string    // its name; "": PSI of a stream
	at    time.Time // when its last byte arrived
	first bool      // the first of its publisher
	info  chunkInfo

	writes  ownWrites  // of its publisher; guarded by the feed
	stamps  []stamp    // of a feed's message, guarded by the feed
	offered bool       // the readers of the feed have it; guarded by the feed
	kinds   kindReader // as it is before the first packet
	has     kindSet    // kinds of tracks in it
	muted   bool       // it had some, and all of them are muted
	replays replayRole // what it is in a replay

	frame []byte // header and payload of the bare form
	size  int    // bytes of payload

	once   sync.Once
	masked []byte

	opening *message // what a reader gets that begins with m, if m lacks something; may be nil

	holders atomic.Int32
}

// ownWrites are those that a publisher may still do itself, and how many of them are one
// processor's.
type ownWrites struct{ left, share int }

// newMessage copies payload. The caller holds the message.
func newMessage(payload []byte, at time.Time, info chunkInfo) *message {
	m := spare.Get().(*message)
	var header [maxHeader]byte
	b := append(append(m.frame[:0], appendHeader(header[:0], opBinary, len(payload), nil)...), payload...)
	*m = message{
		at: at, info: info, stamps: m.stamps[:0], kinds: kindReader{tracks: m.kinds.tracks[:0]},
		frame: b, size: len(payload), masked: m.masked[:0],
	}
	m.holders.Store(1)
	return m
}

// release ends one hold of m, which the caller may not use any more.
func (m *message) release() {
	if m.holders.Add(-1) > 0 {
		return
	}
	if m.opening != nil {
		m.opening.release()
		m.opening = nil
	}
	if m.size <= maxSpare {
		spare.Put(m)
	}
}

func (m *message) payload() []byte { return m.frame[len(m.frame)-m.size:] }

// wire returns m in form f.
func (m *message) wire(f form) []byte {
	switch f {
	case raw:
		return m.payload()
	case bare:
		return m.frame
	}
	m.once.Do(func() {
		m.masked = appendFrame(slices.Grow(m.masked, maxHeader+m.size), opBinary, m.payload(), masked)
	})
	return m.masked
}

// wireSize returns len(wire(f)) without building it.
func (m *message) wireSize(f form) int {
	switch f {
	case raw:
		return m.size
	case bare:
		return len(m.frame)
	}
	return len(m.frame) + 4
}

// asOpening returns what a reader gets that begins with m.
func (m *message) asOpening() *message {
	if m.opening != nil {
		return m.opening
	}
	return m
}

// isWatchable reports whether a viewer who gets m can watch from there on.
func (m *message) isWatchable() bool {
	return m.replays == replayEnd || m.info.key || m.info.start && (!m.info.hasVideo || m.info.blind)
}

// preface returns the packets to send before m when a gate opens: the PSI of a
// feed; in a stream whose gate opens again, discontinuity marks; nil if none.
func (m *message) preface(again bool) *message {
	var p *message
	switch {
	case again && len(m.info.marks) > 0:
		p = newMessage(appendMarks(nil, m.info.marks), m.at, chunkInfo{})
		p.kinds.copy(&m.kinds)
		p.has = p.kinds.openAll()
	case !m.info.hasPAT && len(m.info.psi) > 0:
		p = newMessage(m.info.psi, m.at, chunkInfo{})
	default:
		return nil
	}
	p.feed = m.feed
	return p
}

// spare holds messages to reuse: their memory is still in the processor's cache,
// and the garbage collector has less to do.
var spare = sync.Pool{New: func() any { return new(message) }}

const (
	maxSpare  = 256 << 10 // bytes of payload in a message worth keeping
	maxHeader = 14        // bytes. RFC 6455 5.2
)

// cause is why a message was dropped. A new one needs a name in causeNames:
// JSON, metrics and logs take it from there.
type cause int

const (
	kept      cause = iota
	dropGate        // waiting for a keyframe
	dropLag         // older than VW_MAXLAG
	dropBytes       // more than maxQueue behind
	dropMuted       // its feed was taken out of the stream, or all its tracks are muted
	dropEnd         // still queued when its reader ended
	causes
)

// causeNames are what the causes are called in JSON and metrics.
var causeNames = [causes]string{dropGate: "gate", dropLag: "lag", dropBytes: "bytes", dropMuted: "muted", dropEnd: "end"}

// counters hold I7: published = delivered + dropped + queued, in messages.
// The zero value is ready for use. The owner guards them.
type counters struct {
	published, delivered uint64
	bytes, frames        uint64 // in what was delivered
	dropped              [causes]uint64
}

// drops returns the messages dropped by the name of each cause.
func (c *counters) drops() dropStats {
	d := make(dropStats, causes-1)
	for why := kept + 1; why < causes; why++ {
		d[causeNames[why]] = c.dropped[why]
	}
	return d
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

// subscriber is the queue between a feed or stream and one reader, bounded in
// age and bytes (I5). Publishers call offer, rule changes call removeFeed and
// drain, and the reader's one goroutine calls the rest. It does not end by
// itself: the reader leaves the mux, then calls end.
type subscriber struct {
	form      form
	maxAge    time.Duration
	interrupt func()        // makes the write in progress return; nil if nothing can
	ready     chan struct{} // holds a token when there is something to take

	mu       sync.Mutex
	writeNow directWrite // what publishers write with, under mu; nil: they may not
	items    []item
	bytes    int              // payload in items
	begun    int              // bytes of items[0] that are written
	inFlight int              // how many of items the write in progress holds
	gates    map[string]*gate // by feed
	expected map[string]bool  // feeds of the stream that a viewer cannot watch yet
	onLive   func()           // called, under mu, when a viewer could begin to watch; may be nil
	ended    chan struct{}    // closed when the write in progress has ended; nil: nobody waits
	muted    *sift            // to be applied to what is in flight, once its write has ended; may be nil
	stopped  bool             // a rule change interrupted the write in progress
	draining bool             // takes nothing new
	lagged   uint64           // dropped since the reader last kept up
	counters counters

	wantsReplay bool      // the reader has seen nothing of the stream
	replayed    time.Time // when it got a replay
	replaySize  int       // bytes of that
	replayLeft  int       // bytes of it that are queued
}

// newSubscriber returns an empty queue. interrupt makes a write in progress
// return early; it is nil where nothing can.
func newSubscriber(f form, maxAge time.Duration, interrupt func()) *subscriber {
	return &subscriber{
		form: f, maxAge: maxAge, interrupt: interrupt, ready: make(chan struct{}, 1),
		gates: make(map[string]*gate), expected: make(map[string]bool),
	}
}

// expect makes a viewer's picture incomplete until a message of feed that can
// be watched is delivered.
func (s *subscriber) expect(feed string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expected[feed] = true
}

// whenLive makes f be called, once or more, when a viewer could begin to watch.
// f must not block.
func (s *subscriber) whenLive(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.onLive = f
}

// wantReplay makes s get the first picture at once when it joins a stream: the
// reader has seen nothing of it. It is called before that.
func (s *subscriber) wantReplay() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wantsReplay = true
}

// isNew reports whether s is to get a replay.
func (s *subscriber) isNew() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.wantsReplay
}

// replay queues what a feed's video has shown since its keyframe. Its gate is
// open then.
func (s *subscriber) replay(feed string, pictures []*message, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gates[feed] = &gate{open: true}
	s.replayed = at
	for _, m := range pictures {
		s.counters.published++
		s.push(m)
		s.replaySize += m.size
		s.replayLeft += m.size
	}
	s.wake()
}

// isTooSlow reports whether the reader will not have taken its replay within
// maxAge: a link that is narrow is no worse off than without one. One that is not
// begins slowly, so what must be done grows with the square of the time.
func (s *subscriber) isTooSlow(now time.Time) bool {
	if s.replayLeft == 0 {
		return false
	}
	took, done := float64(now.Sub(s.replayed))/float64(s.maxAge), float64(s.replaySize-s.replayLeft)
	return took > 1./replayPatience && done < float64(s.replaySize)*took*took
}

// isReplaying reports whether some of a replay is queued.
func (s *subscriber) isReplaying() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.replayLeft > 0
}

// holdsReplay reports whether s is to write nothing now, since so many bytes are
// not acknowledged. Of a replay, half must be before as much again is written: a
// link may be narrow, and others may share it, who are live.
func (s *subscriber) holdsReplay(unacked int, now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.trim(now)
	return s.begun == 0 && s.replayLeft > 0 && unacked > max(replayPart, s.replaySize-s.replayLeft)/2
}

// wakeups returns the channel that holds a token when there may be something
// to take.
func (s *subscriber) wakeups() <-chan struct{} { return s.ready }

// offer queues messages, or drops them and counts why. It does not block (I2).
func (s *subscriber) offer(messages ...*message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.enqueue(messages) {
		s.wake()
	}
}

// offerNow is offer, and writes at once, as far as the connection takes it, what
// comes while nothing is queued: to wake the reader's goroutine for it would cost as
// much as the write. It reports whether it tried.
func (s *subscriber) offerNow(messages ...*message) (tried bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	free := s.writeNow != nil && len(s.items) == 0 && s.lagged == 0
	if !s.enqueue(messages) {
		return false
	}
	if free {
		s.inFlight = len(s.items)
		if n, done := s.writeNow(s.items, messages[0].at); done {
			s.finishWrite(n)
		}
	}
	if len(s.items) > 0 {
		s.wake()
	}
	return free
}

// enqueue queues messages, or drops them, and reports whether it has queued one; mu
// is held.
func (s *subscriber) enqueue(messages []*message) (queued bool) {
	if s.draining {
		return false
	}
	for _, m := range messages {
		s.counters.published++
		if passed := s.pass(m); passed != nil {
			s.push(passed)
			s.trim(m.at)
			queued = true
		} else {
			s.counters.dropped[dropGate]++
		}
	}
	return queued
}

// directWrite writes what a connection takes of items at once, and returns how many
// bytes that is. If it is not done, the reader's goroutine goes on with it, and calls
// wrote.
type directWrite func(items []item, now time.Time) (n int, done bool)

// letWrite lets publishers write with f what comes while nothing is queued, until
// it is called with nil; once that returns, none does.
func (s *subscriber) letWrite(f directWrite) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.writeNow = f
}

// isBegun reports whether a message is written in part.
func (s *subscriber) isBegun() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.begun > 0
}

// pass returns the message to queue for m, or nil if its feed's gate is closed
// to it. When m opens the gate, the preface of m is queued.
func (s *subscriber) pass(m *message) *message {
	g, again := s.gates[m.feed], true
	if g == nil {
		g, again = &gate{since: m.at}, false
		s.gates[m.feed] = g
	}
	if m.first && g.open {
		*g = gate{since: m.at}
	}
	passes, opens := g.pass(m)
	switch {
	case !passes:
		return nil
	case !opens:
		return m
	}
	if p := m.preface(again); p != nil {
		s.counters.published++
		s.push(p)
		p.release()
	}
	return m.asOpening()
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

// droppable returns the index of the first item that may be dropped: neither in
// flight nor begun.
func (s *subscriber) droppable() int {
	if s.inFlight == 0 && s.begun > 0 {
		return 1
	}
	return s.inFlight
}

// remove drops each item from index lo on for which why returns a cause.
func (s *subscriber) remove(lo int, why func(item) cause) {
	rest := s.items[:lo]
	for _, it := range s.items[lo:] {
		if c := why(it); c == kept {
			rest = append(rest, it)
		} else {
			s.counters.dropped[c]++
			s.letGo(it)
		}
	}
	clear(s.items[len(rest):])
	s.items = rest
}

// letGo ends the hold of an item that is no longer queued.
func (s *subscriber) letGo(it item) {
	s.bytes -= it.size
	if it.replays != noReplay {
		s.replayLeft -= it.size
	}
	it.release()
}

// trim drops what is too old or too much, and what cannot be decoded without
// it: all up to the feed's next keyframe, queued already or yet to come.
func (s *subscriber) trim(now time.Time) {
	lo := s.droppable()
	tooSlow := s.isTooSlow(now)
	if lo == len(s.items) || now.Sub(s.items[lo].at) <= s.maxAge && s.bytes <= maxQueue && !tooSlow {
		return
	}
	most := maxQueue
	if s.bytes > maxQueue {
		most = maxQueue / 2
	}
	cut := make(map[string]*gate) // feeds that lost a message, until a later one opens them again
	rest := s.items[:lo]
	for _, it := range s.items[lo:] {
		why, g := kept, cut[it.feed]
		switch {
		case now.Sub(it.at) > s.maxAge || tooSlow && it.replays != noReplay:
			why = dropLag
		case s.bytes > most:
			why = dropBytes
		case g != nil && !g.opens(it.message):
			why = dropGate
		}
		if why == kept {
			if g != nil {
				delete(cut, it.feed)
				rest, it = s.reopen(rest, it)
			}
			rest = append(rest, it)
			continue
		}
		s.counters.dropped[why]++
		s.lagged++
		if g == nil {
			cut[it.feed] = &gate{since: it.at}
		}
		s.letGo(it)
	}
	clear(s.items[len(rest):])
	s.items = rest
	for f, g := range cut {
		if s.gates[f] != nil { // not removed in the meantime
			s.gates[f] = g
		}
	}
}

// reopen appends the preface that it needs, the first of its feed after what was
// dropped, and returns what to queue for it; mu is held.
func (s *subscriber) reopen(rest []item, it item) ([]item, item) {
	if p := it.preface(true); p != nil { // in the place of one that was dropped
		s.counters.published++
		s.bytes += p.size
		rest = append(rest, item{message: p})
	}
	if g := s.gates[it.feed]; g != nil {
		g.blind = it.info.hasVideo && it.info.blind
	}
	if m := it.asOpening(); m != it.message {
		s.bytes += m.size - it.size
		m.holders.Add(1)
		it.release()
		it.message = m
	}
	return rest, it
}

// take appends to b what to write next, and keeps it in flight until wrote:
// whole messages of at most limit bytes together, or the first alone if it is
// longer, cut at limit if cut is set.
func (s *subscriber) take(b [][]byte, limit int, cut bool, now time.Time) [][]byte {
	s.mu.Lock()
	s.trim(now)
	if s.replayLeft > 0 {
		limit = min(limit, replayPart) // what is written cannot be dropped
	}
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

// nextSize drops what is too old at now, and returns the payload of the first message
// that is left and not begun; 0 if there is none.
func (s *subscriber) nextSize(now time.Time) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.trim(now)
	if i := s.droppable(); i < len(s.items) {
		return s.items[i].size
	}
	return 0
}

// wrote ends the write of what take returned, n bytes of which were written.
func (s *subscriber) wrote(n int) progress {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.finishWrite(n)
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

// finishWrite takes out of the queue what the n bytes that were written of the
// items in flight complete; mu is held.
func (s *subscriber) finishWrite(n int) {
	n += s.begun
	done := 0
	for _, it := range s.items[:s.inFlight] {
		size := it.wireSize(s.form)
		if n < size {
			break
		}
		n -= size
		done++
		s.counters.delivered++
		s.counters.bytes += uint64(it.size)
		s.counters.frames += uint64(it.info.frames)
		if s.onLive != nil && it.feed != "" && it.isWatchable() {
			if delete(s.expected, it.feed); len(s.expected) == 0 {
				s.onLive()
			}
		}
		s.letGo(it)
	}
	left := s.inFlight - done // were in flight, and are not written
	s.begun, s.inFlight = n, 0
	s.items = slices.Delete(s.items, 0, done)
	if s.ended != nil {
		if s.muted != nil {
			s.removeMuted(s.muted, s.droppable(), left)
			s.muted = nil
		}
		s.remove(s.droppable(), func(it item) cause {
			if it.dead {
				return dropMuted
			}
			return kept
		})
		s.releaseWaiters()
	}
}

// removeFeed drops what is queued of a feed, and interrupts the write in
// progress if that holds some. When the channel it returns is closed, or at once
// when that is nil, no message of the feed will be begun (I6). The caller holds
// the lock that keeps new ones from being offered.
func (s *subscriber) removeFeed(feed string) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.gates, feed)
	delete(s.expected, feed)
	s.remove(s.droppable(), func(it item) cause {
		if it.feed == feed {
			return dropMuted
		}
		return kept
	})
	held := false
	for i := range s.items[:s.inFlight] {
		if s.items[i].feed == feed {
			s.items[i].dead, held = true, true
		}
	}
	if !held {
		return nil
	}
	return s.stopWrite()
}

// mute takes what f says is muted out of what is queued, and interrupts the write
// in progress if that holds some. When the channel it returns is closed, or at
// once when that is nil, no message that holds some will be begun (I6). The
// caller keeps new ones from being offered. What is offered before the channel is
// closed, after a lift, stays as it is.
func (s *subscriber) mute(f *sift) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.removeMuted(f, s.droppable(), len(s.items))
	if s.muted != nil && s.muted.blocked != f.blocked {
		f = newSift(f.blocked | s.muted.blocked)
	}
	if !slices.ContainsFunc(s.items[:s.inFlight], func(it item) bool { return f.touches(it.message) }) {
		return nil
	}
	s.muted = f
	return s.stopWrite()
}

// removeMuted takes what f says is muted out of the items from index lo to hi,
// which may still be dropped; mu is held.
func (s *subscriber) removeMuted(f *sift, lo, hi int) {
	if lo >= hi {
		return
	}
	rest := s.items[:lo]
	for _, it := range s.items[lo:hi] {
		if f.touches(it.message) {
			m := f.apply(it.message)
			s.letGo(it)
			if m == nil {
				s.counters.dropped[dropMuted]++
				continue
			}
			s.bytes += m.size
			it.message = m
		}
		rest = append(rest, it)
	}
	s.items = slices.Delete(s.items, len(rest), hi)
}

// countMuted counts a message that was not offered since all of it is muted.
func (s *subscriber) countMuted() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.draining {
		s.counters.published++
		s.counters.dropped[dropMuted]++
	}
}

// stopWrite interrupts the write in progress, and returns a channel that is
// closed when it has ended; mu is held.
func (s *subscriber) stopWrite() <-chan struct{} {
	if s.ended != nil {
		return s.ended // that is done already
	}
	s.ended = make(chan struct{})
	if s.interrupt != nil {
		s.stopped = true
		s.interrupt()
	}
	return s.ended
}

// releaseWaiters wakes those who wait for the write in progress: it has ended.
func (s *subscriber) releaseWaiters() {
	if s.ended != nil {
		close(s.ended)
		s.ended = nil
	}
}

// drain makes s refuse new messages; what is queued can still be taken.
func (s *subscriber) drain() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.draining = true
	s.wake()
}

// drained reports whether drain was called and all that was queued is written.
func (s *subscriber) drained() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.draining && len(s.items) == 0
}

// unfinished appends the unwritten part of a message that is begun. The last
// write must have ended.
func (s *subscriber) unfinished(b [][]byte) [][]byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.begun > 0 {
		b = append(b, s.items[0].message.wire(s.form)[s.begun:])
	}
	return b
}

// end drops what is left and returns the final counters. No write may be in
// progress, and the reader must have left the mux.
func (s *subscriber) end() counters {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.inFlight, s.begun = 0, 0
	s.remove(0, func(item) cause { return dropEnd })
	s.releaseWaiters()
	return s.counters
}

// count returns the counters so far and how many messages are queued.
func (s *subscriber) count() (c counters, queued int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.counters, len(s.items)
}

// age returns how long the oldest message has been queued.
func (s *subscriber) age(now time.Time) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.items) == 0 {
		return 0
	}
	return max(0, now.Sub(s.items[0].at))
}

// item is a message in a queue. dead is set while it is in flight: it is
// dropped if the write did not begin it.
type item struct {
	*message
	dead bool
}

// gate is whether messages of one feed pass to one reader (I5).
type gate struct {
	open  bool
	blind bool      // open, but only to sound: the video did not come
	since time.Time // when it closed, or since when the video comes again
}

// pass reports whether m passes, and whether it is the first after a gap. A gate
// that opened without video passes that from its next keyframe on.
func (g *gate) pass(m *message) (passes, opens bool) {
	switch {
	case g.open && !g.blind:
		return true, false
	case g.open && (m.info.blind || m.info.soundOnly):
		if m.info.blind {
			g.since = m.at
		}
		return true, false
	case !g.opens(m):
		return false, false
	}
	g.open, g.blind = true, m.info.hasVideo && m.info.blind
	return true, true
}

// opens reports whether m may be the first of its feed after a gap.
func (g *gate) opens(m *message) bool {
	switch i := &m.info; {
	case i.key || i.anew:
		return true
	case !i.hasVideo || i.blind:
		return i.start
	default:
		return i.start && !i.soundOnly && m.at.Sub(g.since) > noKeyframe
	}
}

// progress is the state of a queue after a write.
type progress struct {
	stopped bool   // a rule change interrupted the write
	partial bool   // a message is begun and not whole
	lagged  uint64 // messages dropped for a slow reader that has now caught up
}

// dropStats counts dropped messages by the name of their cause.
type dropStats map[string]uint64

const (
	maxQueue   = 16 << 20 // bytes queued for one reader
	noKeyframe = 5 * time.Second

	replayPatience = 8 // the part of maxAge after which it is judged how fast a replay goes
)
