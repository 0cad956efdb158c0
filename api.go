// The HTTP contract: routes, access, errors. Each handler decodes, calls one
// method of rules or mux, and encodes.

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/websocket"
)

const (
	maxBody     = 64 << 10 // bytes of a rule
	maxHeaders  = 8 << 10  // bytes of a request's header
	bodyTimeout = 10 * time.Second
)

// server answers HTTP. Its handlers end when ctx does; tasks counts them, since
// http.Server.Shutdown does not wait for hijacked connections.
type server struct {
	ctx     context.Context
	rules   *rules
	mux     *mux
	maxLag  time.Duration
	started time.Time
	token   string // what peers that are not loopback present; "": none may
	player  player // of the page
	log     *slog.Logger
	tasks   sync.WaitGroup
	door    door

	control *control // set before it serves; nil: none
	port    int      // the same; 0: not known

	routes *http.ServeMux
	cross  *http.CrossOriginProtection
	host   string // this machine's name
}

func newServer(ctx context.Context, r *rules, token string, log *slog.Logger) *server {
	s := &server{
		ctx: ctx, rules: r, mux: r.mux, maxLag: r.maxLag, token: token, log: log,
		started: time.Now(), routes: http.NewServeMux(), cross: http.NewCrossOriginProtection(),
	}
	s.host, _ = os.Hostname()
	for _, method := range []string{"POST", "PUT", "UPDATE"} {
		s.handle(method+" /api/streams", s.setStream)
		s.handle(method+" /api/destinations", s.setDestination)
	}
	s.handle("GET /api/streams/{stream...}", s.getStream)
	s.handle("DELETE /api/streams/{stream...}", s.deleteStream)
	s.handle("GET /api/destinations/{id...}", s.getDestination)
	s.handle("DELETE /api/destinations/{id...}", s.deleteDestination)
	s.handle("GET /api/stats", s.getStats)
	s.routes.HandleFunc("GET /api/events", s.events)
	s.routes.HandleFunc("GET /metrics", s.getMetrics)
	s.handle("GET /api/devices", s.getDevices)
	s.handle("GET /healthcheck", func(*http.Request) (any, error) { return "ok", nil })
	s.routes.HandleFunc("POST /ts/{feed...}", s.postFeed)
	s.routes.HandleFunc("PUT /ts/{feed...}", s.postFeed)
	s.routes.HandleFunc("GET /ts/{name...}", s.getTS)
	s.routes.HandleFunc("GET /in/{feed...}", s.in)
	s.routes.HandleFunc("GET /out/{name...}", s.out)
	for _, path := range []string{"/{$}", "/page.css", "/page.js", "/icon.svg"} {
		s.routes.HandleFunc("GET "+path, s.getPage)
	}
	s.routes.HandleFunc("GET /player.js", s.getPlayer)
	s.routes.HandleFunc("POST /login", s.login)
	for _, path := range []string{"/ts", "/in", "/out"} { // else ServeMux redirects
		s.handle(path, func(*http.Request) (any, error) { return nil, invalid("path %q: the name is missing", path) })
	}
	for _, path := range []string{"/api/streams", "/api/destinations"} {
		s.routes.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Allow", "POST, PUT, UPDATE")
			s.refuse(w, r, notAllowed(w, r))
		})
	}
	return s
}

// ServeHTTP checks access, then routes; ServeMux's own answers become JSON.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.tasks.Add(1)
	defer s.tasks.Done()
	if err := s.admit(r); err != nil {
		s.log.Debug("not admitted", "remote", r.RemoteAddr, "err", err) // anybody can cause it, as often as he likes
		s.refuse(w, r, err)
		return
	}
	if err := tidyPath(r.URL); err != nil {
		s.refuse(w, r, err)
		return
	}
	h, pattern := s.routes.Handler(r)
	if pattern != "" {
		s.routes.ServeHTTP(w, r) // sets the path values
		return
	}
	own := muxAnswer{header: w.Header(), status: http.StatusOK}
	h.ServeHTTP(&own, r)
	if own.status == http.StatusMethodNotAllowed {
		s.refuse(w, r, notAllowed(w, r))
		return
	}
	s.refuse(w, r, httpError{own.status, fmt.Sprintf("path %q: there is no such thing", r.URL.Path)})
}

// notAllowed is the error of a method that the Allow header does not list.
func notAllowed(w http.ResponseWriter, r *http.Request) error {
	return httpError{http.StatusMethodNotAllowed, fmt.Sprintf("%s %q: the methods here are %s", r.Method, r.URL.Path, w.Header().Get("Allow"))}
}

// muxAnswer keeps what ServeMux says of a request that matches no route.
type muxAnswer struct {
	header http.Header
	status int
}

func (a *muxAnswer) Header() http.Header         { return a.header }
func (a *muxAnswer) WriteHeader(status int)      { a.status = status }
func (a *muxAnswer) Write(b []byte) (int, error) { return len(b), nil }

// tidyPath takes the leading slash off a name that follows its route, and
// refuses what ServeMux would answer with a redirect, which ffmpeg does not
// follow.
func tidyPath(u *url.URL) error {
	for _, route := range []string{"/ts/", "/in/", "/out/", "/api/streams/", "/api/destinations/"} {
		if name, ok := strings.CutPrefix(u.Path, route+"/"); ok {
			u.Path, u.RawPath = route+name, ""
		}
	}
	p := u.EscapedPath()
	if clean := path.Clean(p); clean != p && (clean == "/" || clean+"/" != p) {
		return httpError{http.StatusBadRequest, fmt.Sprintf("path %q: it has empty segments, . or ..", u.Path)}
	}
	return nil
}

// refuse answers with an error. A body that is still coming is not waited for:
// ffmpeg only notices the answer when the connection closes.
func (s *server) refuse(w http.ResponseWriter, r *http.Request, err error) {
	status := http.StatusInternalServerError
	var known httpError
	var bad invalidError
	switch {
	case errors.As(err, &known):
		status = known.status
	case errors.As(err, &bad):
		status = http.StatusBadRequest
	case errors.Is(err, errNotFound):
		status = http.StatusNotFound
	case errors.Is(err, errReplaced):
		status = http.StatusConflict
	case errors.Is(err, errNotTS):
		status = http.StatusUnsupportedMediaType
	case errors.Is(err, errShutdown), errors.Is(err, errFull):
		status = http.StatusServiceUnavailable
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

// shownDestinations returns the destination rules, and the control link among
// them, without their secrets.
func (s *server) shownDestinations() map[string]destinationRule {
	all := s.rules.allDestinations()
	for name, rule := range all {
		all[name] = rule.shown()
	}
	if s.control != nil {
		all[controlID] = s.control.rule.shown()
	}
	return all
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
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(bodyTimeout)) // its peer may not read
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	w.Write(b)
}

// handle makes a route of a function whose result is answered as JSON.
func (s *server) handle(pattern string, f func(*http.Request) (any, error)) {
	s.routes.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTimeout))
		v, err := f(r)
		if err != nil {
			s.refuse(w, r, err)
			return
		}
		answer(w, http.StatusOK, v)
	})
}

// body decodes a rule.
func body(r *http.Request, v any) error {
	b, err := io.ReadAll(io.LimitReader(r.Body, maxBody+1))
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return httpError{http.StatusRequestTimeout, fmt.Sprintf("body: not here within %v", bodyTimeout)}
	}
	if err != nil {
		return invalid("body: %v", err)
	}
	if len(b) > maxBody {
		return httpError{http.StatusRequestEntityTooLarge, fmt.Sprintf("body: more than %d bytes", maxBody)}
	}
	return decode(b, v)
}

func (s *server) setStream(r *http.Request) (any, error) {
	var rule streamRule
	if err := body(r, &rule); err != nil {
		return nil, err
	}
	return s.rules.setStream(rule)
}

func (s *server) getStream(r *http.Request) (any, error) {
	name := r.PathValue("stream")
	if name == "all" {
		return s.rules.allStreams(), nil
	}
	name, err := cleanStream(name)
	if err != nil {
		return nil, err
	}
	return s.rules.stream(name)
}

func (s *server) deleteStream(r *http.Request) (any, error) {
	return s.dropStream(r.PathValue("stream"))
}

func (s *server) setDestination(r *http.Request) (any, error) {
	var rule destinationRule
	if err := body(r, &rule); err != nil {
		return nil, err
	}
	rule, err := s.rules.setDestination(rule)
	return rule.shown(), err
}

func (s *server) getDestination(r *http.Request) (any, error) {
	return s.listDestination(r.PathValue("id"))
}

func (s *server) deleteDestination(r *http.Request) (any, error) {
	return s.dropDestination(r.PathValue("id"))
}

// postFeed publishes the body until it ends.
func (s *server) postFeed(w http.ResponseWriter, r *http.Request) {
	c := http.NewResponseController(w)
	if err := s.publish(r, func() { c.SetReadDeadline(past) }); err != nil {
		s.refuse(w, r, err)
		return
	}
	answer(w, http.StatusOK, "ok")
}

// publish publishes the body of r; interrupt makes reads of it fail.
func (s *server) publish(r *http.Request, interrupt func()) error {
	name, err := cleanFeed(r.PathValue("feed"))
	if err != nil {
		return err
	}
	defer onDone(s.ctx, interrupt)()
	log := s.log.With("feed", name, "remote", r.RemoteAddr)
	log.Info("publisher arrived", "agent", fmt.Sprintf("%.100s", r.UserAgent()))
	p := newPublisher(r, interrupt)
	p.begun = func() { s.door.settle(r) }
	err = s.mux.publish(name, p, r.Body)
	if s.ctx.Err() != nil {
		err = errShutdown
	}
	log.Info("publisher left", "err", err)
	return err
}

// newPublisher is who made the request.
func newPublisher(r *http.Request, interrupt func()) *publisher {
	return &publisher{remote: r.RemoteAddr, agent: fmt.Sprintf("%.100s", r.UserAgent()), interrupt: interrupt}
}

// getTS sends a feed or stream as it is, until the reader leaves.
func (s *server) getTS(w http.ResponseWriter, r *http.Request) {
	name, err := cleanName("feed or stream", r.PathValue("name"))
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	if r.ContentLength != 0 { // net/http would wait for it before it answers
		s.refuse(w, r, invalid("a GET of video has no body"))
		return
	}
	leave, err := s.door.reader(r)
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	defer leave()
	w.Header().Set("Content-Type", "video/mp2t")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodHead {
		return
	}
	conn := &response{w: w, c: http.NewResponseController(w)}
	conn.c.Flush()
	l := newLink(conn, s.log.With("stream", name, "remote", r.RemoteAddr))
	l.cannotResume()
	l.pings = 0
	sub := l.subscribe(raw, s.maxLag)
	s.mux.join(name, sub)
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	defer context.AfterFunc(s.ctx, func() { cancel(errShutdown) })()
	l.log.Info("reader left", "err", l.send(ctx, sub))
	s.mux.leave(name, sub)
	sub.end()
}

// response lets a link write to a GET: its Write is not done before the bytes
// are handed to the kernel.
type response struct {
	net.Conn // nil; a link that only sends uses the methods below
	w        http.ResponseWriter
	c        *http.ResponseController
}

func (r *response) SetWriteDeadline(t time.Time) error { return r.c.SetWriteDeadline(t) }

func (r *response) Write(b []byte) (int, error) {
	n, err := r.w.Write(b)
	if err != nil {
		return n, err
	}
	return n, r.c.Flush()
}

// in publishes a feed from a websocket's binary messages, however split.
func (s *server) in(w http.ResponseWriter, r *http.Request) {
	name, err := cleanFeed(r.PathValue("feed"))
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	defer s.door.settle(r) // http.Server does not tell the end of a connection that was hijacked
	s.upgrade(w, r, func(l *link, in *inbox) error {
		l.log = s.log.With("feed", name, "remote", r.RemoteAddr)
		l.log.Info("publisher arrived", "agent", fmt.Sprintf("%.100s", r.UserAgent()))
		ctx, cancel := context.WithCancelCause(s.ctx)
		defer cancel(nil)
		p := newPublisher(r, func() { cancel(errReplaced) })
		p.begun = func() { s.door.settle(r) }
		return l.serve(ctx, l.subscribe(bare, s.maxLag), func() error {
			return s.mux.publish(name, p, cutOff{in})
		}, func() {})
	})
}

// cutOff is a reader whose end is never a proper one: a websocket may close in
// the middle of a frame of video.
type cutOff struct{ io.Reader }

func (c cutOff) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	if err == io.EOF {
		err = errPeerClosed
	}
	return n, err
}

// out sends a feed or stream to a viewer, such as JSMpeg.
func (s *server) out(w http.ResponseWriter, r *http.Request) {
	name, err := cleanName("feed or stream", r.PathValue("name"))
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	leave, err := s.door.reader(r)
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	defer leave()
	s.upgrade(w, r, func(l *link, in *inbox) error {
		l.log = s.log.With("stream", name, "remote", r.RemoteAddr)
		l.log.Info("reader arrived", "agent", fmt.Sprintf("%.100s", r.UserAgent()))
		sub := l.subscribe(bare, s.maxLag)
		s.mux.join(name, sub)
		err := l.serve(s.ctx, sub, func() error { return discard(in) }, func() {})
		s.mux.leave(name, sub)
		sub.end()
		return err
	})
}

// upgrade makes a websocket of the request, and closes it when serve returns.
// The first subprotocol that is offered is accepted, whatever it is: JSMpeg
// offers "null".
func (s *server) upgrade(w http.ResponseWriter, r *http.Request, serve func(*link, *inbox) error) {
	if err := checkUpgrade(r); err != nil {
		w.Header().Set("Upgrade", "websocket")
		w.Header().Set("Sec-WebSocket-Version", websocket.SupportedProtocolVersion)
		s.refuse(w, r, err)
		return
	}
	h := &hijacker{ResponseWriter: w, log: s.log}
	websocket.Server{
		Handshake: func(c *websocket.Config, _ *http.Request) error {
			c.Protocol = c.Protocol[:min(len(c.Protocol), 1)]
			return nil
		},
		Handler: func(*websocket.Conn) {
			err := serve(h.link, h.inbox)
			h.link.log.Info("websocket ended", "err", err)
		},
	}.ServeHTTP(h, r)
}

// hijacker makes a link of the connection that x/net upgrades.
type hijacker struct {
	http.ResponseWriter
	log   *slog.Logger
	link  *link
	inbox *inbox
}

// Hijack implements http.Hijacker.
func (h *hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(h.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	conn.SetWriteDeadline(time.Now().Add(time.Second)) // its peer may not read
	h.link = newLink(conn, h.log)
	early, _ := rw.Reader.Peek(rw.Reader.Buffered()) // frames that came with the request
	h.inbox = newInbox(h.link, bytes.Clone(early), 4<<10)
	return conn, rw, nil
}
