package main

import (
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/websocket"
)

// newTestServer is a server without a listener, whose destinations cannot dial.
func newTestServer(t *testing.T, token string) *server {
	r := newRules(t.Context(), newMux(), 500*time.Millisecond, discardLog)
	t.Cleanup(func() {
		r.deleteDestinations()
		r.tasks.Wait()
	})
	return newServer(t.Context(), r, token, discardLog)
}

// ask does "METHOD path [body]" from loopback, and returns the answer as
// "status body".
func ask(h http.Handler, request string, header ...string) string {
	method, rest, _ := strings.Cut(request, " ")
	path, body, _ := strings.Cut(rest, " ")
	r := httptest.NewRequest(method, path, strings.NewReader(body))
	r.RemoteAddr, r.Host = "127.0.0.1:50000", "localhost:8888"
	if body == "" {
		r.Body, r.ContentLength = http.NoBody, 0
	}
	for i := 0; i < len(header); i += 2 {
		switch header[i] {
		case "Host":
			r.Host = header[i+1]
		case "remote":
			r.RemoteAddr = header[i+1]
		default:
			r.Header.Set(header[i], header[i+1])
		}
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return fmt.Sprint(w.Code, " ", w.Body)
}

// TestAPI is section 6 of the contract, row by row, byte for byte.
func TestAPI(t *testing.T) {
	s := newTestServer(t, "")
	const (
		front = `{"stream":"stream/front/large","feeds":["video0","audio0"]}`
		dest  = `{"id":"0","stream":"stream/front/large","destination":"ws://127.0.0.1:1/in/a?x=1&y=<2>"}`
	)
	steps := []struct{ request, want string }{
		{"GET /healthcheck", `200 "ok"`},
		{"GET /api/streams/all", `200 {}`},
		{"GET /api/destinations/all", `200 {}`},
		{`POST /api/streams {"stream":"/stream/front/large","feeds":["video0","audio0"]}`, "200 " + front},
		{`PUT /api/streams {"stream":"stream/front/large","feeds":["/video0","audio0"]}`, "200 " + front},
		{`UPDATE /api/streams {"feeds":["video0","audio0"],"stream":"stream/front/large"}`, "200 " + front},
		{"GET /api/streams/all", `200 {"stream/front/large":["video0","audio0"]}`},
		{"GET /api/streams/stream/front/large", `200 ["video0","audio0"]`},
		{"GET /api/streams//stream/front/large", `200 ["video0","audio0"]`},
		{"GET /api/streams/stream%2Ffront%2Flarge", `200 ["video0","audio0"]`},
		{"GET /api/streams/stream/none", `404 {"error":"stream \"stream/none\": there is none"}`},
		{`POST /api/streams {"stream":"stream/front/large","feeds":[]}`, `200 {"stream":"stream/front/large","feeds":[]}`},
		{"GET /api/streams/stream/front/large", `200 []`},

		{"POST /api/destinations " + dest, "200 " + dest},
		{`PUT /api/destinations {"stream":"/stream/front/large","destination":"ws://127.0.0.1:1/in/a?x=1&y=<2>","id":0}`, "200 " + dest},
		{"UPDATE /api/destinations " + dest, "200 " + dest},
		{"GET /api/destinations/all", `200 {"0":` + dest + `}`},
		{"GET /api/destinations/0", "200 " + dest},
		{"GET /api/destinations/1", `404 {"error":"destination \"1\": there is none"}`},
		{`POST /api/destinations {"id":"a/b","stream":"video0","destination":"wss://127.0.0.1:1"}`, `200 {"id":"a/b","stream":"video0","destination":"wss://127.0.0.1:1"}`},
		{"DELETE /api/destinations/a/b", `200 "a/b"`},

		// A stream, then its destination; and the reverse; twice.
		{"DELETE /api/streams/stream/front/large", `200 "stream/front/large"`},
		{"DELETE /api/streams/stream/front/large", `404 {"error":"stream \"stream/front/large\": there is none"}`},
		{"DELETE /api/destinations/0", `200 "0"`},
		{"DELETE /api/destinations/0", `404 {"error":"destination \"0\": there is none"}`},
		{"POST /api/destinations " + dest, "200 " + dest},
		{"POST /api/streams " + front, "200 " + front},
		{"DELETE /api/destinations/0", `200 "0"`},
		{"DELETE /api/streams/stream/front/large", `200 "stream/front/large"`},

		{"POST /api/destinations " + dest, "200 " + dest},
		{"POST /api/streams " + front, "200 " + front},
		{"DELETE /api/streams/all", `200 "deleteAll"`},
		{"DELETE /api/destinations/all", `200 "deleteAll"`},
		{"GET /api/streams/all", `200 {}`},
		{"GET /api/destinations/all", `200 {}`},
		{"DELETE /api/streams/all", `200 "deleteAll"`},
		{"DELETE /api/destinations/all", `200 "deleteAll"`},
		{"HEAD /ts/video0", "200 "},
	}
	for i, step := range steps {
		if got := ask(s, step.request); got != step.want {
			t.Errorf("step %d, %s\n got %s\nwant %s", i, step.request, got, step.want)
		}
	}
}

// TestAPIErrors: what is wrong is named, and nothing changes.
func TestAPIErrors(t *testing.T) {
	s := newTestServer(t, "")
	stream := func(name string) string { return `POST /api/streams {"stream":"` + name + `","feeds":[]}` }
	feed := func(name string) string { return `POST /api/streams {"stream":"stream/x","feeds":["` + name + `"]}` }
	to := func(url string) string {
		return `POST /api/destinations {"id":"0","stream":"video0","destination":"` + url + `"}`
	}
	id := func(id string) string {
		return `POST /api/destinations {"id":` + id + `,"stream":"video0","destination":"ws://a"}`
	}
	tests := []struct {
		request string
		status  int
		want    string // in the error
	}{
		{"GET /index.html", 404, `"/index.html"`},
		{"GET /nope", 404, `"/nope"`},
		{"GET /api/streams", 405, "POST, PUT, UPDATE"},
		{"DELETE /api/destinations", 405, "POST, PUT, UPDATE"},
		{"POST /api/streams/all {}", 405, "DELETE, GET, HEAD"},
		{"POST /healthcheck", 405, "GET, HEAD"},
		{"DELETE /ts/video0", 405, "GET, HEAD, POST, PUT"},
		{"GET /ts", 400, "missing"},
		{"GET /ts/", 400, "missing"},
		{"GET /out/", 400, "missing"},
		{"GET /ts/a//b", 400, "empty"},
		{"GET /ts/../healthcheck", 400, ".."},
		{"GET //", 400, "it has empty segments"},
		{"GET /ts/a%2F..%2Fb", 400, `"a/../b"`},
		{"GET /ts/%2e%2e", 400, `".."`},
		{"GET /ts/a%0Ab", 400, `a\\nb`},
		{"GET /ts/all", 400, "reserved"},
		{"GET /ts/" + strings.Repeat("n", 257), 400, "257 bytes"},
		{"POST /ts/stream/x data", 400, "stream/"},
		{"POST /ts/a:b data", 400, `"a:b"`},
		{"GET /api/streams/front", 400, "stream/"},
		{"GET /api/destinations/a%20b", 400, `"a b"`},
		{"DELETE /api/destinations/apiRule", 400, "reserved"},
		{"DELETE /api/streams/deleteAll", 400, "reserved"},
		{"GET /in/x", 426, "websocket"},
		{"GET /out/x", 426, "websocket"},

		{"POST /api/streams ", 400, "JSON: EOF"},
		{"POST /api/streams {", 400, "JSON: unexpected EOF"},
		{"POST /api/streams []", 400, "JSON: cannot unmarshal array"},
		{"POST /api/streams null", 400, "missing"},
		{`POST /api/streams {"stream":"stream/x","feeds":[]} {}`, 400, "more after the end"},
		{`POST /api/streams {"stream":"stream/x","feeds":[],"mute":true}`, 400, `"mute"`},
		{`POST /api/streams {"stream":"stream/x"}`, 400, `"feeds" is missing`},
		{`POST /api/streams {"stream":"stream/x","feeds":null}`, 400, `"feeds" is missing`},
		{`POST /api/streams {"stream":"stream/x","feeds":"video0"}`, 400, "cannot unmarshal string"},
		{`POST /api/streams {"stream":"stream/x","feeds":["a","/a"]}`, 400, `"a" is there twice`},
		{`POST /api/streams {"stream":"stream/x","feeds":["a"` + strings.Repeat(`,"a"`, maxFeeds) + `]}`, 400, "65 feeds"},
		{"POST /api/streams " + strings.Repeat(" ", maxBody) + "{}", 413, "65536"},
		{"POST /api/streams " + strings.Repeat("[", 60000), 400, "JSON"},
		{stream(""), 400, "missing"},
		{stream("front"), 400, "stream/"},
		{stream("stream/"), 400, `"stream/"`},
		{stream("stream/a//b"), 400, "empty"},
		{stream("stream/ä"), 400, "ä"},
		{stream("stream/\xff"), 400, "stream/"},
		{stream(`stream/a\nb`), 400, `a\\nb`},
		{stream("stream/" + strings.Repeat("x", 300)), 400, "307 bytes"},
		{feed(""), 400, "missing"},
		{feed("stream/y"), 400, "stream/"},
		{feed("all"), 400, "reserved"},
		{feed("a b"), 400, `a b`},

		{id(`""`), 400, "missing"},
		{id(`"all"`), 400, "reserved"},
		{id(`"apiRule"`), 400, "reserved"},
		{id(`"a b"`), 400, "a b"},
		{id(`null`), 400, "a string or a number"},
		{id(`true`), 400, "a string or a number"},
		{id(`{}`), 400, "a string or a number"},
		{`POST /api/destinations {"stream":"video0","destination":"ws://a"}`, 400, "id: the name is missing"},
		{`POST /api/destinations {"id":"0","destination":"ws://a"}`, 400, "stream: the name is missing"},
		{`POST /api/destinations {"id":"0","stream":"x y","destination":"ws://a"}`, 400, "x y"},
		{to(""), 400, "must be ws or wss"},
		{to("relay"), 400, "must be ws or wss"},
		{to("http://relay"), 400, `"http"`},
		{to("ws://"), 400, "host is missing"},
		{to("ws:///path"), 400, "host is missing"},
		{to("ws://:80/x"), 400, "host is missing"},
		{to("ws://a:0"), 400, "the port is 0"},
		{to("ws://a:65536"), 400, "the port is 65536"},
		{to("ws://a:b"), 400, "not a URL"},
		{to("ws://a/#x"), 400, "fragment"},
		{to("ws://a/ b"), 400, "not a URL"},
		{to(`ws://a\r\nX: y/`), 400, "not a URL"},
		{to("ws://ä/"), 400, "not a URL"},
	}
	for _, tt := range tests {
		got := ask(s, tt.request)
		if !strings.HasPrefix(got, fmt.Sprint(tt.status, ` {"error":"`)) || !strings.Contains(got, strings.ReplaceAll(tt.want, `"`, `\"`)) {
			t.Errorf("%.100s\n got %s\nwant %d with %s", tt.request, got, tt.status, tt.want)
		}
		if strings.Contains(got, "\n") {
			t.Errorf("%.100s: got several lines", tt.request)
		}
	}
	if got := ask(s, "GET /api/streams/all") + ask(s, "GET /api/destinations/all"); got != "200 {}200 {}" {
		t.Errorf("errors left rules behind: %s", got)
	}
}

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
		{"another machine, health", guarded, "GET /healthcheck", []string{"remote", far}, 401},
		{"wrong token", guarded, rule, []string{"remote", far, "Authorization", "Bearer secre"}, 401},
		{"empty token", open, rule, []string{"remote", far, "Authorization", "Bearer "}, 403},
		{"token", guarded, rule, []string{"remote", far, "Authorization", "Bearer secret"}, 200},
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
		{"this host", open, "GET /api/streams/all", []string{"Host", open.host + ":8888"}, 200},
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

// TestRefusedPost: a publisher that is refused is told, and cut off, while its
// body goes on.
func TestRefusedPost(t *testing.T) {
	addr, _, _ := runVW(t)
	tests := []struct{ name, path, data, want string }{
		{"a bad name", "/ts/stream/x", "", "400"},
		{"no MPEG-TS", "/ts/video0", strings.Repeat("this is text ", 6000), "415"},
		{"a wrong path", "/video0", "", "404"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			conn, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			start := time.Now()
			conn.SetDeadline(start.Add(3 * time.Second))
			fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: %s\r\nTransfer-Encoding: chunked\r\n\r\n", tt.path, addr)
			if tt.data != "" {
				fmt.Fprintf(conn, "%x\r\n%s\r\n", len(tt.data), tt.data)
			}
			answer, err := io.ReadAll(conn) // ends when the connection does
			if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 "+tt.want) || !strings.Contains(string(answer), `{"error":`) {
				t.Errorf("after %v got %q, %v, want %s", time.Since(start), answer, err, tt.want)
			}
		})
	}
}

// TestTakeOver: the newest publisher wins; the older gets 409 at once, and a
// body that is not MPEG-TS takes nothing over.
func TestTakeOver(t *testing.T) {
	addr, _, _ := runVW(t)
	post := func() (*io.PipeWriter, chan string) {
		r, w := io.Pipe()
		done := make(chan string, 1)
		go func() {
			a, err := http.Post("http://"+addr+"/ts/video0", "", r)
			if err != nil {
				done <- err.Error()
				return
			}
			defer a.Body.Close()
			b, _ := io.ReadAll(a.Body)
			done <- fmt.Sprint(a.StatusCode, " ", string(b))
		}()
		return w, done
	}
	clip := testClip(12, 1000)
	old, oldDone := post()
	old.Write(clip)
	text, textDone := post()
	text.Write([]byte(strings.Repeat("text ", 20000)))
	if got := <-textDone; !strings.HasPrefix(got, "415 ") {
		t.Errorf("text: got %s, want 415", got)
	}
	text.Close()
	select {
	case got := <-oldDone:
		t.Fatalf("text took the feed over: %s", got)
	default:
	}
	next, nextDone := post()
	next.Write(clip)
	if got := <-oldDone; !strings.HasPrefix(got, `409 {"error":"replaced`) {
		t.Errorf("the older: got %s, want 409", got)
	}
	old.Close()
	next.Close()
	if got := <-nextDone; got != `200 "ok"` {
		t.Errorf("the newest: got %s, want 200", got)
	}
}

// TestInOut: a publisher on /in, a viewer on /out that offers subprotocols as
// JSMpeg does, and a destination from one to the other.
func TestInOut(t *testing.T) {
	addr, _, _ := runVW(t)
	call := func(request string) {
		t.Helper()
		method, rest, _ := strings.Cut(request, " ")
		path, body, _ := strings.Cut(rest, " ")
		r, _ := http.NewRequest(method, "http://"+addr+path, strings.NewReader(body))
		a, err := http.DefaultClient.Do(r)
		if err != nil || a.StatusCode != 200 {
			t.Fatalf("%s: got %v, %v", request, a, err)
		}
		a.Body.Close()
	}
	dial := func(path string, protocol ...string) *websocket.Conn {
		t.Helper()
		c, _ := websocket.NewConfig("ws://"+addr+path, "http://"+addr)
		c.Protocol = protocol
		ws, err := websocket.DialConfig(c)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ws.Close() })
		return ws
	}
	call(`POST /api/destinations {"id":1,"stream":"video0","destination":"ws://` + addr + `/in/relay0"}`)
	viewer := dial("/out/relay0", "null", "other")
	if got := viewer.Config().Protocol; !slices.Equal(got, []string{"null"}) {
		t.Errorf("got subprotocol %q, want null", got)
	}
	publisher := dial("/in/video0")
	publisher.PayloadType = websocket.BinaryFrame
	clip := testClip(120, 3000)
	done := make(chan []byte)
	go func() { // what the viewer gets, until it has one frame in 120
		var got []byte
		buf := make([]byte, 1<<16)
		viewer.SetDeadline(time.Now().Add(10 * time.Second))
		for len(got) < len(clip)/2 {
			n, err := viewer.Read(buf)
			if err != nil {
				t.Errorf("the viewer: %v after %d bytes", err, len(got))
				break
			}
			got = append(got, buf[:n]...)
		}
		done <- got
	}()
	for b := clip; len(b) > 0; { // in pieces, as slow as a camera; again until the viewer has enough
		n := min(len(b), 1000)
		if _, err := publisher.Write(b[:n]); err != nil {
			t.Fatal(err)
		}
		b = b[n:]
		time.Sleep(time.Millisecond)
	}
	got := <-done
	if !strings.Contains(string(clip), string(got)) {
		t.Errorf("the viewer got %d bytes that are not what was published", len(got))
	}
	if p := packet(got); p.pid() != patPID {
		t.Errorf("the viewer's first packet has PID %#x, want PAT", p.pid())
	}
	call("DELETE /api/destinations/1")
}

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

// TestAllIsACopy: what GET answers does not change under the caller.
func TestAllIsACopy(t *testing.T) {
	s := newTestServer(t, "")
	ask(s, `POST /api/streams {"stream":"stream/x","feeds":["a"]}`)
	all := s.rules.allStreams()
	before := maps.Clone(all)
	ask(s, "DELETE /api/streams/all")
	if !maps.EqualFunc(all, before, slices.Equal[[]string]) {
		t.Errorf("got %v, want %v", all, before)
	}
}
