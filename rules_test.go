package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/websocket"
)

// TestRuleLimits: a rule too many is refused and changes nothing, while those
// that there are can be changed, muted and deleted.
func TestRuleLimits(t *testing.T) {
	s := newTestServer(t, "")
	s.commands.rules.dialer = deadEnd
	stream := func(i int, feeds string) string {
		return fmt.Sprintf(`POST /api/streams {"stream":"stream/%d","feeds":[%s]}`, i, feeds)
	}
	to := func(i int, url string) string {
		return fmt.Sprintf(`POST /api/destinations {"id":"%d","stream":"video0","destination":"%s"}`, i, url)
	}
	for i := range maxStreams {
		if got := ask(s, stream(i, `"a","b"`)); got[:3] != "200" {
			t.Fatalf("stream %d: got %s, want 200", i, got)
		}
	}
	for i := range maxDestinations {
		if got := ask(s, to(i, "ws://a")); got[:3] != "200" {
			t.Fatalf("destination %d: got %s, want 200", i, got)
		}
	}
	for _, step := range []struct{ request, want string }{
		{stream(maxStreams, `"a"`), `503 {"error":"stream \"stream/256\": there are 256 streams: limit reached"}`},
		{fmt.Sprintf("GET /api/streams/stream/%d", maxStreams), "404"},
		{stream(0, `"a"`), "200"},
		{stream(0, ``), "200"},
		{stream(0, `"c"`), "200"},
		{"DELETE /api/streams/stream/0", "200"},
		{stream(maxStreams, `"a"`), "200"},
		{to(maxDestinations, "ws://a"), `503 {"error":"destination \"1024\": there are 1024 destinations: limit reached"}`},
		{fmt.Sprintf("GET /api/destinations/%d", maxDestinations), "404"},
		{to(0, "ws://b"), "200"},
		{"DELETE /api/destinations/0", "200"},
		{to(maxDestinations, "ws://a"), "200"},
		{to(1, "ws://a/"+strings.Repeat("x", maxURL)), "400"},
		{"DELETE /api/streams/all", "200"},
		{"DELETE /api/destinations/all", "200"},
	} {
		if got := ask(s, step.request); !strings.HasPrefix(got, step.want) {
			t.Errorf("%.100s: got %s, want %s", step.request, got, step.want)
		}
	}
}

// TestAllIsACopy: what GET answers does not change under the caller.
func TestAllIsACopy(t *testing.T) {
	s := newTestServer(t, "")
	ask(s, `POST /api/streams {"stream":"stream/x","feeds":["a"]}`)
	all := s.commands.rules.allStreams()
	before := maps.Clone(all)
	ask(s, "DELETE /api/streams/all")
	if !maps.EqualFunc(all, before, slices.Equal[[]string]) {
		t.Errorf("got %v, want %v", all, before)
	}
}

// TestSecrets: answers show *** for secrets, an update that sends it back
// keeps them, one without them takes them away.
func TestSecrets(t *testing.T) {
	s := newTestServer(t, "")
	rule := func(rest string) string { return `{"id":"0","stream":"video0","destination":` + rest + `}` }
	const (
		full  = `"ws://me:pass@127.0.0.1:1/in/a@b?x=1","token":"abcd.efgh","headers":{"x-key":"k1","X-Other":"k2"}`
		shown = `"ws://***@127.0.0.1:1/in/a@b?x=1","token":"***","headers":{"X-Key":"***","X-Other":"***"}`
	)
	nothing := func(url string) string {
		return `{"error":"destination \"` + url + `\": *** keeps a secret that is stored for the same host, port and path, and none is: give the token, the headers and the password anew"}`
	}
	stored := func() string {
		r, _ := s.commands.rules.destination("0")
		return fmt.Sprintf("%s %s %q", r.Destination, r.Token, r.Headers)
	}
	steps := []struct{ request, want, stored string }{
		{"POST " + rule(full), "200 " + rule(shown), `ws://me:pass@127.0.0.1:1/in/a@b?x=1 abcd.efgh "X-Key: k1\nX-Other: k2\n"`},
		{"GET", "200 " + rule(shown), ""},
		{"POST " + rule(shown), "200 " + rule(shown), `ws://me:pass@127.0.0.1:1/in/a@b?x=1 abcd.efgh "X-Key: k1\nX-Other: k2\n"`},
		{"POST " + rule(`"ws://***@127.0.0.1:1/in/a@b?x=2","token":"***","headers":{"x-key":"***","new":"v"}`),
			"200 " + rule(`"ws://***@127.0.0.1:1/in/a@b?x=2","token":"***","headers":{"New":"***","X-Key":"***"}`),
			`ws://me:pass@127.0.0.1:1/in/a@b?x=2 abcd.efgh "New: v\nX-Key: k1\n"`},
		{"POST " + rule(`"ws://evil.invalid/","token":"***"`), "400 " + nothing("ws://evil.invalid/"),
			`ws://me:pass@127.0.0.1:1/in/a@b?x=2 abcd.efgh "New: v\nX-Key: k1\n"`},
		{"POST " + rule(`"ws://127.0.0.1:1/in/a@b","headers":{"X-Other":"***"}`), "400 " + nothing("…"),
			`ws://me:pass@127.0.0.1:1/in/a@b?x=2 abcd.efgh "New: v\nX-Key: k1\n"`},
		{"POST " + rule(`"ws://127.0.0.1:2/"`), "200 " + rule(`"ws://127.0.0.1:2/"`), `ws://127.0.0.1:2/  ""`},
		{"POST " + rule(`"ws://127.0.0.1:2/","token":"***"`), "400 " + nothing("ws://127.0.0.1:2/"), ""},
		{"POST " + rule(`"ws://***@127.0.0.1:2/"`), "400 " + nothing("…"), ""},
		{"POST " + rule(`"ws://127.0.0.1:2/","token":"","headers":{}`), "200 " + rule(`"ws://127.0.0.1:2/"`), `ws://127.0.0.1:2/  ""`},
	}
	for i, step := range steps {
		method, body, _ := strings.Cut(step.request, " ")
		path := " /api/destinations"
		if method == "GET" {
			path += "/0"
		}
		if got := ask(s, method+path+" "+body); got != step.want {
			t.Errorf("step %d, %s\n got %s\nwant %s", i, step.request, got, step.want)
		}
		if got := stored(); step.stored != "" && got != step.stored {
			t.Errorf("step %d: got %s stored, want %s", i, got, step.stored)
		}
	}
	if got, want := ask(s, "GET /api/destinations/all"), `200 {"0":`+rule(`"ws://127.0.0.1:2/"`)+`}`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// TestMuteSwitch: each hand mutes and lifts its own, what either has muted is
// muted, and only here lifts what control has muted, by saying so.
func TestMuteSwitch(t *testing.T) {
	s := newTestServer(t, "")
	const (
		off   = `200 {"audio":false,"video":false}`
		sound = `200 {"audio":true,"video":false}`
		by    = `200 {"audio":true,"video":false,"by":{"audio":["%s"]}}`
	)
	remote := func(rule string) string {
		v, err := s.commands.setMute([]byte(rule), handControl)
		if err != nil {
			return err.Error()
		}
		return "200 " + string(encode(v))
	}
	for i, step := range []struct{ hand, request, want string }{
		{"", "GET", off},
		{"", `PUT {"audio":true}`, sound},
		{"", "GET", sound},
		{"", `POST {"audio":true}`, sound},
		{"control", `{"audio":false}`, fmt.Sprintf(by, "here")},
		{"control", `{"audio":false,"control":false}`, `"control" is not for the control link, which lifts what it has muted itself`},
		{"", `PUT {"audio":false}`, off},
		{"control", `{"audio":true}`, sound},
		{"", "GET", fmt.Sprintf(by, "control")},
		{"", `PUT {"audio":false}`, fmt.Sprintf(by, "control")},
		{"", `PUT {"audio":true}`, fmt.Sprintf(by, `here","control`)},
		{"control", `{"audio":false}`, fmt.Sprintf(by, "here")},
		{"control", `{"audio":true,"video":true}`, `200 {"audio":true,"video":true,"by":{"audio":["here","control"]}}`},
		{"", `PUT {"audio":false,"video":false}`, `200 {"audio":true,"video":true,"by":{"audio":["control"],"video":["control"]}}`},
		{"", `PUT {"video":true,"audio":false,"control":false}`, `200 {"audio":false,"video":true,"by":{"video":["here","control"]}}`},
		{"", `PUT {"video":false,"control":false}`, off},
		{"", "PUT ", "400"}, // as a redirect or a proxy sends it
		{"", "POST ", "400"},
		{"", "POST {}", `400 {"error":"\"audio\" and \"video\" are missing: {\"audio\":true} mutes, {\"audio\":false} lifts that"}`},
		{"", `POST {"control":false}`, "400"},
		{"", `POST {"audio":true,"control":false}`, "400"},
		{"", `POST {"audio":false,"control":true}`, "400"},
		{"", `POST {"audio":"true"}`, "400"},
		{"", `POST {"sound":true}`, "400"},
		{"", `POST null`, "400"},
		{"", "DELETE", "405"},
		{"", "GET", off},
	} {
		got := ""
		if step.hand == "control" {
			got = remote(step.request)
		} else {
			method, body, _ := strings.Cut(step.request, " ")
			got = ask(s, method+" /api/mute "+body)
		}
		if got != step.want && (len(step.want) > 3 || !strings.HasPrefix(got, step.want)) {
			t.Errorf("step %d, %s%s: got %s, want %s", i, step.hand, step.request, got, step.want)
		}
	}
	ask(s, `PUT /api/mute {"video":true}`)
	remote(`{"audio":true}`)
	metrics := ask(s, "GET /metrics")
	for _, want := range []string{
		"\nvw_muted{kind=\"audio\",by=\"here\"} 0\nvw_muted{kind=\"audio\",by=\"control\"} 1\n",
		"\nvw_muted{kind=\"video\",by=\"here\"} 1\nvw_muted{kind=\"video\",by=\"control\"} 0\n",
	} {
		if !strings.Contains(metrics, want) {
			t.Errorf("got\n%s\nwant %q in it", metrics, want)
		}
	}
	stats := s.commands.stats()
	if m := stats.Mute; !m.Audio || !m.Video || len(m.Since) != 2 || time.Since(m.Since["audio"]) > time.Minute || len(m.By) != 1 {
		t.Errorf("the stats have %+v", m)
	}
}

// TestMuteKept: what is muted is in the state file, and in force again after a
// restart, with what VW_MUTE says.
func TestMuteKept(t *testing.T) {
	file := filepath.Join(t.TempDir(), "state")
	synctest.Test(t, func(t *testing.T) { testMuteKept(t, file) })
}

func testMuteKept(t *testing.T, file string) {
	on, off := true, false
	r, end := keepRules(t, file)
	set := func(rule muteRule, by hand) {
		t.Helper()
		if _, err := r.setMute(rule, by); err != nil {
			t.Fatal(err)
		}
	}
	set(muteRule{Audio: &on}, handHere)
	set(muteRule{Audio: &on, Video: &on}, handControl)
	if got, want := onDisk(t, file), "{\"vw\":1,\"streams\":0,\"destinations\":0,\"mutes\":2}\n"+
		"{\"mutedBy\":\"here\",\"audio\":true,\"video\":false}\n{\"mutedBy\":\"control\",\"audio\":true,\"video\":true}\n"; got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	end()
	r, end = keepRules(t, file)
	if got, want := r.set().mutes, muteOf(handHere, 0)|muteOf(handControl, 0)|muteOf(handControl, 1); got != want {
		t.Errorf("after a restart: got %b, want %b", got, want)
	}
	set(muteRule{Audio: &off, Video: &off, Control: &off}, handHere)
	if got, want := onDisk(t, file), "{\"vw\":1,\"streams\":0,\"destinations\":0}\n"; got != want {
		t.Errorf("lifted: got %s, want %s", got, want)
	}
	set(muteRule{Video: &on}, handControl)
	end()
	s, _, err := readSettings([]string{"VW_MUTE=audio, Video"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	r = newRules(ctx, newMux(), time.Second, discardLog)
	r.mute(s.mute)
	if err := r.keep(file); err != nil {
		t.Fatal(err)
	}
	if got, want := r.set().mutes, muteOf(handHere, 0)|muteOf(handHere, 1)|muteOf(handControl, 1); got != want {
		t.Errorf("with VW_MUTE: got %b, want %b", got, want)
	}
	cancel()
	r.wait()
}

// TestMuteHungDisk: a mute is in force whatever the disk does, a lift only when
// it is stored; and a mute that comes while that is written wins.
func TestMuteHungDisk(t *testing.T) {
	file := filepath.Join(t.TempDir(), "state")
	synctest.Test(t, func(t *testing.T) {
		r, end := keepRules(t, file)
		s := newServer(t.Context(), r, "", discardLog)
		disk := make(chan struct{})
		r.file.save = func(file string, b []byte) error {
			<-disk
			return writeState(file, b)
		}
		for _, step := range []struct {
			request, want string
			after         time.Duration
			muted         muteStatus
		}{
			{`{"audio":true}`, "in force, not stored", shortWait, muteStatus{Audio: true}},
			{`{"audio":true}`, "in force, not stored", 0, muteStatus{Audio: true}},
			{`{"audio":false}`, "nothing has changed", longWait, muteStatus{Audio: true}},
			{`{"audio":false,"video":true}`, "what is muted is in force, and nothing is lifted", 0, muteStatus{Audio: true, Video: true}},
		} {
			start := time.Now()
			got, want := ask(s, "PUT /api/mute "+step.request), fmt.Sprintf(`500 {"error":"%s: the disk does not answer"}`, step.want)
			if got != want || time.Since(start) != step.after {
				t.Errorf("%s: got %s after %v, want %s after %v", step.request, got, time.Since(start), want, step.after)
			}
			if got := s.commands.listMute(handHere); got.Audio != step.muted.Audio || got.Video != step.muted.Video {
				t.Errorf("%s: got %+v, want %+v", step.request, got, step.muted)
			}
		}
		var lift sync.WaitGroup
		lift.Go(func() {
			if got := ask(s, `PUT /api/mute {"audio":false,"video":false}`); got != `200 {"audio":true,"video":false}` {
				t.Errorf("the lift: got %s", got)
			}
		})
		synctest.Wait()
		ask(s, `PUT /api/mute {"audio":true}`)
		close(disk)
		lift.Wait()
		time.Sleep(2 * retryWrite)
		if got, want := onDisk(t, file), string(r.set().encode()); got != want || r.set().mutes != muteOf(handHere, 0) {
			t.Errorf("got %s on the disk, want %s", got, want)
		}
		end()
	})
}

// TestMuteAndLift: one call that mutes and lifts has the mute in force at once,
// and is not held for the lift longer than for the mute alone.
func TestMuteAndLift(t *testing.T) {
	for _, tt := range []struct {
		name, before string
		disk         time.Duration // for one write
		want         string
		after        time.Duration
	}{
		{"a disk that hangs", `{"video":true}`, time.Minute, `500 {"error":"what is muted is in force, and nothing is lifted: the disk does not answer"}`, shortWait},
		{"and the mute is in force already", `{"audio":true,"video":true}`, time.Minute, `500 {"error":"what is muted is in force, and nothing is lifted: the disk does not answer"}`, shortWait},
		{"a disk that answers in time", `{"video":true}`, 60 * time.Millisecond, `200 {"audio":true,"video":false}`, 60 * time.Millisecond},
		{"nothing to lift", `{"audio":false}`, 60 * time.Millisecond, `200 {"audio":true,"video":false}`, 60 * time.Millisecond},
	} {
		file := filepath.Join(t.TempDir(), "state")
		synctest.Test(t, func(t *testing.T) {
			r, end := keepRules(t, file)
			s := newServer(t.Context(), r, "", discardLog)
			ask(s, "PUT /api/mute "+tt.before)
			r.file.save = func(file string, b []byte) error {
				time.Sleep(tt.disk)
				return writeState(file, b)
			}
			start := time.Now()
			time.AfterFunc(time.Nanosecond, func() {
				if got := s.commands.listMute(handHere); !got.Audio {
					t.Errorf("%s: the sound is not muted at once", tt.name)
				}
			})
			if got := ask(s, `PUT /api/mute {"audio":true,"video":false}`); got != tt.want || time.Since(start) != tt.after {
				t.Errorf("%s: got %s after %v, want %s after %v", tt.name, got, time.Since(start), tt.want, tt.after)
			}
			time.Sleep(2 * time.Minute)
			if got, want := onDisk(t, file), string(r.set().encode()); got != want {
				t.Errorf("%s: got %s on the disk, want %s", tt.name, got, want)
			}
			end()
		})
	}
}

// TestChangeAgain holds I6 for who asks for what is in force already: he is told so
// when a message that was begun before has ended, as the one who asked first is.
func TestChangeAgain(t *testing.T) {
	for _, tt := range []struct{ name, request, again string }{
		{"mute", `PUT /api/mute {"audio":true}`, "200"},
		{"mute again from here and there", `PUT /api/mute {"audio":true,"video":true}`, "200"},
		{"a rule without the feed", `POST /api/streams {"stream":"stream/x","feeds":[]}`, "200"},
		{"without", `POST /api/streams {"stream":"stream/x","without":["f"]}`, "200"},
		{"delete a stream", `DELETE /api/streams/stream/x`, "404"},
		{"delete all streams", `DELETE /api/streams/all`, "200"},
		{"delete a destination", `DELETE /api/destinations/0`, "404"},
		{"delete all destinations", `DELETE /api/destinations/all`, "200"},
	} {
		synctest.Test(t, func(t *testing.T) {
			b := newStudio(t)
			r := newRules(t.Context(), b.mux, time.Second, discardLog)
			if _, err := r.setStream(streamRule{"stream/x", []string{"f"}}); err != nil {
				t.Fatal(err)
			}
			rule, _, err := destinationRule{ID: "0", Stream: "stream/x", Destination: "ws://relay.invalid/"}.clean()
			if err != nil {
				t.Fatal(err)
			}
			d := newDestination(newUplink(rule, deadEnd, discardLog), b.mux, time.Second)
			d.cancel = func(error) {}
			r.destinations["0"] = &running{destination: d}
			s := newServer(t.Context(), r, "", discardLog)
			b.play(20)
			batch := b.sub.take(nil, 1<<20, false, time.Now()) // a write that nothing interrupts
			start := time.Now()
			var calls sync.WaitGroup
			for i, want := range []string{"200", tt.again} {
				calls.Go(func() {
					time.Sleep(time.Duration(i) * time.Millisecond)
					got := ask(s, tt.request)
					if took := time.Since(start); took != 30*time.Millisecond || !strings.HasPrefix(got, want) {
						t.Errorf("%s, call %d: got %s after %v, want %s when the write has ended, after 30ms", tt.name, i, got, took, want)
					}
				})
			}
			time.Sleep(30 * time.Millisecond)
			b.sub.wrote(len(slices.Concat(batch...)))
			d.setQuiet()
			calls.Wait()
			start = time.Now()
			if ask(s, tt.request); time.Since(start) != 0 {
				t.Errorf("%s, when it has ended: got an answer after %v, want it at once", tt.name, time.Since(start))
			}
		})
	}
}

// TestSecretMoves: *** takes no secret to another host, port or dialect, out of
// TLS, or on a websocket to another path: all others are refused, and what goes
// out then is what was stored.
func TestSecretMoves(t *testing.T) {
	ca := newCerts(t)
	var mu sync.Mutex
	var seen string // of the requests and messages that came
	see := func(text string) {
		mu.Lock()
		defer mu.Unlock()
		seen += text + "\n"
	}
	upgrade := websocket.Server{Handler: func(ws *websocket.Conn) {
		var token string
		if websocket.Message.Receive(ws, &token) == nil {
			see("message " + token)
		}
	}}
	relay := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		user, password, _ := r.BasicAuth()
		see(fmt.Sprintf("%s %s %s %s %s:%s", r.Method, r.URL.Path, r.Header.Get("Authorization"), r.Header.Get("X-Key"), user, password))
		if r.Method == "GET" {
			upgrade.ServeHTTP(w, r)
		}
	}), ErrorLog: log.New(io.Discard, "", 0)}
	l := listenLoopback(t)
	go relay.Serve(eitherListener{l, ca.server})
	defer relay.Close()
	port := l.Addr().(*net.TCPAddr).Port

	r, _, _ := realRules(t, io.Discard)
	r.dialer.roots = ca.roots
	dial := r.dialer.dial
	s := newServer(t.Context(), r, "", discardLog)
	rule := func(to, secret string) string {
		before, after, _ := strings.Cut(to, "//")
		switch secret {
		case "headers":
			return fmt.Sprintf(`{"id":"0","stream":"video0","destination":"%s","token":"x","headers":{"X-Key":"%%s"}}`, to)
		case "userinfo":
			return fmt.Sprintf(`{"id":"0","stream":"video0","destination":"%s//%%s@%s"}`, before, after)
		}
		return fmt.Sprintf(`{"id":"0","stream":"video0","destination":"%s","token":"%%s"}`, to)
	}
	moves, kept := 0, 0
	schemes := []string{"ws", "wss", "http", "https"}
	for _, secret := range []string{"token", "headers", "userinfo"} {
		for _, was := range schemes {
			for _, is := range schemes {
				for same := range 8 {
					host, toPort, path := "127.0.0.1", port, "/in/a"
					if same&1 != 0 {
						host = "localhost"
					}
					if same&2 != 0 {
						toPort++
					}
					if same&4 != 0 {
						path = "/in/b"
					}
					if secret == "userinfo" && (was[0] == 'h' || is[0] == 'h') {
						continue // not allowed together with the token
					}
					ok := same&3 == 0 && (is == was || is == was+"s") && (same&4 == 0 || was[0] == 'h')
					from, to := fmt.Sprintf("%s://127.0.0.1:%d/in/a", was, port), fmt.Sprintf("%s://%s:%d%s", is, host, toPort, path)
					word := fmt.Sprintf("secret:%d", moves)
					r.deleteDestinations()
					r.dialer.dial = func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("none") }
					if got := ask(s, "POST /api/destinations "+fmt.Sprintf(rule(from, secret), word)); got[:3] != "200" {
						t.Fatal(got)
					}
					r.dialer.dial = dial
					before := r.set().encode()
					got := ask(s, "POST /api/destinations "+fmt.Sprintf(rule(to, secret), hidden))
					moves++
					if !ok {
						if got[:3] != "400" || !bytes.Equal(before, r.set().encode()) {
							t.Errorf("%s: %s to %s: got %s", secret, from, to, got)
						}
						continue
					}
					kept++
					if got[:3] != "200" {
						t.Errorf("%s: %s to %s: got %s", secret, from, to, got)
					}
					if was == is && same == 0 {
						continue // the rule has not changed, so that nobody dials
					}
					waitFor(t, "the secret to arrive: "+secret+" "+from+" "+to, func() bool {
						mu.Lock()
						defer mu.Unlock()
						return strings.Contains(seen, word)
					})
				}
			}
		}
	}
	for i := range moves {
		if n := strings.Count(seen, fmt.Sprintf("secret:%d\n", i)); n > 1 {
			t.Errorf("secret %d came %d times", i, n)
		}
	}
	t.Logf("%d moves, %d of them keep the secret", moves, kept)
}

// eitherListener speaks TLS with those who begin with it.
type eitherListener struct {
	net.Listener
	config *tls.Config
}

func (l eitherListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	b := bufio.NewReader(conn)
	first, _ := b.Peek(1)
	c := bufferedConn{conn, b}
	if len(first) > 0 && first[0] == 0x16 { // RFC 8446 5.1
		return tls.Server(c, l.config), nil
	}
	return c, nil
}

type bufferedConn struct {
	net.Conn
	r *bufio.Reader
}

func (c bufferedConn) Read(b []byte) (int, error) { return c.r.Read(b) }

// TestConcurrentChanges: 50 callers change, mute and delete rules; in the end
// what runs is what GET says, and I7 holds.
func TestConcurrentChanges(t *testing.T) {
	r, ctx, tasks := realRules(t, io.Discard)
	relay := &chaosRelay{t: t}
	relay.start()
	tasks.Go(func() { load(ctx, r, "video0") })
	tasks.Go(func() { load(ctx, r, "audio0") })
	until := time.Now().Add(scaled(time.Second, 3*time.Second, time.Minute))
	s := newServer(ctx, r, "", discardLog)
	var callers sync.WaitGroup
	var calls atomic.Int64
	for range 50 {
		callers.Go(func() {
			for time.Now().Before(until) {
				i, feeds := rand.N(10), []string{`[]`, `["video0"]`, `["audio0","video0"]`}[rand.N(3)]
				request := []string{
					fmt.Sprintf(`POST /api/streams {"stream":"stream/%d","feeds":%s}`, i%3, feeds),
					fmt.Sprintf(`POST /api/destinations {"id":%d,"stream":"stream/%d","destination":"ws://%s/%d"}`, i, i%3, relay.addr, rand.N(3)),
					fmt.Sprintf(`POST /api/destinations {"id":%d,"stream":"video0","destination":"ws://127.0.0.1:1"}`, i),
					fmt.Sprintf(`DELETE /api/streams/stream/%d`, i%3),
					fmt.Sprintf(`DELETE /api/destinations/%d`, i),
					`GET /api/destinations/all`, `GET /api/streams/all`,
				}[rand.N(7)]
				if got := ask(s, request); got[:3] != "200" && got[:3] != "404" {
					t.Errorf("%s: got %s", request, got)
				}
				calls.Add(1)
			}
		})
	}
	callers.Wait()
	for name, d := range r.destinations {
		if string(d.rule.ID) != name || d.ended() {
			t.Errorf("destination %s: rule %v, ended %v", name, d.rule, d.ended())
		}
		d.mu.Lock()
		if d.sub != nil {
			sum(t, d.sub)
		}
		d.mu.Unlock()
	}
	r.mux.mu.Lock()
	for name, st := range r.mux.streams {
		var feeds []string
		for _, f := range st.feeds {
			feeds = append(feeds, f.name)
			if !slices.Contains(f.streams, st) {
				t.Errorf("%s has %s, which does not publish to it", name, f.name)
			}
		}
		if want, ok := r.streams[name]; ok != st.ruled || !slices.Equal(feeds, want) {
			t.Errorf("%s: %v runs, the rule is %v", name, feeds, want)
		}
	}
	r.mux.mu.Unlock()
	t.Logf("%d calls, %d connections", calls.Load(), relay.conns.Load())
	r.deleteDestinations()
	r.deleteStreams()
	waitFor(t, "every subscriber to leave", func() bool {
		r.mux.mu.Lock()
		defer r.mux.mu.Unlock()
		return len(r.mux.streams) == 0 && len(r.mux.feeds) == 2
	})
}

// TestRulesEditStream: feeds are added and taken out whatever the others are, and
// come back where they were.
func TestRulesEditStream(t *testing.T) {
	s := newTestServer(t, "")
	for _, step := range []struct{ rule, want string }{
		{`{"stream":"stream/a","with":["v"]}`, `404 `},
		{`{"stream":"stream/a","without":["v"]}`, `404 `},
		{`{"stream":"stream/a","feeds":["v","a","b"]}`, `200 {"stream":"stream/a","feeds":["v","a","b"]}`},
		{`{"stream":"/stream/a","without":["v"]}`, `200 {"stream":"stream/a","feeds":["a","b"]}`},
		{`{"stream":"stream/a","without":["v","b"]}`, `200 {"stream":"stream/a","feeds":["a"]}`},
		{`{"stream":"stream/a","with":["b"]}`, `200 {"stream":"stream/a","feeds":["a","b"]}`},
		{`{"stream":"stream/a","with":["v","v1"]}`, `200 {"stream":"stream/a","feeds":["v","a","b","v1"]}`},
		{`{"stream":"stream/a","with":["v"]}`, `200 {"stream":"stream/a","feeds":["v","a","b","v1"]}`},
		{`{"stream":"stream/a","with":["c"],"without":["v","a","b"]}`, `200 {"stream":"stream/a","feeds":["v1","c"]}`},
		{`{"stream":"stream/a","with":["c"],"without":["c"]}`, `200 {"stream":"stream/a","feeds":["v1"]}`},
		{`{"stream":"stream/a","with":["c","c"]}`, `400 `},
		{`{"stream":"stream/a","with":["stream/b"]}`, `400 `},
		{`{"stream":"stream/a","feeds":[],"without":["v1"]}`, `400 `},
		{`{"stream":"stream/a","without":[]}`, `200 {"stream":"stream/a","feeds":["v1"]}`},
		{`{"stream":"stream/a","feeds":["b","a"]}`, `200 {"stream":"stream/a","feeds":["b","a"]}`},
		{`{"stream":"stream/a","with":["v"]}`, `200 {"stream":"stream/a","feeds":["b","a","v"]}`},
	} {
		if got := ask(s, "POST /api/streams "+step.rule); !strings.HasPrefix(got, step.want) {
			t.Errorf("%s: got %s, want %s", step.rule, got, step.want)
		}
	}
	many := make([]string, maxFeeds)
	for i := range many {
		many[i] = fmt.Sprintf("f%d", i)
	}
	if _, err := s.commands.rules.setStream(streamRule{"stream/a", many}); err != nil {
		t.Fatal(err)
	}
	if got := ask(s, `POST /api/streams {"stream":"stream/a","with":["x"]}`); !strings.HasPrefix(got, "400 ") {
		t.Errorf("one feed too many: got %s, want 400", got)
	}
	if got := ask(s, `POST /api/streams {"stream":"stream/a","with":["x"],"without":["f0"]}`); !strings.HasPrefix(got, "200 ") {
		t.Errorf("one feed for another: got %s, want 200", got)
	}
}

// TestRulesEditTogether: of many who edit a stream at once, none undoes what
// another does.
func TestRulesEditTogether(t *testing.T) {
	s := newTestServer(t, "")
	var want, all []string
	for i := range 20 {
		all = append(all, fmt.Sprintf("f%02d", i))
		if i%2 == 1 {
			want = append(want, all[i])
		}
	}
	if _, err := s.commands.rules.setStream(streamRule{"stream/a", all}); err != nil {
		t.Fatal(err)
	}
	var editing sync.WaitGroup
	for i, f := range all {
		editing.Go(func() {
			e := streamEdit{Stream: "stream/a", Without: []string{f}}
			for range 1 + i%2 {
				if _, err := s.commands.rules.editStream(e); err != nil {
					t.Error(err)
				}
				e.With, e.Without = e.Without, nil
			}
		})
	}
	editing.Wait()
	if got, err := s.commands.rules.stream("stream/a"); err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
}
