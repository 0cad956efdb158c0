// The log: lines for people, with levels for the journal, which block nobody.
//
// Whoever logs leaves a whole line in a bounded queue, and one goroutine writes
// the lines. When nobody reads them, the newest are dropped and counted; the
// count is told where the log goes on. A standard stream takes no deadline, so
// a write that hangs for good is left behind when vw ends: the exception to I3.

package main

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"maps"
	"os"
	"sync"
	"time"
)

const (
	maxLines     = 256 << 10              // bytes of lines that wait to be written
	flushTimeout = 500 * time.Millisecond // for what is left when vw ends
)

// newLog returns a log that is written to w, with levels for the journal if
// that is where w goes, and its lines, which must be closed. systemd.exec(5),
// JOURNAL_STREAM
func newLog(env []string, w io.Writer, level slog.Level) (*slog.Logger, *lines) {
	handler := func(w io.Writer) slog.Handler {
		return slog.NewTextHandler(w, &slog.HandlerOptions{Level: level})
	}
	if f, ok := w.(*os.File); ok {
		if id := getenv(env, "JOURNAL_STREAM"); id != "" && id == fileID(f) {
			handler = func(w io.Writer) slog.Handler {
				j := &journal{w: w}
				return journalHandler{j, slog.NewTextHandler(&j.line, &slog.HandlerOptions{Level: level})}
			}
		}
	}
	q := newLines(w, func(lost int) []byte {
		var b bytes.Buffer
		slog.New(handler(&b)).Error("log lines were lost: nobody read them in time", "count", lost)
		return b.Bytes()
	})
	return slog.New(handler(q)), q
}

// lines is the queue of lines before the writer. Safe for concurrent use.
type lines struct {
	w     io.Writer
	gap   func(lost int) []byte // the line that tells of those lost
	ready chan struct{}         // holds a token when there is something to do
	done  chan struct{}         // closed when nothing more will be written

	mu     sync.Mutex
	queue  []line
	bytes  int // in queue
	lost   int // lines dropped, and not told yet
	full   bool
	closed bool
}

// line is text with its newline. tells is the number of lost lines it tells of.
type line struct {
	text  []byte
	tells int
}

func newLines(w io.Writer, gap func(lost int) []byte) *lines {
	q := &lines{w: w, gap: gap, ready: make(chan struct{}, 1), done: make(chan struct{})}
	var writer sync.WaitGroup // close waits for it, for a while
	writer.Go(q.run)
	return q
}

// Write queues one line, or drops it. It does not block, and never fails.
func (q *lines) Write(text []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.full = q.full || q.bytes+len(text) > maxLines
	if q.full {
		q.lost++
		return len(text), nil
	}
	q.push(line{text: bytes.Clone(text)})
	return len(text), nil
}

// push is called with mu held.
func (q *lines) push(l line) {
	q.queue = append(q.queue, l)
	q.bytes += len(l.text)
	q.wake()
}

func (q *lines) wake() {
	select {
	case q.ready <- struct{}{}:
	default:
	}
}

// close writes what is queued, for at most 0.5 s.
func (q *lines) close() {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	q.wake()
	select {
	case <-q.done:
	case <-time.After(flushTimeout):
	}
}

// run writes lines until the queue is closed and empty.
func (q *lines) run() {
	defer close(q.done)
	for {
		l, ok := q.next()
		if !ok {
			return
		}
		_, err := q.w.Write(l.text)
		q.wrote(l, err == nil)
	}
}

// next waits for the line to write next; ok is false when there will be none.
func (q *lines) next() (l line, ok bool) {
	for {
		q.mu.Lock()
		if len(q.queue) > 0 {
			l, q.queue = q.queue[0], q.queue[1:]
			q.mu.Unlock()
			return l, true
		}
		closed := q.closed
		q.mu.Unlock()
		if closed {
			return line{}, false
		}
		<-q.ready
	}
}

// wrote takes note of a write. Once lines are dropped, all are until half of
// the queue is free, so that the gap is in one place, and the line that tells
// of it stands there.
func (q *lines) wrote(l line, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.bytes -= len(l.text)
	if !ok {
		q.lost += max(1, l.tells)
	} else if q.lost > 0 && q.bytes <= maxLines/2 {
		q.push(line{q.gap(q.lost), q.lost})
		q.lost, q.full = 0, false
	}
	if len(q.queue) == 0 {
		q.full = false
	}
}

// journal is one line at a time on its way to the journal.
type journal struct {
	w io.Writer

	mu   sync.Mutex
	line bytes.Buffer
}

// journalHandler begins each line with its priority. sd-daemon(3)
type journalHandler struct {
	*journal
	slog.Handler // writes to line
}

func (h journalHandler) Handle(ctx context.Context, r slog.Record) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.line.Reset()
	h.line.WriteString(priority(r.Level))
	if err := h.Handler.Handle(ctx, r); err != nil {
		return err
	}
	_, err := h.w.Write(h.line.Bytes())
	return err
}

func (h journalHandler) WithAttrs(a []slog.Attr) slog.Handler {
	return journalHandler{h.journal, h.Handler.WithAttrs(a)}
}

func (h journalHandler) WithGroup(name string) slog.Handler {
	return journalHandler{h.journal, h.Handler.WithGroup(name)}
}

// priority is a level as the journal writes it: that of syslog. RFC 5424 6.2.1
func priority(l slog.Level) string {
	switch {
	case l >= slog.LevelError:
		return "<3>"
	case l >= slog.LevelWarn:
		return "<4>"
	case l >= slog.LevelInfo:
		return "<6>"
	}
	return "<7>"
}

const (
	episodePause = time.Minute // without an event of its kind, and an episode is over
	maxEpisodes  = 256         // kinds that are remembered
)

// episodes tells the first event of a kind from those that follow it, so that the
// log has one line of each episode. Safe for concurrent use; the zero value is ready.
type episodes struct {
	mu   sync.Mutex
	last map[string]time.Time // by kind
}

// begins reports whether an event of a kind is the first of an episode. Where too
// many kinds are remembered, that of a new one is not told.
func (e *episodes) begins(kind string, now time.Time) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	last, known := e.last[kind]
	if !known && len(e.last) >= maxEpisodes {
		maps.DeleteFunc(e.last, func(_ string, t time.Time) bool { return now.Sub(t) > episodePause })
		if len(e.last) >= maxEpisodes {
			return false
		}
	}
	if e.last == nil {
		e.last = make(map[string]time.Time)
	}
	e.last[kind] = now
	return !known || now.Sub(last) > episodePause
}
