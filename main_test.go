package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestMain fails the run when goroutines are left behind (I3).
func TestMain(m *testing.M) {
	status := m.Run()
	http.DefaultClient.CloseIdleConnections()
	if left := leaked(); left != "" && status == 0 {
		fmt.Fprintf(os.Stderr, "goroutines left behind:\n%s\n", left)
		status = 1
	}
	os.Exit(status)
}

// leaked returns the stacks of goroutines that run our code outside a test;
// it gives them 5 s to end.
func leaked() string {
	for deadline := time.Now().Add(5 * time.Second); ; {
		var left []string
		buf := make([]byte, 1<<20)
		for _, g := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
			if !strings.Contains(g, "TestMain") && strings.Contains(g, "\nmain.") || strings.Contains(g, "vw.(") {
				left = append(left, g)
			}
		}
		if len(left) == 0 || time.Now().After(deadline) {
			return strings.Join(left, "\n\n")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// tsMaker writes a valid transport stream of one program for tests.
type tsMaker struct {
	bytes.Buffer
	cc map[uint16]byte
}

const (
	testPMT   = 0x1000
	testVideo = 0x100
	testAudio = 0x101
)

func (t *tsMaker) counter(pid uint16) byte {
	if t.cc == nil {
		t.cc = make(map[uint16]byte)
	}
	t.cc[pid] = (t.cc[pid] + 1) & 15
	return t.cc[pid]
}

// section writes a section into one packet, with its CRC.
func (t *tsMaker) section(pid uint16, b ...byte) {
	binary.BigEndian.PutUint16(b[1:], 0xb000|uint16(len(b)+4-3))
	b = binary.BigEndian.AppendUint32(b, crc32MPEG(b))
	p := append([]byte{0x47, 0x40 | byte(pid>>8), byte(pid), 0x10 | t.counter(pid), 0}, b...)
	t.Write(append(p, bytes.Repeat([]byte{0xff}, packetSize-len(p))...))
}

// tables writes a PAT and a PMT; tracks are pairs of PID and stream_type.
func (t *tsMaker) tables(tracks ...int) {
	t.section(patPID, 0, 0, 0, 0, 1, 0xc1, 0, 0, 0, 1, 0xe0|testPMT>>8, testPMT&0xff)
	pmt := []byte{2, 0, 0, 0, 1, 0xc1, 0, 0, 0xe0 | byte(tracks[0]>>8), byte(tracks[0]), 0xf0, 0}
	for i := 0; i < len(tracks); i += 2 {
		pmt = append(pmt, byte(tracks[i+1]), 0xe0|byte(tracks[i]>>8), byte(tracks[i]), 0xf0, 0)
	}
	t.section(testPMT, pmt...)
}

// pes is one frame as tsMaker writes it.
type pes struct {
	pid    uint16
	id     byte // stream_id
	key    bool // random_access_indicator, and a PCR
	pts    ticks
	size   int  // bytes of payload
	length bool // PES_packet_length tells it
}

// packets returns the packets of a frame: its last one is stuffed, unless the
// size fills it.
func (t *tsMaker) packets(f pes) []byte {
	b := []byte{0, 0, 1, f.id, 0, 0, 0x80, 0x80, 5, 0x21, 0, 1, 0, 1}
	writeTime(b[9:], f.pts&(wrap-1))
	if f.length {
		binary.BigEndian.PutUint16(b[4:], uint16(8+f.size))
	}
	for i := range f.size {
		b = append(b, byte(i*7)|1)
	}
	var out []byte
	for start := byte(0x40); len(b) > 0; start = 0 {
		var field []byte
		if start != 0 && f.key {
			field = []byte{7, 0x50, 0, 0, 0, 0, 0x7e, 0}
		}
		room := packetSize - 4 - len(field)
		if pad := room - len(b); pad > 0 {
			if field == nil {
				field, pad = []byte{byte(pad - 1)}, pad-1
				if pad > 0 {
					field, pad = append(field, 0), pad-1
				}
			} else {
				field[0] += byte(pad)
			}
			field = append(field, bytes.Repeat([]byte{0xff}, pad)...)
		}
		control := byte(0x10)
		if field != nil {
			control = 0x30
		}
		p := append([]byte{0x47, start | byte(f.pid>>8), byte(f.pid), control | t.counter(f.pid)}, field...)
		n := packetSize - len(p)
		out = append(append(out, p...), b[:n]...)
		b = b[n:]
	}
	return out
}

func (t *tsMaker) frame(f pes) { t.Write(t.packets(f)) }

var nullPacket = append([]byte{0x47, 0x1f, 0xff, 0x10}, make([]byte, packetSize-4)...)

// testClip is n frames of video at 25/s, keyframes every 12 with PSI before.
func testClip(n, size int) []byte {
	var t tsMaker
	for i := range n {
		if i%12 == 0 {
			t.tables(testVideo, 0x01)
		}
		t.frame(pes{pid: testVideo, id: 0xe0, key: i%12 == 0, pts: 126000 + ticks(i)*3600, size: size})
	}
	return t.Bytes()
}

// discardLog is a logger for what no test reads.
var discardLog = slog.New(slog.DiscardHandler)

// logBuffer is where a test reads the log.
type logBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func TestRun(t *testing.T) {
	damaged := filepath.Join(t.TempDir(), "state")
	if err := os.WriteFile(damaged, []byte("{\"vw\":1,\"streams\":1,\"destinations\":0}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name           string
		args, env      []string
		status         int
		stdout, stderr string // in it
	}{
		{"help", []string{"help"}, nil, 0, "VW_MAXLAG", ""},
		{"version", []string{"version"}, nil, 0, "vw ", ""},
		{"nothing", nil, nil, 2, "", `"": the command must be`},
		{"unknown", []string{"strem"}, nil, 2, "", `"strem": the command must be`},
		{"check nothing", []string{"check"}, nil, 2, "", `"check": the command must be`},
		{"check no URL", []string{"check", "relay"}, nil, 2, "", `destination "relay": the scheme is "", it must be ws or wss`},
		{"port", []string{"stream"}, []string{"VW_PORT=99999"}, 2, "", `VW_PORT="99999": it must be a port`},
		{"host", []string{"stream"}, []string{"VW_HOST=a b"}, 2, "", `VW_HOST="a b": it must be an address`},
		{"level", []string{"stream"}, []string{"VW_LOG_LEVEL=loud"}, 2, "", `VW_LOG_LEVEL="loud": it must be one of`},
		{"lag", []string{"stream"}, []string{"VW_MAXLAG=2"}, 2, "", `VW_MAXLAG="2": it must be a duration`},
		{"unknown host", []string{"stream"}, []string{"VW_PORT=0", "VW_HOST=nowhere.invalid"}, 2, "", `VW_HOST="nowhere.invalid": `},
		{"state", []string{"stream"}, []string{"VW_PORT=0", "VW_STATE=" + damaged}, 2, "", "line 2: it is missing"},
		{"no folder", []string{"stream"}, []string{"VW_PORT=0", "VW_STATE=/no/such/folder/f"}, 2, "", `VW_STATE="/no/such/folder/f": open `},
		{"api", []string{"stream"}, []string{"VW_API=ftp://me:pass@relay/"}, 2, "", `VW_API, VW_API_TOKEN: destination "…": the scheme is "ftp"`},
		{"api without token", []string{"stream"}, []string{"VW_API=https://relay/"}, 2, "", `VW_API, VW_API_TOKEN: destination "https://relay/": the scheme is "https", which needs a "token"`},
		{"api token", []string{"stream"}, []string{"VW_API=ws://relay/", "VW_API_TOKEN=a b"}, 2, "", "VW_API, VW_API_TOKEN: token: it must be"},
		{"profile", []string{"stream"}, []string{"VW_CPUPROFILE=/no/such/folder/f"}, 2, "", "VW_CPUPROFILE"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			if got := run(t.Context(), tt.args, tt.env, &stdout, &stderr); got != tt.status {
				t.Errorf("got status %d, want %d", got, tt.status)
			}
			if !strings.Contains(stdout.String(), tt.stdout) || !strings.Contains(stderr.String(), tt.stderr) {
				t.Errorf("got %q and %q, want %q and %q in them", &stdout, &stderr, tt.stdout, tt.stderr)
			}
			if tt.status == 2 && strings.Count(stderr.String(), "\n") != 1 {
				t.Errorf("got %q, want one line", &stderr)
			}
		})
	}
}

func TestReadSettings(t *testing.T) {
	s, warnings, err := readSettings([]string{"PATH=/bin", "VW_PORT=80", "VW_HOST=::", "VW_LOGLEVEL=Fatal", "VW_MAXLAG=1s", "VW_TOKEN=a=b", "VW_STAET=x", "VW_CPUPROFILE="})
	if err != nil {
		t.Fatal(err)
	}
	usual, _ := newPlayer("")
	want := settings{host: "::", port: 80, logLevel: slog.LevelError, token: "a=b", maxLag: time.Second, player: usual}
	if s != want {
		t.Errorf("got %+v, want %+v", s, want)
	}
	if len(warnings) != 1 || !strings.Contains(warnings[0], "VW_STAET") {
		t.Errorf("got warnings %q, want one of VW_STAET", warnings)
	}
	_, warnings, _ = readSettings([]string{"VW_PROT=1"})
	if len(warnings) != 1 || !strings.HasSuffix(warnings[0], "did you mean VW_PORT?") {
		t.Errorf("got warnings %q, want VW_PORT to be meant", warnings)
	}
	s, _, err = readSettings(nil)
	if want := (settings{port: 8888, maxLag: 500 * time.Millisecond, player: usual}); s != want || err != nil {
		t.Errorf("got %+v, %v, want %+v", s, err, want)
	}
}

func FuzzReadSettings(f *testing.F) {
	f.Add("VW_PORT=8888")
	f.Add("VW_MAXLAG=-1h")
	f.Add("VW_\x00=\xff")
	f.Fuzz(func(t *testing.T, e string) {
		s, warnings, err := readSettings([]string{e})
		if err == nil && (s.port < 0 || s.port > 65535 || s.maxLag < 10*time.Millisecond || s.maxLag > time.Minute) {
			t.Errorf("%q: got %+v", e, s)
		}
		if err != nil && strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: got an error of several lines: %q", e, err)
		}
		for _, w := range warnings {
			if strings.ContainsFunc(w, func(r rune) bool { return r < ' ' || r > '~' }) {
				t.Errorf("%q: got the warning %q", e, w)
			}
		}
	})
}

// runVW runs the program in this process, on a free port, until the test
// ends. It returns its address.
func runVW(t testing.TB, env ...string) (addr string, log *logBuffer, stop func() int) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	log = &logBuffer{}
	status := make(chan int, 1)
	go func() { status <- run(ctx, []string{"stream"}, append([]string{"VW_PORT=0"}, env...), io.Discard, log) }()
	stop = sync.OnceValue(func() int {
		cancel()
		return <-status
	})
	t.Cleanup(func() { stop() })
	waitFor(t, "vw to listen", func() bool {
		_, rest, ok := strings.Cut(log.String(), "listening addr=")
		addr, _, _ = strings.Cut(rest, "\n")
		return ok && strings.Contains(rest, "\n")
	})
	return addr, log, stop
}

// waitFor waits at most 5 s for ok.
func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited 5 s for %s", what)
		}
	}
}

// TestShutdown: status 0, whatever publishers and readers do.
func TestShutdown(t *testing.T) {
	addr, log, stop := runVW(t)
	body, in := io.Pipe()
	posted := make(chan string, 1)
	go func() {
		r, err := http.Post("http://"+addr+"/ts/video0", "", body)
		if err != nil {
			posted <- err.Error()
			return
		}
		r.Body.Close()
		posted <- r.Status
	}()
	clip := testClip(12, 2000)
	in.Write(clip)
	// What is on its way when vw ends meets no answer, but a connection that is lost.
	waitFor(t, "the clip", func() bool {
		r, err := http.Get("http://" + addr + "/api/stats")
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		var all stats
		return json.NewDecoder(r.Body).Decode(&all) == nil && all.Feeds["video0"] != nil && all.Feeds["video0"].Bytes == uint64(len(clip))
	})
	reader, err := http.Get("http://" + addr + "/ts/video0")
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Body.Close()
	idle, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	start := time.Now()
	if got := stop(); got != 0 {
		t.Errorf("got status %d, want 0", got)
	}
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("took %v, want 5 s at most", d)
	}
	// When the connection is lost, net/http's client waits for the end of the
	// body, but that must not be what it fails to write.
	late := time.AfterFunc(5*time.Second, func() { in.Close() })
	got := <-posted
	late.Stop()
	in.Close()
	if got != "503 Service Unavailable" {
		t.Errorf("the publisher got %q, want 503\n%s", got, log)
	}
}
