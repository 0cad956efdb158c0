// Rules: what a hoster has asked for, and how a change of it is applied. One
// change at a time, each wholly or not at all (I9); no HTTP here.
//
// A change that only takes away is applied at once, and then stored. One that
// adds is stored first, and applied when it is on the disk; until then it is
// pending, and a newer change of the same rule revokes it. When it takes
// something away, too, it does not wait longer for a disk that hangs than a
// change that only takes away. Nobody waits for the disk with mu held (I6).

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	maxEndWait = 50 * time.Millisecond // for writes in progress that hold what was muted
	shortWait  = 90 * time.Millisecond // from call to return, of a change that takes something away
	longWait   = 5 * time.Second       // the same, of one that only adds
	endWait    = time.Second           // for the disk, when vw ends
)

// rules are the rule set and what runs for it. Safe for concurrent use.
type rules struct {
	// static after construction
	ctx    context.Context // ends every destination
	mux    *mux
	dialer dialer // of every way to a relay
	maxLag time.Duration
	file   *stateFile // nil: the rules end with vw
	log    *slog.Logger
	tasks  sync.WaitGroup // the goroutines of destinations and take-overs

	mu           sync.RWMutex // held while a change is applied, which may take 100 ms
	streams      map[string][]string
	places       map[string][]string // of a stream: the order of its feeds, and of those that it had
	destinations map[string]*running
	mutes        muteSet
	mutedSince   [2]time.Time             // by kind: when it was muted
	ending       map[<-chan struct{}]bool // closed when what held something that was taken away has ended
	pending      []*change                // not applied yet, oldest first
	unstored     []*change                // that the next write stores; the pending ones are among them
}

func newRules(ctx context.Context, x *mux, maxLag time.Duration, log *slog.Logger) *rules {
	return &rules{
		ctx: ctx, mux: x, dialer: newDialer(), maxLag: maxLag, log: log,
		streams: make(map[string][]string), places: make(map[string][]string), destinations: make(map[string]*running),
		ending: make(map[<-chan struct{}]bool),
	}
}

// keep makes the rules in the state file called name those of r, and the file
// follow r from now on. It is called once, before any other method.
func (r *rules) keep(name string) error {
	file, set, err := openState(name, r.log)
	if err != nil {
		return err
	}
	r.mute(set.mutes)
	for name, feeds := range set.streams {
		r.mu.Lock()
		r.carryOut(r.streamChange(streamRule{name, feeds}), time.Now(), atOnce)
	}
	for _, rule := range set.destinations {
		r.mu.Lock()
		r.carryOut(r.destinationChange(rule), time.Now(), atOnce)
	}
	r.file = file
	file.start(r.ctx, r.snapshot, r.stored)
	return nil
}

// wait returns when nothing runs any more; ctx must be done. A disk that hangs
// is left behind after a while.
func (r *rules) wait() {
	r.tasks.Wait()
	if r.file != nil {
		r.file.wait(endWait)
	}
}

// tryLocks returns when each lock on the way of rule changes and of video could
// be taken once.
func (r *rules) tryLocks() {
	r.mu.RLock()
	defer r.mu.RUnlock()
	r.mux.tryLocks()
}

// ruleKey names a rule: of a stream or of a destination.
type ruleKey struct{ kind, name string }

// change is what one call changes. Guarded by rules.mu, but for result.
type change struct {
	key     ruleKey               // of the rule that it sets; zero: it sets none
	lifts   muteSet               // of a change that lifts a mute; a newer mute takes its own out
	put     func(*ruleSet)        // does to a copy of the rules what apply does to them
	apply   func() (after func()) // does it, with mu held; after is the rest, without mu
	takes   bool                  // takes away something that is in force
	mute    *change               // of the same call, which is applied already and does not wait longer than for that; nil: none
	applied bool
	after   func()            // what apply returned
	ending  []<-chan struct{} // what has to end before its call may return
	result  chan error        // what the disk said
}

// finish does what is left to do of a change that is applied, without mu.
func (c *change) finish() {
	awaitEnds(c.ending)
	c.after()
}

// carryOut applies and stores c, and returns when both are done, or when the
// disk does not answer in time. mu is held when it is called, and is not when
// it returns.
func (r *rules) carryOut(c *change, begun time.Time, atOnce bool) error {
	c.result = make(chan error, 1)
	if atOnce || r.file == nil {
		r.applyChange(c)
	} else {
		r.pending = append(r.pending, c)
	}
	if r.file != nil {
		r.unstored = append(r.unstored, c)
		r.file.request()
	}
	applied := c.applied
	r.mu.Unlock()
	if c.mute != nil {
		c.mute.finish()
	}
	if applied {
		c.finish()
	}
	if r.file == nil {
		return nil
	}
	err := r.awaitDisk(c, begun)
	if !applied && c.applied {
		c.finish()
	}
	return err
}

const atOnce = true // before it is stored

// awaitDisk waits until c is stored. When the disk does not answer in time, a
// change that takes something away is applied, and one that only adds is not.
func (r *rules) awaitDisk(c *change, begun time.Time) error {
	wait := longWait
	if c.takes || c.mute != nil {
		wait = shortWait
		if r.file.hangs(shortWait) && !r.file.isSlow() {
			wait = 0
		}
	}
	late := time.NewTimer(time.Until(begun.Add(wait)))
	defer late.Stop()
	select {
	case err := <-c.result:
		return err
	case <-late.C:
	case <-r.ctx.Done():
		late.Reset(min(endWait, time.Until(begun.Add(wait))))
		select {
		case err := <-c.result:
			return err
		case <-late.C:
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	select {
	case err := <-c.result:
		return err
	default:
	}
	r.unstored = slices.DeleteFunc(r.unstored, func(o *change) bool { return o == c }) // nobody waits for its result
	if i := slices.Index(r.pending, c); i >= 0 && c.takes {
		r.applyChange(c)
	} else if i >= 0 {
		r.pending = slices.Delete(r.pending, i, i+1)
		r.file.request() // the write that hangs may store c
	}
	switch slow := r.file.isSlow(); {
	case slow && c.applied:
		return errBeingStored
	case !slow:
		r.file.tellHang()
	}
	return notStored(c, errDiskHangs)
}

// errBeingStored: the change is in force, and a disk that is known to be slow has
// yet to say that it is stored. The log is told if it is not.
var errBeingStored = errors.New("in force, being stored")

// snapshot returns the rules as they are to be stored, with those pending, and
// the changes that made them so.
func (r *rules) snapshot() (ruleSet, []*change) {
	r.mu.Lock()
	defer r.mu.Unlock()
	changes := r.unstored
	r.unstored = nil
	return r.planned(), changes
}

// planned returns a copy of the rules as they are when all that is pending is
// applied; mu is held.
func (r *rules) planned() ruleSet {
	set := r.inForce()
	for _, c := range r.pending {
		c.put(&set)
	}
	return set
}

// stored takes what the disk said of the changes that snapshot returned, and
// applies those that waited for it.
func (r *rules) stored(changes []*change, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range changes {
		if i := slices.Index(r.pending, c); i >= 0 && (err == nil || errors.As(err, new(unsyncedError))) {
			r.applyChange(c)
		} else if i >= 0 {
			r.pending = slices.Delete(r.pending, i, i+1)
		}
		if err != nil {
			c.result <- notStored(c, err)
		} else {
			c.result <- nil
		}
	}
}

// notStoredError: the state file could not be written. It says what that means
// for the change.
type notStoredError struct {
	meaning string
	error
}

func (e notStoredError) Error() string { return e.meaning + ": " + e.error.Error() }
func (e notStoredError) Unwrap() error { return e.error }

// notStored is err, as the caller of c is told. mu is held.
func notStored(c *change, err error) error {
	switch {
	case c.applied && errors.As(err, new(unsyncedError)):
		return notStoredError{"in force and stored, but a power cut may undo it", err}
	case c.applied:
		return notStoredError{"in force, not stored", err}
	}
	return notStoredError{"nothing has changed", err}
}

// applyChange makes c what runs; mu is held. What is pending of the same rule,
// and older, is revoked.
func (r *rules) applyChange(c *change) {
	r.revoke(c.key, c)
	c.after = c.apply()
	c.ending = r.unended()
	c.applied = true
}

// ends notes what has to end since something was taken away: writes in progress,
// and connections. mu is held.
func (r *rules) ends(ended ...<-chan struct{}) {
	for _, e := range ended {
		r.ending[e] = true
	}
}

// unended returns what has not ended yet of what calls took away, this one and
// those before it: who asks again for what is in force already must not be told
// so before they are. mu is held.
func (r *rules) unended() []<-chan struct{} {
	maps.DeleteFunc(r.ending, func(e <-chan struct{}, _ bool) bool {
		select {
		case <-e:
			return true
		default:
			return false
		}
	})
	return slices.Collect(maps.Keys(r.ending))
}

// unlockEnded unlocks mu, and waits as the call did that took something away: the
// one of now changes nothing.
func (r *rules) unlockEnded() {
	ending := r.unended()
	r.mu.Unlock()
	awaitEnds(ending)
}

// revoke keeps the changes of a rule that are pending, and older than c, from
// being applied, and c from being so twice. It reports whether there was an
// older one; mu is held.
func (r *rules) revoke(key ruleKey, c *change) (revoked bool) {
	newer := false
	r.pending = slices.DeleteFunc(r.pending, func(p *change) bool {
		if p == c {
			newer = true
			return true
		}
		older := p.key == key && key != ruleKey{} && !newer
		revoked = revoked || older
		return older
	})
	return revoked
}

// countDestinations returns how many destinations there are.
func (r *rules) countDestinations() int {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return len(r.destinations)
}

// set returns a copy of the rules in force.
func (r *rules) set() ruleSet {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.inForce()
}

// inForce is set with mu held.
func (r *rules) inForce() ruleSet {
	set := ruleSet{maps.Clone(r.streams), make(map[string]destinationRule, len(r.destinations)), r.mutes}
	for name, d := range r.destinations {
		set.destinations[name] = d.rule
	}
	return set
}

// isStored reports whether the state file, if there is one, has the rules in
// force; mu is held.
func (r *rules) isStored() bool { return r.file == nil || r.file.isCurrent() }

// setStream adds or changes a stream, and returns the rule as it is stored.
// When it returns, no message of a feed that the rule no longer has will be
// begun (I6).
func (r *rules) setStream(rule streamRule) (streamRule, error) {
	begun := time.Now()
	rule, err := rule.clean()
	if err != nil {
		return rule, err
	}
	r.mu.Lock()
	return r.replaceStream(rule, begun)
}

// editStream adds feeds to a stream and takes feeds out of it, whatever others it
// has now: of two callers who edit it at once, neither undoes what the other does.
// A feed that comes back gets the place that it had.
func (r *rules) editStream(e streamEdit) (streamRule, error) {
	begun := time.Now()
	e, err := e.clean()
	if err != nil {
		return streamRule{}, err
	}
	r.mu.Lock()
	feeds, known := r.planned().streams[e.Stream]
	if !known {
		r.mu.Unlock()
		return streamRule{}, fmt.Errorf("stream %q %w", e.Stream, errNotFound)
	}
	feeds = e.apply(feeds, r.places[e.Stream])
	if len(feeds) > maxFeeds {
		r.mu.Unlock()
		return streamRule{}, tooManyFeeds(e.Stream, feeds)
	}
	return r.replaceStream(streamRule{e.Stream, feeds}, begun)
}

// replaceStream makes rule, which is clean, that of its stream; it is called with
// mu held and unlocks it.
func (r *rules) replaceStream(rule streamRule, begun time.Time) (streamRule, error) {
	old, known := r.streams[rule.Stream]
	planned := r.planned()
	next, expected := planned.streams[rule.Stream]
	switch {
	case known && slices.Equal(old, rule.Feeds) && slices.Equal(next, rule.Feeds) && r.isStored():
		r.unlockEnded()
		return rule, nil
	case !known && !expected && len(planned.streams) >= maxStreams:
		r.mu.Unlock()
		return rule, fmt.Errorf("stream %q: there are %d streams: %w", rule.Stream, len(planned.streams), errFull)
	}
	adds := !subset(rule.Feeds, old)
	c := r.streamChange(rule)
	c.takes = !adds || !subset(old, rule.Feeds) || !subset(next, rule.Feeds)
	return rule, r.carryOut(c, begun, !adds)
}

// streamChange is the change to rule.
func (r *rules) streamChange(rule streamRule) *change {
	return &change{
		key: ruleKey{"stream", rule.Stream},
		put: func(set *ruleSet) { set.streams[rule.Stream] = rule.Feeds },
		apply: func() func() {
			r.streams[rule.Stream] = rule.Feeds
			r.places[rule.Stream] = placesOf(rule.Feeds, r.places[rule.Stream])
			r.ends(r.mux.setStream(rule.Stream, rule.Feeds, true)...)
			return func() {
				r.log.Info("stream set", "stream", rule.Stream, "feeds", strings.Join(rule.Feeds, " "))
			}
		},
	}
}

// stream returns the feeds of a stream, or errNotFound.
func (r *rules) stream(name string) ([]string, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	feeds, ok := r.streams[name]
	if !ok {
		return nil, fmt.Errorf("stream %q %w", name, errNotFound)
	}
	return feeds, nil
}

// allStreams returns a copy of the stream rules.
func (r *rules) allStreams() map[string][]string { return r.set().streams }

// deleteStream removes a stream. When it returns, no message of its feeds will
// be begun on it (I6).
func (r *rules) deleteStream(name string) error {
	begun := time.Now()
	r.mu.Lock()
	_, known := r.streams[name]
	if !r.revoke(ruleKey{"stream", name}, nil) && !known {
		r.unlockEnded()
		return fmt.Errorf("stream %q %w", name, errNotFound)
	}
	return r.carryOut(r.streamsDeletion(name), begun, atOnce)
}

// deleteStreams removes all streams.
func (r *rules) deleteStreams() error {
	begun := time.Now()
	r.mu.Lock()
	r.revokeAll("stream")
	return r.carryOut(r.streamsDeletion(slices.Collect(maps.Keys(r.streams))...), begun, atOnce)
}

// revokeAll keeps the pending changes of a kind of rule from being applied; mu
// is held.
func (r *rules) revokeAll(kind string) {
	r.pending = slices.DeleteFunc(r.pending, func(c *change) bool { return c.key.kind == kind })
}

// streamsDeletion is the change that deletes streams.
func (r *rules) streamsDeletion(names ...string) *change {
	return &change{takes: true, apply: func() func() {
		for _, name := range names {
			delete(r.streams, name)
			delete(r.places, name)
			r.ends(r.mux.setStream(name, nil, false)...)
		}
		return func() {
			for _, name := range names {
				r.log.Info("stream deleted", "stream", name)
			}
		}
	}}
}

// awaitEnds waits for writes in progress to end, for a while. Only TLS and
// HTTP writes cannot be interrupted; the message in such a write was begun
// before the call.
func awaitEnds(ended []<-chan struct{}) {
	if len(ended) == 0 {
		return
	}
	timeout := time.NewTimer(maxEndWait)
	defer timeout.Stop()
	for _, e := range ended {
		select {
		case <-e:
		case <-timeout.C:
			return
		}
	}
}

// setDestination adds or changes a destination, and returns the rule as it is
// stored. The same rule again changes nothing; *** keeps a secret as it is.
func (r *rules) setDestination(rule destinationRule) (destinationRule, error) {
	begun := time.Now()
	r.mu.Lock()
	planned := r.planned()
	rule, _, err := rule.keep(planned.destinations[strings.TrimPrefix(string(rule.ID), "/")]).clean()
	if err != nil {
		r.mu.Unlock()
		return rule, err
	}
	name := string(rule.ID)
	old, known := r.destinations[name]
	next, expected := planned.destinations[name]
	switch {
	case known && old.rule == rule && next == rule && r.isStored():
		r.unlockEnded()
		return rule, nil
	case !known && !expected && len(planned.destinations) >= maxDestinations:
		r.mu.Unlock()
		return rule, fmt.Errorf("destination %q: there are %d destinations: %w", name, len(planned.destinations), errFull)
	}
	c := r.destinationChange(rule)
	c.takes = known // the old way, if nothing else
	return rule, r.carryOut(c, begun, !atOnce)
}

// destinationChange is the change to rule, which is clean.
func (r *rules) destinationChange(rule destinationRule) *change {
	return &change{
		key: ruleKey{"destination", string(rule.ID)},
		put: func(set *ruleSet) { set.destinations[string(rule.ID)] = rule },
		apply: func() func() {
			r.runDestination(rule)
			return func() {}
		},
	}
}

// runDestination starts a destination; mu is held. A new URL for the same
// stream is opened beside the old one, which ends when the new one has taken
// over; any other change ends the old one now.
func (r *rules) runDestination(rule destinationRule) {
	was := r.destinations[string(rule.ID)]
	if was != nil && was.rule == rule {
		return
	}
	up := newUplink(rule, r.dialer, r.log.With("dest", string(rule.ID), "stream", rule.Stream))
	up.log.Info("destination set")
	if was != nil && was.rule.Stream != rule.Stream {
		was.stop(errChanged)
		was = nil
	}
	r.destinations[string(rule.ID)] = startBeside(r.ctx, &r.tasks, was, newDestination(up, r.mux, r.maxLag))
}

// destination returns a rule, or errNotFound.
func (r *rules) destination(name string) (destinationRule, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	d := r.destinations[name]
	if d == nil {
		return destinationRule{}, fmt.Errorf("destination %q %w", name, errNotFound)
	}
	return d.rule, nil
}

// allDestinations returns a copy of the destination rules.
func (r *rules) allDestinations() map[string]destinationRule { return r.set().destinations }

// destinationStats looks at what runs, by id.
func (r *rules) destinationStats(now time.Time) map[string]*destinationStats {
	r.mu.RLock()
	running := maps.Clone(r.destinations)
	r.mu.RUnlock()
	all := make(map[string]*destinationStats, len(running))
	for name, d := range running {
		all[name] = d.stats(now)
	}
	return all
}

// deleteDestination removes a destination. When it returns, nothing more is
// written to its relay (I6).
func (r *rules) deleteDestination(name string) error {
	begun := time.Now()
	r.mu.Lock()
	_, known := r.destinations[name]
	if !r.revoke(ruleKey{"destination", name}, nil) && !known {
		r.unlockEnded()
		return fmt.Errorf("destination %q %w", name, errNotFound)
	}
	return r.carryOut(r.destinationsDeletion(name), begun, atOnce)
}

// deleteDestinations removes all destinations.
func (r *rules) deleteDestinations() error {
	begun := time.Now()
	r.mu.Lock()
	r.revokeAll("destination")
	return r.carryOut(r.destinationsDeletion(slices.Collect(maps.Keys(r.destinations))...), begun, atOnce)
}

// destinationsDeletion is the change that deletes destinations.
func (r *rules) destinationsDeletion(names ...string) *change {
	return &change{takes: true, apply: func() func() {
		var gone []*running
		for _, name := range names {
			if d := r.destinations[name]; d != nil {
				delete(r.destinations, name)
				r.ends(d.end(errRemoved)...)
				gone = append(gone, d)
			}
		}
		return func() {
			for _, d := range gone {
				d.stop(errRemoved)
			}
		}
	}}
}

// mute mutes what was muted when vw ended, or is from the start. It is called
// before there is a destination.
func (r *rules) mute(what muteSet) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.applyMutes(r.mutes | what)
}

// muteStatus returns what is muted, as a hand is told, and since when.
func (r *rules) muteStatus(asks hand) (s muteStatus, since map[string]time.Time) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	since = make(map[string]time.Time)
	for kind, name := range mediaKinds {
		if r.mutes.by(kind) != nil {
			since[name] = r.mutedSince[kind]
		}
	}
	return r.mutes.status(asks), since
}

// setMute changes what a hand has muted. When it returns, no message that holds
// what is muted will be begun (I6). A mute is in force whether it can be stored
// or not; a lift is stored first, and a mute that comes meanwhile wins.
func (r *rules) setMute(rule muteRule, by hand) (muteStatus, error) {
	begun := time.Now()
	mutes, lifts, err := rule.clean(by)
	if err != nil {
		return muteStatus{}, err
	}
	r.mu.Lock()
	revoked := false
	for _, c := range r.pending {
		revoked = revoked || c.lifts&mutes != 0
		c.lifts &^= mutes
	}
	again := mutes != 0 && mutes&^r.mutes == 0 && !revoked && r.isStored()
	lift := r.liftChange(lifts)
	switch {
	case lifts&r.mutes != 0:
		if mutes != 0 {
			lift.mute = r.muteChange(mutes)
			r.applyChange(lift.mute)
		}
		err = r.carryOut(lift, begun, !atOnce)
	case again:
		r.unlockEnded()
	case mutes != 0:
		err = r.carryOut(r.muteChange(mutes), begun, atOnce)
	default:
		r.mu.Unlock()
	}
	r.mu.RLock()
	status := r.mutes.status(by)
	r.mu.RUnlock()
	if bad := (notStoredError{}); mutes != 0 && lifts != 0 && !lift.applied && errors.As(err, &bad) {
		err = notStoredError{"what is muted is in force, and nothing is lifted", bad.error}
	}
	return status, err
}

// muteChange is the change that mutes.
func (r *rules) muteChange(mutes muteSet) *change {
	return &change{takes: true, apply: func() func() { return r.applyMutes(r.mutes | mutes) }}
}

// liftChange is the change that lifts mutes.
func (r *rules) liftChange(lifts muteSet) *change {
	c := &change{lifts: lifts}
	c.put = func(set *ruleSet) { set.mutes &^= c.lifts }
	c.apply = func() func() { return r.applyMutes(r.mutes &^ c.lifts) }
	return c
}

// applyMutes makes mutes what is muted; mu is held. after is as of a change.
func (r *rules) applyMutes(mutes muteSet) (after func()) {
	was := r.mutes
	r.mutes = mutes
	var muted kindSet
	for kind, track := range []trackKind{soundTrack, pictureTrack} {
		if mutes.by(kind) == nil {
			continue
		}
		muted |= kindsOf(track)
		if was.by(kind) == nil {
			r.mutedSince[kind] = time.Now()
		}
	}
	r.ends(r.mux.setMute(muted)...)
	return func() {
		for by, name := range handNames {
			for kind, what := range mediaKinds {
				bit := muteOf(hand(by), kind)
				switch {
				case mutes&^was&bit != 0:
					r.log.Info("muted", "kind", what, "by", name)
				case was&^mutes&bit != 0:
					r.log.Info("mute lifted", "kind", what, "by", name)
				}
			}
		}
	}
}
