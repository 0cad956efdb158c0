// Rules: what a hoster has asked for, its validation, and how a change is
// applied. One change at a time, each wholly or not at all (I9); no HTTP here.

package main

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// rules are the rule set and what runs for it. Safe for concurrent use.
type rules struct {
	ctx    context.Context // ends every destination
	mux    *mux
	dial   func(ctx context.Context, network, address string) (net.Conn, error)
	proxy  func(*http.Request) (*url.URL, error) // on the way to a relay; nil: none
	roots  *x509.CertPool                        // that vouch for relays; nil: the system's
	maxLag time.Duration
	file   string // the state file; "": none
	log    *slog.Logger
	tasks  sync.WaitGroup // the goroutines of destinations, take-overs and the state file

	storing sync.Mutex                        // held while the set is written, and while something is added; taken before mu
	behind  atomic.Bool                       // the file is not the set
	save    func(file string, b []byte) error // writeState, but in tests

	mu           sync.RWMutex // held while a change is applied, which may take 50 ms
	streams      map[string][]string
	destinations map[string]*running
	adding       change // is being written, and applied then; the zero value: none, or it was taken back
}

// change is the rule that an addition is about.
type change struct {
	what string // "stream" or "destination"
	name string
}

func newRules(ctx context.Context, x *mux, maxLag time.Duration, log *slog.Logger) *rules {
	dialer := &net.Dialer{Control: limitUnsent}
	return &rules{
		ctx: ctx, mux: x, dial: dialer.DialContext, maxLag: maxLag, log: log,
		save: writeState, streams: make(map[string][]string), destinations: make(map[string]*running),
	}
}

// keep makes the rules in the state file called name those of r, and the file
// follow r from now on. It is called once, before any other method.
func (r *rules) keep(name string) error {
	set, err := readState(name)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for name, feeds := range set.streams {
		r.applyStream(streamRule{name, feeds})
	}
	for _, rule := range set.destinations {
		r.applyDestination(rule)
	}
	r.file = name
	r.tasks.Go(r.catchUp)
	return nil
}

// catchUp tries again to write the state file when that has failed.
func (r *rules) catchUp() {
	again := time.NewTicker(10 * time.Second)
	defer again.Stop()
	for r.ctx.Err() == nil {
		select {
		case <-again.C:
		case <-r.ctx.Done():
		}
		if r.behind.Load() && r.store() == nil {
			r.log.Info("the rules are stored again")
		}
	}
}

// errNotStored: the state file could not be written.
type errNotStored struct {
	inForce string // what that means for the change
	error
}

func (e errNotStored) Error() string { return e.inForce + ": " + e.error.Error() }

// store writes the set as it is to the state file, after a change that only
// takes away: a full disk does not keep a mute from being in force.
func (r *rules) store() error {
	r.storing.Lock()
	defer r.storing.Unlock()
	if err := r.write(r.set()); err != nil {
		return errNotStored{"in force, not stored", err}
	}
	return nil
}

// set returns a copy of the rules.
func (r *rules) set() ruleSet {
	return ruleSet{r.allStreams(), r.allDestinations()}
}

// write makes set the content of the state file; storing is held.
func (r *rules) write(set ruleSet) error {
	if r.file == "" {
		return nil
	}
	err := r.save(r.file, set.encode())
	if was := r.behind.Swap(err != nil); !was && err != nil {
		r.log.Error("the rules are not stored", "err", err)
	}
	return err
}

// setStream adds or changes a stream. When it returns, no message of a feed
// that the rule no longer has will be begun (I6).
func (r *rules) setStream(rule streamRule) (streamRule, error) {
	rule, err := rule.clean()
	if err != nil {
		return rule, err
	}
	if done, err := r.mute(rule); done {
		return rule, err
	}
	r.storing.Lock()
	defer r.storing.Unlock()
	set := r.begin(change{"stream", rule.Stream})
	if _, known := set.streams[rule.Stream]; !known && len(set.streams) >= maxStreams {
		return rule, fmt.Errorf("stream %q: there are %d streams: %w", rule.Stream, len(set.streams), errFull)
	}
	set.streams[rule.Stream] = rule.Feeds
	return rule, r.add(set, func() { r.applyStream(rule) })
}

// begin notes what is to be added, and returns a copy of the rules before it;
// storing is held.
func (r *rules) begin(c change) ruleSet {
	r.mu.Lock()
	r.adding = c
	r.mu.Unlock()
	return r.set()
}

// add stores a set with what is added, then applies that with mu held; storing
// is held. What was muted or deleted while the disk was written stays so: that
// came after this.
func (r *rules) add(set ruleSet, apply func()) error {
	err := r.write(set)
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil {
		return errNotStored{"nothing has changed", err}
	}
	if r.adding != (change{}) {
		apply()
	}
	return nil
}

// takeBack keeps an addition that is being written from being applied, and
// tells whether there was one; mu is held. A change without a name is for all.
func (r *rules) takeBack(c change) bool {
	if r.adding != c && (r.adding.what != c.what || c.name != "") {
		return false
	}
	r.adding = change{}
	return true
}

// mute sets a stream if the rule adds no feed to it.
func (r *rules) mute(rule streamRule) (done bool, err error) {
	r.mu.Lock()
	old, ok := r.streams[rule.Stream]
	for _, f := range rule.Feeds {
		ok = ok && slices.Contains(old, f)
	}
	stored := ok && slices.Equal(old, rule.Feeds) && !r.behind.Load()
	if ok && r.takeBack(change{"stream", rule.Stream}) {
		stored = false
	}
	if ok && !slices.Equal(old, rule.Feeds) {
		r.applyStream(rule)
	}
	r.mu.Unlock()
	switch {
	case !ok:
		return false, nil
	case stored:
		return true, nil
	}
	return true, r.store()
}

// applyStream is called with mu held.
func (r *rules) applyStream(rule streamRule) {
	r.streams[rule.Stream] = rule.Feeds
	await(r.mux.setStream(rule.Stream, rule.Feeds, true))
	r.log.Info("stream set", "stream", rule.Stream, "feeds", strings.Join(rule.Feeds, " "))
}

// stream returns the feeds of a stream, or errNotFound.
func (r *rules) stream(name string) ([]string, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	feeds, ok := r.streams[name]
	if !ok {
		return nil, fmt.Errorf("stream %q: %w", name, errNotFound)
	}
	return feeds, nil
}

// allStreams returns a copy of the stream rules.
func (r *rules) allStreams() map[string][]string {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return maps.Clone(r.streams)
}

// deleteStream removes a stream, as setStream without feeds would silence it.
func (r *rules) deleteStream(name string) error {
	r.mu.Lock()
	_, ok := r.streams[name]
	if ok {
		r.takeBack(change{"stream", name})
		await(r.dropStream(name))
	}
	r.mu.Unlock()
	if !ok {
		return fmt.Errorf("stream %q: %w", name, errNotFound)
	}
	return r.store()
}

// deleteStreams removes all streams.
func (r *rules) deleteStreams() error {
	r.mu.Lock()
	r.takeBack(change{"stream", ""})
	var words []<-chan struct{}
	for name := range r.streams {
		words = append(words, r.dropStream(name)...)
	}
	await(words)
	r.mu.Unlock()
	return r.store()
}

// dropStream is called with mu held; the stream is silent when its words are.
func (r *rules) dropStream(name string) []<-chan struct{} {
	delete(r.streams, name)
	words := r.mux.setStream(name, nil, false)
	r.log.Info("stream deleted", "stream", name)
	return words
}

// await waits for send loops to say that no write is in progress, and at most
// 50 ms: only a write that nothing can interrupt takes so long, and what that
// holds was begun before.
func await(words []<-chan struct{}) {
	if len(words) == 0 {
		return
	}
	timeout := time.NewTimer(50 * time.Millisecond)
	defer timeout.Stop()
	for _, w := range words {
		select {
		case <-w:
		case <-timeout.C:
			return
		}
	}
}

// setDestination adds or changes a destination. The same rule again changes
// nothing; *** keeps a secret as it is.
func (r *rules) setDestination(rule destinationRule) (destinationRule, error) {
	r.storing.Lock()
	defer r.storing.Unlock()
	name := strings.TrimPrefix(string(rule.ID), "/")
	set := r.begin(change{"destination", name})
	rule, _, err := rule.keep(set.destinations[name]).clean()
	if err != nil {
		return rule, err
	}
	old, known := set.destinations[string(rule.ID)]
	if known && old == rule && !r.behind.Load() {
		return rule, nil
	}
	if !known && len(set.destinations) >= maxDestinations {
		return rule, fmt.Errorf("destination %q: there are %d destinations: %w", rule.ID, len(set.destinations), errFull)
	}
	set.destinations[string(rule.ID)] = rule
	return rule, r.add(set, func() { r.applyDestination(rule) })
}

// newDestination returns what a rule runs, without a log. The rule is clean.
func (r *rules) newDestination(rule destinationRule) *destination {
	u, err := url.Parse(rule.Destination)
	if err != nil {
		panic(err) // a rule is clean
	}
	return &destination{
		rule: rule, url: u, mux: r.mux, dial: r.dial, proxy: r.proxy, roots: r.roots, maxLag: r.maxLag,
	}
}

// applyDestination starts a destination; mu is held. A new URL for the same
// stream is opened beside the old one, which ends when the new one has taken
// over; any other change ends the old one now.
func (r *rules) applyDestination(rule destinationRule) {
	was := r.destinations[string(rule.ID)]
	if was != nil && was.rule == rule {
		return
	}
	d := r.newDestination(rule)
	d.log = r.log.With("dest", string(rule.ID), "stream", rule.Stream, "url", d.shown())
	is := &running{destination: d}
	if was != nil && was.rule.Stream == rule.Stream {
		is.old = append(slices.DeleteFunc(was.old, (*destination).ended), was.destination)
		if len(is.old) > maxOld { // the first is what viewers see, the others have not yet taken over
			is.old[1].stop(errChanged)
			is.old = slices.Delete(is.old, 1, 2)
		}
	} else if was != nil {
		was.stop(errChanged)
	}
	r.destinations[string(rule.ID)] = is
	d.log.Info("destination set")
	d.start(r.ctx, &r.tasks)
	if len(is.old) > 0 {
		r.tasks.Go(func() { handOver(was.destination, d) })
	}
}

// destination returns a rule, or errNotFound.
func (r *rules) destination(name string) (destinationRule, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	d := r.destinations[name]
	if d == nil {
		return destinationRule{}, fmt.Errorf("destination %q: %w", name, errNotFound)
	}
	return d.rule, nil
}

// allDestinations returns a copy of the destination rules.
func (r *rules) allDestinations() map[string]destinationRule {
	r.mu.RLock()
	defer r.mu.RUnlock()
	all := make(map[string]destinationRule, len(r.destinations))
	for name, d := range r.destinations {
		all[name] = d.rule
	}
	return all
}

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
	r.mu.Lock()
	d := r.destinations[name]
	if d != nil {
		r.takeBack(change{"destination", name})
		delete(r.destinations, name)
		d.stop(errRemoved)
	}
	r.mu.Unlock()
	if d == nil {
		return fmt.Errorf("destination %q: %w", name, errNotFound)
	}
	return r.store()
}

// deleteDestinations removes all destinations.
func (r *rules) deleteDestinations() error {
	r.mu.Lock()
	r.takeBack(change{"destination", ""})
	for _, d := range r.destinations {
		d.end(errRemoved)
	}
	for name, d := range r.destinations {
		delete(r.destinations, name)
		d.stop(errRemoved)
	}
	r.mu.Unlock()
	return r.store()
}
