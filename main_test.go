package main

import (
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

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
		{"nothing", nil, nil, 2, "", "vw stream     run: "},
		{"version as of old", []string{"--version"}, nil, 0, "vw ", ""},
		{"unknown", []string{"strem"}, nil, 2, "", `"strem": the command must be`},
		{"meant", []string{"strem"}, nil, 2, "", `; did you mean stream?`},
		{"host and port", []string{"stream"}, []string{"VW_HOST=127.0.0.1:8888"}, 2, "", `VW_HOST="127.0.0.1:8888": it must be an address or a host name, without a port, which is VW_PORT`},
		{"name and port", []string{"stream"}, []string{"VW_HOST=localhost:8888"}, 2, "", `VW_HOST="localhost:8888": it must be`},
		{"IPv6 and port", []string{"stream"}, []string{"VW_HOST=[::1]:8888"}, 2, "", `VW_HOST="[::1]:8888": it must be`},
		{"an address elsewhere", []string{"stream"}, []string{"VW_PORT=0", "VW_HOST=192.0.2.77"}, 2, "", `VW_HOST="192.0.2.77": this machine does not have that address`},
		{"check nothing", []string{"check"}, nil, 2, "", `vw: check takes one URL, that of the relay: vw check wss://relay.example.org/in/video0`},
		{"check an empty variable", []string{"check", ""}, nil, 2, "", `vw: check takes one URL`},
		{"check two URLs", []string{"check", "ws://a/", "ws://b/"}, nil, 2, "", `vw: check takes one URL`},
		{"check -h", []string{"check", "-h"}, nil, 2, "", `vw: check takes one URL`},
		{"check a typo", []string{"check", "wss//relay/in/x"}, nil, 2, "", `destination "wss//relay/in/x": the URL must begin with ws:// or wss://; did you mean wss://relay/in/x?`},
		{"check no URL", []string{"check", "relay"}, nil, 2, "", `destination "relay": the URL must begin with ws:// or wss://; did you mean ws://relay?`},
		{"port", []string{"stream"}, []string{"VW_PORT=99999"}, 2, "", `VW_PORT="99999": it must be a port`},
		{"host", []string{"stream"}, []string{"VW_HOST=a b"}, 2, "", `VW_HOST="a b": it must be an address`},
		{"level", []string{"stream"}, []string{"VW_LOG_LEVEL=loud"}, 2, "", `VW_LOG_LEVEL="loud": it must be one of`},
		{"lag", []string{"stream"}, []string{"VW_MAXLAG=2"}, 2, "", `VW_MAXLAG="2": it must be a duration`},
		{"unknown host", []string{"stream"}, []string{"VW_PORT=0", "VW_HOST=nowhere.invalid"}, 2, "", `VW_HOST="nowhere.invalid": `},
		{"state", []string{"stream"}, []string{"VW_PORT=0", "VW_STATE=" + damaged}, 2, "", "line 2: it is missing"},
		{"no folder", []string{"stream"}, []string{"VW_PORT=0", "VW_STATE=/no/such/folder/f"}, 2, "", `VW_STATE="/no/such/folder/f": the folder /no/such/folder does not exist`},
		{"api", []string{"stream"}, []string{"VW_API=ftp://me:pass@relay/"}, 2, "", `VW_API, VW_API_TOKEN: destination "…": the URL must begin with ws:// or wss://`},
		{"api without token", []string{"stream"}, []string{"VW_API=https://relay/"}, 2, "", `VW_API, VW_API_TOKEN: destination "https://relay/": the scheme is "https", which needs a "token"`},
		{"api token", []string{"stream"}, []string{"VW_API=ws://relay/", "VW_API_TOKEN=a b"}, 2, "", "VW_API, VW_API_TOKEN: token: it must be"},
		{"proxy", []string{"stream"}, []string{"HTTPS_PROXY=http://user:100%sure@proxy:3128"}, 2, "", `HTTPS_PROXY="…": it must be a URL like http://user:password@host:port`},
		{"proxy of check", []string{"check", "ws://relay/"}, []string{"http_proxy=http://proxy:99999"}, 2, "", `http_proxy="http://proxy:99999": it must be a URL`},
		{"proxy of another kind", []string{"stream"}, []string{"HTTP_PROXY=socks4://proxy"}, 2, "", `HTTP_PROXY="socks4://proxy": it must be a URL`},
		{"headers of check", []string{"check", "ws://relay/"}, []string{`VW_CHECK_HEADERS={"Host":"secret"}`}, 2, "", `VW_CHECK_HEADERS="***": it must be an object`},
		{"token of check", []string{"check", "ws://relay/"}, []string{"VW_CHECK_TOKEN=a b"}, 2, "", "token: it must be"},
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
			if tt.status == 2 && tt.args != nil && strings.Count(stderr.String(), "\n") != 1 {
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
	usual, _ := newPlayers("")
	want := settings{host: "::", port: 80, logLevel: slog.LevelError, token: "a=b", maxLag: time.Second, players: usual}
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
	if want := (settings{port: 8888, maxLag: 500 * time.Millisecond, players: usual}); s != want || err != nil {
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

// TestHealthcheck: vw healthcheck ends with 0 when vw runs, else with 1.
func TestHealthcheck(t *testing.T) {
	addr, _, stop := runVW(t, "VW_HOST=[::1]")
	_, port, _ := net.SplitHostPort(addr)
	env := []string{"VW_HOST=[::1]", "VW_PORT=" + port}
	var stdout, stderr bytes.Buffer
	if got := run(t.Context(), []string{"healthcheck"}, env, &stdout, &stderr); got != 0 || stdout.String() != "ok\n" {
		t.Errorf("got status %d, %q and %q", got, &stdout, &stderr)
	}
	stop()
	if got := run(t.Context(), []string{"healthcheck"}, env, &stdout, &stderr); got != 1 || !strings.Contains(stderr.String(), "vw: nothing listens at [::1]:"+port+" (connection refused)") {
		t.Errorf("without vw: got status %d, %q", got, &stderr)
	}
}

// TestPortInUse: the second vw says so, and ends with 1.
func TestPortInUse(t *testing.T) {
	addr, _, _ := runVW(t, "VW_HOST=127.0.0.1")
	_, port, _ := net.SplitHostPort(addr)
	var stderr bytes.Buffer
	got := run(t.Context(), []string{"stream"}, []string{"VW_HOST=127.0.0.1", "VW_PORT=" + port}, io.Discard, &stderr)
	if got != 1 || !strings.Contains(stderr.String(), "port "+port+" is in use, by another vw or another program; VW_PORT sets another port") {
		t.Errorf("got status %d, %q", got, &stderr)
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
