// Rules: what a hoster has asked for, its validation, and how a change is
// applied. One change at a time, each wholly or not at all (I9); no HTTP here.

package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
)

// streamRule combines feeds into a stream; no feeds: everything muted.
type streamRule struct {
	Stream string   `json:"stream"`
	Feeds  []string `json:"feeds"`
}

// destinationRule sends a feed or stream to a relay.
type destinationRule struct {
	ID          id     `json:"id"`
	Stream      string `json:"stream"`
	Destination string `json:"destination"`
}

// id names a destination. In JSON a string, or a number as it is written.
type id string

func (i *id) UnmarshalJSON(b []byte) error {
	if b[0] == '"' {
		return json.Unmarshal(b, (*string)(i))
	}
	var n json.Number
	if err := json.Unmarshal(b, &n); err != nil || n == "" {
		return fmt.Errorf("id %.100s: it must be a string or a number", b)
	}
	*i = id(n)
	return nil
}

// errNotFound: there is no rule of that name.
var errNotFound = errors.New("there is none")

// invalidError is a rule, or a name, that is not allowed. It names the value
// and what is.
type invalidError struct{ text string }

func (e invalidError) Error() string { return e.text }

func invalid(format string, args ...any) error { return invalidError{fmt.Sprintf(format, args...)} }

const (
	maxName  = 256 // bytes
	maxFeeds = 64  // in a stream
)

var reserved = []string{"all", "deleteAll", "apiRule"}

// cleanName checks a name of what kind says, and takes one leading slash off.
func cleanName(kind, name string) (string, error) {
	name = strings.TrimPrefix(name, "/")
	if name == "" {
		return "", invalid("%s: the name is missing", kind)
	}
	if len(name) > maxName {
		return "", invalid("%s %.40q…: the name has %d bytes, at most %d are allowed", kind, name, len(name), maxName)
	}
	if slices.Contains(reserved, name) {
		return "", invalid("%s %q: the name is reserved", kind, name)
	}
	for segment := range strings.SplitSeq(name, "/") {
		if segment == "" || segment == "." || segment == ".." || strings.ContainsFunc(segment, func(r rune) bool {
			return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("._-", r))
		}) {
			return "", invalid("%s %q: a name is segments of A-Z a-z 0-9 . _ - joined by /, none of them empty, . or ..", kind, name)
		}
	}
	return name, nil
}

// cleanFeed checks the name of a feed.
func cleanFeed(name string) (string, error) {
	name, err := cleanName("feed", name)
	if err == nil && isStream(name) {
		return "", invalid("feed %q: a name that begins with stream/ is a stream's", name)
	}
	return name, err
}

// cleanStream checks the name of a stream.
func cleanStream(name string) (string, error) {
	name, err := cleanName("stream", name)
	if err == nil && !isStream(name) {
		return "", invalid("stream %q: the name of a stream begins with stream/", name)
	}
	return name, err
}

// clean returns the rule as it is stored.
func (r streamRule) clean() (streamRule, error) {
	name, err := cleanStream(r.Stream)
	if err != nil {
		return streamRule{}, err
	}
	if r.Feeds == nil {
		return streamRule{}, invalid(`stream %q: "feeds" is missing; [] mutes everything`, name)
	}
	if len(r.Feeds) > maxFeeds {
		return streamRule{}, invalid("stream %q: it has %d feeds, at most %d are allowed", name, len(r.Feeds), maxFeeds)
	}
	feeds := make([]string, 0, len(r.Feeds))
	for _, f := range r.Feeds {
		if f, err = cleanFeed(f); err != nil {
			return streamRule{}, err
		}
		if slices.Contains(feeds, f) {
			return streamRule{}, invalid("stream %q: the feed %q is there twice", name, f)
		}
		feeds = append(feeds, f)
	}
	return streamRule{name, feeds}, nil
}

// clean returns the rule as it is stored, and its URL.
func (r destinationRule) clean() (destinationRule, *url.URL, error) {
	none := destinationRule{}
	name, err := cleanName("id", string(r.ID))
	if err != nil {
		return none, nil, err
	}
	source, err := cleanName("stream", r.Stream)
	if err != nil {
		return none, nil, err
	}
	u, err := url.Parse(r.Destination)
	switch {
	case err != nil || strings.ContainsFunc(r.Destination, func(c rune) bool { return c <= ' ' || c >= 0x7f }):
		return none, nil, invalid("destination %.100q: not a URL", r.Destination)
	case u.Scheme != "ws" && u.Scheme != "wss":
		return none, nil, invalid("destination %.100q: the scheme is %q, it must be ws or wss", r.Destination, u.Scheme)
	case u.Hostname() == "":
		return none, nil, invalid("destination %.100q: the host is missing", r.Destination)
	case u.Fragment != "" || strings.Contains(r.Destination, "#"): // RFC 6455 3
		return none, nil, invalid("destination %.100q: a websocket URL has no fragment (#)", r.Destination)
	case !validPort(u.Port()):
		return none, nil, invalid("destination %.100q: the port is %s, it must be 1 to 65535", r.Destination, u.Port())
	}
	return destinationRule{id(name), source, r.Destination}, u, nil
}

func validPort(s string) bool {
	if s == "" {
		return true
	}
	_, err := net.LookupPort("tcp", s)
	return err == nil && strings.Trim(s, "0") != ""
}

// rules are the rule set and what runs for it. Safe for concurrent use.
type rules struct {
	ctx    context.Context // ends every destination
	mux    *mux
	dial   func(ctx context.Context, network, address string) (net.Conn, error)
	proxy  func(*http.Request) (*url.URL, error) // on the way to a relay; nil: none
	roots  *x509.CertPool                        // that vouch for relays; nil: the system's
	maxLag time.Duration
	log    *slog.Logger
	tasks  sync.WaitGroup // the goroutines of destinations and take-overs

	mu           sync.RWMutex
	streams      map[string][]string
	destinations map[string]*running
}

// running is a destination, and those that it is taking over from.
type running struct {
	*destination
	old []*destination
}

func newRules(ctx context.Context, x *mux, maxLag time.Duration, log *slog.Logger) *rules {
	dialer := &net.Dialer{Control: limitUnsent}
	return &rules{
		ctx: ctx, mux: x, dial: dialer.DialContext, maxLag: maxLag, log: log,
		streams: make(map[string][]string), destinations: make(map[string]*running),
	}
}

// setStream adds or changes a stream. When it returns, no message of a feed
// that the rule no longer has will be begun (I6).
func (r *rules) setStream(rule streamRule) (streamRule, error) {
	rule, err := rule.clean()
	if err != nil {
		return rule, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.streams[rule.Stream] = rule.Feeds
	await(r.mux.setStream(rule.Stream, rule.Feeds, true))
	r.log.Info("stream set", "stream", rule.Stream, "feeds", strings.Join(rule.Feeds, " "))
	return rule, nil
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
	defer r.mu.Unlock()
	if _, ok := r.streams[name]; !ok {
		return fmt.Errorf("stream %q: %w", name, errNotFound)
	}
	await(r.dropStream(name))
	return nil
}

// deleteStreams removes all streams.
func (r *rules) deleteStreams() {
	r.mu.Lock()
	defer r.mu.Unlock()
	var words []<-chan struct{}
	for name := range r.streams {
		words = append(words, r.dropStream(name)...)
	}
	await(words)
}

// dropStream is called with mu held; the stream is silent when its words are.
func (r *rules) dropStream(name string) []<-chan struct{} {
	delete(r.streams, name)
	r.log.Info("stream deleted", "stream", name)
	return r.mux.setStream(name, nil, false)
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
// nothing. A new URL for the same stream is opened beside the old one, which
// ends when the new one has taken over; any other change ends the old one now.
func (r *rules) setDestination(rule destinationRule) (destinationRule, error) {
	rule, u, err := rule.clean()
	if err != nil {
		return rule, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	was := r.destinations[string(rule.ID)]
	if was != nil && was.rule == rule {
		return rule, nil
	}
	d := &destination{
		rule: rule, url: u, mux: r.mux, dial: r.dial, proxy: r.proxy, roots: r.roots, maxLag: r.maxLag,
		log: r.log.With("dest", string(rule.ID), "stream", rule.Stream, "url", u.Scheme+"://"+u.Host+u.EscapedPath()),
	}
	is := &running{destination: d}
	if was != nil && was.rule.Stream == rule.Stream {
		is.old = append(slices.DeleteFunc(was.old, (*destination).ended), was.destination)
	} else if was != nil {
		was.stop()
	}
	r.destinations[string(rule.ID)] = is
	d.log.Info("destination set")
	d.start(r.ctx, &r.tasks)
	if len(is.old) > 0 {
		r.tasks.Go(func() { handOver(was.destination, d) })
	}
	return rule, nil
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
	old.stop()
}

// stop ends the destination and those before it (I6).
func (d *running) stop() {
	for _, old := range d.old {
		old.cancel(errRemoved)
	}
	d.destination.stop()
	for _, old := range d.old {
		old.stop()
	}
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

// deleteDestination removes a destination. When it returns, nothing more is
// written to its relay (I6).
func (r *rules) deleteDestination(name string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	d := r.destinations[name]
	if d == nil {
		return fmt.Errorf("destination %q: %w", name, errNotFound)
	}
	delete(r.destinations, name)
	d.stop()
	return nil
}

// deleteDestinations removes all destinations.
func (r *rules) deleteDestinations() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, d := range r.destinations {
		d.cancel(errRemoved)
	}
	for name, d := range r.destinations {
		delete(r.destinations, name)
		d.stop()
	}
}

// decode reads exactly one JSON value, without fields that v has not.
func decode(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return invalid("JSON: %.200s", strings.TrimPrefix(err.Error(), "json: "))
	}
	if len(bytes.TrimSpace(b[d.InputOffset():])) > 0 {
		return invalid("JSON: more after the end of the rule: %.40q", bytes.TrimSpace(b[d.InputOffset():]))
	}
	return nil
}
