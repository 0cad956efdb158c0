package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

const testState = `{"vw":1,"streams":2,"destinations":1}
{"stream":"stream/a","feeds":["video0","audio0"]}
{"stream":"stream/b","feeds":[]}
{"id":"0","stream":"stream/a","destination":"ws://relay.invalid/in/a?x=1&y=<2>"}
`

// TestDecodeState: a damaged file is an error that names the line.
func TestDecodeState(t *testing.T) {
	set, err := decodeState([]byte(testState))
	if err != nil {
		t.Fatal(err)
	}
	again, err := decodeState(set.encode())
	if err != nil || !reflect.DeepEqual(again, set) || len(set.streams) != 2 || len(set.destinations) != 1 {
		t.Errorf("encoded and decoded again: got %v, %v, want %v", again, err, set)
	}
	for _, tt := range []struct{ name, old, new, want string }{
		{"empty", testState, "", "line 1: it is missing"},
		{"zeros", testState, strings.Repeat("\x00", 512), "line 1: it ends before its newline"},
		{"cut in a line", "<2>\"}\n", "", "line 4: it ends before its newline"},
		{"cut between lines", testState[strings.Index(testState, `{"id"`):], "", "line 4: it is missing"},
		{"version", `"vw":1`, `"vw":2`, `line 1: "vw" is 2, it must be 1`},
		{"negative", `"streams":2`, `"streams":-1`, "line 2: "},
		{"mutes missing", `"destinations":1`, `"destinations":1,"mutes":1`, "line 5: it is missing"},
		{"mutes of nobody", "<2>\"}\n", "<2>\"}\n{\"mutedBy\":\"you\",\"audio\":true,\"video\":false}\n", "line 5: there should be 2 streams"},
		{"one too many", `"destinations":1`, `"destinations":0`, "line 4: there should be 2 streams and 0 destinations"},
		{"not JSON", `"video0"`, `video0`, "line 2: this is no JSON: "},
		{"twice", `stream/b`, `stream/a`, `line 3: stream "stream/a" is there twice`},
		{"a name", `video0`, `video/../0`, `line 2: feed "video/../0": `},
		{"unknown field", `"feeds":[]`, `"feeds":[],"x":1`, `line 3: unknown field "x"`},
		{"a URL", `ws://`, `gopher://`, `line 4: destination "gopher://`},
		{"no feeds", `"feeds":[]`, `"feeds":null`, `line 3: stream "stream/b": "feeds" is missing`},
		{"blank line", "{\"id\"", "\n{\"id\"", "line 4: there is no JSON: "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			text := strings.Replace(testState, tt.old, tt.new, 1)
			if text == testState {
				t.Fatal("the case changes nothing")
			}
			if _, err := decodeState([]byte(text)); err == nil || !strings.HasPrefix(err.Error(), tt.want) {
				t.Errorf("got %v, want %q…", err, tt.want)
			}
		})
	}
}

// FuzzDecodeState: what can be read is written so that it reads the same.
func FuzzDecodeState(f *testing.F) {
	f.Add([]byte(testState))
	f.Add([]byte(`{"vw":1,"streams":0,"destinations":0}` + "\n"))
	f.Add([]byte(`{"vw":1,"streams":0,"destinations":0,"mutes":2}` + "\n" + `{"mutedBy":"here","audio":true,"video":false}` + "\n" + `{"mutedBy":"control","audio":true,"video":true}` + "\n"))
	f.Add([]byte(`{"vw":1,"streams":9999999999,"destinations":-1}` + "\n{}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		set, err := decodeState(b)
		if err != nil {
			return
		}
		text := set.encode()
		again, err := decodeState(text)
		if err != nil || !reflect.DeepEqual(again, set) || !bytes.Equal(again.encode(), text) {
			t.Errorf("got %v, %v, want %v", again, err, set)
		}
	})
}

// keepRules returns rules that keep a state file, and whose destinations
// cannot dial; end ends them.
func keepRules(t *testing.T, file string) (r *rules, end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	r = newRules(ctx, newMux(), time.Second, discardLog)
	r.dialer = deadEnd
	end = sync.OnceFunc(func() {
		cancel()
		r.wait()
	})
	t.Cleanup(end)
	if err := r.keep(file); err != nil {
		t.Fatal(err)
	}
	return r, end
}

// onDisk is the content of a state file.
func onDisk(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestState: every change is in the file when its call returns, and the rules
// are there again after a restart.
func TestState(t *testing.T) {
	file := filepath.Join(t.TempDir(), "state")
	synctest.Test(t, func(t *testing.T) { testEveryChange(t, file) })
}

func testEveryChange(t *testing.T, file string) {
	r, end := keepRules(t, file)
	for i, change := range []func() error{
		func() error { return nil },
		func() error { _, err := r.setStream(streamRule{"stream/a", []string{"video0", "audio0"}}); return err },
		func() error { _, err := r.setStream(streamRule{"stream/a", []string{"video0"}}); return err },
		func() error { _, err := r.setStream(streamRule{"stream/b", []string{}}); return err },
		func() error {
			_, err := r.setDestination(destinationRule{ID: "0", Stream: "stream/a", Destination: "ws://relay.invalid/"})
			return err
		},
		func() error {
			_, err := r.setDestination(destinationRule{ID: "0", Stream: "stream/a", Destination: "ws://other.invalid/"})
			return err
		},
		func() error {
			_, err := r.setDestination(destinationRule{ID: "1", Stream: "video0", Destination: "ws://other.invalid/"})
			return err
		},
		func() error { return r.deleteDestination("0") },
		func() error { return r.deleteStream("stream/b") },
		func() error {
			end()
			r, end = keepRules(t, file)
			return nil
		},
		func() error { return r.deleteDestinations() },
		func() error { return r.deleteStreams() },
	} {
		before := onDisk(t, file)
		if err := change(); errors.Is(err, errDiskHangs) { // that of a busy machine
			waitFor(t, "the disk", r.file.isCurrent)
		} else if err != nil {
			t.Fatal(i, err)
		}
		after := onDisk(t, file)
		set, err := decodeState([]byte(after))
		if err != nil || !reflect.DeepEqual(set, r.set()) {
			t.Errorf("change %d: the file has %v, %v, want %v", i, set, err, r.set())
		}
		if restart := i == 0 || i == 9; restart != (before == after) {
			t.Errorf("change %d: the file was\n%s and is\n%s", i, before, after)
		}
	}
	if info, err := os.Stat(file); err != nil || info.Mode() != 0o600 {
		t.Errorf("got mode %v, %v, want 0600", info.Mode(), err)
	}
}

// TestStateReadOnly: what cannot be stored changes nothing, unless it only
// takes away; that is stored as soon as it can be.
func TestStateReadOnly(t *testing.T) {
	file := filepath.Join(t.TempDir(), "state")
	synctest.Test(t, func(t *testing.T) {
		r, end := keepRules(t, file)
		defer end()
		r.setStream(streamRule{"stream/a", []string{"video0", "audio0"}})
		r.setStream(streamRule{"stream/b", []string{"video1"}})
		r.setDestination(destinationRule{ID: "0", Stream: "stream/a", Destination: "ws://relay.invalid/"})
		r.setDestination(destinationRule{ID: "1", Stream: "stream/a", Destination: "ws://relay.invalid/"})
		stored, was := onDisk(t, file), r.set()
		os.Chmod(file, 0o400)
		s := newServer(t.Context(), r, "", discardLog)
		for _, tt := range []struct {
			request, want string
			inForce       func() bool
		}{
			{`POST /api/streams {"stream":"stream/c","feeds":["video0"]}`, "nothing has changed", nil},
			{`POST /api/streams {"stream":"stream/a","feeds":["video0","audio1"]}`, "nothing has changed", nil},
			{`POST /api/destinations {"id":"2","stream":"stream/a","destination":"ws://relay.invalid/"}`, "nothing has changed", nil},
			{`POST /api/destinations {"id":"0","stream":"stream/a","destination":"ws://other.invalid/"}`, "nothing has changed", nil},
			{`POST /api/streams {"stream":"stream/a","feeds":["video0"]}`, "in force, not stored", func() bool { return len(r.set().streams["stream/a"]) == 1 }},
			{`DELETE /api/streams/stream/b`, "in force, not stored", func() bool { return len(r.set().streams) == 1 }},
			{`DELETE /api/destinations/0`, "in force, not stored", func() bool { return len(r.set().destinations) == 1 }},
			{`DELETE /api/destinations/all`, "in force, not stored", func() bool { return len(r.set().destinations) == 0 }},
		} {
			want := fmt.Sprintf(`500 {"error":"%s: write %s: the file is read-only"}`, tt.want, file)
			if got := ask(s, tt.request); got != want {
				t.Errorf("%s: got %s, want %s", tt.request, got, want)
			}
			if tt.inForce == nil && !reflect.DeepEqual(r.set(), was) || tt.inForce != nil && !tt.inForce() {
				t.Errorf("%s: the rules are %v", tt.request, r.set())
			}
			if got := onDisk(t, file); got != stored {
				t.Errorf("%s: the file has\n%s", tt.request, got)
			}
		}
		os.Chmod(file, 0o600)
		time.Sleep(11 * time.Second)
		if set, err := decodeState([]byte(onDisk(t, file))); err != nil || !reflect.DeepEqual(set, r.set()) {
			t.Errorf("at last: got %v, %v, want %v", set, err, r.set())
		}
	})
}

// TestStateSlowDisk: a mute and a delete do not wait for a disk that hangs in
// another change, and are not undone when that goes on.
func TestStateSlowDisk(t *testing.T) {
	one := map[string][]string{"stream/a": {"video0"}}
	two := map[string][]string{"stream/a": {"video0", "audio0"}}
	dest := map[string]destinationRule{"0": {ID: "0", Stream: "stream/a", Destination: "ws://relay.invalid/"}}
	set := func(feeds ...string) func(*rules) error {
		return func(r *rules) error {
			_, err := r.setStream(streamRule{"stream/a", feeds})
			return err
		}
	}
	send := func(id id) func(*rules) error {
		return func(r *rules) error {
			_, err := r.setDestination(destinationRule{ID: id, Stream: "stream/a", Destination: "ws://other.invalid/"})
			return err
		}
	}
	for _, tt := range []struct {
		name       string
		before     ruleSet
		slow, then func(*rules) error
		want       ruleSet
	}{
		{"mute during an addition", ruleSet{two, nil, 0}, set("video0", "audio0", "audio1"), set("video0"), ruleSet{one, nil, 0}},
		{"mute again during an unmute", ruleSet{one, nil, 0}, set("video0", "audio0"), set("video0"), ruleSet{one, nil, 0}},
		{"delete during an unmute", ruleSet{map[string][]string{"stream/a": {}}, nil, 0}, set("video0"),
			func(r *rules) error { return r.deleteStream("stream/a") }, ruleSet{}},
		{"delete all during an addition", ruleSet{}, set("video0"), (*rules).deleteStreams, ruleSet{}},
		{"delete during a new URL", ruleSet{nil, dest, 0}, send("0"), func(r *rules) error { return r.deleteDestination("0") }, ruleSet{}},
		{"delete all during a new one", ruleSet{nil, dest, 0}, send("1"), (*rules).deleteDestinations, ruleSet{}},
		{"another is deleted", ruleSet{one, dest, 0}, set("video0", "audio0"), func(r *rules) error { return r.deleteDestination("0") }, ruleSet{two, nil, 0}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "state")
			if err := writeState(file, tt.before.encode()); err != nil {
				t.Fatal(err)
			}
			r, _ := keepRules(t, file)
			hangs, disk := make(chan struct{}, 2), make(chan struct{})
			r.file.save = func(file string, b []byte) error {
				hangs <- struct{}{}
				<-disk
				return writeState(file, b)
			}
			var calls sync.WaitGroup
			call := func(f func(*rules) error) {
				calls.Go(func() {
					if err := f(r); err != nil && err != errBeingStored && !errors.Is(err, errDiskHangs) {
						t.Error(err)
					}
				})
			}
			call(tt.slow)
			<-hangs
			call(tt.then)
			waitFor(t, "the second to be in force", func() bool {
				r.mu.RLock()
				defer r.mu.RUnlock()
				return len(r.pending) == 0 || !bytes.Equal(ruleSet{r.streams, nil, 0}.encode(), ruleSet{tt.before.streams, nil, 0}.encode()) || len(r.destinations) < len(tt.before.destinations)
			})
			if got := r.set().encode(); tt.name != "another is deleted" && !bytes.Equal(got, tt.want.encode()) {
				t.Errorf("while the disk hung: got %s, want %s", got, tt.want.encode())
			}
			close(disk)
			calls.Wait()
			waitFor(t, "the disk", r.file.isCurrent)
			onDisk, want := onDisk(t, file), string(tt.want.encode())
			if got := string(r.set().encode()); got != want || onDisk != want {
				t.Errorf("got %s, and on the disk %s, want %s", got, onDisk, want)
			}
		})
	}
}

// TestStateHungDisk: what takes something away is in force within 100 ms,
// whatever the disk does; what only adds is not. When the disk goes on, it has
// what is in force.
func TestStateHungDisk(t *testing.T) {
	const dest = `{"id":"0","stream":"%s","destination":"ws://%s/"}`
	for _, tt := range []struct {
		name          string
		pending       string // asked for before, and waiting for the disk
		request, want string
		within        time.Duration
		streams, to   string // in force afterwards
	}{
		{"mute", "", `POST /api/streams {"stream":"stream/a","feeds":["video0"]}`, "in force, not stored", shortWait, "[video0]", "a relay"},
		{"mute all", "", `POST /api/streams {"stream":"stream/a","feeds":[]}`, "in force, not stored", shortWait, "[]", "a relay"},
		{"mute while another waits", `POST /api/streams {"stream":"stream/b","feeds":["x"]}`,
			`POST /api/streams {"stream":"stream/a","feeds":["audio0"]}`, "in force, not stored", shortWait, "[audio0]", "a relay"},
		{"take away and add", "", `POST /api/streams {"stream":"stream/a","feeds":["video0","audio1"]}`, "in force, not stored", shortWait, "[video0 audio1]", "a relay"},
		{"add", "", `POST /api/streams {"stream":"stream/a","feeds":["video0","audio0","audio1"]}`, "nothing has changed", longWait, "[video0 audio0]", "a relay"},
		{"add a stream", "", `POST /api/streams {"stream":"stream/b","feeds":["x"]}`, "nothing has changed", longWait, "[video0 audio0]", "a relay"},
		{"delete", "", `DELETE /api/streams/stream/a`, "in force, not stored", shortWait, "none", "a relay"},
		{"delete all", "", `DELETE /api/streams/all`, "in force, not stored", shortWait, "none", "a relay"},
		{"mute what is being added", `POST /api/streams {"stream":"stream/a","feeds":["video0","audio0","audio1"]}`,
			`POST /api/streams {"stream":"stream/a","feeds":["video0"]}`, "in force, not stored", shortWait, "[video0]", "a relay"},
		{"mute part of what is being added", `POST /api/streams {"stream":"stream/a","feeds":["video0","audio0","audio1","audio2"]}`,
			`POST /api/streams {"stream":"stream/a","feeds":["video0","audio1"]}`, "in force, not stored", shortWait, "[video0 audio1]", "a relay"},
		{"delete what is being added", `POST /api/streams {"stream":"stream/b","feeds":["x"]}`, `DELETE /api/streams/stream/b`, "in force, not stored", shortWait, "[video0 audio0]", "a relay"},
		{"delete destination", "", `DELETE /api/destinations/0`, "in force, not stored", shortWait, "[video0 audio0]", "none"},
		{"delete destinations", "", `DELETE /api/destinations/all`, "in force, not stored", shortWait, "[video0 audio0]", "none"},
		{"another stream", "", `POST /api/destinations ` + fmt.Sprintf(dest, "video0", "relay.invalid"), "in force, not stored", shortWait, "[video0 audio0]", "video0 relay.invalid"},
		{"another URL", "", `POST /api/destinations ` + fmt.Sprintf(dest, "a", "other.invalid"), "in force, not stored", shortWait, "[video0 audio0]", "a other.invalid"},
		{"the same", "", `POST /api/streams {"stream":"stream/a","feeds":["video0","audio0"]}`, "", 0, "[video0 audio0]", "a relay"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "state")
			synctest.Test(t, func(t *testing.T) {
				r, end := keepRules(t, file)
				s := newServer(t.Context(), r, "", discardLog)
				ask(s, `POST /api/streams {"stream":"stream/a","feeds":["video0","audio0"]}`)
				ask(s, `POST /api/destinations `+fmt.Sprintf(dest, "a", "relay"))
				disk := make(chan struct{})
				r.file.save = func(file string, b []byte) error {
					<-disk
					return writeState(file, b)
				}
				var calls sync.WaitGroup
				if tt.pending != "" {
					calls.Go(func() { ask(s, tt.pending) })
					synctest.Wait()
				}
				want := fmt.Sprintf(`500 {"error":"%s: the disk does not answer"}`, tt.want)
				if tt.want == "" {
					want = "200 "
				}
				for i := range 2 { // the second one knows that the disk hangs
					start := time.Now()
					got := ask(s, tt.request)
					took := time.Since(start)
					if i == 1 && tt.within != shortWait {
						continue
					}
					if i == 1 && strings.HasPrefix(got, "404 ") && took == 0 {
						continue // it is deleted
					}
					if !strings.HasPrefix(got, want) || i == 0 && took != tt.within || i == 1 && took != 0 {
						t.Errorf("call %d: got %s after %v, want %s after %v", i, got, took, want, tt.within)
					}
				}
				streams, to := "none", "none"
				if feeds, ok := r.set().streams["stream/a"]; ok {
					streams = fmt.Sprint(feeds)
				}
				if d, ok := r.set().destinations["0"]; ok {
					to = d.Stream + " " + strings.Trim(strings.TrimPrefix(d.Destination, "ws://"), "/")
				}
				if streams != tt.streams || to != tt.to || r.set().streams["stream/b"] != nil && tt.pending == "" {
					t.Errorf("got %s to %s in force, want %s to %s", streams, to, tt.streams, tt.to)
				}
				close(disk)
				calls.Wait()
				time.Sleep(2 * retryWrite)
				if set, err := decodeState([]byte(onDisk(t, file))); err != nil || !reflect.DeepEqual(set, r.set()) {
					t.Errorf("at last: the file has %v, %v, want %v", set, err, r.set())
				}
				end()
			})
		})
	}
}

// TestStateSlowCard: on a disk that is known to need longer than a call may take,
// a change that takes away is no error; the answer says that it is not stored
// yet, and the log is told if it never is.
func TestStateSlowCard(t *testing.T) {
	file := filepath.Join(t.TempDir(), "state")
	synctest.Test(t, func(t *testing.T) {
		log := &logBuffer{}
		r, end := keepRules(t, file)
		r.file.log = slog.New(slog.NewTextHandler(log, nil))
		s := newServer(t.Context(), r, "", discardLog)
		ask(s, `POST /api/streams {"stream":"stream/a","feeds":["video0","audio0"]}`)
		ask(s, `POST /api/streams {"stream":"stream/b","feeds":["video0"]}`)
		const disk = 300 * time.Millisecond
		takes := disk
		r.file.save = func(file string, b []byte) error {
			time.Sleep(takes)
			return writeState(file, b)
		}
		control := func(rule string) string { return string(s.commands.answer([]byte(rule))) }
		for _, step := range []struct {
			request, want string
			after         time.Duration
		}{
			{`PUT /api/mute {"video":true}`, `500 {"error":"in force, not stored: the disk does not answer"}`, shortWait}, // it was fast
			{`PUT /api/mute {"video":false}`, `200 {"audio":false,"video":false}`, disk},
			{`PUT /api/mute {"audio":true}`, `202 {"audio":true,"video":false,"stored":false}`, shortWait},
			{`PUT /api/mute {"audio":true}`, `200 {"audio":true,"video":false}`, 0},
			{`{"verb":"mute","rule":{"video":true},"ref":1}`, `{"audio":true,"video":true,"by":{"audio":["here"]},"stored":false,"ref":1}`, shortWait},
			{`POST /api/streams {"stream":"stream/a","feeds":["video0","audio1"]}`, `202 {"stream":"stream/a","feeds":["video0","audio1"],"stored":false}`, shortWait},
			{`DELETE /api/streams/stream/a`, `202 "stream/a"`, shortWait},
			{`{"verb":"delete","what":"stream","which":"stream/b"}`, `{"deleted":"stream/b","stored":false}`, shortWait},
			{`PUT /api/mute {"audio":false}`, `200 {"audio":false,"video":true,"by":{"video":["control"]}}`, disk},
		} {
			start := time.Now()
			got := ""
			if step.request[0] == '{' {
				got = control(step.request)
			} else {
				got = ask(s, step.request)
			}
			if took := time.Since(start); got != step.want || took != step.after {
				t.Errorf("%s: got %s after %v, want %s after %v", step.request, got, took, step.want, step.after)
			}
			time.Sleep(2 * disk)
			if got, want := onDisk(t, file), string(r.set().encode()); got != want {
				t.Errorf("%s: got %s on the disk, want %s", step.request, got, want)
			}
		}
		told := log.len()
		takes = time.Hour
		for i, want := range []string{"202 ", "500 "} {
			if got := ask(s, `PUT /api/mute {"audio":true}`); !strings.HasPrefix(got, want) {
				t.Errorf("call %d, the disk hangs: got %s, want %s", i, got, want)
			}
			if text := log.String()[told:]; (i == 1) != strings.Contains(text, "level=ERROR msg=\"the rules are not stored\" err=\"the disk does not answer\"") {
				t.Errorf("call %d, the disk hangs: the log says %q", i, text)
			}
			time.Sleep(longWait)
		}
		time.Sleep(2 * time.Hour)
		if got, want := onDisk(t, file), string(r.set().encode()); got != want {
			t.Errorf("at last: got %s on the disk, want %s", got, want)
		}
		end()
	})
}

// TestStateHungAtTheEnd: vw ends in time, with a disk that hangs.
func TestStateHungAtTheEnd(t *testing.T) {
	file := filepath.Join(t.TempDir(), "state")
	synctest.Test(t, func(t *testing.T) {
		r, end := keepRules(t, file)
		disk := make(chan struct{})
		r.file.save = func(string, []byte) error {
			<-disk
			return nil
		}
		var caller sync.WaitGroup
		caller.Go(func() { r.setStream(streamRule{"stream/a", []string{"video0"}}) })
		synctest.Wait()
		start := time.Now()
		end()
		caller.Wait()
		if d := time.Since(start); d > 2*endWait {
			t.Errorf("it took %v, want %v at most", d, 2*endWait)
		}
		close(disk)
	})
}

// TestStateUnsynced: when the file has its new content, but may lose it in a
// power cut, the rule is in force, and the answer says so.
func TestStateUnsynced(t *testing.T) {
	r, _ := keepRules(t, filepath.Join(t.TempDir(), "state"))
	r.file.save = func(string, []byte) error {
		return unsyncedError{errors.New("sync /x: input/output error")}
	}
	s := newServer(t.Context(), r, "", discardLog)
	want := `500 {"error":"in force and stored, but a power cut may undo it: sync /x: input/output error"}`
	for _, request := range []string{
		`POST /api/streams {"stream":"stream/a","feeds":["video0","audio0"]}`,
		`POST /api/streams {"stream":"stream/a","feeds":["video0"]}`,
	} {
		if got := ask(s, request); got != want {
			t.Errorf("%s: got %s, want %s", request, got, want)
		}
	}
	if got := r.allStreams()["stream/a"]; !slices.Equal(got, []string{"video0"}) {
		t.Errorf("got %v in force", got)
	}
}

// TestStateFiles: a link stays one, and its target is made; a file that others
// could read is made private; two vw do not use the same one.
func TestStateFiles(t *testing.T) {
	dir := t.TempDir()
	file, link, second := filepath.Join(dir, "state"), filepath.Join(dir, "link"), filepath.Join(dir, "second")
	os.Symlink("state", link)
	os.Symlink(link, second)
	r, end := keepRules(t, second)
	if _, err := r.setStream(streamRule{"stream/a", []string{"video0"}}); err != nil {
		t.Fatal(err)
	}
	if target, err := os.Readlink(link); target != "state" || !strings.Contains(onDisk(t, file), "video0") {
		t.Errorf("the link leads to %q, %v, and the file has %s", target, err, onDisk(t, file))
	}
	other := newRules(t.Context(), newMux(), time.Second, discardLog)
	if err := other.keep(file); err == nil || err.Error() != "another vw uses this file" {
		t.Errorf("a second vw: got %v", err)
	}
	end()
	os.Chmod(file, 0o644)
	log := &logBuffer{}
	third := newRules(t.Context(), newMux(), time.Second, slog.New(slog.NewTextHandler(log, nil)))
	if err := third.keep(link); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(file); err != nil || info.Mode() != 0o600 || !strings.Contains(log.String(), "level=WARN") {
		t.Errorf("got mode %v, %v, and the log says %q", info.Mode(), err, log)
	}
	if got := third.allStreams()["stream/a"]; !slices.Equal(got, []string{"video0"}) {
		t.Errorf("got %v", got)
	}
	os.WriteFile(filepath.Join(dir, "damaged"), []byte("rules\n"), 0o600)
	for _, name := range []string{"damaged", "..", "none/state"} {
		if err := newRules(t.Context(), newMux(), time.Second, discardLog).keep(filepath.Join(dir, name)); err == nil {
			t.Errorf("%s: got no error", name)
		}
	}
	if all, err := filepath.Glob(filepath.Join(dir, "[dn.]*.lock")); err != nil || len(all) > 0 {
		t.Errorf("beside files that are refused: got %q, %v", all, err)
	}
	os.Symlink("loop", filepath.Join(dir, "loop"))
	if err := newRules(t.Context(), newMux(), time.Second, discardLog).keep(filepath.Join(dir, "loop")); err == nil {
		t.Error("a link to itself: got no error")
	}
}

// TestE2EStateKill: vw is killed at any moment while rules change; after each
// restart the rules are those that a caller was told last, or that he was
// waiting to be told, or where he was told that they are not stored, older ones.
func TestE2EStateKill(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		rounds int
		file   func(t *testing.T) string
	}{
		{"file", scaled(30, 200, 200), func(t *testing.T) string { return filepath.Join(t.TempDir(), "state") }},
		{"link", scaled(3, 20, 200), func(t *testing.T) string {
			link := filepath.Join(t.TempDir(), "link")
			if err := os.Symlink(filepath.Join(t.TempDir(), "state"), link); err != nil {
				t.Fatal(err)
			}
			return link
		}},
		{"full disk", scaled(3, 20, 200), smallDisk},
		{"read-only folder", scaled(3, 20, 200), readOnlyFolder},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			refused := killRounds(t, tt.file(t), tt.rounds)
			if fails := tt.name == "full disk" || tt.name == "read-only folder"; (refused > 0) != fails {
				t.Errorf("%d changes were refused", refused)
			}
		})
	}
}

// mount mounts something on dir until the test ends.
func mount(t *testing.T, dir string, args ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("left out: only root may mount")
	}
	if out, err := exec.Command(needs(t, "mount"), append(args, dir)...).CombinedOutput(); err != nil {
		t.Fatalf("mount %v: %v: %s", args, err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
}

// smallDisk returns the name of a state file on a disk that is full again and again.
func smallDisk(t *testing.T) string {
	dir := t.TempDir()
	mount(t, dir, "-t", "tmpfs", "-o", "size=8k", "vwtest")
	var filling sync.WaitGroup
	end := make(chan struct{})
	filling.Go(func() {
		other := filepath.Join(dir, "other")
		for full := true; ; full = !full {
			select {
			case <-end:
				os.Remove(other)
				return
			case <-time.After(rand.N(10 * time.Millisecond)):
			}
			if full {
				os.WriteFile(other, make([]byte, 4<<10), 0o600)
			} else {
				os.Remove(other)
			}
		}
	})
	t.Cleanup(func() {
		close(end)
		filling.Wait()
	})
	file := filepath.Join(dir, "state")
	eventually(t, settleTime, func() error { return writeState(file, ruleSet{}.encode()) })
	return file
}

// readOnlyFolder returns the name of a state file that cannot be replaced.
func readOnlyFolder(t *testing.T) string {
	dir := t.TempDir()
	file := filepath.Join(dir, "state")
	if err := writeState(file, ruleSet{}.encode()); err != nil {
		t.Fatal(err)
	}
	mount(t, dir, "--bind", "-o", "ro", dir)
	return file
}

// killRounds starts a vw with a state file, changes its rules and kills it, again and
// again. It returns how many changes were refused.
func killRounds(t *testing.T, file string, rounds int) (refused int) {
	want := []string{"{}{}"} // one of these
	changes, unanswered := 0, 0
	for range rounds {
		vw := startVW(t, "VW_STATE="+file)
		got := vw.call(t, http.StatusOK, "GET", "/api/streams/all", "") + vw.call(t, http.StatusOK, "GET", "/api/destinations/all", "")
		if !slices.Contains(want, got) {
			t.Fatalf("after %d changes: got %s, want one of %s", changes, got, want)
		}
		model := newModel(t, got)
		var killed sync.WaitGroup
		killed.Go(func() {
			time.Sleep(rand.N(40 * time.Millisecond))
			vw.cmd.Process.Kill()
		})
		var unstored []string // how the rules were before changes that are in force, and may not be stored
		for {
			before := model.String()
			method, path, body := model.change()
			req, _ := http.NewRequest(method, vw.url+path, strings.NewReader(body))
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				want = append(unstored, before, model.String())
				unanswered++
				break
			}
			answer, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			changes++
			switch {
			case resp.StatusCode == http.StatusOK:
				unstored = nil
			case resp.StatusCode == http.StatusAccepted, // the disk is slow, and known for it
				strings.Contains(string(answer), "in force, not stored: "):
				unstored = append(unstored, before)
			case strings.Contains(string(answer), "nothing has changed: "):
				model = newModel(t, before)
				refused++
			default:
				t.Fatalf("%s %s %s: %s", method, path, body, resp.Status)
			}
		}
		killed.Wait()
		vw.kill(t)
		vw.err = nil // as it should
		http.DefaultClient.CloseIdleConnections()
	}
	t.Logf("%d kills, %d changes answered, %d of them refused, %d not answered", rounds, changes, refused, unanswered)
	return refused
}

// ruleModel is what the rules should be.
type ruleModel struct {
	streams      map[string][]string
	destinations map[string]destinationRule
}

func newModel(t *testing.T, text string) *ruleModel {
	m := &ruleModel{}
	d := json.NewDecoder(strings.NewReader(text))
	if err := errors.Join(d.Decode(&m.streams), d.Decode(&m.destinations)); err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *ruleModel) String() string {
	a, _ := json.Marshal(m.streams)
	b, _ := json.Marshal(m.destinations)
	return string(a) + string(b)
}

// change changes the model, and returns the call that does the same.
func (m *ruleModel) change() (method, path, body string) {
	n := rand.IntN(8)
	name, dest := fmt.Sprint("stream/", n), fmt.Sprint(n)
	switch _, known := m.streams[name]; {
	case rand.IntN(20) == 0:
		clear(m.streams)
		return "DELETE", "/api/streams/all", ""
	case known && rand.IntN(3) == 0:
		delete(m.streams, name)
		return "DELETE", "/api/streams/" + name, ""
	case rand.IntN(2) == 0:
		m.streams[name] = []string{"video0", "audio0", "audio1"}[:rand.IntN(4)]
		b, _ := json.Marshal(streamRule{name, m.streams[name]})
		return "POST", "/api/streams", string(b)
	}
	if _, known := m.destinations[dest]; known && rand.IntN(3) == 0 {
		delete(m.destinations, dest)
		return "DELETE", "/api/destinations/" + dest, ""
	}
	rule := destinationRule{ID: id(dest), Stream: name, Destination: fmt.Sprintf("ws://127.0.0.1:1/%d", rand.IntN(3))}
	m.destinations[dest] = rule
	b, _ := json.Marshal(rule)
	return "POST", "/api/destinations", string(b)
}

// TestSecretsInFile: secrets are in the state file, which is for its owner
// alone, and come back from it; they are in no answer and no line of the log.
func TestSecretsInFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "rules")
	relay := newTokenRelay(t)
	secrets := []string{"topsecret1.token", "topsecret2", "topsecret3", "topsecret4.token"}
	env := []string{"VW_STATE=" + file, "VW_LOGLEVEL=debug", "VW_API=ws://me:topsecret3@" + relay + "/control", "VW_API_TOKEN=topsecret4.token"}
	grep := func(what, text string) {
		t.Helper()
		for _, s := range secrets {
			if strings.Contains(text, s) {
				t.Errorf("%s: %q is in %s", what, s, text)
			}
		}
	}
	for i := range 2 {
		addr, log, stop := runVW(t, env...)
		if i == 0 {
			for n, scheme := range []string{"ws", "http"} {
				user := "me:topsecret3@"
				if scheme == "http" {
					user = ""
				}
				grep("answer", httpCall(t, "POST", "http://"+addr+"/api/destinations", fmt.Sprintf(
					`{"id":%d,"stream":"video0","destination":"%s://%s%s/echo","token":"topsecret1.token","headers":{"X-Key":"topsecret2"}}`, n, scheme, user, relay)))
			}
		}
		waitFor(t, "refusals", func() bool { return strings.Count(log.String(), "no connection, trying again") == 3 })
		for _, path := range []string{"/api/destinations/all", "/api/destinations/0", "/api/destinations/1"} {
			answer := httpCall(t, "GET", "http://"+addr+path, "")
			grep("answer", answer)
			if !strings.Contains(answer, `"token":"***"`) {
				t.Errorf("%s: got %s, want a token", path, answer)
			}
		}
		grep("stats", httpCall(t, "GET", "http://"+addr+"/api/stats", "")+httpCall(t, "GET", "http://"+addr+"/metrics", ""))
		stop()
		grep("log", log.String())
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range secrets[:3] {
			if !strings.Contains(string(b), s) {
				t.Errorf("the file has no %s: %s", s, b)
			}
		}
		if info, _ := os.Stat(file); info.Mode().Perm() != 0o600 {
			t.Errorf("got mode %v, want 0600", info.Mode())
		}
	}
}
