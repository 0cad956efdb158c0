package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestRuleLimits: a rule too many is refused and changes nothing, while those
// that there are can be changed, muted and deleted.
func TestRuleLimits(t *testing.T) {
	s := newTestServer(t, "")
	s.commands.rules.dial = func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("none") }
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
		{stream(maxStreams, `"a"`), `503 {"error":"stream \"stream/256\": there are 256 streams: no more are allowed"}`},
		{fmt.Sprintf("GET /api/streams/stream/%d", maxStreams), "404"},
		{stream(0, `"a"`), "200"},
		{stream(0, ``), "200"},
		{stream(0, `"c"`), "200"},
		{"DELETE /api/streams/stream/0", "200"},
		{stream(maxStreams, `"a"`), "200"},
		{to(maxDestinations, "ws://a"), `503 {"error":"destination \"1024\": there are 1024 destinations: no more are allowed"}`},
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
	stored := func() string {
		r, _ := s.commands.rules.destination("0")
		return fmt.Sprintf("%s %s %q", r.Destination, r.Token, r.Headers)
	}
	steps := []struct{ request, want, stored string }{
		{"POST " + rule(full), "200 " + rule(shown), `ws://me:pass@127.0.0.1:1/in/a@b?x=1 abcd.efgh "X-Key: k1\nX-Other: k2\n"`},
		{"GET", "200 " + rule(shown), ""},
		{"POST " + rule(shown), "200 " + rule(shown), `ws://me:pass@127.0.0.1:1/in/a@b?x=1 abcd.efgh "X-Key: k1\nX-Other: k2\n"`},
		{"POST " + rule(`"ws://***@127.0.0.1:2/","token":"***","headers":{"x-key":"***","new":"v"}`),
			"200 " + rule(`"ws://***@127.0.0.1:2/","token":"***","headers":{"New":"***","X-Key":"***"}`),
			`ws://me:pass@127.0.0.1:2/ abcd.efgh "New: v\nX-Key: k1\n"`},
		{"POST " + rule(`"ws://evil.invalid/","token":"***"`), `400 {"error":"destination \"ws://evil.invalid/\": *** stands for what is stored for this host, and nothing is"}`,
			`ws://me:pass@127.0.0.1:2/ abcd.efgh "New: v\nX-Key: k1\n"`},
		{"POST " + rule(`"ws://127.0.0.1:2/","headers":{"X-Other":"***"}`), `400 {"error":"destination \"ws://127.0.0.1:2/\": *** stands for what is stored for this host, and nothing is"}`,
			`ws://me:pass@127.0.0.1:2/ abcd.efgh "New: v\nX-Key: k1\n"`},
		{"POST " + rule(`"ws://127.0.0.1:2/"`), "200 " + rule(`"ws://127.0.0.1:2/"`), `ws://127.0.0.1:2/  ""`},
		{"POST " + rule(`"ws://127.0.0.1:2/","token":"***"`), `400 {"error":"destination \"ws://127.0.0.1:2/\": *** stands for what is stored for this host, and nothing is"}`, ""},
		{"POST " + rule(`"ws://***@127.0.0.1:2/"`), `400 {"error":"destination \"…\": *** stands for what is stored for this host, and nothing is"}`, ""},
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
