// The log: its format, and levels that the journal understands.

package main

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"os"
	"sync"
)

// newHandler writes the log to w, with levels for the journal if that is where
// w goes. systemd.exec(5), JOURNAL_STREAM
func newHandler(env []string, w io.Writer, level slog.Level) slog.Handler {
	o := &slog.HandlerOptions{Level: level}
	f, ok := w.(*os.File)
	if id := getenv(env, "JOURNAL_STREAM"); !ok || id == "" || id != fileID(f) {
		return slog.NewTextHandler(w, o)
	}
	j := &journal{w: w}
	return journalHandler{j, slog.NewTextHandler(&j.line, o)}
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
