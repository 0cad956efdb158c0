package main

import (
	"errors"
	"net/url"
	"slices"
	"strings"
	"testing"
)

// TestNames is the rule for names.
func TestNames(t *testing.T) {
	for name, want := range map[string]string{
		"video0": "video0", "/video0": "video0", "a/b.c/d-e_F": "a/b.c/d-e_F", "...": "...", "All": "All",
		strings.Repeat("n", 256): strings.Repeat("n", 256),
		"":                       "", "/": "", "//a": "", "a/": "", ".": "", "..": "", "a/../b": "", "a\x00": "", "a\u202e": "", "all": "", "/all": "", "deleteAll": "", "apiRule": "",
	} {
		got, err := cleanName("feed", name)
		if (err == nil) != (want != "") || err == nil && got != want {
			t.Errorf("%q: got %q, %v, want %q", name, got, err, want)
		}
	}
}

// FuzzName: a name that passes is safe in a path, a log and a URL.
func FuzzName(f *testing.F) {
	f.Add("video0")
	f.Add("a/../b")
	f.Fuzz(func(t *testing.T, name string) {
		got, err := cleanName("feed", name)
		if err != nil {
			return
		}
		for _, segment := range strings.Split(got, "/") {
			if segment == "" || segment == "." || segment == ".." || len(got) > maxName {
				t.Errorf("%q: got %q", name, got)
			}
		}
		if strings.ContainsFunc(got, func(r rune) bool { return r < '-' || r > 'z' }) {
			t.Errorf("%q: got %q", name, got)
		}
	})
}

// FuzzRules: no body makes a rule that would not be accepted again as it is
// stored, and no error has more than one line.
func FuzzRules(f *testing.F) {
	f.Add([]byte(`{"stream":"stream/a","feeds":["b"]}`))
	f.Add([]byte(`{"id":0,"stream":"a","destination":"wss://u:p@h:1/x?y"}`))
	f.Add([]byte(`{"id":1e400,"stream":"\ud800"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var s streamRule
		var d destinationRule
		for _, err := range []error{decode(b, &s), decode(b, &d)} {
			if err != nil && strings.ContainsAny(err.Error(), "\n\r\x1b") {
				t.Errorf("got the error %q", err)
			}
		}
		if c, err := s.clean(); err == nil {
			if again, err := c.clean(); err != nil || again.Stream != c.Stream || !slices.Equal(again.Feeds, c.Feeds) {
				t.Errorf("got %v, then %v, %v", c, again, err)
			}
		}
		if c, u, err := d.clean(); err == nil {
			if again, _, err := c.clean(); err != nil || again != c {
				t.Errorf("got %v, then %v, %v", c, again, err)
			}
			if u.Host == "" || strings.ContainsAny(u.Host+u.RequestURI(), "\r\n ") {
				t.Errorf("got the URL %q", u)
			}
		}
	})
}

// TestURLSecrets: an error of a URL says nothing of what may be secret in it.
func TestURLSecrets(t *testing.T) {
	s := newTestServer(t, "")
	for _, url := range []string{
		"http://u:hunter2@a", "hunter2:hunter2@a", "ws://u:hunter2@:80", "ws://u:hunter2@a:0", "ws://hunter2@a/#", "ws://u:hunter2?@a",
		"ws://u:hunter2 @a", "http://a/?hunter2", "ws://a:b?hunter2", "ws://u:hunter2@a/" + strings.Repeat("x", maxURL),
	} {
		got := ask(s, `POST /api/destinations {"id":"0","stream":"video0","destination":"`+url+`"}`)
		if got[:3] != "400" || strings.Contains(strings.ReplaceAll(got, `scheme is \"hunter2\"`, ""), secretUser) {
			t.Errorf("%.100s: got %s, want 400 without the secret", url, got)
		}
	}
}

// TestSecretErrors: what is refused, and that no error shows a secret.
func TestSecretErrors(t *testing.T) {
	s := newTestServer(t, "")
	tests := []struct{ rest, want string }{ // rest of the rule, in the error
		{`"destination":"http://relay/"`, `needs a "token"`},
		{`"destination":"https://relay/"`, `needs a "token"`},
		{`"destination":"ftp://relay/","token":"SECRET"`, `must begin with ws:// or wss://`},
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
		{`"destination":"ws://relay","token":1`, "token must be a string"},
		{`"destination":"ws://relay","headers":{"X":"SECRET\r\nY: z"}`, "header X"},
		{`"destination":"ws://relay","headers":{"X":" SECRET"}`, "header X"},
		{`"destination":"ws://relay","headers":{"X":"SECRETä"}`, "header X"},
		{`"destination":"ws://relay","headers":{"X":""}`, "header X"},
		{`"destination":"ws://relay","headers":{"X":"SECRET` + strings.Repeat("x", maxField) + `"}`, "4096"},
		{`"destination":"ws://relay","headers":{"X Y":"SECRET"}`, `"X Y"`},
		{`"destination":"ws://relay","headers":{"X\r\nY":"SECRET"}`, `X\\r\\nY`},
		{`"destination":"ws://relay","headers":{"":"SECRET"}`, `header ""`},
		{`"destination":"ws://relay","headers":{"x-a":"SECRET","X-A":"SECRET"}`, "X-A is listed twice"},
		{`"destination":"ws://relay","headers":{"host":"SECRET"}`, "Host: it is vw's own"},
		{`"destination":"ws://relay","headers":{"origin":"SECRET"}`, "Origin: it is vw's own"},
		{`"destination":"ws://relay","headers":{"upgrade":"SECRET"}`, "Upgrade: it is vw's own"},
		{`"destination":"ws://relay","headers":{"connection":"SECRET"}`, "Connection: it is vw's own"},
		{`"destination":"ws://relay","headers":{"sec-websocket-key":"SECRET"}`, "it is vw's own"},
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
