// The HTTP contract: routes, JSON, errors to statuses; and the commands that
// HTTP and the control link share, which know no HTTP.

package main

import (
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	maxBody     = 64 << 10 // bytes of a rule
	maxHeaders  = 8 << 10  // bytes of a request's header
	bodyTimeout = 10 * time.Second
	maxCheck    = time.Minute
)

// server answers HTTP. Its handlers end when ctx does; tasks counts them, since
// http.Server.Shutdown does not wait for hijacked connections.
type server struct {
	ctx      context.Context
	commands *commands
	door     *door
	media    *media
	page     *page
	routes   *http.ServeMux
	log      *slog.Logger
	tasks    sync.WaitGroup
	checking sync.Mutex // by the one that checks a destination
}

func newServer(ctx context.Context, r *rules, token string, log *slog.Logger) *server {
	d := newDoor(token, r.countDestinations, log, slices.Collect(maps.Keys(pageTypes))...)
	s := &server{
		ctx:      ctx,
		commands: &commands{rules: r, started: time.Now()},
		door:     d,
		media:    &media{ctx: ctx, mux: r.mux, maxLag: r.maxLag, door: d, log: log},
		page:     &page{},
		log:      log,
	}
	s.routes = s.table()
	return s
}

// table is every route.
func (s *server) table() *http.ServeMux {
	m := http.NewServeMux()
	for _, method := range []string{"POST", "PUT", "UPDATE"} {
		m.Handle(method+" /api/streams", byBody(s.commands.setStream))
		m.Handle(method+" /api/destinations", byBody(s.commands.setDestination))
	}
	m.Handle("GET /api/streams/{name...}", byName(s.commands.listStream))
	m.Handle("GET /api/destinations/{name...}", byName(s.commands.listDestination))
	m.Handle("GET /api/streams", handler(func(*http.Request) (any, error) { return s.commands.listStream("all") }))
	m.Handle("GET /api/destinations", handler(func(*http.Request) (any, error) { return s.commands.listDestination("all") }))
	m.Handle("DELETE /api/streams/{name...}", byName(s.commands.deleteStream))
	m.Handle("DELETE /api/destinations/{name...}", byName(s.commands.deleteDestination))
	m.Handle("GET /api/mute", handler(func(*http.Request) (any, error) { return s.commands.listMute(handHere), nil }))
	for _, method := range []string{"POST", "PUT"} {
		m.Handle(method+" /api/mute", byBody(func(rule []byte) (any, error) { return s.commands.setMute(rule, handHere) }))
	}
	m.HandleFunc("POST /api/check/{name...}", s.postCheck)
	m.Handle("GET /api/devices", handler(getDevices))
	m.Handle("GET /api/stats", handler(func(*http.Request) (any, error) { return s.commands.stats(), nil }))
	m.HandleFunc("GET /api/events", s.getEvents)
	m.HandleFunc("GET /metrics", s.getMetrics)
	m.Handle("GET /healthcheck", handler(func(*http.Request) (any, error) { return "ok", nil })) // isProbe answers it

	m.HandleFunc("POST /ts/{name...}", s.media.postTS)
	m.HandleFunc("PUT /ts/{name...}", s.media.postTS)
	m.HandleFunc("GET /ts/{name...}", s.media.getTS)
	m.HandleFunc("GET /in/{name...}", s.media.in)
	m.HandleFunc("GET /out/{name...}", s.media.out)

	for _, path := range []string{"/{$}", "/page.css", "/page.js", "/preview.js", "/icon.svg"} {
		m.HandleFunc("GET "+path, s.page.getPage)
	}
	m.HandleFunc("GET /player.js", s.page.getPlayer)
	m.HandleFunc("GET /mpegts.js", s.page.getPlayer)
	m.HandleFunc("POST /login", s.login)

	// Without these, ServeMux would answer with a redirect.
	for _, path := range []string{"/ts", "/in", "/out", "/api/check"} {
		m.Handle(path, handler(func(r *http.Request) (any, error) {
			err := invalid("path %q: the name is missing", path)
			s.media.tellRefused(r, err)
			return nil, err
		}))
	}
	for _, path := range []string{"/api/streams", "/api/destinations"} {
		m.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Allow", "GET, HEAD, POST, PUT, UPDATE")
			refuse(w, r, notAllowed(w, r))
		})
	}
	return m
}

// ServeHTTP checks access, then routes; ServeMux's own answers become JSON.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.tasks.Add(1)
	defer s.tasks.Done()
	if isProbe(r) {
		w.Header().Set("Allow", "GET, HEAD, POST, PUT, UPDATE, DELETE, OPTIONS")
		answer(w, http.StatusOK, "ok")
		return
	}
	if err := s.door.admit(r); err != nil {
		s.log.Debug("not admitted", "remote", r.RemoteAddr, "err", err) // Debug, since any caller can trigger this at will
		s.media.tellRefused(r, err)
		s.page.refuse(w, r, err)
		return
	}
	if r.Method == http.MethodPost || r.Method == http.MethodPut || r.Method == "UPDATE" {
		switch r.URL.Path { // a slash too many
		case "/api/streams/", "/api/destinations/", "/api/mute/":
			r.URL.Path, r.URL.RawPath = strings.TrimSuffix(r.URL.Path, "/"), ""
		}
	}
	if err := tidyPath(r.URL); err != nil {
		s.media.tellRefused(r, err)
		refuse(w, r, err)
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
		refuse(w, r, notAllowed(w, r))
		return
	}
	refuse(w, r, httpError{own.status, fmt.Sprintf("nothing at %.200s; the page is at /, the calls are in docs/api.md", printable(r.URL.Path))})
}

// isProbe reports whether r asks only whether vw lives, as load balancers do. Such
// a request is answered to everybody, and the answer says nothing else.
func isProbe(r *http.Request) bool {
	switch r.Method {
	case http.MethodGet, http.MethodHead:
		return r.URL.Path == "/healthcheck"
	case http.MethodOptions: // RFC 9110 9.3.7; haproxy's own check is OPTIONS /
		return r.URL.Path == "*" || r.URL.Path == "/"
	}
	return false
}

// notAllowed is the error of a method that the Allow header does not list.
func notAllowed(w http.ResponseWriter, r *http.Request) error {
	return httpError{http.StatusMethodNotAllowed, fmt.Sprintf("%s %q: method not allowed; allowed: %s", r.Method, r.URL.Path, w.Header().Get("Allow"))}
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

// handler answers with what f returns, as JSON.
func handler(f func(*http.Request) (any, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTimeout))
		v, err := f(r)
		switch {
		case err == errBeingStored:
			answer(w, http.StatusAccepted, beingStored(v))
		case err != nil:
			refuse(w, r, err)
		default:
			answer(w, http.StatusOK, v)
		}
	})
}

// beingStored returns the answer v to a change that is in force, and not stored
// yet, which an object says.
func beingStored(v any) any {
	b := encode(v)
	if b[0] == '{' {
		b = withField(b, "stored", false)
	}
	return json.RawMessage(b)
}

// byName is the handler of a command that takes a name.
func byName(command func(name string) (any, error)) http.Handler {
	return handler(func(r *http.Request) (any, error) { return command(r.PathValue("name")) })
}

// byBody is the handler of a command that takes a rule.
func byBody(command func(rule []byte) (any, error)) http.Handler {
	return handler(func(r *http.Request) (any, error) {
		b, err := readBody(r)
		if err != nil {
			return nil, err
		}
		return command(b)
	})
}

// readBody reads what a rule may have.
func readBody(r *http.Request) ([]byte, error) {
	var in io.Reader = r.Body
	switch encoding := r.Header.Get("Content-Encoding"); strings.ToLower(encoding) {
	case "", "identity":
	case "gzip":
		unzipped, err := gzip.NewReader(r.Body)
		if err != nil {
			return nil, invalid("body: it is not gzip, as Content-Encoding says: %v", err)
		}
		in = unzipped
	default:
		return nil, httpError{http.StatusUnsupportedMediaType, fmt.Sprintf("Content-Encoding %.40q: send the rule as it is, or with gzip", encoding)}
	}
	b, err := io.ReadAll(io.LimitReader(in, maxBody+1))
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil, httpError{http.StatusRequestTimeout, fmt.Sprintf("body: not received within %v", bodyTimeout)}
	}
	if err != nil {
		return nil, invalid("body: %v", err)
	}
	if len(b) == 0 {
		return nil, invalid("the body is empty: a JSON rule is expected")
	}
	if len(b) > maxBody {
		return nil, httpError{http.StatusRequestEntityTooLarge, fmt.Sprintf("body: more than %d bytes", maxBody)}
	}
	return b, nil
}

// getMetrics answers in Prometheus' text format 0.0.4.
func (s *server) getMetrics(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(bodyTimeout))
	w.Write(s.commands.stats().metrics())
}

// getDevices lists the devices; their lines post to where the call came in.
func getDevices(r *http.Request) (any, error) {
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
	b, err := readBody(r)
	if err == nil {
		err = decode(b, &given)
	}
	var cookie *http.Cookie
	if err == nil {
		cookie, err = s.door.signIn(r, given.Token)
	}
	if err != nil {
		refuse(w, r, err)
		return
	}
	http.SetCookie(w, cookie)
	w.Header().Set("Cache-Control", "no-store")
	answer(w, http.StatusOK, "ok")
}

// getEvents sends the stats as server-sent events: at once, then every second
// and soon after a mute or a lift, until the listener leaves, stops reading or vw
// ends.
func (s *server) getEvents(w http.ResponseWriter, r *http.Request) {
	leave, err := s.door.reader(r)
	if err != nil {
		refuse(w, r, err)
		return
	}
	defer leave()
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	setLive(w.Header())
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if r.Method == http.MethodHead {
		return
	}
	c := http.NewResponseController(w)
	for {
		all := s.commands.stats()
		b, err := json.Marshal(all) // one line
		if err != nil {
			panic(err) // what we answer can be encoded
		}
		c.SetWriteDeadline(time.Now().Add(maxStall))
		fmt.Fprintf(w, "data: %s\n\n", b)
		if c.Flush() != nil || !s.awaitEvent(r.Context(), all.Mute) {
			return
		}
	}
}

// awaitEvent waits until the next event is due: what is muted has changed from
// told, or a second has passed. It returns false when ctx or vw ends.
func (s *server) awaitEvent(ctx context.Context, told muteStatus) bool {
	due, look := time.NewTimer(eventsEvery), time.NewTicker(eventsEvery/5)
	defer due.Stop()
	defer look.Stop()
	for {
		select {
		case <-due.C:
			return true
		case <-look.C:
			mute, since := s.commands.rules.muteStatus(handHere)
			if mute.Since = since; !reflect.DeepEqual(mute, told) {
				return true
			}
		case <-ctx.Done():
			return false
		case <-s.ctx.Done():
			return false
		}
	}
}

// postCheck checks a destination, until the caller leaves. It sets no read deadline,
// which net/http would take for that.
func (s *server) postCheck(w http.ResponseWriter, r *http.Request) {
	printed, err := s.checkDestination(r.Context(), r.PathValue("name"))
	if err != nil {
		refuse(w, r, err)
		return
	}
	answer(w, http.StatusOK, printed)
}

// checkDestination does what vw check does with the rule of a destination, and
// returns what that prints, which has no secrets. It takes up to a minute.
func (s *server) checkDestination(ctx context.Context, id string) (any, error) {
	id, err := cleanName("id", id)
	if err != nil {
		return nil, err
	}
	rule, err := s.commands.rules.destination(id)
	if err != nil {
		return nil, err
	}
	if !s.checking.TryLock() {
		return nil, httpError{http.StatusServiceUnavailable, "another destination is being checked: try again in some seconds"}
	}
	defer s.checking.Unlock()
	ctx, cancel := context.WithTimeout(ctx, maxCheck)
	defer cancel()
	defer context.AfterFunc(s.ctx, cancel)()
	var printed strings.Builder
	check(ctx, rule, &printed, &printed)
	return strings.TrimSpace(printed.String()), nil
}

// commands are what can be asked of vw, over HTTP and the control link. Safe
// for concurrent use; what they return can be encoded as JSON and shows no
// secret.
type commands struct {
	rules   *rules
	started time.Time
	control *control // set before the first command; nil: none
	port    int      // the same; 0: not known
	name    string   // the same: what answers on the control link carry; "": nothing
}

// setStream adds or changes the stream that rule is about.
func (c *commands) setStream(rule []byte) (any, error) {
	var e streamEdit
	if err := decode(rule, &e); err != nil {
		return nil, err
	}
	if e.isWhole() {
		return c.rules.setStream(streamRule{e.Stream, e.Feeds})
	}
	return c.rules.editStream(e)
}

// listStream returns the feeds of a stream, or of all streams by name.
func (c *commands) listStream(which string) (any, error) {
	if which == "all" {
		return c.rules.allStreams(), nil
	}
	name, err := cleanStream(which)
	if err != nil {
		return nil, err
	}
	return c.rules.stream(name)
}

// deleteStream deletes a stream, or all, and returns what it has deleted.
func (c *commands) deleteStream(which string) (any, error) {
	if which == "all" {
		return "deleteAll", c.rules.deleteStreams()
	}
	name, err := cleanStream(which)
	if err != nil {
		return nil, err
	}
	return name, c.rules.deleteStream(name)
}

// setDestination adds or changes the destination that rule is about.
func (c *commands) setDestination(rule []byte) (any, error) {
	var r destinationRule
	if err := decode(rule, &r); err != nil {
		return nil, err
	}
	r, err := c.rules.setDestination(r)
	return r.shown(), err
}

// listDestination returns a destination, or all by id. The control link is
// listed among them.
func (c *commands) listDestination(which string) (any, error) {
	switch {
	case which == "all":
		all := c.rules.allDestinations()
		if c.control != nil {
			all[controlID] = c.control.rule
		}
		for name, rule := range all {
			all[name] = rule.shown()
		}
		return all, nil
	case which == controlID && c.control != nil:
		return c.control.rule.shown(), nil
	}
	name, err := cleanName("id", which)
	if err != nil {
		return nil, err
	}
	rule, err := c.rules.destination(name)
	return rule.shown(), err
}

// deleteDestination deletes a destination, or all, and returns what it has deleted.
func (c *commands) deleteDestination(which string) (any, error) {
	if which == "all" {
		return "deleteAll", c.rules.deleteDestinations()
	}
	name, err := cleanName("id", which)
	if err != nil {
		return nil, err
	}
	return name, c.rules.deleteDestination(name)
}

// setMute changes what a hand has muted, and returns what is muted then.
func (c *commands) setMute(rule []byte, by hand) (any, error) {
	var r muteRule
	if err := decode(rule, &r); err != nil {
		return nil, err
	}
	return c.rules.setMute(r, by)
}

// listMute returns what is muted, as a hand is told.
func (c *commands) listMute(asks hand) muteStatus {
	status, _ := c.rules.muteStatus(asks)
	return status
}

// stats looks at everything that runs.
func (c *commands) stats() stats {
	all := newStats(c.started, c.rules)
	if c.control != nil {
		all.Destinations[controlID] = c.control.stats()
	}
	return all
}
