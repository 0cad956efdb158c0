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
	"net"
	"net/http"
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
}

// postTS publishes the body until it ends.
func (m *media) postTS(w http.ResponseWriter, r *http.Request) {
	c := http.NewResponseController(w)
	if err := m.publish(r, func() { c.SetReadDeadline(past) }); err != nil {
		refuse(w, r, err)
		return
	}
	answer(w, http.StatusOK, "ok")
}

// publish publishes the body of r; interrupt makes reads of it fail.
func (m *media) publish(r *http.Request, interrupt func()) error {
	name, err := cleanFeed(r.PathValue("name"))
	if err != nil {
		return err
	}
	defer onDone(m.ctx, interrupt)()
	log := m.log.With("feed", name, "remote", r.RemoteAddr)
	log.Info("publisher arrived", "agent", fmt.Sprintf("%.100s", r.UserAgent()))
	p := newPublisher(r, interrupt)
	p.begun = func() { m.door.settle(r) }
	p.warn = func(what string) { log.Warn("clock of the publisher", "what", what) }
	err = m.mux.publish(name, p, r.Body)
	if m.ctx.Err() != nil {
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
		p := newPublisher(r, func() { cancel(errReplaced) })
		p.begun = func() { m.door.settle(r) }
		p.warn = func(what string) { log.Warn("clock of the publisher", "what", what) }
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
