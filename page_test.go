package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// far makes a request one of another machine.
const far = "192.0.2.1:5000"

// TestPageFiles: small, nothing inline, and with a policy that refuses what is.
func TestPageFiles(t *testing.T) {
	s := newTestServer(t, "")
	s.page.players = defaultPlayers
	size := 0
	for path, kind := range pageTypes {
		if path == "/login" || path == "/player.js" || path == "/mpegts.js" {
			continue
		}
		w := httptest.NewRecorder()
		r := httptest.NewRequest("GET", "http://localhost:8888"+path, nil)
		r.RemoteAddr = "127.0.0.1:5000"
		s.ServeHTTP(w, r)
		if w.Code != 200 || w.Header().Get("Content-Type") != kind {
			t.Errorf("%s: got %d, %s, want 200, %s", path, w.Code, w.Header().Get("Content-Type"), kind)
		}
		size += w.Body.Len()
		for name, want := range map[string]string{
			"Content-Security-Policy": "default-src 'none'; script-src 'self' 'wasm-unsafe-eval' " + defaultPlayers.jsmpeg.url + " " + defaultPlayers.mpegts.url +
				"; style-src 'self' " + playerStyles + "; img-src 'self'; media-src blob:; connect-src 'self' ws://localhost:8888 wss://localhost:8888; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
			"X-Content-Type-Options": "nosniff",
			"Referrer-Policy":        "no-referrer",
		} {
			if got := w.Header().Get(name); got != want {
				t.Errorf("%s: %s\n got %s\nwant %s", path, name, got, want)
			}
		}
		if path != "/" {
			continue
		}
		if found := regexp.MustCompile(`(?i)<script>|<style|\son\w+=|\sstyle=|javascript:|\{\{`).FindString(w.Body.String()); found != "" {
			t.Errorf("%s has %q in it", path, found)
		}
		for _, p := range []player{defaultPlayers.jsmpeg, defaultPlayers.mpegts} {
			if !strings.Contains(w.Body.String(), `"`+p.url+`"`) || !strings.Contains(w.Body.String(), `"`+p.integrity+`"`) {
				t.Errorf("%s has not %+v in it", path, p)
			}
		}
	}
	if size == 0 || size > 40<<10 {
		t.Errorf("got %d bytes, want at most 40 KiB", size)
	}
	t.Logf("%d bytes in all", size)
	for _, host := range []string{"a;script-src *", "[::1]:8888", "a b"} {
		w := httptest.NewRecorder()
		r := httptest.NewRequest("GET", "/", nil)
		r.Host = host
		s.page.setHeader(w, r)
		if got := w.Header().Get("Content-Security-Policy"); !strings.Contains(got, "connect-src 'self';") {
			t.Errorf("Host %q: got %s", host, got)
		}
	}
}

// TestPlayerSetting: what VW_PLAYER may be, and what comes of it.
func TestPlayerSetting(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	here, folder := filepath.Dir(self), t.TempDir()
	files := func(jsmpeg, mpegts string) players { return players{player{file: jsmpeg}, player{file: mpegts}} }
	urls := func(jsmpeg, mpegts string) players { return players{player{url: jsmpeg}, player{url: mpegts}} }
	tests := []struct {
		value string
		want  players
		ok    bool
	}{
		{"", defaultPlayers, true},
		{"https://cdn.example/a.js?b", urls("https://cdn.example/a.js?b", "https://cdn.example/mpegts.js"), true},
		{"https://cdn.example/c/mpegts.min.js?b", urls("https://cdn.example/c/"+jsmpegFile, "https://cdn.example/c/mpegts.min.js?b"), true},
		{"https://cdn.example/c/", urls("https://cdn.example/c/"+jsmpegFile, "https://cdn.example/c/mpegts.js"), true},
		{"https://cdn.example", urls("https://cdn.example/"+jsmpegFile, "https://cdn.example/mpegts.js"), true},
		{"/opt/a.js", files("/opt/a.js", "/opt/mpegts.js"), true},
		{"/opt/mpegts.js", files("/opt/"+jsmpegFile, "/opt/mpegts.js"), true},
		{"a.js", files(filepath.Join(here, "a.js"), filepath.Join(here, "mpegts.js")), true},
		{folder, files(filepath.Join(folder, jsmpegFile), filepath.Join(folder, "mpegts.js")), true},
		{"ftp://cdn.example/a.js", players{}, false},
		{"https:///a.js", players{}, false},
		{"https://u:p@cdn.example/a.js", players{}, false},
		{"https://cdn.example/a.js; script-src *", players{}, false},
		{"https://cdn.example;script-src", players{}, false},
	}
	for _, tt := range tests {
		if got, ok := newPlayers(tt.value); ok != tt.ok || ok && got != tt.want {
			t.Errorf("%q: got %+v, %v, want %+v, %v", tt.value, got, ok, tt.want, tt.ok)
		}
	}

	s := newTestServer(t, "")
	const missing = `404 {"error":"VW_PLAYER: the file does not exist"}`
	get := func(name, value, jsmpeg, mpegts string) {
		t.Helper()
		s.page.players, _ = newPlayers(value)
		for request, want := range map[string]string{"GET /player.js": jsmpeg, "GET /mpegts.js": mpegts} {
			if got := ask(s, request); got != want {
				t.Errorf("%s: %s: got %s, want %s", name, request, got, want)
			}
		}
	}
	get("the default", "", missing, missing)
	get("a file that does not exist", filepath.Join(folder, "no.js"), missing, missing)
	get("an empty folder", folder, missing, missing)
	for name, content := range map[string]string{jsmpegFile: "JSMpeg", "other.js": "another", mpegtsFile: "mpegts"} {
		if err := os.WriteFile(filepath.Join(folder, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	get("a folder", folder, "200 JSMpeg", "200 mpegts")
	get("a file", filepath.Join(folder, "other.js"), "200 another", "200 mpegts")
	get("the other file", filepath.Join(folder, mpegtsFile), "200 JSMpeg", "200 mpegts")
	if got := ask(s, "GET /"); !strings.Contains(got, `data-jsmpeg="player.js" data-jsmpeg-hash="" data-mpegts="mpegts.js" data-mpegts-hash=""`) {
		t.Errorf("the page has other players: %s", got)
	}
}

// TestWithoutComments: what is sent does what the source does.
func TestWithoutComments(t *testing.T) {
	for _, tt := range []struct{ name, source, want string }{
		{"comments", "// a\n  // b\nx // c\n", "x // c\n"},
		{"indentation", "  a {\n    b\n\n  }\n", "a {\nb\n}\n"},
		{"a URL", "'http://x'\n", "'http://x'\n"},
		{"no newline at the end", "  a", "a"},
	} {
		if got := string(withoutComments([]byte(tt.source))); got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
	// In a template literal of several lines, both would be part of the text.
	for _, name := range []string{"page.js", "preview.js"} {
		b, err := pageFiles.ReadFile("page/" + name)
		if err != nil {
			t.Fatal(err)
		}
		for i, line := range strings.Split(string(b), "\n") {
			if !strings.HasPrefix(strings.TrimLeft(line, " "), "//") && strings.Count(line, "`")%2 != 0 {
				t.Errorf("%s:%d: a template literal goes over the end of the line: %s", name, i+1, line)
			}
		}
	}
}

// TestSignIn: the page goes to everybody, what it shows to who has the token
// or the cookie, and the cookie to who has the token.
func TestSignIn(t *testing.T) {
	s := newTestServer(t, "secret")
	login := func(body string, header ...string) *httptest.ResponseRecorder {
		r := httptest.NewRequest("POST", "/login", strings.NewReader(body))
		r.RemoteAddr, r.Host = far, "vw.example"
		for i := 0; i < len(header); i += 2 {
			r.Header.Set(header[i], header[i+1])
		}
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		return w
	}
	for _, tt := range []struct {
		name, body string
		header     []string
		status     int
	}{
		{"another token", `{"token":"secre"}`, nil, 401},
		{"no token", `{"token":""}`, nil, 401},
		{"no JSON", `token=secret`, nil, 400},
		{"too much", `{"token":"` + strings.Repeat("x", maxBody) + `"}`, nil, 413},
		{"a page elsewhere", `{"token":"secret"}`, []string{"Origin", "https://evil.example"}, 403},
	} {
		w := login(tt.body, tt.header...)
		if w.Code != tt.status || w.Header().Get("Set-Cookie") != "" {
			t.Errorf("%s: got %d with the cookie %q, want %d without", tt.name, w.Code, w.Header().Get("Set-Cookie"), tt.status)
		}
	}
	plain := login(`{"token":"secret"}`, "Origin", "http://vw.example").Header().Get("Set-Cookie")
	cookie, attributes, _ := strings.Cut(plain, ";")
	if want := " Path=/; Max-Age=2592000; HttpOnly; SameSite=Strict"; attributes != want || strings.Contains(cookie, "secret") {
		t.Errorf("got the cookie %q, want one with%s", plain, want)
	}
	if got := login(`{"token":"secret"}`, "Origin", "https://vw.example").Header().Get("Set-Cookie"); !strings.Contains(got, "; Secure") {
		t.Errorf("over TLS: got the cookie %q, want Secure", got)
	}

	other, restarted, open := newTestServer(t, "another"), newTestServer(t, "secret"), newTestServer(t, "")
	tests := []struct {
		name    string
		s       *server
		request string
		cookie  string
		want    int
	}{
		{"the page", s, "GET /", "", 200},
		{"its script", s, "GET /page.js", "", 200},
		{"its player", s, "GET /player.js", "", 404},
		{"the API", s, "GET /api/streams/all", "", 401},
		{"events", s, "GET /api/events", "", 401},
		{"a path that only begins like the page's", s, "GET /page.js/../api/streams/all", "", 401},
		{"the API with the cookie", s, "GET /api/streams/all", cookie, 200},
		{"events with the cookie", s, "HEAD /api/events", cookie, 200},
		{"preview with the cookie", s, "GET /out/video0", cookie, 426},
		{"a cookie beside it", s, "GET /api/streams/all", "vw=x; " + cookie, 200},
		{"no value", s, "GET /api/streams/all", "vw=", 401},
		{"the token as the cookie", s, "GET /api/streams/all", "vw=secret", 401},
		{"after a restart", restarted, "GET /api/streams/all", cookie, 200},
		{"with a new token", other, "GET /api/streams/all", cookie, 401},
		{"without VW_TOKEN", open, "GET /", "", 403},
		{"without VW_TOKEN, with a cookie", open, "GET /api/streams/all", "vw=" + open.door.session(), 403},
	}
	for _, tt := range tests {
		if got := ask(tt.s, tt.request, "remote", far, "Cookie", tt.cookie); !strings.HasPrefix(got, fmt.Sprint(tt.want, " ")) {
			t.Errorf("%s: got %.100s, want %d", tt.name, got, tt.want)
		}
	}

	// Basic makes a browser ask on its own; ffmpeg needs it.
	for path, want := range map[string]string{"/ts/video0": "Basic", "/api/streams/all": "Bearer", "/api/events": "Bearer", "/out/video0": "Bearer"} {
		r := httptest.NewRequest("GET", path, nil)
		r.RemoteAddr = far
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		if got := w.Header().Get("WWW-Authenticate"); w.Code != 401 || got != want+` realm="vw"` {
			t.Errorf("%s: got %d with %q, want 401 with %s", path, w.Code, got, want)
		}
	}
}

// TestPageRefused: who may not ask is told what to do, in a browser as a page
// and elsewhere as JSON.
func TestPageRefused(t *testing.T) {
	s := newTestServer(t, "")
	const browser, host = "text/html,application/xhtml+xml", "<b>.example"
	for _, tt := range []struct {
		name, request string
		header        []string
		page          bool
	}{
		{"another device", "GET /", []string{"remote", far, "Accept", browser}, true},
		{"another name", "GET /", []string{"Host", host, "Accept", browser}, true},
		{"curl", "GET /", []string{"remote", far, "Accept", "*/*"}, false},
		{"the API in a browser", "GET /api/stats", []string{"remote", far, "Accept", browser}, false},
	} {
		got := ask(s, tt.request, tt.header...)
		isPage := strings.HasPrefix(got, "403 <!doctype html>") && strings.Contains(got, "VW_TOKEN") && !strings.Contains(got, "{{")
		if isJSON := strings.HasPrefix(got, `403 {"error":`); isPage != tt.page || isJSON == tt.page {
			t.Errorf("%s: got %.200s, want a page: %v", tt.name, got, tt.page)
		}
		if strings.Contains(got, "<b>") {
			t.Errorf("%s: the name of the host became markup: %s", tt.name, got)
		}
	}
}

// TestEvents: the stats at once and again, one JSON in a line, until vw ends.
func TestEvents(t *testing.T) {
	addr, _, stop := runVW(t)
	r, err := http.Get("http://" + addr + "/api/events")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	if got := r.Header.Get("Content-Type"); got != "text/event-stream" {
		t.Errorf("got %s, want text/event-stream", got)
	}
	lines := bufio.NewReader(r.Body)
	var last float64
	for range 2 {
		line, err := lines.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		var got struct {
			Uptime  float64
			Streams map[string]json.RawMessage
		}
		data, ok := strings.CutPrefix(line, "data: ")
		if err := json.Unmarshal([]byte(data), &got); !ok || err != nil || got.Streams == nil || got.Uptime <= last {
			t.Errorf("got %q, %v, want the stats of a later time", line, err)
		}
		last = got.Uptime
		if line, err := lines.ReadString('\n'); line != "\n" || err != nil {
			t.Errorf("got %q, %v, want an empty line", line, err)
		}
	}
	if got := stop(); got != 0 {
		t.Errorf("got status %d, want 0", got)
	}
	if _, err := io.ReadAll(lines); err != nil {
		t.Errorf("the end: %v, want a proper one", err)
	}
}

// oneConn is a listener of one connection.
type oneConn struct {
	conn chan net.Conn
	done chan struct{}
}

func (l oneConn) Accept() (net.Conn, error) {
	select {
	case c := <-l.conn:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l oneConn) Close() error {
	close(l.done)
	return nil
}

func (l oneConn) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 8888} }

// fromHere is a connection whose peer seems to be on this machine.
type fromHere struct{ net.Conn }

func (c fromHere) RemoteAddr() net.Addr { return oneConn{}.Addr() }

// TestEventsMute: a mute and its lift are told at once, not in a second.
func TestEventsMute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, "")
		ctx, cancel := context.WithCancel(t.Context())
		events, w := io.Pipe()
		var serving sync.WaitGroup
		serving.Go(func() {
			r := httptest.NewRequest("GET", "/api/events", nil).WithContext(ctx)
			r.RemoteAddr, r.Host = "127.0.0.1:50000", "localhost"
			s.ServeHTTP(&pipeWriter{w}, r)
			w.Close()
		})
		lines := bufio.NewScanner(events)
		next := func() (e struct{ Mute muteStatus }) {
			for lines.Scan() {
				if data, ok := strings.CutPrefix(lines.Text(), "data: "); ok {
					if err := json.Unmarshal([]byte(data), &e); err != nil {
						t.Error(err)
					}
					return e
				}
			}
			t.Error("the events ended")
			return e
		}
		if next().Mute.Audio {
			t.Error("muted from the start")
		}
		for _, muted := range []bool{true, false} {
			time.Sleep(eventsEvery / 4)
			ask(s, fmt.Sprintf(`PUT /api/mute {"audio":%v}`, muted))
			begun := time.Now()
			if got := next().Mute.Audio; got != muted || time.Since(begun) > eventsEvery/4 {
				t.Errorf("after %v: got %v, want %v within %v", time.Since(begun), got, muted, eventsEvery/4)
			}
		}
		begun := time.Now()
		next()
		if got := time.Since(begun); got != eventsEvery {
			t.Errorf("the next event came after %v, want %v", got, eventsEvery)
		}
		cancel()
		serving.Wait()
	})
}

// pipeWriter answers into a pipe.
type pipeWriter struct{ io.Writer }

func (pipeWriter) Header() http.Header              { return http.Header{} }
func (pipeWriter) WriteHeader(int)                  {}
func (pipeWriter) Flush()                           {}
func (pipeWriter) SetWriteDeadline(time.Time) error { return nil }

// TestEventsStuck: a listener that does not read is cut off.
func TestEventsStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, "")
		ours, theirs := net.Pipe()
		l := oneConn{make(chan net.Conn, 1), make(chan struct{})}
		l.conn <- fromHere{ours}
		h := &http.Server{Handler: s}
		var serving sync.WaitGroup
		serving.Go(func() { h.Serve(l) })
		fmt.Fprint(theirs, "GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
		synctest.Wait()
		start := time.Now()
		s.tasks.Wait()
		if d := time.Since(start); d != maxStall {
			t.Errorf("cut off after %v, want %v", d, maxStall)
		}
		theirs.Close()
		h.Close()
		serving.Wait()
	})
}

// ---- In Chromium

// pageBrowser shows the page of a vw.
type pageBrowser struct {
	*browser
}

// js returns what an expression in the page is, as text.
func (b pageBrowser) js(t *testing.T, expression string) (s string) {
	t.Helper()
	b.evaluate(t, "String("+expression+")", &s)
	return s
}

// until waits for an expression to be wanted.
func (b pageBrowser) until(t *testing.T, want, expression string) {
	t.Helper()
	eventually(t, 2*startupTime, func() error {
		if got := b.js(t, expression); got != want {
			return fmt.Errorf("%s: got %q, want %q", expression, got, want)
		}
		return nil
	})
}

// tap does what a finger does in the middle of the element that an expression
// is: whatever covers it gets the tap.
func (b pageBrowser) tap(t *testing.T, element string) {
	t.Helper()
	var at struct{ X, Y float64 }
	b.evaluate(t, `(() => {
		const e = `+element+`;
		e.scrollIntoView({block: 'center'});
		const r = e.getBoundingClientRect();
		return {x: r.x + r.width / 2, y: r.y + r.height / 2};
	})()`, &at)
	if at.X == 0 {
		t.Fatalf("there is no %s to tap", element)
	}
	for _, kind := range []string{"mousePressed", "mouseReleased"} {
		b.call(t, "Input.dispatchMouseEvent", map[string]any{"type": kind, "x": at.X, "y": at.Y, "button": "left", "clickCount": 1}, nil)
	}
}

// submit fills in a form and sends it off.
func (b pageBrowser) submit(t *testing.T, id string, fields ...string) {
	t.Helper()
	for i := 0; i < len(fields); i += 2 {
		b.js(t, fmt.Sprintf("document.getElementById(%q).elements[%q].value = %q", id, fields[i], fields[i+1]))
	}
	b.tap(t, fmt.Sprintf("document.querySelector('#%s button:not([type])')", id))
}

// look leaves pictures of the whole page among the artifacts, for a phone and
// a desktop, light and dark.
func (b pageBrowser) look(t *testing.T, name string) {
	t.Helper()
	for width, device := range map[int]string{390: "phone", 1280: "desktop"} {
		b.call(t, "Emulation.setDeviceMetricsOverride", map[string]any{"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}, nil)
		var got int
		if b.evaluate(t, "document.documentElement.scrollWidth", &got); got > width {
			t.Errorf("%s, %s: the page is %d pixels wide, want %d", name, device, got, width)
		}
		for _, scheme := range []string{"light", "dark"} {
			b.call(t, "Emulation.setEmulatedMedia", map[string]any{"features": []any{map[string]any{"name": "prefers-color-scheme", "value": scheme}}}, nil)
			b.js(t, "scrollTo(0, 0)")
			b.capture(t, fmt.Sprintf("%s-%s-%s.png", name, device, scheme), map[string]any{"captureBeyondViewport": true})
		}
	}
}

// npmPlayers is a folder of both players, from their npm packages.
func npmPlayers(t *testing.T) string {
	t.Helper()
	needs(t, "npm")
	if out, err := exec.Command("testdata/player/install.sh").CombinedOutput(); err != nil {
		t.Fatalf("install the players: %v\n%s", err, out)
	}
	folder := t.TempDir()
	for _, name := range []string{"@cycjimmy/jsmpeg-player/dist/" + jsmpegFile, "mpegts.js/dist/" + mpegtsFile} {
		from, err := filepath.Abs(filepath.Join("testdata/player/node_modules", name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(from, filepath.Join(folder, filepath.Base(name))); err != nil {
			t.Fatal(err)
		}
	}
	return folder
}

// Elements of the page, as expressions.
func row(list, key string) string {
	return fmt.Sprintf("document.querySelector('#%s > [data-key=%q]')", list, key)
}

func destinationRow(id string) string {
	return fmt.Sprintf("document.querySelector('.destinations > [data-key=%q]')", id)
}

func switchOf(stream, feed string) string {
	return row("streams", stream) + fmt.Sprintf(".querySelector('.switch[data-key=%q]')", feed)
}

func kindSwitch(kind string) string {
	return "document.querySelector('#room [data-kind=" + kind + "]')"
}

// part is what the class names in a row, and not in a row within it.
func part(row, class string) string { return "((r) => r && part(r, '" + class + "'))(" + row + ")" }

// TestPage: everything that the page is for, in a browser, with real ffmpegs
// and a relay that is not ours.
func TestPage(t *testing.T) {
	t.Parallel()
	v := startVW(t, "VW_PLAYER="+npmPlayers(t))
	b := pageBrowser{startBrowser(t)}
	b.open(t, v.url+"/")
	b.until(t, "live", "document.getElementById('link').textContent")
	b.until(t, "true", "document.querySelector('#devices').textContent.includes('-f lavfi -i testsrc2')")
	b.look(t, "empty")

	s := &programStream{vw: v, relay: startRelay(t, "127.0.0.1:0")}
	startFFmpeg(t, realTime, videoInput, videoCodec, []string{v.url + "/ts/video0"})
	startFFmpeg(t, realTime, audioInput, audioCodec, []string{"-user_agent", "<img src=x onerror=alert(1)>", v.url + "/ts/audio0"})
	startFFmpeg(t, realTime, videoInput, liveCodec, []string{v.url + "/ts/video1"})
	for feed, codec := range map[string]string{"video0": "mpeg1video", "audio0": "mp2", "video1": "h264"} {
		b.until(t, "live", part(row("feeds", feed), "state")+".textContent")
		b.until(t, "true", part(row("feeds", feed), "rate")+".textContent.endsWith('bit/s')")
		b.until(t, "true", part(row("feeds", feed), "tracks")+".textContent.startsWith('"+codec+"')")
	}
	if got := b.js(t, part(row("feeds", "audio0"), "more")+".textContent"); !strings.Contains(got, "<img src=x") {
		t.Errorf("the publisher is %q, want its agent in it", got)
	}
	if got := b.js(t, "document.images.length"); got != "0" {
		t.Errorf("the agent became %s elements", got)
	}
	b.until(t, "true", "document.getElementById('devices').hidden")

	// Rules are added, feeds and streams by a tap; what is refused is told
	// beside the form, and the focus goes back to where it was.
	b.tap(t, "document.getElementById('newStream')")
	for _, feed := range []string{"video0", "audio0"} {
		b.tap(t, "[...document.querySelectorAll('#stream-form .chips button')].find((e) => e.textContent === '"+feed+"')")
	}
	b.look(t, "new-stream")
	b.submit(t, "stream-form", "stream", "test")
	b.until(t, "true true", switchOf("stream/test", "video0")+".ariaChecked + ' ' + "+switchOf("stream/test", "audio0")+".ariaChecked")
	b.until(t, "newStream", "document.activeElement.id")
	b.tap(t, part(row("streams", "stream/test"), "send"))
	b.submit(t, "destination-form", "destination", "http://relay")
	b.until(t, "true", "document.querySelector('#destination-form .error').textContent.includes('must be ws')")
	b.look(t, "refused")
	b.submit(t, "destination-form", "destination", "ws://u:hidden@"+s.relay.addr+"/in/test?code=hidden")
	destination := destinationRow("0")
	b.until(t, "open", part(destination, "state")+".textContent")
	b.until(t, "true", "document.activeElement === "+part(row("streams", "stream/test"), "send"))
	if got := b.js(t, "document.body.textContent.includes('hidden')"); got != "false" {
		t.Errorf("the password or query of a relay is on the page")
	}

	// A tap mutes: no sound comes to the relay after it, and pictures do.
	grow := func(kind, n int) {
		t.Helper()
		from := s.frames(t)[kind]
		eventually(t, startupTime, func() error {
			if got := s.frames(t)[kind]; got < from+n {
				return fmt.Errorf("the relay got %d frames of kind %d since, want %d", got-from, kind, n)
			}
			return nil
		})
	}
	rule := func() string { return v.call(t, 200, "GET", "/api/streams/stream/test", "") }
	const video, audio = 0, 1
	grow(audio, 20)
	videoSwitch, audioSwitch := switchOf("stream/test", "video0"), switchOf("stream/test", "audio0")
	b.tap(t, audioSwitch)
	b.until(t, "false", audioSwitch+".ariaChecked")
	if got := rule(); got != `["video0"]` {
		t.Errorf("muted: the rule is %s, want video0 alone", got)
	}
	grow(video, 5)
	silent := s.frames(t)[audio]
	grow(video, 50)
	if got := s.frames(t)[audio]; got != silent {
		t.Errorf("the relay got %d frames of sound after the mute", got-silent)
	}
	b.look(t, "muted")
	b.tap(t, audioSwitch)
	b.until(t, "true", audioSwitch+".ariaChecked")
	grow(audio, 20)
	b.tap(t, videoSwitch)
	b.tap(t, audioSwitch) // before the first is known to have worked
	b.until(t, "false false", videoSwitch+".ariaChecked + ' ' + "+audioSwitch+".ariaChecked")
	if got := rule(); got != `[]` {
		t.Errorf("both muted: the rule is %s, want none", got)
	}
	b.until(t, "open, all muted", part(destination, "state")+".textContent")
	b.tap(t, audioSwitch) // as the second of a double tap does
	time.Sleep(time.Second)
	if got := rule(); got != `[]` {
		t.Errorf("a double tap: the rule is %s, want none", got)
	}
	b.tap(t, audioSwitch)
	b.tap(t, videoSwitch)
	b.until(t, "true true", videoSwitch+".ariaChecked + ' ' + "+audioSwitch+".ariaChecked")
	if got := rule(); got != `["video0","audio0"]` {
		t.Errorf("heard again: the rule is %s, want it in its order", got)
	}

	// A relay that dies shows as such, with its reason.
	s.relay.kill(t)
	died := time.Now()
	b.until(t, "true", part(destination, "state")+".textContent !== 'open' && "+destination+".textContent.includes('refused')")
	t.Logf("the relay's death showed after %.1f s: %s", time.Since(died).Seconds(), b.js(t, part(destination, "reason")+".textContent"))
	b.tap(t, part(destination, "check"))
	b.until(t, "true", part(destination, "found")+".textContent.includes('FAILED')")
	b.look(t, "dead")

	// It is changed, with what is secret kept.
	b.tap(t, part(destination, "change"))
	b.until(t, "ws://***@"+s.relay.addr+"/in/test?code=hidden", "document.querySelector('#destination-form').elements.destination.value")
	b.submit(t, "destination-form", "stream", "video0")
	b.until(t, "null", row("streams", "stream/test")+".querySelector('.destinations > li')")
	b.until(t, "0", part(row("feeds", "video0"), "destinations")+".children[0].dataset.key")

	// Deleting takes two taps.
	b.tap(t, part(destination, "delete"))
	b.until(t, "Really delete?", part(destination, "delete")+".textContent")
	b.tap(t, part(destination, "delete"))
	b.until(t, "null", destination)
	if got := v.call(t, 200, "GET", "/api/destinations/all", ""); got != "{}" {
		t.Errorf("deleted: got %s, want none", got)
	}
	stream := row("streams", "stream/test")
	b.until(t, "Delete stream", part(stream, "delete")+".textContent")
	b.tap(t, part(stream, "delete"))
	b.until(t, "Really delete stream?", part(stream, "delete")+".textContent")
	b.tap(t, part(stream, "delete"))
	b.until(t, "null", stream)
	b.quiet(t, "status of 400") // what a rule was refused with
}

// quiet checks that the console says nothing but what is expected, what
// Chromium thinks of WebGL without a GPU, and of taps that come before a
// preview is connected.
func (b pageBrowser) quiet(t *testing.T, expected ...string) {
	t.Helper()
	known := regexp.MustCompile(strings.Join(append(expected, `"source":"rendering"`, "closed before the connection is established"), "|"))
	for _, line := range b.console {
		if !known.MatchString(line) {
			t.Errorf("console: %s", line)
		}
	}
}

// TestPagePreview: every codec that can be played, alone and in streams, with
// sound at a tap, through a mute, a restart and a lost connection.
func TestPagePreview(t *testing.T) {
	notUnderRace(t)
	t.Parallel()
	v := startVW(t, "VW_PLAYER="+npmPlayers(t))
	b := pageBrowser{startBrowser(t)}
	b.open(t, v.url+"/")
	start := func(feed string, args ...[]string) *process {
		return startFFmpeg(t, slices.Concat(realTime, slices.Concat(args...)), []string{v.url + "/ts/" + feed})
	}
	start("mpeg1", videoInput, videoCodec)
	start("mp2", audioInput, audioCodec)
	h264 := start("h264", videoInput, liveCodec)
	start("aac", audioInput, aacCodec)
	start("hevc", testPicture("160x120"), []string{"-f", "mpegts", "-codec:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=none"})
	for name, feeds := range map[string]string{"old": `"mpeg1","mp2"`, "new": `"h264","aac"`, "mixed": `"h264","mp2"`, "two": `"mpeg1","h264","mp2","aac"`} {
		v.call(t, 200, "POST", "/api/streams", fmt.Sprintf(`{"stream":"stream/%s","feeds":[%s]}`, name, feeds))
	}
	for _, feed := range []string{"mpeg1", "mp2", "h264", "aac", "hevc"} {
		b.until(t, "live", part(row("feeds", feed), "state")+".textContent")
	}

	// The browser checks the files against the hashes that the CDN's must have.
	b.js(t, fmt.Sprintf("Object.assign(document.body.dataset, {jsmpegHash: %q, mpegtsHash: %q})", defaultPlayers.jsmpeg.integrity, defaultPlayers.mpegts.integrity))
	const note = "document.querySelector('#preview .note').textContent"
	const sound = "document.querySelector('#preview .sound')"
	watch := func(name string) {
		t.Helper()
		list := "feeds"
		if isStream(name) {
			list = "streams"
		}
		b.tap(t, part(row(list, name), "watch"))
		b.until(t, name, "watching?.name")
	}
	const pictures = "/(^| )(2[0-9]|1[5-9]|30) pictures/.test(" + note + ")"
	for _, name := range []string{"stream/old", "stream/new", "stream/mixed", "stream/two"} {
		watch(name)
		b.until(t, "true", "watching.pictures > 50")
		b.until(t, "true", pictures)
		b.tap(t, sound)
		b.until(t, "true", "watching.sound && watching.sounds > 50 && watching.pictures > 25")
		b.until(t, "true", pictures+" && (watching.behind ?? 0) < 1")
		clip := map[string]any{}
		b.js(t, "scrollTo(0, 0)") // the switches stay on top, over the picture
		b.evaluate(t, "(() => { const {x, y, width, height} = document.querySelector('.screen > :first-child').getBoundingClientRect(); return {x, y: y + scrollY, width, height, scale: 1}; })()", &clip)
		eventually(t, startupTime, func() error { // in a tenth of the pictures something large is before them
			if got := bars(b.capture(t, filepath.Base(name)+".png", map[string]any{"clip": clip, "captureBeyondViewport": true})); got < 0.65 {
				return fmt.Errorf("%s: %.2f of the bars from red to cyan are as they should be, want at least 0.65", name, got)
			}
			return nil
		})
	}
	b.look(t, "preview")
	watch("hevc")
	b.until(t, "true", "document.querySelector('.cover').textContent === (canPlay('hevc') ? '' : \"This browser's preview cannot play hevc.\")")
	if got, want := b.js(t, "document.querySelector('.ffplay').textContent"), "ffplay -fflags nobuffer -analyzeduration 1000000 "+v.url+"/ts/hevc"; got != want {
		t.Errorf("the line is %q, want %q", got, want)
	}
	b.look(t, "hevc")
	for _, feed := range []string{"mp2", "aac"} {
		watch(feed)
		b.until(t, "Sound is off", note)
		b.tap(t, sound)
		b.until(t, "true", "watching.sounds > 20")
		b.until(t, "Sound alone.", "document.querySelector('.cover').textContent")
	}

	// Recovery, in a stream that mpegts.js plays.
	watch("stream/new")
	b.until(t, "true", pictures)
	tap := func(feed string) { b.tap(t, switchOf("stream/new", feed)) }
	tap("aac")
	b.until(t, "false", switchOf("stream/new", "aac")+".ariaChecked")
	b.until(t, "true", pictures+" && "+note+".includes('Muted in this stream: aac')")
	tap("h264")
	b.until(t, "Muted in this stream: aac, h264.", "document.querySelector('.cover').textContent")
	b.until(t, "0", "document.querySelectorAll('video').length") // no last picture
	time.Sleep(time.Second)                                      // no double tap
	tap("h264")
	tap("aac")
	b.until(t, "true", pictures+" && !"+note+".includes('Muted')")
	h264.kill(t)
	b.until(t, "0", "document.querySelectorAll('video').length")
	start("h264", videoInput, liveCodec)
	b.until(t, "true", pictures)
	b.js(t, "watching.socket.close(), watching.old = true") // as a proxy does
	b.until(t, "true", "!watching.old && "+pictures)
	b.tap(t, "document.querySelector('#preview .close')")
	b.until(t, "true", "document.getElementById('preview').hidden && document.activeElement === "+part(row("streams", "stream/new"), "watch"))
	b.quiet(t)
}

// clockCamera makes pictures that say in 16 columns, black or white, which they are.
type clockCamera struct {
	mu   sync.Mutex
	born []time.Time
}

const clockWidth, clockHeight = 320, 240

// film writes 25 raw pictures/s until w is closed.
func (c *clockCamera) film(w io.WriteCloser) {
	defer w.Close()
	tick := time.NewTicker(40 * time.Millisecond)
	defer tick.Stop()
	picture := make([]byte, clockWidth*clockHeight)
	for n := 0; ; n++ {
		for i := range picture {
			picture[i] = 16 + byte(n>>(i%clockWidth*16/clockWidth)&1)*219
		}
		c.mu.Lock()
		c.born = append(c.born, time.Now())
		c.mu.Unlock()
		if _, err := w.Write(picture); err != nil {
			return
		}
		<-tick.C
	}
}

// startClock makes ffmpeg publish what a clockCamera films.
func startClock(t *testing.T, url string, codec ...string) *clockCamera {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(needs(t, "ffmpeg"), slices.Concat([]string{"-v", "error", "-f", "rawvideo", "-pix_fmt", "gray", "-video_size",
		fmt.Sprintf("%dx%d", clockWidth, clockHeight), "-framerate", "25", "-i", "-", "-pix_fmt", "yuv420p", "-f", "mpegts", "-muxdelay", "0.001"}, codec, []string{url})...)
	cmd.Stdin = r
	c := &clockCamera{}
	var filming sync.WaitGroup
	t.Cleanup(filming.Wait)
	start(t, "ffmpeg", cmd)
	r.Close()
	filming.Go(func() { c.film(w) })
	return c
}

// readClock makes a page keep in shown the number of each picture that its preview
// shows, and when that was.
const readClock = `(() => {
	const get = HTMLCanvasElement.prototype.getContext; // WebGL gives its picture away once it is shown
	HTMLCanvasElement.prototype.getContext = function (kind, options) { return get.call(this, kind, {...options, preserveDrawingBuffer: true}); };
	const context = Object.assign(document.createElement('canvas'), {width: 64, height: 1}).getContext('2d', {willReadFrequently: true});
	window.shown = [];
	(function look() {
		requestAnimationFrame(look);
		const e = document.querySelector('.screen > video, .screen > canvas');
		if (!(e?.videoWidth || e?.width)) return;
		context.drawImage(e, 0, 0, 64, 1);
		const { data } = context.getImageData(0, 0, 64, 1);
		let n = 0;
		for (let i = 0; i < 16; i++) n |= (data[16 * i + 8] > 128) << i;
		if (n !== shown.at(-1)?.[0]) shown.push([n, Date.now()]);
	})();
})()`

// TestPageLive: the preview shows, by a clock in the picture, what was seen less
// than a second before, though the keyframe is long past; every picture, with
// sound.
//
// Not beside other tests: a browser without a GPU needs the processors to show
// pictures in time.
func TestPageLive(t *testing.T) {
	notUnderRace(t)
	players := npmPlayers(t)
	for _, tt := range []struct {
		name         string
		width        int
		video, audio []string
		watch        time.Duration
	}{
		{"mpegts.js, phone", 390, []string{"-codec:v", "libx264", "-tune", "zerolatency"}, aacCodec, scaled(15*time.Second, 15*time.Second, 30*time.Second)},
		{"JSMpeg, desktop", 1280, []string{"-codec:v", "mpeg1video", "-b:v", "1000k", "-bf", "0", "-g", "12"}, audioCodec, scaled(6*time.Second, 6*time.Second, 30*time.Second)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			v := startVW(t, "VW_PLAYER="+players)
			v.call(t, 200, "POST", "/api/streams", `{"stream":"stream/a","feeds":["video0","audio0"]}`)
			startFFmpeg(t, realTime, audioInput, tt.audio, []string{v.url + "/ts/audio0"})
			c := startClock(t, v.url+"/ts/video0", tt.video...)
			b := pageBrowser{startBrowser(t)}
			b.open(t, v.url+"/")
			b.call(t, "Emulation.setDeviceMetricsOverride", map[string]any{"width": tt.width, "height": 844, "deviceScaleFactor": 1, "mobile": tt.width < 500}, nil)
			for _, feed := range []string{"video0", "audio0"} {
				b.until(t, "live", part(row("feeds", feed), "state")+".textContent")
			}
			time.Sleep(3 * time.Second) // x264's next keyframe is 10 s after the first
			b.js(t, readClock)
			asked := time.Now()
			b.tap(t, part(row("streams", "stream/a"), "watch"))
			b.until(t, "true", "watching.pictures > 10")
			b.tap(t, "document.querySelector('#preview .sound')")
			b.until(t, "true", "watching.sound && watching.sounds > 0")
			var begun, ended struct{ Pictures, Sounds, At float64 }
			const count = "({pictures: watching.pictures, sounds: watching.sounds, at: performance.now() / 1000})"
			b.evaluate(t, count, &begun)
			time.Sleep(tt.watch)
			b.evaluate(t, count, &ended)
			took := ended.At - begun.At
			pictures, sounds := (ended.Pictures-begun.Pictures)/took, (ended.Sounds-begun.Sounds)/took
			t.Logf("in %.1f s: %.1f pictures/s, %.1f units of sound a second", took, pictures, sounds)
			if pictures < 0.9*25 || sounds < 0.8*41.7 {
				t.Errorf("got %.1f pictures/s and %.1f units of sound, want 25, and 41.7 or more", pictures, sounds)
			}
			c.judge(t, b, asked)
			b.quiet(t)
		})
	}
}

// judge looks at what the preview has shown since it was asked for.
func (c *clockCamera) judge(t *testing.T, b pageBrowser, asked time.Time) {
	t.Helper()
	var shown [][2]int64
	b.evaluate(t, "shown", &shown)
	c.mu.Lock()
	defer c.mu.Unlock()
	var delays []time.Duration // of what is shown a second after the first
	var first, fresh time.Time
	for _, s := range shown {
		at := time.UnixMilli(s[1])
		if int(s[0]) >= len(c.born) {
			t.Fatalf("picture %d of %d is shown", s[0], len(c.born))
		}
		delay := at.Sub(c.born[s[0]])
		if s[0] == 0 && delay > time.Second {
			continue // black: not a picture yet
		}
		if first.IsZero() {
			first = at
		}
		if fresh.IsZero() && delay < time.Second {
			fresh = at
		}
		if at.Sub(first) > time.Second {
			delays = append(delays, delay)
		}
	}
	if len(delays) == 0 {
		t.Fatal("nothing was shown")
	}
	slices.Sort(delays)
	usual, most := delays[len(delays)*19/20], delays[len(delays)-1]
	t.Logf("the first picture after %v, one of less than a second ago after %v; then %d pictures, %v old in the median, %v in 95 of 100, %v at most",
		first.Sub(asked), fresh.Sub(asked), len(delays), delays[len(delays)/2], usual, most)
	if usual > time.Second {
		t.Errorf("95 of 100 pictures were %v old, want less than a second", usual)
	}
}

// fakePage shows the page what a test wants it to be told, and keeps what it
// asks the API for in asked.
func fakePage(t *testing.T) pageBrowser {
	t.Helper()
	v := startVW(t)
	b := pageBrowser{startBrowser(t)}
	b.open(t, v.url+"/")
	b.until(t, "live", "document.getElementById('link').textContent")
	b.js(t, `(() => {
		source.close();
		clearTimeout(overdue);
		window.asked = [];
		window.answer = {};
		call = async (method, path, body) => {
			if (path === 'api/stats') return stats;
			asked.push(method + ' ' + path + (body ? ' ' + JSON.stringify(body) : ''));
			return answer;
		};
		window.colour = (e, name) => {
			const probe = document.body.appendChild(document.createElement('i'));
			probe.style.color = 'var(--' + name + ')';
			const same = getComputedStyle(e).color === getComputedStyle(probe).color;
			probe.remove();
			return same;
		};
		window.fake = (mute, destinations) => show({version: 'v', uptime: 1, mute, destinations, feeds: {
			audio0: {state: 'live', publisher: {remote: 'r', agent: '', since: 1}, tracks: [{pid: 256, codec: 'mp2', kind: 'audio'}]},
			video0: {state: 'live', publisher: {remote: 'r', agent: '', since: 1}, tracks: [{pid: 256, codec: 'h264', kind: 'video'}]},
			data0: {state: 'live', publisher: {remote: 'r', agent: '', since: 1}, tracks: [{pid: 256, codec: '0x06', kind: 'data'}]},
			video1: {state: 'absent', publisher: null, tracks: []}},
		streams: {
			'stream/a': {feeds: ['video0', 'audio0'], present: ['video0', 'audio0'], muted: []},
			'stream/absent': {feeds: ['video1'], present: [], muted: []},
			'stream/empty': {feeds: [], present: [], muted: []},
			'stream/muted': {feeds: [], present: [], muted: ['video0']}}});
	})()`)
	return b
}

// TestPageDestinations: how a destination is, in words and in colour: green is
// only what sends something, and what helps stands before what Go says.
func TestPageDestinations(t *testing.T) {
	t.Parallel()
	b := fakePage(t)
	for _, tt := range []struct{ name, mute, destination, state, colour, reason, raw string }{
		{"a stream", "", "stream: 'stream/a', state: 'open'", "open", "good", "", ""},
		{"a feed", "", "stream: 'video0', state: 'open'", "open", "good", "", ""},
		{"no such stream", "", "stream: 'stream/b', state: 'open'", "no such stream", "warn", "", ""},
		{"no such feed", "", "stream: 'video9', state: 'open'", "open, not published", "warn", "", ""},
		{"a feed that left", "", "stream: 'video1', state: 'open'", "open, not published", "warn", "", ""},
		{"a stream whose feeds left", "", "stream: 'stream/absent', state: 'open'", "open, not published", "warn", "", ""},
		{"a stream without feeds", "", "stream: 'stream/empty', state: 'open'", "open, no feeds", "warn", "", ""},
		{"a muted stream", "", "stream: 'stream/muted', state: 'open'", "open, all muted", "warn", "", ""},
		{"a stream, sound muted", "audio: true", "stream: 'stream/a', state: 'open'", "open, sound muted", "good", "", ""},
		{"a stream, all muted", "audio: true, video: true", "stream: 'stream/a', state: 'open'", "open, all muted", "warn", "", ""},
		{"picture, sound muted", "audio: true", "stream: 'video0', state: 'open'", "open", "good", "", ""},
		{"picture, picture muted", "video: true", "stream: 'video0', state: 'open'", "open, all muted", "warn", "", ""},
		{"data, sound muted", "audio: true", "stream: 'data0', state: 'open'", "open, all muted", "warn", "", ""},
		{"the control link", "audio: true, video: true", "id: 'apiRule', stream: 'api', state: 'open'", "open", "good", "", ""},
		{"an error", "", "stream: 'video0', state: 'waiting', error: 'dial: no'", "waiting", "bad", "dial: no", ""},
		{"advice", "", "stream: 'video0', state: 'waiting', error: 'dial: no', advice: 'Nothing listens.'", "waiting", "bad", "Nothing listens.", "dial: no"},
		{"advice of the past", "", "stream: 'video0', state: 'open', error: 'dial: no', advice: 'Nothing listens.'", "open", "good", "", "Last error: dial: no"},
	} {
		id := "x"
		if strings.Contains(tt.destination, "apiRule") {
			id = "apiRule"
		}
		b.js(t, fmt.Sprintf("fake({%s}, {%s: {id: 'x', destination: 'ws://relay', since: 0, bytes: 0, %s}})", tt.mute, id, tt.destination))
		x := destinationRow(id)
		for what, want := range map[string]string{
			part(x, "state") + ".textContent":                                 tt.state,
			part(x, "reason") + ".textContent":                                tt.reason,
			part(x, "raw") + ".textContent":                                   tt.raw,
			"colour(" + part(x, "state") + ", '" + tt.colour + "')":           "true",
			part(x, "check") + ".hidden":                                      fmt.Sprint(!strings.Contains(tt.destination, "waiting")),
			part(x, "delete") + ".hidden && " + part(x, "change") + ".hidden": fmt.Sprint(id == "apiRule"),
		} {
			if got := b.js(t, what); got != want {
				t.Errorf("%s: %s: got %q, want %q", tt.name, what, got, want)
			}
		}
	}
	b.look(t, "advice")
	// What reads alike is named apart.
	if got := b.js(t, `(() => {
		const names = [...document.querySelectorAll('main button')].filter((e) => e.checkVisibility()).map((e) => e.ariaLabel ?? e.textContent);
		return names.filter((n, i) => names.indexOf(n) !== i && !/^(video|audio)\d/.test(n));
	})()`); got != "" {
		t.Errorf("several buttons are named %s", got)
	}
}

// TestPageMute: the two switches say what is muted, by whom and since when, and
// ask for no more than what was pressed.
func TestPageMute(t *testing.T) {
	t.Parallel()
	b := fakePage(t)
	const open = "{x: {id: 'x', stream: 'stream/a', destination: 'ws://relay', state: 'open', since: 0, bytes: 0}}"
	const at = "new Date(2026, 0, 2, 9, 5)"
	for _, tt := range []struct{ name, mute, destinations, leaves, audio, video, title string }{
		{"nothing", "audio: false, video: false", open, "Nothing is muted", "Sound goes to 1 relay", "Picture goes to 1 relay", "vw"},
		{"nothing, no relay", "audio: false, video: false", "{}", "Nothing is muted", "Sound is not muted", "Picture is not muted", "vw"},
		{"sound, here", "audio: true, video: false", open, "No sound leaves this room", "Sound is muted, by you", "Picture goes to 1 relay", "vw: sound muted"},
		{"sound, here, named", "audio: true, video: false, by: {audio: ['here']}", open, "No sound leaves this room", "Sound is muted, by you", "Picture goes to 1 relay", "vw: sound muted"},
		{"sound, from afar", "audio: true, video: false, by: {audio: ['control']}", open, "No sound leaves this room", "Sound is muted, from the control link", "Picture goes to 1 relay", "vw: sound muted"},
		{"sound, by both", "audio: true, video: false, by: {audio: ['here', 'control']}", open, "No sound leaves this room", "Sound is muted, by you and from the control link", "Picture goes to 1 relay", "vw: sound muted"},
		{"picture, since", "audio: false, video: true, since: {video: " + at + "}", open, "No picture leaves this room", "Sound goes to 1 relay", "Picture is muted, by you, since 1/2/2026 9:05 AM", "vw: picture muted"},
		{"all", "audio: true, video: true", open, "Nothing leaves this room", "Sound is muted, by you", "Picture is muted, by you", "vw: sound and picture muted"},
	} {
		b.js(t, fmt.Sprintf("fake({%s}, %s)", tt.mute, tt.destinations))
		for what, want := range map[string]string{
			"document.querySelector('.leaves').textContent": tt.leaves,
			kindSwitch("audio") + ".textContent":            tt.audio,
			kindSwitch("video") + ".textContent":            tt.video,
			kindSwitch("audio") + ".ariaChecked":            fmt.Sprint(!strings.Contains(tt.mute, "audio: true")),
			kindSwitch("video") + ".ariaChecked":            fmt.Sprint(!strings.Contains(tt.mute, "video: true")),
			"document.title":                                tt.title,
		} {
			if got := strings.ReplaceAll(b.js(t, what), "\u202f", " "); got != want {
				t.Errorf("%s: %s: got %q, want %q", tt.name, what, got, want)
			}
		}
	}

	for _, tt := range []struct {
		name, mute string
		taps       int // negative: each long after the one before
		want       string
	}{
		{"mute", "audio: false, video: false", 1, `PUT api/mute {"audio":true}`},
		{"lift", "audio: true, video: true", 1, `PUT api/mute {"audio":false}`},
		{"a double tap mutes", "audio: false, video: false", 2, `PUT api/mute {"audio":true}`},
		{"control's takes two taps", "audio: true, video: false, by: {audio: ['control']}", 1, ""},
		{"control's, a double tap", "audio: true, video: false, by: {audio: ['control']}", 2, ""},
		{"control's, lifted", "audio: true, video: false, by: {audio: ['control']}", -2, `PUT api/mute {"audio":false,"control":false}`},
	} {
		b.js(t, fmt.Sprintf("(asked.length = 0, answer = {}, fake({%s}, {}), changed.audio.at = 0)", tt.mute)) // long ago
		b.js(t, "answer = {audio: !stats.mute.audio, video: stats.mute.video}")
		for range max(tt.taps, -tt.taps) {
			if tt.taps < 0 {
				b.js(t, "changed.audio.at = 0")
			}
			b.tap(t, kindSwitch("audio"))
		}
		if got := b.js(t, "asked.join()"); got != tt.want {
			t.Errorf("%s: the page asked for %q, want %q", tt.name, got, tt.want)
		}
		b.js(t, "document.activeElement.blur()")
	}
	// Who taps to mute what somebody else has muted in this moment lifts nothing.
	b.js(t, "(asked.length = 0, fake({audio: false, video: false}, {}), fake({audio: true, video: false}, {}))")
	b.tap(t, kindSwitch("audio"))
	if got := b.js(t, "asked.join()"); got != "" {
		t.Errorf("a tap as it changed: the page asked for %q, want nothing", got)
	}
	// The switches are in view and large, wherever the page is scrolled to.
	b.call(t, "Emulation.setDeviceMetricsOverride", map[string]any{"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": true}, nil)
	if got := b.js(t, `(() => {
		scrollTo(0, document.body.scrollHeight);
		return [...document.querySelectorAll('.kinds button')].every((e) => {
			const r = e.getBoundingClientRect();
			return scrollY > 100 && r.top >= 0 && r.bottom < 200 && r.height >= 48 && r.width > 150;
		});
	})()`); got != "true" {
		t.Errorf("scrolled down, the switches are out of view, or small")
	}
	// Without a connection nothing is claimed.
	b.js(t, "disconnected('no connection')")
	if got := b.js(t, "document.querySelector('#room').textContent"); strings.Contains(got, "is muted") || !strings.Contains(got, "not known") {
		t.Errorf("without a connection the page says %q", got)
	}
	b.look(t, "mute")
}

// TestPageMuted: muted at the page or elsewhere, nothing of it comes to the
// relay, the page says so and its preview is dark; lifted, all comes back.
func TestPageMuted(t *testing.T) {
	t.Parallel()
	v := startVW(t, "VW_PLAYER="+npmPlayers(t))
	s := &programStream{vw: v, relay: startRelay(t, "127.0.0.1:0")}
	startFFmpeg(t, realTime, videoInput, videoCodec, []string{v.url + "/ts/video0"})
	startFFmpeg(t, realTime, audioInput, audioCodec, []string{v.url + "/ts/audio0"})
	v.call(t, 200, "POST", "/api/streams", `{"stream":"stream/test","feeds":["video0","audio0"]}`)
	v.send(t, "0", "stream/test", "ws://"+s.relay.addr+"/in/test")
	b := pageBrowser{startBrowser(t)}
	b.open(t, v.url+"/")
	const video, audio = 0, 1
	grow := func(kind int) {
		t.Helper()
		from := s.frames(t)[kind]
		eventually(t, startupTime, func() error {
			if got := s.frames(t)[kind] - from; got < 20 {
				return fmt.Errorf("the relay got %d frames of kind %d, want 20", got, kind)
			}
			return nil
		})
	}
	state := part(destinationRow("0"), "state") + ".textContent"
	const cover = "document.querySelector('#preview .cover').textContent"
	words := func(kind string) string { return kindSwitch(kind) + ".textContent.replace(/, since .*/, ', since')" }
	b.until(t, "open", state)
	b.until(t, "Sound goes to 1 relay", words("audio"))
	b.tap(t, part(row("streams", "stream/test"), "watch"))
	b.until(t, "true", "watching.pictures > 20")
	grow(audio)
	time.Sleep(time.Second) // a tap on what has just changed lifts nothing

	b.tap(t, kindSwitch("audio"))
	b.until(t, "Sound is muted, by you, since", words("audio"))
	b.until(t, "open, sound muted", state)
	b.until(t, "true", "watching.pictures > 20")
	silent := s.frames(t)[audio]
	grow(video)
	if got := s.frames(t)[audio]; got != silent {
		t.Errorf("the relay got %d frames of sound after the mute", got-silent)
	}
	b.look(t, "sound-muted")

	muted := time.Now()
	v.call(t, 200, "PUT", "/api/mute", `{"video":true}`) // as somebody else
	b.until(t, "Picture is muted, by you, since", words("video"))
	t.Logf("the page said after %v what somebody else has muted", time.Since(muted))
	b.until(t, "open, all muted", state)
	b.until(t, "true", cover+".includes('Picture is muted, by you, since')")
	b.until(t, "0", "document.querySelectorAll('#preview canvas').length")
	b.until(t, "Nothing leaves this room", "document.querySelector('.leaves').textContent")
	b.look(t, "all-muted")

	time.Sleep(time.Second)
	b.tap(t, kindSwitch("video"))
	b.tap(t, kindSwitch("audio"))
	b.until(t, "Picture goes to 1 relay", words("video"))
	b.until(t, "Sound goes to 1 relay", words("audio"))
	b.until(t, "open", state)
	grow(video)
	grow(audio)
	b.until(t, "true", "watching.pictures > 20")
	b.until(t, "", cover)
	b.quiet(t)
}

// TestPageWindows: seven windows of the page are as live as one, though a
// browser has six connections to a host; when the one that listens is closed,
// another one does.
func TestPageWindows(t *testing.T) {
	t.Parallel()
	v := startVW(t)
	b := pageBrowser{startBrowser(t)}
	var sessions []string
	for range 7 {
		b.open(t, v.url+"/")
		sessions = append(sessions, b.session)
		b.until(t, "false", "document.hidden")
		b.until(t, "live", "document.getElementById('link').textContent")
	}
	listeners := func(want string) {
		t.Helper()
		eventually(t, startupTime, func() error {
			n := 0
			for i := range sessions {
				b.session = sessions[i]
				if b.js(t, "!!source") == "true" {
					n++
				}
			}
			if got := fmt.Sprint(n); got != want {
				return fmt.Errorf("%s windows listen, want %s", got, want)
			}
			return nil
		})
	}
	fresh := func() {
		t.Helper()
		for i := range sessions {
			b.session = sessions[i]
			at := b.js(t, "stats.uptime")
			b.until(t, "true", "stats.uptime > "+at+" && !stale")
		}
	}
	listeners("1")
	fresh()
	for i := range sessions {
		b.session = sessions[i]
		if b.js(t, "!!source") == "true" {
			b.call(t, "Page.close", nil, nil)
			sessions = slices.Delete(sessions, i, i+1)
			break
		}
	}
	listeners("1")
	fresh()
}

// TestPageDeadRelay: a relay that stops answering, its connection still open,
// shows as such.
func TestPageDeadRelay(t *testing.T) {
	t.Parallel()
	v := startVW(t)
	relay := startRelay(t, "127.0.0.1:0")
	startFFmpeg(t, realTime, videoInput, videoCodec, []string{v.url + "/ts/video0"})
	v.send(t, "0", "video0", "ws://"+relay.addr+"/in/test")
	b := pageBrowser{startBrowser(t)}
	b.open(t, v.url+"/")
	destination := destinationRow("0")
	b.until(t, "open", part(destination, "state")+".textContent")
	b.until(t, "true", part(destination, "rate")+".textContent.endsWith('bit/s')")
	stopped := time.Now()
	relay.signal(t, signalStop)
	defer relay.signal(t, signalContinue)
	b.until(t, "true", part(destination, "state")+".textContent !== 'open' && "+part(destination, "reason")+".textContent !== ''")
	t.Logf("the silent relay showed after %.1f s: %s", time.Since(stopped).Seconds(), b.js(t, part(destination, "reason")+".textContent"))
}

// TestPagePlayerURL: the policy lets the page load a player from where
// VW_PLAYER says.
func TestPagePlayerURL(t *testing.T) {
	t.Parallel()
	elsewhere := httptest.NewServer(http.FileServer(http.Dir(npmPlayers(t))))
	t.Cleanup(elsewhere.Close)
	v := startVW(t, "VW_PLAYER="+elsewhere.URL+"/jsmpeg-player.umd.min.js?x=1")
	startFFmpeg(t, realTime, videoInput, videoCodec, []string{v.url + "/ts/video0"})
	b := pageBrowser{startBrowser(t)}
	b.open(t, v.url+"/")
	b.until(t, "live", part(row("feeds", "video0"), "state")+".textContent")
	b.tap(t, part(row("feeds", "video0"), "watch"))
	b.until(t, "true", "watching.pictures > 10")
	b.js(t, "unwatch()")
}

// TestPageSignIn: from another machine, through a proxy, the page asks for
// the token; then all of it works, events and websockets too. The player is
// missing, and the page says what to do.
func TestPageSignIn(t *testing.T) {
	t.Parallel()
	v := startVW(t, "VW_TOKEN=open sesame", "VW_PLAYER=/no/such/player.js")
	target, err := url.Parse(v.url)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httptest.NewServer(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(target)
		r.SetXForwarded()
		r.Out.Host = r.In.Host
	}})
	t.Cleanup(proxy.Close)
	t.Cleanup(proxy.CloseClientConnections)
	startFFmpeg(t, realTime, videoInput, videoCodec, []string{v.url + "/ts/video0"})
	b := pageBrowser{startBrowser(t)}
	b.open(t, proxy.URL+"/")
	b.until(t, "false", "document.getElementById('login').hidden")
	b.submit(t, "login", "token", "sesame")
	b.until(t, "true", "document.querySelector('#login .error').textContent.includes('VW_TOKEN')")
	b.look(t, "login")
	b.submit(t, "login", "token", "open sesame")
	b.until(t, "live", part(row("feeds", "video0"), "state")+".textContent")
	b.until(t, "true", "document.getElementById('login').hidden")
	if got := b.js(t, "document.cookie"); got != "" {
		t.Errorf("a script can read the cookie %q", got)
	}
	b.js(t, "window.probe = new WebSocket(http.replace('http', 'ws') + 'out/video0')")
	b.until(t, "1", "probe.readyState")
	b.tap(t, part(row("feeds", "video0"), "watch"))
	b.until(t, "true", "document.querySelector('#preview .cover').textContent.includes('VW_PLAYER=')")
	b.look(t, "no-player")

	// What the console was told of: two refusals of events and of the token,
	// and the player. Nothing of the policy.
	if got := slices.IndexFunc(b.console, func(line string) bool { return strings.Contains(line, "Security Policy") }); got >= 0 {
		t.Errorf("console: %s", b.console[got])
	}
	v.stop(t)
	b.until(t, "true", "document.body.classList.contains('stale')")
	b.look(t, "gone")
}
