// The HTTP contract: routes, access, errors. Each handler decodes, calls one
// method of rules or mux, and encodes.

package main

import (
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

// do carries out one command. Its answer is an object.
func (s *server) do(command []byte) (any, error) {
	if len(command) > maxBody {
		return nil, invalid("command: more than %d bytes", maxBody)
	}
	var c struct {
		Verb  string          `json:"verb"`
		What  string          `json:"what"`
		Which string          `json:"which"`
		Rule  json.RawMessage `json:"rule"`
		Ref   json.RawMessage `json:"ref"`
	}
	if err := decode(command, &c); err != nil {
		return nil, err
	}
	if report := reports[c.Verb]; report != nil {
		v, err := report(s)
		return map[string]any{c.Verb: v}, err
	}
	if c.Verb == "add" && (c.What == "stream" || c.What == "destination") && c.Rule == nil {
		return nil, invalid(`add %s: "rule" is missing`, c.What)
	}
	switch c.Verb + " " + c.What {
	case "add stream":
		var rule streamRule
		if err := decode(c.Rule, &rule); err != nil {
			return nil, err
		}
		return s.rules.setStream(rule)
	case "add destination":
		var rule destinationRule
		if err := decode(c.Rule, &rule); err != nil {
			return nil, err
		}
		rule, err := s.rules.setDestination(rule)
		return rule.shown(), err
	case "list stream":
		return s.listStream(c.Which)
	case "list destination":
		return s.listDestination(c.Which)
	case "delete stream":
		return deleted(s.dropStream(c.Which))
	case "delete destination":
		if c.Which == controlID {
			return nil, invalid("Cannot delete %s", controlID)
		}
		return deleted(s.dropDestination(c.Which))
	}
	switch c.Verb {
	case "add", "list", "delete":
		return nil, invalid("%s %.40q: it must be stream or destination", c.Verb, c.What)
	}
	return nil, invalid("verb %.40q: there is no such command", c.Verb)
}

// reports are the commands that are nothing but a verb; the answer is an
// object with the verb as its one key.
var reports = map[string]func(*server) (any, error){
	"healthcheck": func(*server) (any, error) { return "ok", nil },
	"devices":     func(s *server) (any, error) { return listDevices("/", s.port) },
	"stats":       func(s *server) (any, error) { return s.stats(), nil },
}

func (s *server) listStream(which string) (any, error) {
	if which == "all" {
		return s.rules.allStreams(), nil
	}
	name, err := cleanStream(which)
	if err != nil {
		return nil, err
	}
	feeds, err := s.rules.stream(name)
	if errors.Is(err, errNotFound) {
		err = nil
	}
	return map[string][]string{"feeds": feeds}, err
}

func (s *server) listDestination(which string) (any, error) {
	switch {
	case which == "all":
		return s.shownDestinations(), nil
	case which == controlID && s.control != nil:
		return s.control.rule.shown(), nil
	}
	name, err := cleanName("id", which)
	if err != nil {
		return nil, err
	}
	rule, err := s.rules.destination(name)
	return rule.shown(), err
}

// dropStream deletes a stream, or all, and returns what it has deleted.
func (s *server) dropStream(which string) (string, error) {
	if which == "all" {
		return "deleteAll", s.rules.deleteStreams()
	}
	name, err := cleanStream(which)
	if err != nil {
		return "", err
	}
	return name, s.rules.deleteStream(name)
}

// dropDestination deletes a destination, or all, and returns what it has deleted.
func (s *server) dropDestination(which string) (string, error) {
	if which == "all" {
		return "deleteAll", s.rules.deleteDestinations()
	}
	name, err := cleanName("id", which)
	if err != nil {
		return "", err
	}
	return name, s.rules.deleteDestination(name)
}

func deleted(what string, err error) (any, error) { return map[string]string{"deleted": what}, err }

func (s *server) getStats(*http.Request) (any, error) { return s.stats(), nil }

// getMetrics answers in Prometheus' text format 0.0.4.
func (s *server) getMetrics(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(bodyTimeout))
	w.Write(s.stats().metrics())
}

// getDevices lists the devices; their lines post to where the call came in.
func (s *server) getDevices(r *http.Request) (any, error) {
	var port int
	if a, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr); ok {
		port = a.Port
	}
	d, err := listDevices("/", port)
	if errors.Is(err, errNotLinux) {
		return nil, httpError{http.StatusNotImplemented, err.Error()}
	}
	return d, err
}

// login gives the cookie for the token.
func (s *server) login(w http.ResponseWriter, r *http.Request) {
	http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTimeout))
	var given struct {
		Token string `json:"token"`
	}
	if err := body(r, &given); err != nil {
		s.refuse(w, r, err)
		return
	}
	if s.token == "" || !s.isToken(given.Token) {
		s.refuse(w, r, httpError{http.StatusUnauthorized, "this is not the value of VW_TOKEN"})
		return
	}
	http.SetCookie(w, &http.Cookie{
		Name: cookieName, Value: s.session(), Path: "/", MaxAge: int(cookieAge.Seconds()),
		HttpOnly: true, SameSite: http.SameSiteStrictMode,
		// The page came by TLS, whatever the proxy tells of it.
		Secure: strings.HasPrefix(r.Header.Get("Origin"), "https:"),
	})
	w.Header().Set("Cache-Control", "no-store")
	answer(w, http.StatusOK, "ok")
}

// events sends the stats as server-sent events: at once, then every second,
// until the listener leaves, stops reading or vw ends.
func (s *server) events(w http.ResponseWriter, r *http.Request) {
	leave, err := s.door.reader(r)
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	defer leave()
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Accel-Buffering", "no") // nginx would wait for more
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if r.Method == http.MethodHead {
		return
	}
	c := http.NewResponseController(w)
	tick := time.NewTicker(eventsEvery)
	defer tick.Stop()
	for {
		b, err := json.Marshal(s.stats()) // one line
		if err != nil {
			panic(err) // what we answer can be encoded
		}
		c.SetWriteDeadline(time.Now().Add(maxStall))
		fmt.Fprintf(w, "data: %s\n\n", b)
		if c.Flush() != nil {
			return
		}
		select {
		case <-tick.C:
		case <-r.Context().Done():
			return
		case <-s.ctx.Done():
			return
		}
	}
}
