package main

import (
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
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
			log := slog.New(newHandler([]string{"JOURNAL_STREAM=" + tt.id}, f, slog.LevelDebug)).With("feed", "a").WithGroup("g")
			log.Error("one\n<0>two", "k", 1)
			log.Warn("one\n<0>two", "k", 1)
			log.Info("one\n<0>two", "k", 1)
			log.Debug("one\n<0>two", "k", 1)
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
