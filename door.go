// The door: how many connections vw has at once.
//
// To open a connection, and to say little on it, costs a caller nothing. So a
// caller too many is not refused: the one that was served or has come longest
// ago makes room, and who asks now is heard. Who publishes or reads stays, and
// has limits of his own.

package main

import (
	"container/list"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/net/websocket"
)

const (
	maxCallers    = 512 // connections that neither publish nor read
	maxPublishers = 256 // feeds that are published; each holds up to 2 MiB
	maxReaders    = 1024
)

// door knows the connections. Its zero value is ready; its methods may be
// called from several goroutines and do not block.
type door struct {
	readers atomic.Int64

	mu      sync.Mutex
	callers list.List // of net.Conn; the next to make room is in front
	at      map[net.Conn]*list.Element
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
		if d.at == nil {
			d.at = make(map[net.Conn]*list.Element)
		}
		d.at[c] = d.callers.PushBack(c)
		full := d.callers.Len() > maxCallers
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

// reader settles r as a reader, until leave.
func (d *door) reader(r *http.Request) (leave func(), err error) {
	if d.readers.Add(1) > maxReaders {
		d.readers.Add(-1)
		return nil, fmt.Errorf("there are %d readers: %w", maxReaders, errFull)
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
	}
	return c, err
}

// admit decides who may ask: this machine, and others with the token. What
// came through a proxy is never this machine.
func (s *server) admit(r *http.Request) error {
	if err := s.cross.Check(r); err != nil {
		return httpError{http.StatusForbidden, err.Error()}
	}
	if fromLoopback(r) {
		host := r.Host
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		host = strings.Trim(host, "[]")
		if net.ParseIP(host) == nil && !strings.EqualFold(host, "localhost") && !strings.EqualFold(host, s.host) {
			return httpError{http.StatusForbidden, fmt.Sprintf("host %.100q: neither an address, localhost nor %q (DNS rebinding)", r.Host, s.host)}
		}
		return nil
	}
	if s.token == "" {
		return httpError{http.StatusForbidden, fmt.Sprintf("remote %s: only this machine may ask, and not through a proxy, unless VW_TOKEN is set", r.RemoteAddr)}
	}
	given, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok {
		_, given, _ = r.BasicAuth()
	}
	if pageTypes[r.URL.Path] == "" && !s.isToken(given) && !s.signedIn(r) {
		return httpError{http.StatusUnauthorized, "VW_TOKEN must be presented: Authorization: Bearer, or Basic with it as the password"}
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
func (s *server) isToken(given string) bool {
	want, got := sha256.Sum256([]byte(s.token)), sha256.Sum256([]byte(given))
	return subtle.ConstantTimeCompare(want[:], got[:]) == 1
}

// session is the value of the cookie: who has it has presented the token, but
// can't tell it. It is the same after a restart.
func (s *server) session() string {
	mac := hmac.New(sha256.New, []byte(s.token))
	mac.Write([]byte("vw: session of the page"))
	return base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// signedIn tells whether the request has the cookie. EventSource and WebSocket
// can present nothing else.
func (s *server) signedIn(r *http.Request) bool {
	return slices.ContainsFunc(r.CookiesNamed(cookieName), func(c *http.Cookie) bool {
		return hmac.Equal([]byte(c.Value), []byte(s.session()))
	})
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
		return httpError{http.StatusUpgradeRequired, "this is a websocket of version 13: ask for an upgrade"}
	case r.Header.Get("Sec-WebSocket-Key") == "":
		return invalid("Sec-WebSocket-Key is missing")
	}
	return nil
}

// httpError is an error with its status.
type httpError struct {
	status int
	text   string
}

func (e httpError) Error() string { return e.text }

// errFull: vw has as many as it can have. Wrapped, it says of what.
var errFull = errors.New("no more are allowed")
