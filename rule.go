// One rule: names, URLs and secrets, and what of them is allowed. Plain data.
//
// The secrets of a rule are its token, the values of its headers, and the
// userinfo of its URL. They are stored and sent; answers, the log and errors
// show *** in their place.

package main

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"net"
	"net/http"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

const (
	hidden = "***"

	maxToken  = 4096 // bytes
	maxFields = 16
	maxField  = 4096 // bytes in the name or the value of a header
)

const (
	maxName  = 256  // bytes
	maxFeeds = 64   // in a stream
	maxURL   = 4096 // bytes

	maxStreams      = 256
	maxDestinations = 1024
	maxOld          = 4 // connections that a destination takes over from
)

// streamRule combines feeds into a stream; no feeds: everything muted.
type streamRule struct {
	Stream string   `json:"stream"`
	Feeds  []string `json:"feeds"`
}

// clean returns the rule as it is stored.
func (r streamRule) clean() (streamRule, error) {
	if r.Stream == "" {
		return streamRule{}, invalid(`"stream" is missing: a name such as "stream/front"`)
	}
	name, err := cleanStream(r.Stream)
	if err != nil {
		return streamRule{}, err
	}
	if r.Feeds == nil {
		return streamRule{}, invalid(`stream %q: "feeds" is missing; [] mutes everything`, name)
	}
	if len(r.Feeds) > maxFeeds {
		return streamRule{}, tooManyFeeds(name, r.Feeds)
	}
	feeds := make([]string, 0, len(r.Feeds))
	for _, f := range r.Feeds {
		if f, err = cleanFeed(f); err != nil {
			return streamRule{}, err
		}
		if slices.Contains(feeds, f) {
			return streamRule{}, invalid("stream %q: the feed %q is listed twice", name, f)
		}
		feeds = append(feeds, f)
	}
	return streamRule{name, feeds}, nil
}

func tooManyFeeds(stream string, feeds []string) error {
	return invalid("stream %q: it has %d feeds, at most %d are allowed", stream, len(feeds), maxFeeds)
}

// streamEdit is what can be asked of a stream: all its feeds, or some to add
// (with) and to take out (without).
type streamEdit struct {
	Stream  string   `json:"stream"`
	Feeds   []string `json:"feeds"`
	With    []string `json:"with"`
	Without []string `json:"without"`
}

// isWhole reports whether e has all feeds of the stream.
func (e streamEdit) isWhole() bool { return e.With == nil && e.Without == nil }

// clean returns an edit of some feeds with clean names.
func (e streamEdit) clean() (streamEdit, error) {
	if e.Feeds != nil {
		return e, invalid(`stream %q: "feeds" are all feeds, which leaves nothing for "with" and "without"`, e.Stream)
	}
	with, err := streamRule{e.Stream, append([]string{}, e.With...)}.clean()
	if err != nil {
		return e, err
	}
	without, err := streamRule{e.Stream, append([]string{}, e.Without...)}.clean()
	return streamEdit{Stream: with.Stream, With: with.Feeds, Without: without.Feeds}, err
}

// apply returns feeds with the edit made, in the order of places.
func (e streamEdit) apply(feeds, places []string) []string {
	all := slices.Clone(feeds)
	for _, f := range e.With {
		if !slices.Contains(all, f) {
			all = append(all, f)
		}
	}
	all = slices.DeleteFunc(all, func(f string) bool { return slices.Contains(e.Without, f) })
	slices.SortStableFunc(all, func(a, b string) int {
		return cmp.Compare(uint(slices.Index(places, a)), uint(slices.Index(places, b))) // what has none is last
	})
	return all
}

// placesOf returns the order of feeds, with those that had a place and are no
// longer among them where they were.
func placesOf(feeds, places []string) []string {
	if !subset(feeds, places) || !slices.IsSortedFunc(feeds, func(a, b string) int {
		return cmp.Compare(slices.Index(places, a), slices.Index(places, b))
	}) {
		places = slices.Concat(feeds, slices.DeleteFunc(slices.Clone(places), func(f string) bool { return slices.Contains(feeds, f) }))
	}
	return places[:min(len(places), 2*maxFeeds)]
}

// destinationRule sends a feed or stream to a relay.
type destinationRule struct {
	ID          id      `json:"id"`
	Stream      string  `json:"stream"`
	Destination string  `json:"destination"`
	Token       string  `json:"token,omitempty"`   // a secret
	Headers     headers `json:"headers,omitempty"` // their values are secrets
}

// clean returns the rule as it is stored, and its URL.
func (r destinationRule) clean() (destinationRule, *url.URL, error) {
	none := destinationRule{}
	switch "" {
	case string(r.ID):
		return none, nil, invalid(`"id" is missing: any name for this destination, such as "0"`)
	case r.Stream:
		return none, nil, invalid(`"stream" is missing: the feed or stream to send, such as "video0"`)
	case r.Destination:
		return none, nil, invalid(`"destination" is missing: the URL of the relay, such as "wss://relay.example/in/video0"`)
	}
	name, err := cleanName("id", string(r.ID))
	if err != nil {
		return none, nil, err
	}
	source, err := cleanName("stream", r.Stream)
	if err != nil {
		return none, nil, err
	}
	u, err := cleanURL(r.Destination)
	if err != nil {
		return none, nil, err
	}
	if err := r.cleanSecrets(u); err != nil {
		return none, nil, err
	}
	return destinationRule{id(name), source, r.Destination, r.Token, r.Headers}, u, nil
}

// cleanControl checks the rule of a control link.
func (r destinationRule) cleanControl() error {
	u, err := cleanURL(r.Destination)
	if err != nil {
		return err
	}
	return r.cleanSecrets(u)
}

// cleanSecrets checks what the URL, the token and the headers are together.
func (r destinationRule) cleanSecrets(u *url.URL) error {
	access := isAccess(u)
	_, user, _ := splitUser(r.Destination)
	unknown := r.Token == hidden || user == hidden
	for _, value := range r.Headers.all() {
		unknown = unknown || value == hidden
	}
	switch {
	case unknown:
		return invalid("destination %.100q: %s keeps a secret that is stored for the same host, port and path, and none is: give the token, the headers and the password anew", withoutSecrets(r.Destination), hidden)
	case len(r.Token) > maxToken || !isVisible(r.Token) || strings.ContainsAny(r.Token, `"\`):
		return invalid(`token: it must be at most %d visible ASCII characters, without " and \`, maxToken)
	case access && r.Token == "":
		return invalid(`destination %.100q: the scheme is %q, which needs a "token"; without one it must be ws or wss`, withoutSecrets(r.Destination), u.Scheme)
	case access && u.User != nil, (access || u.User != nil) && r.Headers.has("Authorization"):
		return invalid("destination %.100q: it has more than one Authorization: token, user:password@ and header", withoutSecrets(r.Destination))
	}
	return nil
}

// keep returns r with the secrets of old in the place of ***, if they go where
// they have gone: who may set rules is not thereby told what is stored.
func (r destinationRule) keep(old destinationRule) destinationRule {
	to, err1 := url.Parse(r.Destination)
	from, err2 := url.Parse(old.Destination)
	if err1 != nil || err2 != nil || !goesAlike(to, from) {
		return r
	}
	if r.Token == hidden {
		r.Token = cmp.Or(old.Token, hidden)
	}
	all, stored := maps.Collect(r.Headers.all()), maps.Collect(old.Headers.all())
	for name, value := range all {
		if value == hidden {
			all[name] = cmp.Or(stored[name], hidden)
		}
	}
	r.Headers = newHeaders(all)
	if before, user, after := splitUser(r.Destination); user == hidden {
		_, user, _ = splitUser(old.Destination)
		r.Destination = before + cmp.Or(user, hidden) + after
	}
	return r
}

// goesAlike reports whether a secret that was sent to from may be sent to to:
// the same host and port, and not in the clear if it was not before. What was a
// header for an access point must not become a message that viewers see, nor go
// to another path of a websocket, where there may be others.
func goesAlike(to, from *url.URL) bool {
	return strings.EqualFold(to.Hostname(), from.Hostname()) && portOf(to) == portOf(from) &&
		(to.Scheme == from.Scheme || to.Scheme == from.Scheme+"s") &&
		(!isWebsocket(from) || cmp.Or(to.EscapedPath(), "/") == cmp.Or(from.EscapedPath(), "/"))
}

// portOf returns the port that u is dialled at.
func portOf(u *url.URL) string {
	return cmp.Or(u.Port(), map[string]string{
		"ws": "80", "http": "80", "wss": "443", "https": "443", "socks5": "1080", "socks5h": "1080",
	}[u.Scheme])
}

// shown returns the rule as an answer shows it.
func (r destinationRule) shown() destinationRule {
	if r.Token != "" {
		r.Token = hidden
	}
	all := maps.Collect(r.Headers.all())
	for name := range all {
		all[name] = hidden
	}
	r.Headers = newHeaders(all)
	if before, user, after := splitUser(r.Destination); user != "" {
		r.Destination = before + hidden + after
	}
	return r
}

// secrets returns what no text may show.
func (r destinationRule) secrets() []string {
	_, user, _ := splitUser(r.Destination)
	_, password, _ := strings.Cut(user, ":")
	all := []string{r.Token, user, password, base64.StdEncoding.EncodeToString([]byte(user))}
	if u, err := url.PathUnescape(password); err == nil {
		all = append(all, u)
	}
	for _, value := range r.Headers.all() {
		_, credentials, _ := strings.Cut(value, " ") // RFC 9110 11.4
		all = append(all, value, credentials)
	}
	return all
}

// hand is one of the two that hold the mute switch. Each mutes and lifts its
// own; what either has muted is muted.
type hand int

const (
	handHere    hand = iota // who passes the door: HTTP, the page, VW_MUTE
	handControl             // the control link
)

var handNames = []string{handHere: "here", handControl: "control"}

// mediaKinds are what can be muted.
var mediaKinds = []string{"audio", "video"}

// muteSet is what is muted, and by whom: a bit for each hand and kind.
type muteSet uint8

// muteOf returns the bit of a hand and a kind, which is an index of mediaKinds.
func muteOf(by hand, kind int) muteSet { return 1 << (int(by)*len(mediaKinds) + kind) }

// by returns the names of the hands that mute a kind.
func (m muteSet) by(kind int) (names []string) {
	for h, name := range handNames {
		if m&muteOf(hand(h), kind) != 0 {
			names = append(names, name)
		}
	}
	return names
}

// muteRule is what a hand changes at the mute switch; what is nil stays as it is.
type muteRule struct {
	Audio   *bool `json:"audio"`
	Video   *bool `json:"video"`
	Control *bool `json:"control"` // false: a lift is one of what the control link has muted, too
}

// clean returns what the rule mutes and lifts.
func (r muteRule) clean(by hand) (mutes, lifts muteSet, err error) {
	for kind, on := range []*bool{r.Audio, r.Video} {
		if on != nil && *on {
			mutes |= muteOf(by, kind)
		} else if on != nil {
			lifts |= muteOf(by, kind)
			if r.Control != nil {
				lifts |= muteOf(handControl, kind)
			}
		}
	}
	switch {
	case mutes|lifts == 0:
		return 0, 0, invalid(`"audio" and "video" are missing: {"audio":true} mutes, {"audio":false} lifts that`)
	case r.Control != nil && by == handControl:
		return 0, 0, invalid(`"control" is not for the control link, which lifts what it has muted itself`)
	case r.Control != nil && (*r.Control || lifts == 0):
		return 0, 0, invalid(`"control" must be false, beside something to lift: {"audio":false,"control":false}`)
	}
	return mutes, lifts, nil
}

// muteStatus is what is muted, as a hand is told.
type muteStatus struct {
	Audio bool                 `json:"audio"`
	Video bool                 `json:"video"`
	By    map[string][]string  `json:"by,omitempty"`    // of what not only the one who asks has muted
	Since map[string]time.Time `json:"since,omitempty"` // in the stats alone
}

// status returns what is muted, as a hand is told.
func (m muteSet) status(asks hand) muteStatus {
	s := muteStatus{Audio: m.by(0) != nil, Video: m.by(1) != nil}
	for kind, name := range mediaKinds {
		if by := m.by(kind); by != nil && !slices.Equal(by, handNames[asks:asks+1]) {
			if s.By == nil {
				s.By = make(map[string][]string)
			}
			s.By[name] = by
		}
	}
	return s
}

// id names a destination. In JSON a string, or a number as it is written.
type id string

func (i *id) UnmarshalJSON(b []byte) error {
	if b[0] == '"' {
		return json.Unmarshal(b, (*string)(i))
	}
	var n json.Number
	if err := json.Unmarshal(b, &n); err != nil || n == "" {
		return fmt.Errorf("id %.100q: it must be a string or a number", b)
	}
	*i = id(n)
	return nil
}

// headers go out with the handshake: "Name: value\n" each, sorted by name. A
// string, so that rules can be compared; a JSON object outside.
type headers string

// all ranges over names and values.
func (h headers) all() iter.Seq2[string, string] {
	return func(yield func(name, value string) bool) {
		for line := range strings.Lines(string(h)) {
			name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
			if !yield(name, value) {
				return
			}
		}
	}
}

// newHeaders is the inverse of all; the names are canonical, nothing has a newline.
func newHeaders(m map[string]string) headers {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(m)) {
		b.WriteString(name + ": " + m[name] + "\n")
	}
	return headers(b.String())
}

// http returns what is to be sent.
func (h headers) http() http.Header {
	all := make(http.Header)
	for name, value := range h.all() {
		all.Set(name, value)
	}
	return all
}

func (h headers) has(name string) bool {
	_, ok := maps.Collect(h.all())[name]
	return ok
}

func (h headers) MarshalJSON() ([]byte, error) { return json.Marshal(maps.Collect(h.all())) }

// UnmarshalJSON checks names and values. RFC 9110 5.1, 5.5
func (h *headers) UnmarshalJSON(b []byte) error {
	var given map[string]string
	if err := json.Unmarshal(b, &given); err != nil {
		return errors.New(`"headers" must be an object of strings`)
	}
	if len(given) > maxFields {
		return fmt.Errorf(`"headers": there are %d, at most %d are allowed`, len(given), maxFields)
	}
	clean := make(map[string]string, len(given))
	for name, value := range given {
		canonical := http.CanonicalHeaderKey(name)
		_, twice := clean[canonical]
		switch {
		case name == "" || len(name) > maxField || strings.ContainsFunc(name, func(c rune) bool {
			return !isLetterOrDigit(c) && !strings.ContainsRune("!#$%&'*+-.^_`|~", c)
		}):
			return fmt.Errorf("header %.40q: not the name of a header", name)
		case slices.Contains(ownHeaders, canonical) || strings.HasPrefix(canonical, "Sec-Websocket-") && canonical != "Sec-Websocket-Protocol":
			return fmt.Errorf("header %s: it is vw's own in a handshake", canonical)
		case twice:
			return fmt.Errorf("header %s is listed twice", canonical)
		case value == "" || len(value) > maxField || value != strings.TrimSpace(value) || strings.ContainsFunc(value, func(c rune) bool { return c < ' ' || c > '~' }):
			return fmt.Errorf("header %s: its value must be 1 to %d ASCII characters, without control characters, and no space around it", canonical, maxField)
		}
		clean[canonical] = value
	}
	*h = newHeaders(clean)
	return nil
}

// ownHeaders are those that the handshake has anyway, or that would break it.
// RFC 6455 4.1, RFC 9110 7.6.1
var ownHeaders = []string{
	"Connection", "Content-Length", "Expect", "Host", "Keep-Alive", "Origin", "Proxy-Authorization",
	"Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade",
}

var reserved = []string{"all", "deleteAll", "apiRule"}

const controlID = "apiRule"

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
			return !isLetterOrDigit(r) && !strings.ContainsRune("._-", r)
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
		return "", invalid("stream %q: the name of a stream begins with stream/; did you mean %q?", name, "stream/"+name)
	}
	return name, err
}

// isStream tells whether a valid name is a stream's; else it is a feed's.
func isStream(name string) bool { return strings.HasPrefix(name, "stream/") }

// cleanURL checks the URL of a relay.
func cleanURL(raw string) (*url.URL, error) {
	u, err := url.Parse(raw)
	shown := withoutSecrets(raw)
	switch {
	case len(raw) > maxURL:
		return nil, invalid("destination %.100q: the URL has %d bytes, at most %d are allowed", shown, len(raw), maxURL)
	case err != nil || !isVisible(raw):
		return nil, invalid("destination %.100q: not a URL%s", shown, withScheme(shown))
	case !slices.Contains([]string{"ws", "wss", "http", "https"}, u.Scheme):
		return nil, invalid("destination %.100q: the URL must begin with ws:// or wss://%s", shown, withScheme(shown))
	case u.Hostname() == "":
		return nil, invalid("destination %.100q: the host is missing%s", shown, withScheme(shown))
	case u.Fragment != "" || strings.Contains(raw, "#"): // RFC 6455 3
		return nil, invalid("destination %.100q: a websocket URL has no fragment (#)", shown)
	case !validPort(u.Port()):
		return nil, invalid("destination %.100q: the port is %s, it must be 1 to 65535", shown, u.Port())
	}
	return u, nil
}

// isWebsocket reports whether u is the URL of a websocket.
func isWebsocket(u *url.URL) bool { return u.Scheme == "ws" || u.Scheme == "wss" }

// isAccess reports whether u is the URL of an access point.
func isAccess(u *url.URL) bool { return u.Scheme == "http" || u.Scheme == "https" }

// isTLS reports whether u is reached over TLS.
func isTLS(u *url.URL) bool { return u.Scheme == "wss" || u.Scheme == "https" }

// withScheme is the hint for a URL whose scheme is missing, not known or not
// followed by "://".
func withScheme(shown string) string {
	scheme := "ws"
	_, rest, known := strings.Cut(shown, "://")
	if m := mistypedScheme.FindStringSubmatch(shown); !known && m != nil {
		scheme, rest = strings.ToLower(m[1]), m[2]
	} else if !known {
		rest = strings.TrimLeft(shown, "/")
	}
	u, err := url.Parse(scheme + "://" + rest)
	if err != nil || u.Hostname() == "" || !validPort(u.Port()) || !isVisible(rest) || scheme+"://"+rest == shown {
		return ""
	}
	return fmt.Sprintf("; did you mean %s://%.100s?", scheme, rest)
}

// mistypedScheme is a scheme of ours that is not followed by "://".
var mistypedScheme = regexp.MustCompile(`(?i)^(wss?|https?)[:;/\\]+([^:;/\\].*)$`)

// withoutSecrets is what an error may say of a URL, which need not be one: no
// query, and nothing where there may be userinfo.
func withoutSecrets(s string) string {
	if strings.Contains(s, "@") {
		return "…"
	}
	s, _, _ = strings.Cut(s, "?")
	return s
}

// splitUser cuts the userinfo out of a URL; user is "" where there is none.
// RFC 3986 3.2.1
func splitUser(raw string) (before, user, after string) {
	scheme, rest, _ := strings.Cut(raw, "://")
	end := strings.IndexAny(rest, "/?#")
	if end < 0 {
		end = len(rest)
	}
	at := strings.LastIndexByte(rest[:end], '@')
	if at < 0 {
		return raw, "", ""
	}
	return scheme + "://", rest[:at], rest[at:]
}

// inQuery returns what may be secret in the query of a URL.
func inQuery(u *url.URL) []string {
	all := []string{u.RawQuery}
	for _, values := range u.Query() {
		all = append(all, values...)
	}
	return all
}

func validPort(s string) bool {
	if s == "" {
		return true
	}
	_, err := net.LookupPort("tcp", s)
	return err == nil && strings.Trim(s, "0") != ""
}

// isLetterOrDigit reports whether c is one of ASCII.
func isLetterOrDigit(c rune) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
}

// isVisible tells whether s is printable ASCII without spaces.
func isVisible(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r >= 0x7f })
}

// printable is s with everything that could work on a terminal replaced.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}

// decode reads exactly one JSON value, without fields that v, a pointer to a
// struct, does not have.
func decode(b []byte, v any) error {
	b = bytes.TrimPrefix(b, []byte("\ufeff")) // some editors and shells begin with it
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return invalidJSON(err, b, reflect.TypeOf(v).Elem())
	}
	if len(bytes.TrimSpace(b[d.InputOffset():])) > 0 {
		return invalid("more after the end of the JSON, which is at byte %d", d.InputOffset()) // not what: it may be a secret
	}
	return checkTwice(b)
}

// checkTwice refuses a field that an object in b has twice, of which encoding/json
// would take the last. b is JSON.
func checkTwice(b []byte) error {
	type object struct {
		seen map[string]bool // nil: it is a list
		name bool            // the next token is a field's name
	}
	open := []object{{}}
	for d := json.NewDecoder(bytes.NewReader(b)); ; {
		token, err := d.Token()
		if err != nil {
			return nil // the end
		}
		in := &open[len(open)-1]
		name, isString := token.(string)
		switch {
		case token == json.Delim('{'):
			in.name = in.seen != nil
			open = append(open, object{make(map[string]bool), true})
		case token == json.Delim('['):
			in.name = in.seen != nil
			open = append(open, object{})
		case token == json.Delim('}'), token == json.Delim(']'):
			open = open[:len(open)-1]
		case isString && in.name:
			if name = strings.ToLower(name); in.seen[name] {
				return invalid("the field %.60q is there twice", name)
			}
			in.seen[name], in.name = true, false
		default:
			in.name = in.seen != nil
		}
	}
}

// invalidJSON says what is wrong with b, which should be a t, in the words of
// who wrote it. It does not quote values, which may be secret.
func invalidJSON(err error, b []byte, t reflect.Type) error {
	var syntax *json.SyntaxError
	var kind *json.UnmarshalTypeError
	name, unknown := strings.CutPrefix(err.Error(), "json: unknown field ") // encoding/json has no type for it
	switch {
	case err == io.EOF:
		return invalid(`there is no JSON: an object is expected, such as {"%s":…}`, fieldNames(t)[0])
	case err == io.ErrUnexpectedEOF:
		return invalid(`the JSON ends too early: is a } or ] missing?`)
	case errors.As(err, &syntax):
		return invalid("this is no JSON%s", unexpected(b, syntax))
	case errors.As(err, &kind) && kind.Field == "":
		return invalid("the JSON must be %s", expected(t))
	case errors.As(err, &kind):
		field := t
		for part := range strings.SplitSeq(kind.Field, ".") {
			field = fieldType(field, part)
		}
		return invalid("%s must be %s", kind.Field, expected(field))
	case unknown:
		given := strings.Trim(name, `"`)
		if meant := nearest(cmp.Or(otherWords[given], given), fieldNames(t)); edits(cmp.Or(otherWords[given], given), meant) <= 2 {
			return invalid("unknown field %.60q; did you mean %q?", given, meant)
		}
		return invalid("unknown field %.60q; the fields are %s", given, strings.Join(fieldNames(t), ", "))
	}
	return invalid("%.200s", strings.TrimPrefix(err.Error(), "json: "))
}

// otherWords are what people call our fields.
var otherWords = map[string]string{"sound": "audio", "picture": "video", "url": "destination"}

// unexpected says where b stops being JSON, and why that may be.
func unexpected(b []byte, err *json.SyntaxError) string {
	at := int(err.Offset) - 1
	if at < 0 || at >= len(b) {
		return ""
	}
	c, _ := utf8.DecodeRune(b[at:])
	hint := ""
	switch before := bytes.TrimRight(b[:at], " \t\r\n"); {
	case c == '\'':
		hint = `; names and strings stand in double quotes`
	case (c == '}' || c == ']') && bytes.HasSuffix(before, []byte(",")):
		hint = "; is there a comma too many?"
	case c == '"' && len(before) > 0 && strings.ContainsRune(`"]}`, rune(before[len(before)-1])):
		hint = "; is a comma missing?"
	case 'a' <= c && c <= 'z' && (bytes.HasSuffix(before, []byte("{")) || bytes.HasSuffix(before, []byte(","))):
		hint = `; names stand in double quotes, as in {"stream":…}`
	}
	return fmt.Sprintf(": %q at byte %d is out of place%s", c, at+1, hint)
}

// expected is what a value of type t looks like in JSON.
func expected(t reflect.Type) string {
	switch t {
	case reflect.TypeFor[id]():
		return `a string or a number: "0"`
	case reflect.TypeFor[headers]():
		return `an object of strings: {"X-Key":"value"}`
	}
	switch t.Kind() {
	case reflect.Pointer:
		return expected(t.Elem())
	case reflect.Bool:
		return "true or false"
	case reflect.Slice:
		return `a list: ["video0"]`
	case reflect.Struct:
		return fmt.Sprintf(`an object: {"%s":…}`, fieldNames(t)[0])
	case reflect.String:
		return `a string: "…"`
	}
	return "a number"
}

// fieldNames returns what the fields of a struct are called in JSON.
func fieldNames(t reflect.Type) (names []string) {
	for i := range t.NumField() {
		name, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
		names = append(names, name)
	}
	return names
}

// fieldType returns the type of a field of a struct, by its name in JSON.
func fieldType(t reflect.Type, name string) reflect.Type {
	if t.Kind() == reflect.Struct {
		if i := slices.Index(fieldNames(t), name); i >= 0 {
			return t.Field(i).Type
		}
	}
	return t
}

// nearest returns the name that is fewest edits away from what was given.
func nearest(given string, names []string) string {
	return slices.MinFunc(names, func(a, b string) int { return edits(given, a) - edits(given, b) })
}

// edits is the Levenshtein distance of two names.
func edits(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		corner := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := corner
			if a[i] != b[j] {
				cost = 1 + min(corner, row[j], row[j+1])
			}
			corner, row[j+1] = row[j+1], cost
		}
	}
	return row[len(b)]
}

// invalidError is a rule, or a name, that is not allowed. It names the value
// and what is.
type invalidError struct{ text string }

func (e invalidError) Error() string { return e.text }

func invalid(format string, args ...any) error { return invalidError{fmt.Sprintf(format, args...)} }

// errNotFound: there is no rule of that name.
var errNotFound = errors.New("does not exist")

// hiddenError is an error whose text has been cleared of secrets.
type hiddenError struct {
	text string
	error
}

func (e hiddenError) Error() string { return e.text }

func (e hiddenError) Unwrap() error { return e.error }

// hide returns err without the secrets: a relay may quote them in its answer,
// whole or cut off. What has fewer than 4 bytes is no secret.
func hide(err error, secrets []string) error {
	if err == nil {
		return nil
	}
	text := err.Error()
	for _, s := range secrets {
		if len(s) >= 4 {
			text = hideIn(text, s)
			quoted := strconv.Quote(s)
			text = hideIn(text, quoted[1:len(quoted)-1])
		}
	}
	if text == err.Error() {
		return err
	}
	return hiddenError{text, err}
}

// hideIn hides every place of text that begins like the secret: with the whole
// of it, or with as much as is left of it, at least 8 bytes.
func hideIn(text, secret string) string {
	begins := secret[:min(8, len(secret))]
	var b strings.Builder
	for {
		before, rest, ok := strings.Cut(text, begins)
		b.WriteString(before)
		if !ok {
			return b.String()
		}
		n := 0
		for s := secret[len(begins):]; n < len(s) && n < len(rest) && s[n] == rest[n]; n++ {
		}
		b.WriteString(hidden)
		text = rest[n:]
	}
}

// subset reports whether every name of a is in b.
func subset(a, b []string) bool {
	return !slices.ContainsFunc(a, func(name string) bool { return !slices.Contains(b, name) })
}
