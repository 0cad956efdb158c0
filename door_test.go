package main

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestAccess: loopback may ask, others with the token; pages of another
// origin, and names that somebody else gave to this machine, may not.
func TestAccess(t *testing.T) {
	open, guarded := newTestServer(t, ""), newTestServer(t, "secret")
	const rule = `POST /api/streams {"stream":"stream/x","feeds":[]}`
	const far = "192.0.2.1:5000"
	tests := []struct {
		name    string
		s       *server
		request string
		header  []string
		want    int
	}{
		{"loopback", open, rule, nil, 200},
		{"IPv6 loopback", open, rule, []string{"remote", "[::1]:5000", "Host", "[::1]:8888"}, 200},
		{"mapped loopback", open, rule, []string{"remote", "[::ffff:127.0.0.1]:5000"}, 200},
		{"loopback, with a token set", guarded, rule, nil, 200},
		{"another machine", open, rule, []string{"remote", far}, 403},
		{"another machine, no token", guarded, rule, []string{"remote", far}, 401},
		{"another machine, health", guarded, "GET /healthcheck", []string{"remote", far}, 200},
		{"another machine, health, no token set", open, "HEAD /healthcheck", []string{"remote", far, "Host", "evil.example", "Via", "x"}, 200},
		{"haproxy's own check", open, "OPTIONS /", []string{"remote", far}, 200},
		{"health, another method", guarded, "POST /healthcheck", []string{"remote", far}, 401},
		{"wrong token", guarded, rule, []string{"remote", far, "Authorization", "Bearer secre"}, 401},
		{"empty token", open, rule, []string{"remote", far, "Authorization", "Bearer "}, 403},
		{"token", guarded, rule, []string{"remote", far, "Authorization", "Bearer secret"}, 200},
		{"token, another case", guarded, rule, []string{"remote", far, "Authorization", "bearer secret"}, 200},
		{"token, more space", guarded, rule, []string{"remote", far, "Authorization", "BEARER  secret "}, 200},
		{"basic", guarded, rule, []string{"remote", far, "Authorization", "basic YW55Ym9keTpzZWNyZXQ="}, 200},
		{"Basic", guarded, rule, []string{"remote", far, "Authorization", "Basic YW55Ym9keTpzZWNyZXQ="}, 200},
		{"wrong Basic", guarded, rule, []string{"remote", far, "Authorization", "Basic c2VjcmV0OnNlY3JldDE="}, 401},
		{"a proxy here", guarded, rule, []string{"X-Forwarded-For", "127.0.0.1"}, 401},
		{"a proxy here", guarded, rule, []string{"Forwarded", "for=127.0.0.1"}, 401},
		{"a proxy here", guarded, rule, []string{"Via", "1.1 x"}, 401},
		{"a proxy here", guarded, rule, []string{"X-Real-IP", "127.0.0.1"}, 401},
		{"a page elsewhere", open, rule, []string{"Origin", "http://evil.example"}, 403},
		{"a page elsewhere", open, rule, []string{"Sec-Fetch-Site", "cross-site"}, 403},
		{"our page", open, rule, []string{"Origin", "http://localhost:8888", "Sec-Fetch-Site", "same-origin"}, 200},
		{"rebinding", open, "GET /api/streams/all", []string{"Host", "evil.example:8888"}, 403},
		{"an address", open, "GET /api/streams/all", []string{"Host", "127.0.0.1:8888"}, 200},
		{"this host", open, "GET /api/streams/all", []string{"Host", open.door.host + ":8888"}, 200},
		{"this host, by mDNS", open, "GET /api/streams/all", []string{"Host", open.door.host + ".local"}, 200},
		{"a page elsewhere watches", open, "GET /out/x", []string{"Origin", "http://evil.example"}, 403},
		{"a page elsewhere publishes", open, "GET /in/x", []string{"Origin", "null"}, 403},
		{"another port", open, "GET /out/x", []string{"Origin", "http://localhost:9999"}, 403},
		{"our page watches", open, "GET /out/x", []string{"Origin", "http://localhost:8888"}, 426},
	}
	for _, tt := range tests {
		if got := ask(tt.s, tt.request, tt.header...); !strings.HasPrefix(got, fmt.Sprint(tt.want, " ")) {
			t.Errorf("%s: got %s, want %d", tt.name, got, tt.want)
		} else if strings.Contains(got, "secret") {
			t.Errorf("%s: the token is in %s", tt.name, got)
		}
	}
}

// TestWrongTokens: who tries tokens is slowed down, however many connections he
// has, and the log says so once; others are not.
func TestWrongTokens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &logBuffer{}
		r := newRules(t.Context(), newMux(), time.Second, slog.New(slog.NewTextHandler(log, nil)))
		s := newServer(t.Context(), r, "secret", r.log)
		try := func(remote, token string) string {
			return ask(s, "GET /api/streams/all", "remote", remote, "Authorization", "Bearer "+token)[:3]
		}
		start := time.Now()
		for range 100 {
			if got := try(far, "wrong"); got != "401" {
				t.Fatalf("got %s", got)
			}
		}
		if got, want := time.Since(start), (100-freeGuesses)*guessEvery; got != want {
			t.Errorf("100 wrong tokens took %v, want %v", got, want)
		}
		start = time.Now()
		if got := try("192.0.2.2:1", "secret"); got != "200" || time.Since(start) > 0 {
			t.Errorf("another caller: got %s after %v", got, time.Since(start))
		}
		if got := try(far, "secret"); got != "200" || time.Since(start) != guessEvery {
			t.Errorf("the right token: got %s after %v, want 200 after %v", got, time.Since(start), guessEvery)
		}
		start = time.Now()
		var all sync.WaitGroup
		var looked atomic.Int64
		for i := range 500 {
			all.Go(func() {
				remote := fmt.Sprintf("[2001:db8::%d]:1", i) // one caller: 64 bits are the same
				switch got := ask(s, `POST /login {"token":"wrong"}`, "remote", remote)[:3]; got {
				case "401":
					looked.Add(1)
				case "429":
				default:
					t.Errorf("got %s", got)
				}
			})
		}
		all.Wait()
		if n, most := looked.Load(), int64(freeGuesses+maxGuessWait/guessEvery+1); n > most || time.Since(start) > maxGuessWait+guessEvery {
			t.Errorf("%d of 500 tokens at once were looked at, want %d, and it took %v", n, most, time.Since(start))
		}
		for range 100 {
			all.Go(func() {
				if got := try("192.0.2.3:1", "secret"); got != "200" {
					t.Errorf("who has the token: got %s", got)
				}
			})
		}
		all.Wait()
		if got := strings.Count(log.String(), "level=WARN"); got != 2 {
			t.Errorf("got %d warnings, want one for each caller\n%s", got, log)
		}
		time.Sleep(2 * guessEpisode)
		for i := range 3 * maxGuessers {
			try(fmt.Sprintf("10.0.%d.%d:1", i/256, i%256), "wrong")
		}
		if n := len(s.door.guesses.by); n > maxGuessers {
			t.Errorf("%d callers are remembered", n)
		}
	})
}

// TestHostileProxy: who comes through nginx on this machine needs the token.
func TestHostileProxy(t *testing.T) {
	t.Parallel()
	v := startVW(t, "VW_TOKEN="+secretToken)
	none := startVW(t)
	for _, tt := range []struct{ name, location string }{
		{"as it is without more", ``},
		{"as is usual", `proxy_http_version 1.1; proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;`},
		{"with the name that was asked for", `proxy_http_version 1.1; proxy_set_header Host $http_host; proxy_set_header X-Real-IP $remote_addr;`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, c := range []struct {
				vw, token string
				want      int
			}{
				{v.addr, "", http.StatusUnauthorized},
				{v.addr, "wrong", http.StatusUnauthorized},
				{v.addr, secretToken, http.StatusOK},
				{none.addr, "", http.StatusForbidden},
			} {
				addr := startNginxWith(t, "", "location / { proxy_pass http://"+c.vw+"; "+tt.location+" }")
				r, err := http.NewRequest("GET", "http://"+addr+"/api/streams/all", nil)
				if err != nil {
					t.Fatal(err)
				}
				r.Close = true
				r.Header.Set("Authorization", "Bearer "+c.token)
				eventually(t, startupTime, func() error {
					a, err := http.DefaultClient.Do(r)
					if err != nil {
						return err
					}
					defer a.Body.Close()
					if a.StatusCode != c.want {
						b, _ := io.ReadAll(a.Body)
						t.Errorf("token %q: got %s %s, want %d", c.token, a.Status, b, c.want)
					}
					return nil
				})
			}
		})
	}
}
