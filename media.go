// Media over HTTP: POST and GET on /ts, and the websockets on /in and /out.

package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/websocket"
)

// media serves feeds and streams. Its handlers end when ctx does.
type media struct {
	ctx    context.Context
	mux    *mux
	maxLag time.Duration
	door   *door
	log    *slog.Logger

	refusals episodes
	series   series
}

// postTS publishes the body until it ends.
func (m *media) postTS(w http.ResponseWriter, r *http.Request) {
	c := http.NewResponseController(w)
	begun, err := m.publish(r, func() { c.SetReadDeadline(past) })
	if err != nil {
		if !begun {
			m.tellRefused(r, err)
		}
		refuse(w, r, err)
		return
	}
	answer(w, http.StatusOK, "ok")
}

// publish publishes the body of r; interrupt makes reads of it fail. begun reports
// whether r had its feed.
func (m *media) publish(r *http.Request, interrupt func()) (begun bool, err error) {
	name, err := cleanFeed(r.PathValue("name"))
	if err != nil {
		return false, err
	}
	if r.ContentLength == 0 && r.Header.Get("Content-Length") == "" {
		return false, httpError{http.StatusLengthRequired, "the request has no body: send it with Transfer-Encoding: chunked, or with a Content-Length"}
	}
	defer onDone(m.ctx, interrupt)()
	log := m.log.With("feed", name, "remote", r.RemoteAddr)
	p, start, isOneOfMany := newPublisher(r, log, interrupt), time.Now(), false
	p.begun = func() {
		begun = true
		m.door.settle(r)
		var first bool
		switch isOneOfMany, first = m.series.goesOn(name, start); {
		case !isOneOfMany:
			log.Info("publisher arrived", "agent", p.agent)
		case first:
			log.Warn("the feed comes in many short requests, and its frames break where they end; more of them are not logged: "+
				"send one request without an end (GStreamer: curlhttpsink)", "agent", p.agent)
		}
	}
	body := &countedBody{Reader: r.Body}
	err = m.mux.publish(name, p, body)
	if m.ctx.Err() != nil {
		err = errShutdown
	}
	if err == nil && body.bytes == 0 {
		err = invalid("the body is empty: MPEG-TS is expected")
	}
	if err != nil {
		log = log.With("err", err)
	}
	if begun && !isOneOfMany {
		log.Info("publisher left")
	}
	if begun || err == nil {
		m.series.note(name, start, err == nil)
	}
	return begun, err
}

// countedBody counts what is read.
type countedBody struct {
	io.Reader
	bytes int
}

func (b *countedBody) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	b.bytes += n
	return n, err
}

// tellRefused tells the log, once in an episode, why a publisher is refused. It
// says nothing of other requests.
func (m *media) tellRefused(r *http.Request, err error) {
	name, ok := strings.CutPrefix(r.URL.Path, "/ts")
	if !ok || name != "" && name[0] != '/' || r.Method != http.MethodPost && r.Method != http.MethodPut {
		return
	}
	status := statusOf(err)
	kind := fmt.Sprint(callerOf(r), " ", status)
	switch status {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusTooManyRequests: // anybody may cause these, for any path
	default:
		kind += name
	}
	if m.refusals.begins(kind, time.Now()) {
		m.log.Info("publisher refused; the same again is not logged", "path", fmt.Sprintf("%.300s", r.URL.Path),
			"remote", r.RemoteAddr, "agent", fmt.Sprintf("%.100s", r.UserAgent()), "status", status, "err", err)
	}
}

const (
	shortRequest = time.Second     // from begin to end
	seriesPause  = 5 * time.Second // without another short request, and a series is over
	fewShort     = 2               // short requests in a row that are logged as others are
)

// series finds feeds that come in many short requests, as if each buffer were a
// feed of its own. Safe for concurrent use; the zero value is ready.
type series struct {
	mu    sync.Mutex
	feeds map[string]shortRequests
}

// shortRequests are those of a feed that followed each other.
type shortRequests struct {
	n    int
	last time.Time // when the last of them ended
	told bool      // and the log was
}

// goesOn reports whether so many short requests of a feed came in a row before now
// that they are not logged one by one, and whether this is to be told first.
func (s *series) goesOn(feed string, now time.Time) (goesOn, first bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.feeds[feed]
	if f.n < fewShort || now.Sub(f.last) > seriesPause {
		return false, false
	}
	first, f.told = !f.told, true
	s.feeds[feed] = f
	return true, first
}

// note takes note of a request that ends now. whole says that it did so properly.
func (s *series) note(feed string, start time.Time, whole bool) {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.DeleteFunc(s.feeds, func(_ string, f shortRequests) bool { return now.Sub(f.last) > seriesPause })
	if !whole || now.Sub(start) > shortRequest {
		delete(s.feeds, feed)
		return
	}
	if s.feeds == nil {
		s.feeds = make(map[string]shortRequests)
	}
	if f, known := s.feeds[feed]; known || len(s.feeds) < maxPublishers {
		s.feeds[feed] = shortRequests{f.n + 1, now, f.told}
	}
}

// newPublisher is who made the request. log is told what is wrong with its clock.
func newPublisher(r *http.Request, log *slog.Logger, interrupt func()) *publisher {
	return &publisher{
		remote: r.RemoteAddr, agent: fmt.Sprintf("%.100s", r.UserAgent()), interrupt: interrupt,
		warn: func(what string) { log.Warn("clock of the publisher", "what", what) },
	}
}

// getTS sends a feed or stream as it is, until the reader leaves.
func (m *media) getTS(w http.ResponseWriter, r *http.Request) {
	name, err := cleanName("feed or stream", r.PathValue("name"))
	if err != nil {
		refuse(w, r, err)
		return
	}
	if r.ContentLength != 0 { // net/http would wait for it before it answers
		refuse(w, r, invalid("a GET of video has no body"))
		return
	}
	leave, err := m.door.reader(r)
	if err != nil {
		refuse(w, r, err)
		return
	}
	defer leave()
	w.Header().Set("Content-Type", "video/mp2t")
	w.Header().Set("Cache-Control", "no-store")
	setLive(w.Header())
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodHead {
		return
	}
	conn := &response{w: w, c: http.NewResponseController(w)}
	conn.c.Flush()
	l := newLink(conn, nil, m.log.With("stream", name, "remote", r.RemoteAddr))
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	defer context.AfterFunc(m.ctx, func() { cancel(errShutdown) })()
	sub := l.subscribe(m.maxLag)
	sub.wantReplay()
	_, err = l.deliver(ctx, m.mux, name, sub, nil)
	l.log.Info("reader left", "err", err)
}

// setLive makes proxies pass each part of an answer on as it comes.
func setLive(h http.Header) {
	h.Set("X-Accel-Buffering", "no")      // nginx would wait for more
	h.Set("Content-Encoding", "identity") // a proxy that compresses would hold back what it has
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
func (m *media) in(w http.ResponseWriter, r *http.Request) {
	name, err := cleanFeed(r.PathValue("name"))
	if err != nil {
		refuse(w, r, err)
		return
	}
	defer m.door.settle(r) // http.Server does not tell the end of a connection that was hijacked
	log := m.log.With("feed", name, "remote", r.RemoteAddr)
	m.upgrade(w, r, log, func(l *link) error {
		log.Info("publisher arrived", "agent", fmt.Sprintf("%.100s", r.UserAgent()))
		ctx, cancel := context.WithCancelCause(m.ctx)
		defer cancel(nil)
		p := newPublisher(r, log, func() { cancel(errReplaced) })
		p.begun = func() { m.door.settle(r) }
		return l.serve(ctx, l.subscribe(m.maxLag), func(context.Context) error {
			return m.mux.publish(name, p, websocketBody{l.in})
		}, nil)
	})
}

// websocketBody reads the media that a publisher sends over a websocket. Its proper
// end is a close frame after a whole message, as the last chunk of a body is.
type websocketBody struct{ in *inbox }

func (b websocketBody) Read(p []byte) (int, error) {
	n, err := b.in.Read(p)
	var closed closeError
	switch {
	case err == io.EOF:
		err = io.ErrUnexpectedEOF
	case errors.As(err, &closed) && !closed.inside:
		err = io.EOF
	}
	return n, err
}

// out sends a feed or stream to a viewer, such as JSMpeg.
func (m *media) out(w http.ResponseWriter, r *http.Request) {
	name, err := cleanName("feed or stream", r.PathValue("name"))
	if err != nil {
		refuse(w, r, err)
		return
	}
	leave, err := m.door.reader(r)
	if err != nil {
		refuse(w, r, err)
		return
	}
	defer leave()
	log := m.log.With("stream", name, "remote", r.RemoteAddr)
	m.upgrade(w, r, log, func(l *link) error {
		log.Info("reader arrived", "agent", fmt.Sprintf("%.100s", r.UserAgent()))
		sub := l.subscribe(m.maxLag)
		sub.wantReplay()
		_, err := l.deliver(m.ctx, m.mux, name, sub, nil)
		return err
	})
}

// upgrade makes a websocket of the request, and closes it when serve returns.
// The first subprotocol that is offered is accepted, whatever it is: JSMpeg
// offers "null".
func (m *media) upgrade(w http.ResponseWriter, r *http.Request, log *slog.Logger, serve func(*link) error) {
	if err := checkUpgrade(r); err != nil {
		w.Header().Set("Upgrade", "websocket")
		w.Header().Set("Sec-WebSocket-Version", websocket.SupportedProtocolVersion)
		refuse(w, r, err)
		return
	}
	h := &hijacker{ResponseWriter: w, log: log}
	websocket.Server{
		Handshake: func(c *websocket.Config, _ *http.Request) error {
			c.Protocol = c.Protocol[:min(len(c.Protocol), 1)]
			return nil
		},
		Handler: func(*websocket.Conn) {
			log.Info("websocket ended", "err", serve(h.link))
		},
	}.ServeHTTP(h, r)
}

// hijacker makes a link of the connection that x/net upgrades.
type hijacker struct {
	http.ResponseWriter
	log  *slog.Logger
	link *link
}

// Hijack implements http.Hijacker.
func (h *hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(h.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	conn.SetWriteDeadline(time.Now().Add(time.Second)) // its peer may not read
	early, _ := rw.Reader.Peek(rw.Reader.Buffered())   // frames that came with the request
	h.link = newLink(conn, newInbox(conn, bytes.Clone(early), masked, 4<<10), h.log)
	return conn, rw, nil
}
