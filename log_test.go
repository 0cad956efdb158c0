package main

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// TestJournal: levels are put before lines when stderr is the journal, and
// only then.
func TestJournal(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, tt := range []struct {
		name, id string
		want     [4]string // what the lines of error, warn, info and debug begin with
	}{
		{"journal", fileID(f), [4]string{"<3>time=", "<4>time=", "<6>time=", "<7>time="}},
		{"another file", "1:1", [4]string{"time=", "time=", "time=", "time="}},
		{"nobody says", "", [4]string{"time=", "time=", "time=", "time="}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f.Truncate(0)
			f.Seek(0, io.SeekStart)
			log, queue := newLog([]string{"JOURNAL_STREAM=" + tt.id}, f, slog.LevelDebug)
			log = log.With("feed", "a").WithGroup("g")
			log.Error("one\n<0>two", "k", 1)
			log.Warn("one\n<0>two", "k", 1)
			log.Info("one\n<0>two", "k", 1)
			log.Debug("one\n<0>two", "k", 1)
			queue.close()
			b, err := os.ReadFile(f.Name())
			if err != nil {
				t.Fatal(err)
			}
			lines := strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
			if len(lines) != len(tt.want) {
				t.Fatalf("got %q, want %d lines", lines, len(tt.want))
			}
			for i, line := range lines {
				if !strings.HasPrefix(line, tt.want[i]) || !strings.HasSuffix(line, ` feed=a g.k=1`) {
					t.Errorf("got %q, want %s… feed=a g.k=1", line, tt.want[i])
				}
			}
		})
	}
}

// TestJournalOfTheProgram: the shipped binary finds out that its stderr is
// the journal.
func TestJournalOfTheProgram(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := exec.Command(build(t, "linux/amd64"), "stream")
	cmd.Env = []string{"VW_PORT=0", "VW_PROT=1", "VW_HOST=127.0.0.1", "JOURNAL_STREAM=" + fileID(w)}
	cmd.Stderr = w
	err = cmd.Start()
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	b := make([]byte, 4096)
	n, err := io.ReadAtLeast(r, b, 1)
	if err != nil || !strings.HasPrefix(string(b[:n]), "<4>time=") {
		t.Errorf("got %q, %v, want a warning that begins with <4>time=", b[:n], err)
	}
}

// TestStalledLog: nobody waits for a log that nobody reads. When it is read
// again the lines go on, with the count of those lost between them.
func TestStalledLog(t *testing.T) {
	r, w := io.Pipe()
	log, lines := newLog(nil, w, slog.LevelInfo)
	const n = 20000
	var longest time.Duration
	for i := range n {
		start := time.Now()
		log.Info("line", "i", i)
		longest = max(longest, time.Since(start))
	}
	t.Logf("%d lines, the slowest call took %v", n, longest)
	go func() {
		lines.close()
		w.Close()
	}()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	got, told := 0, 0
	for line := range strings.Lines(string(b)) {
		if _, count, ok := strings.Cut(line, "count="); ok {
			k, err := strconv.Atoi(strings.TrimSpace(count))
			if err != nil {
				t.Fatal(line)
			}
			told += k
			continue
		}
		if !strings.HasSuffix(line, fmt.Sprintf(" msg=line i=%d\n", got+told)) {
			t.Fatalf("after %d lines and %d lost: got %q", got, told, line)
		}
		got++
	}
	if got+told != n || told == 0 || got == 0 {
		t.Errorf("got %d lines, and %d told to be lost, want %d together", got, told, n)
	}
}

// TestLogGoesOn: lines that could not be written are counted, and told when
// one can be written again.
func TestLogGoesOn(t *testing.T) {
	w := &flakyWriter{broken: true}
	log, lines := newLog(nil, w, slog.LevelInfo)
	for i := range 10000 {
		log.Info("lost", "i", i)
	}
	waitFor(t, "an empty queue", func() bool {
		lines.mu.Lock()
		defer lines.mu.Unlock()
		return len(lines.queue) == 0 && lines.bytes == 0
	})
	w.set(false)
	log.Info("on")
	lines.close()
	if got := w.String(); !strings.Contains(got, "msg=on\n") || !strings.HasSuffix(got, "count=10000\n") {
		t.Errorf("got %q, want a line, and that 10000 were lost", got)
	}
}

// flakyWriter fails while it is broken.
type flakyWriter struct {
	logBuffer
	broken bool
}

func (w *flakyWriter) set(broken bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.broken = broken
}

func (w *flakyWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	broken := w.broken
	w.mu.Unlock()
	if broken {
		return 0, syscall.EPIPE
	}
	return w.logBuffer.Write(b)
}

// TestStuckLogAtTheEnd: vw leaves a line that cannot be written.
func TestStuckLogAtTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := io.Pipe()
		log, lines := newLog(nil, w, slog.LevelInfo)
		log.Info("stuck")
		start := time.Now()
		lines.close()
		if d := time.Since(start); d != flushTimeout {
			t.Errorf("it took %v, want %v", d, flushTimeout)
		}
		r.Close()
	})
}

// TestBrokenPipe: vw goes on when the reader of its log has gone.
func TestBrokenPipe(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(build(t, "linux/amd64"), "stream")
	cmd.Env = []string{"VW_PORT=0", "VW_LOGLEVEL=debug"}
	cmd.Stderr = w
	err = cmd.Start()
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	b := make([]byte, 4096)
	n, err := r.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	_, addr, _ := strings.Cut(string(b[:n]), "addr=")
	addr, _, _ = strings.Cut(addr, "\n")
	for i := range 20 {
		if got := httpCall(t, "POST", "http://"+addr+"/api/streams", fmt.Sprintf(`{"stream":"stream/%d","feeds":[]}`, i)); !strings.Contains(got, `"feeds":[]`) {
			t.Errorf("got %s", got)
		}
	}
	if got := httpCall(t, "GET", "http://"+addr+"/healthcheck", ""); got != `"ok"` {
		t.Errorf("healthcheck: got %s", got)
	}
	cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Errorf("vw ended with %v, want status 0", err)
	}
}
