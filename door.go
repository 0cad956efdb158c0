// The door: who may come in, how many at once, and what those hear who may not.
//
// This machine may ask, and others with the token, or with the cookie that the
// page gets for it. A page of another origin may not, and a name that somebody
// else has given to this machine does not count.
//
// To open a connection, and to say little on it, costs a caller nothing. So a
// caller too many is not refused: the connection that was served or opened
// longest ago is closed, and the newest is heard. Publishers and readers stay,
// and have limits of their own. Where the system gives vw few descriptors, readers
// are refused first: relays, publishers and callers keep a share.

package main

import (
	"bytes"
	"container/list"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/websocket"
)

// These hold where vw may have enough descriptors.
const (
	maxCallers = 512 // connections that neither publish nor read
	maxReaders = 1024
)

const (
	enoughDescriptors = 1 << 16 // for every limit
	ownDescriptors    = 32      // that vw has open itself: listeners, log, state file, lookups of names
)

const (
	answerTimeout = 10 * time.Second // to write an answer of a few bytes

	cookieName = "vw"
	cookieAge  = 30 * 24 * time.Hour
)

// door decides about requests and knows the connections. Its methods may be
// called from several goroutines. They do not block, but for callers who
// present wrong tokens.
type door struct {
	// static after construction
	token  string   // what peers that are not loopback present; "": none may
	public []string // paths that need no token
	host   string   // this machine's name
	cross  *http.CrossOriginProtection
	log    *slog.Logger

	descriptors int        // that vw may have
	maxCallers  int        // connections that neither publish nor read
	relays      func() int // how many relays vw is to send to

	readers  atomic.Int64
	guesses  guesses
	episodes episodes // that the log was told of

	mu      sync.Mutex
	callers list.List // of net.Conn; the next to make room is in front
	at      map[net.Conn]*list.Element
}

// newDoor returns a door that asks nobody for a token on the public paths. relays
// returns the number of relays to send to.
func newDoor(token string, relays func() int, log *slog.Logger, public ...string) *door {
	descriptors := min(descriptorLimit(), enoughDescriptors)
	d := &door{
		descriptors: descriptors, maxCallers: min(maxCallers, descriptors/4), relays: relays,
		token: token, public: public, cross: http.NewCrossOriginProtection(), log: log,
		at: make(map[net.Conn]*list.Element), guesses: guesses{by: make(map[netip.Prefix]*guesser)},
	}
	d.host, _ = os.Hostname()
	return d
}

type connKey struct{}

// withConn lets the handlers of a connection know it.
func withConn(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, c)
}

// track is the ConnState of http.Server.
func (d *door) track(c net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew, http.StateIdle:
		d.mu.Lock()
		d.drop(c)
		d.at[c] = d.callers.PushBack(c)
		full := d.callers.Len() > d.maxCallers
		d.mu.Unlock()
		if full {
			d.makeRoom()
		}
	case http.StateClosed:
		d.mu.Lock()
		d.drop(c)
		d.mu.Unlock()
	}
}

// drop is called with mu held.
func (d *door) drop(c net.Conn) {
	if e := d.at[c]; e != nil {
		d.callers.Remove(e)
		delete(d.at, c)
	}
}

// makeRoom closes the connection of the caller in front.
func (d *door) makeRoom() {
	d.mu.Lock()
	e := d.callers.Front()
	if e == nil {
		d.mu.Unlock()
		return
	}
	c := e.Value.(net.Conn)
	d.drop(c)
	d.mu.Unlock()
	c.Close()
}

// settle makes the connection of r one that stays: no caller, until it is
// idle again.
func (d *door) settle(r *http.Request) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c, _ := r.Context().Value(connKey{}).(net.Conn)
	d.drop(c)
}

// readerLimit returns how many readers there may be: what others may need of the
// descriptors is left to them. A relay needs two while another URL takes over.
func (d *door) readerLimit() int {
	n := d.descriptors
	others := min(ownDescriptors, n/4) + d.maxCallers + min(maxPublishers, n/8) + max(2*d.relays(), n/8)
	return max(0, min(maxReaders, n-others))
}

// reader settles r as a reader, until leave.
func (d *door) reader(r *http.Request) (leave func(), err error) {
	limit := d.readerLimit()
	if d.readers.Add(1) > int64(limit) {
		d.readers.Add(-1)
		if limit < maxReaders {
			err = fmt.Errorf("there are %d readers, and vw may have %d descriptors for all that it does: %w", limit, d.descriptors, errFull)
		} else {
			err = fmt.Errorf("there are %d readers: %w", limit, errFull)
		}
		if d.episodes.begins("readers", time.Now()) {
			d.log.Warn("a reader is refused; more of them are not logged", "remote", r.RemoteAddr, "err", err)
		}
		return nil, err
	}
	d.settle(r)
	return func() { d.readers.Add(-1) }, nil
}

// doorListener makes room when the process is out of descriptors.
type doorListener struct {
	net.Listener
	door *door
}

func (l doorListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if errors.Is(err, syscall.EMFILE) {
		l.door.makeRoom() // http.Server soon tries again
		if l.door.episodes.begins("descriptors", time.Now()) {
			l.door.log.Warn("vw has no descriptor left, and closes connections that say nothing", "descriptors", l.door.descriptors)
		}
	}
	return c, err
}

// admit decides who may ask: this machine, and others with the token. What
// came through a proxy is never this machine.
func (d *door) admit(r *http.Request) error {
	if err := d.cross.Check(r); err != nil {
		return httpError{http.StatusForbidden, err.Error()}
	}
	if fromLoopback(r) {
		return d.checkHost(r.Host)
	}
	if d.token == "" {
		return httpError{http.StatusForbidden, fmt.Sprintf("remote %s: only this machine may ask, and not through a proxy, unless VW_TOKEN is set", r.RemoteAddr)}
	}
	if slices.Contains(d.public, r.URL.Path) || d.signedIn(r) {
		return nil
	}
	if token := presented(r); token != "" {
		return d.checkToken(r, token)
	}
	return httpError{http.StatusUnauthorized, "VW_TOKEN must be presented: Authorization: Bearer, or Basic with it as the password"}
}

// checkHost refuses names that somebody else may have given to this machine: a
// page under such a name would be of the same origin as what it asks.
func (d *door) checkHost(asked string) error {
	host := asked
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.Trim(host, "[]")
	for _, own := range []string{"localhost", d.host, d.host + ".local"} {
		if strings.EqualFold(host, own) {
			return nil
		}
	}
	if net.ParseIP(host) == nil {
		return httpError{http.StatusForbidden, fmt.Sprintf("host %.100q: neither an address, localhost nor %q (DNS rebinding)", asked, d.host)}
	}
	return nil
}

// presented returns the token that r presents, or "". RFC 6750 2.1, RFC 7617
func presented(r *http.Request) string {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if strings.EqualFold(scheme, "Bearer") {
		return strings.TrimSpace(token)
	}
	_, password, _ := r.BasicAuth()
	return password
}

// checkToken refuses a token that is not VW_TOKEN. A caller who has presented
// several wrong ones waits for the answer.
func (d *door) checkToken(r *http.Request, token string) error {
	right := d.isToken(token)
	decision := d.guesses.judge(callerOf(r), right, time.Now())
	if decision.first {
		d.log.Warn("a wrong token was presented; more of them are not logged", "remote", r.RemoteAddr)
	}
	told := time.NewTimer(decision.wait)
	defer told.Stop()
	select {
	case <-told.C:
	case <-r.Context().Done():
	}
	switch {
	case decision.refused:
		return httpError{http.StatusTooManyRequests, "too many wrong tokens came from your address; try again in a few seconds"}
	case !right:
		return httpError{http.StatusUnauthorized, "this is not the value of VW_TOKEN"}
	}
	return nil
}

// fromLoopback tells whether the request was made on this machine, and not
// for somebody else by a proxy on it. HTTP/1.0 is what nginx speaks unless it
// is told otherwise.
func fromLoopback(r *http.Request) bool {
	if !r.ProtoAtLeast(1, 1) {
		return false
	}
	for name := range r.Header {
		if name == "Forwarded" || name == "Via" || name == "X-Real-Ip" || strings.HasPrefix(name, "X-Forwarded-") {
			return false
		}
	}
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	return err == nil && peer.Addr().Unmap().IsLoopback()
}

// isToken compares in constant time.
func (d *door) isToken(given string) bool {
	want, got := sha256.Sum256([]byte(d.token)), sha256.Sum256([]byte(given))
	return subtle.ConstantTimeCompare(want[:], got[:]) == 1
}

// session is the value of the cookie: who has it has presented the token, but
// can't tell it. It is the same after a restart.
func (d *door) session() string {
	mac := hmac.New(sha256.New, []byte(d.token))
	mac.Write([]byte("vw: session of the page"))
	return base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// signedIn tells whether the request has the cookie. EventSource and WebSocket
// can present nothing else.
func (d *door) signedIn(r *http.Request) bool {
	return slices.ContainsFunc(r.CookiesNamed(cookieName), func(c *http.Cookie) bool {
		return hmac.Equal([]byte(c.Value), []byte(d.session()))
	})
}

// signIn returns the cookie for the token.
func (d *door) signIn(r *http.Request, token string) (*http.Cookie, error) {
	if d.token == "" {
		return nil, httpError{http.StatusUnauthorized, "VW_TOKEN is not set, so there is nothing to sign in with"}
	}
	if err := d.checkToken(r, token); err != nil {
		return nil, err
	}
	return &http.Cookie{
		Name: cookieName, Value: d.session(), Path: "/", MaxAge: int(cookieAge.Seconds()),
		HttpOnly: true, SameSite: http.SameSiteStrictMode,
		// The page came by TLS, whatever the proxy tells of it.
		Secure: strings.HasPrefix(r.Header.Get("Origin"), "https:"),
	}, nil
}

// checkUpgrade tells what x/net would refuse in plain text, and refuses pages
// of another origin: a browser lets those open websockets. RFC 6455 4.2.1, 10.2.
func checkUpgrade(r *http.Request) error {
	if origin := r.Header.Get("Origin"); origin != "" {
		if u, err := url.Parse(origin); err != nil || !strings.EqualFold(u.Host, r.Host) {
			return httpError{http.StatusForbidden, fmt.Sprintf("origin %.100q: only pages of %.100q may open this websocket", origin, r.Host)}
		}
	}
	switch {
	case !strings.EqualFold(r.Header.Get("Upgrade"), "websocket"),
		!strings.Contains(strings.ToLower(r.Header.Get("Connection")), "upgrade"),
		r.Header.Get("Sec-WebSocket-Version") != websocket.SupportedProtocolVersion:
		_, name, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
		return httpError{http.StatusUpgradeRequired, fmt.Sprintf("this address is for websockets of version 13 (relays, players); the same over HTTP: /ts/%.200s", printable(name))}
	case r.Header.Get("Sec-WebSocket-Key") == "":
		return invalid("Sec-WebSocket-Key is missing")
	}
	return nil
}

const (
	freeGuesses  = 5                      // wrong tokens that cost a caller nothing
	guessEvery   = 250 * time.Millisecond // after those, a token is looked at this often
	maxGuessWait = 5 * time.Second        // for a caller's turn; who would wait longer is refused
	guessEpisode = time.Minute            // without a wrong token, and a caller is forgotten
	maxGuessers  = 1024
)

// guesses slows down who tries tokens. All that a caller presents waits for its
// turn, the right one, too: else an answer that comes at once would tell.
type guesses struct {
	mu sync.Mutex
	by map[netip.Prefix]*guesser
}

// guesser is a caller who has presented wrong tokens.
type guesser struct {
	wrong int       // in this episode
	last  time.Time // when the last was
	next  time.Time // whose turn is given away up to here
}

// callerOf returns the network that a caller has to himself: an address, or
// with IPv6 64 bits of one.
func callerOf(r *http.Request) netip.Prefix {
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Prefix{}
	}
	addr := peer.Addr().Unmap().WithZone("")
	bits := min(64, addr.BitLen())
	prefix, _ := addr.Prefix(bits)
	return prefix
}

// decision is how a caller who presents a token is answered.
type decision struct {
	wait    time.Duration // before the answer
	refused bool          // whatever the token is
	first   bool          // wrong token of an episode
}

// judge counts a token that is wrong.
func (g *guesses) judge(from netip.Prefix, right bool, now time.Time) (v decision) {
	g.mu.Lock()
	defer g.mu.Unlock()
	who := g.by[from]
	if who != nil && now.Sub(who.last) > guessEpisode {
		delete(g.by, from)
		who = nil
	}
	if who != nil && who.wrong >= freeGuesses {
		if who.next.Before(now) {
			who.next = now
		}
		if v.wait = who.next.Sub(now); v.wait > maxGuessWait {
			return decision{wait: time.Second, refused: true}
		}
		who.next = who.next.Add(guessEvery)
		v.wait += guessEvery
	}
	if right {
		return v
	}
	if who == nil {
		if len(g.by) >= maxGuessers {
			g.forget(now)
		}
		who, v.first = &guesser{}, true
		g.by[from] = who
	}
	who.wrong++
	who.last = now
	return v
}

// forget makes room: whose episode is over is forgotten, or else who guessed
// longest ago; mu is held.
func (g *guesses) forget(now time.Time) {
	oldest := netip.Prefix{}
	for from, who := range g.by {
		if now.Sub(who.last) > guessEpisode {
			delete(g.by, from)
		} else if o := g.by[oldest]; o == nil || who.last.Before(o.last) {
			oldest = from
		}
	}
	if len(g.by) >= maxGuessers {
		delete(g.by, oldest)
	}
}

// httpError is an error with its status.
type httpError struct {
	status int
	text   string
}

func (e httpError) Error() string { return e.text }

// statusOf returns the status of the answer that tells of err.
func statusOf(err error) int {
	var known httpError
	var bad invalidError
	switch {
	case errors.As(err, &known):
		return known.status
	case errors.As(err, &bad):
		return http.StatusBadRequest
	case errors.Is(err, errNotFound):
		return http.StatusNotFound
	case errors.Is(err, errReplaced):
		return http.StatusConflict
	case errors.Is(err, errNotTS):
		return http.StatusUnsupportedMediaType
	case errors.Is(err, errShutdown), errors.Is(err, errFull):
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}

// refuse answers with an error. A body that is still coming is not waited for:
// ffmpeg only notices the answer when the connection closes.
func refuse(w http.ResponseWriter, r *http.Request, err error) {
	status := statusOf(err)
	switch status {
	case http.StatusTooManyRequests:
		w.Header().Set("Retry-After", strconv.Itoa(int(maxGuessWait.Seconds())))
	case http.StatusServiceUnavailable:
		w.Header().Set("Retry-After", "5")
		w.Header().Set("Connection", "close") // there may be too many
	case http.StatusLengthRequired:
		w.Header().Set("Connection", "close") // what follows may be the body, and no request
	}
	if status == http.StatusUnauthorized {
		// RFC 9110 15.5.2 wants one. ffmpeg waits for Basic on /ts; elsewhere a
		// browser would put its own dialog over the page's.
		scheme := "Bearer"
		if strings.HasPrefix(r.URL.Path, "/ts/") {
			scheme = "Basic"
		}
		w.Header().Set("WWW-Authenticate", scheme+` realm="vw"`)
	}
	c := http.NewResponseController(w)
	if r.ContentLength != 0 {
		c.EnableFullDuplex() // else net/http reads on before it writes
		w.Header().Set("Connection", "close")
	}
	answer(w, status, map[string]string{"error": err.Error()})
	if r.ContentLength != 0 {
		c.Flush()
		c.SetReadDeadline(time.Now().Add(closeTimeout)) // a reset now could overtake the answer
	}
}

// encode returns v as JSON, exactly and without a newline.
func encode(v any) []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		panic(err) // what we answer can be encoded
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}

// answer writes v as JSON.
func answer(w http.ResponseWriter, status int, v any) {
	b := encode(v)
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(answerTimeout)) // its peer may not read
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	w.Write(b)
}
