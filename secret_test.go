package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/net/websocket"
)

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
		r, _ := s.rules.destination("0")
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

// TestSecretErrors: what is refused, and that no error shows a secret.
func TestSecretErrors(t *testing.T) {
	s := newTestServer(t, "")
	tests := []struct{ rest, want string }{ // rest of the rule, in the error
		{`"destination":"http://relay/"`, `needs a "token"`},
		{`"destination":"https://relay/"`, `needs a "token"`},
		{`"destination":"ftp://relay/","token":"SECRET"`, `must be ws or wss`},
		{`"destination":"https://me:SECRET@relay/","token":"SECRET"`, "more than one Authorization"},
		{`"destination":"https://relay/","token":"SECRET","headers":{"authorization":"SECRET"}`, "more than one Authorization"},
		{`"destination":"ws://me:SECRET@relay/","headers":{"Authorization":"SECRET"}`, "more than one Authorization"},
		{`"destination":"ws://me:SECRET@relay:0/"`, "the port is 0"},
		{`"destination":"ws://me:SECRET#1@relay/"`, `"…"`},
		{`"destination":"ws://me:SECRET/1@relay/"`, `"…"`},
		{`"destination":"me:SECRET@relay"`, `"…"`},
		{`"destination":"ws://relay","token":"SECRET\r\nX: y"`, "visible ASCII"},
		{`"destination":"ws://relay","token":"SECRET ä"`, "visible ASCII"},
		{`"destination":"ws://relay","token":"SECRET` + strings.Repeat("x", maxToken) + `"`, "4096"},
		{`"destination":"ws://relay","token":1`, "cannot unmarshal number"},
		{`"destination":"ws://relay","headers":{"X":"SECRET\r\nY: z"}`, "header X"},
		{`"destination":"ws://relay","headers":{"X":" SECRET"}`, "header X"},
		{`"destination":"ws://relay","headers":{"X":"SECRETä"}`, "header X"},
		{`"destination":"ws://relay","headers":{"X":""}`, "header X"},
		{`"destination":"ws://relay","headers":{"X":"SECRET` + strings.Repeat("x", maxField) + `"}`, "4096"},
		{`"destination":"ws://relay","headers":{"X Y":"SECRET"}`, `"X Y"`},
		{`"destination":"ws://relay","headers":{"X\r\nY":"SECRET"}`, `X\\r\\nY`},
		{`"destination":"ws://relay","headers":{"":"SECRET"}`, `header ""`},
		{`"destination":"ws://relay","headers":{"x-a":"SECRET","X-A":"SECRET"}`, "X-A: it is there twice"},
		{`"destination":"ws://relay","headers":{"host":"SECRET"}`, "Host: it is vw's own"},
		{`"destination":"ws://relay","headers":{"origin":"SECRET"}`, "Origin: it is vw's own"},
		{`"destination":"ws://relay","headers":{"upgrade":"SECRET"}`, "Upgrade: it is vw's own"},
		{`"destination":"ws://relay","headers":{"connection":"SECRET"}`, "Connection: it is vw's own"},
		{`"destination":"ws://relay","headers":{"sec-websocket-protocol":"SECRET"}`, "it is vw's own"},
		{`"destination":"ws://relay","headers":["SECRET"]`, "object of strings"},
		{`"destination":"ws://relay","headers":{"X":["SECRET"]}`, "object of strings"},
		{`"destination":"ws://relay","headers":{` + strings.Repeat(`"X":"SECRET",`, 3) + `"A":"1","B":"1","C":"1","D":"1","E":"1","F":"1","G":"1","H":"1","I":"1","J":"1","K":"1","L":"1","M":"1","N":"1","O":"1","P":"1"}`, "17, at most 16"},
	}
	for _, tt := range tests {
		got := ask(s, `POST /api/destinations {"id":"0","stream":"video0",`+tt.rest+`}`)
		if !strings.HasPrefix(got, "400 ") || !strings.Contains(got, strings.ReplaceAll(tt.want, `"`, `\"`)) {
			t.Errorf("%.100s\n got %s\nwant 400 with %s", tt.rest, got, tt.want)
		}
		if strings.Contains(got, "SECRET") {
			t.Errorf("%.100s: the secret is in %s", tt.rest, got)
		}
	}
	if got := ask(s, "GET /api/destinations/all"); got != "200 {}" {
		t.Errorf("errors left rules behind: %s", got)
	}
}

func TestHide(t *testing.T) {
	const token = "eyJhbGciOi.eyJhdWQ.c2ln"
	tests := []struct{ name, text, want string }{
		{"none", "the relay answered 401", "the relay answered 401"},
		{"whole", "a " + token + " b " + token, "a *** b ***"},
		{"cut off", `"401 ` + token[:12] + `"`, `"401 ***"`},
		{"first 8", token[:8], "***"},
		{"less is none", token[:7], token[:7]},
		{"one in another", token[:8] + token, "******"},
		{"short", "me:pw1234@h", "me:***@h"},
	}
	for _, tt := range tests {
		was := errors.New(tt.text)
		err := hide(was, []string{"", "a", token, "pw1234"})
		if err.Error() != tt.want || !errors.Is(err, was) {
			t.Errorf("%s: got %q, want %q", tt.name, err, tt.want)
		}
	}
	if err := hide(nil, []string{token}); err != nil {
		t.Errorf("got %v, want nil", err)
	}
}

func FuzzSplitUser(f *testing.F) {
	f.Add("ws://me:pass@relay:80/in/a@b?c@d#e")
	f.Add("wss://a@b@c")
	f.Fuzz(func(t *testing.T, raw string) {
		before, user, after := splitUser(raw)
		if before+user+after != raw {
			t.Errorf("%q: got %q %q %q", raw, before, user, after)
		}
		u, err := cleanURL(raw)
		if err != nil || u.User == nil {
			return
		}
		if blank := (destinationRule{Destination: raw}).shown().Destination; user != "" && (strings.Contains(before, "@") || !strings.HasPrefix(blank, before+"***@")) {
			t.Errorf("%q is shown as %q", raw, blank)
		}
		if given, err := url.Parse(before + "***" + after); err != nil || given.Host != u.Host || given.RequestURI() != u.RequestURI() {
			t.Errorf("%q: without its user it is another URL", raw)
		}
	})
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

// newTokenRelay is a relay that refuses every token, and quotes all secrets.
func newTokenRelay(t *testing.T) (addr string) {
	refuse := websocket.Handler(func(ws *websocket.Conn) {
		var token string
		websocket.Message.Receive(ws, &token)
		r := ws.Request()
		user, password, _ := r.BasicAuth()
		reason := fmt.Sprintf("%s %s %s %q %v", token, user, password, r.Header, "topsecret2")
		websocket.JSON.Send(ws, map[string]any{"topic": "x", "token": token, "authorised": false, "reason": reason})
	})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			http.Error(w, fmt.Sprint(r.Header), http.StatusUnauthorized)
			return
		}
		refuse.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// httpCall returns the body of the answer, whatever its status.
func httpCall(t *testing.T, method, url, body string) string {
	t.Helper()
	r, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	a, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Body.Close()
	b, err := io.ReadAll(a.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
