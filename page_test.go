package main

import (
	"bufio"
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
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// far makes a request one of another machine.
const far = "192.0.2.1:5000"

// TestPageFiles: small, nothing inline, and with a policy that refuses what is.
func TestPageFiles(t *testing.T) {
	s := newTestServer(t, "")
	s.page.player, _ = newPlayer("")
	size := 0
	for path, kind := range pageTypes {
		if path == "/login" || path == "/player.js" {
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
			"Content-Security-Policy": "default-src 'none'; script-src 'self' 'wasm-unsafe-eval' " + defaultPlayer +
				"; style-src 'self' " + playerStyles + "; img-src 'self'; connect-src 'self' ws://localhost:8888 wss://localhost:8888; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
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
		for _, want := range []string{defaultPlayer, defaultIntegrity} {
			if !strings.Contains(w.Body.String(), `"`+want+`"`) {
				t.Errorf("%s has not %s in it", path, want)
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
	tests := []struct {
		value string
		want  player
		ok    bool
	}{
		{"", player{url: defaultPlayer, integrity: defaultIntegrity}, true},
		{"https://cdn.example/a.js?b", player{url: "https://cdn.example/a.js?b"}, true},
		{"/opt/a.js", player{file: "/opt/a.js"}, true},
		{"a.js", player{file: filepath.Join(filepath.Dir(self), "a.js")}, true},
		{"ftp://cdn.example/a.js", player{}, false},
		{"https:///a.js", player{}, false},
		{"https://u:p@cdn.example/a.js", player{}, false},
		{"https://cdn.example/a.js; script-src *", player{}, false},
		{"https://cdn.example;script-src", player{}, false},
	}
	for _, tt := range tests {
		if got, ok := newPlayer(tt.value); ok != tt.ok || ok && got != tt.want {
			t.Errorf("%q: got %+v, %v, want %+v, %v", tt.value, got, ok, tt.want, tt.ok)
		}
	}

	name := filepath.Join(t.TempDir(), "player.js")
	s := newTestServer(t, "")
	for _, tt := range []struct{ name, file, want string }{
		{"the default", "", `404 {"error":"VW_PLAYER: there is no such file"}`},
		{"a file that is missing", name, `404 {"error":"VW_PLAYER: there is no such file"}`},
		{"a folder", filepath.Dir(name), `404 {"error":"VW_PLAYER: there is no such file"}`},
	} {
		s.page.player.file = tt.file
		if got := ask(s, "GET /player.js"); got != tt.want {
			t.Errorf("%s: got %s, want %s", tt.name, got, tt.want)
		}
	}
	if err := os.WriteFile(name, []byte("JSMpeg"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.page.player = player{file: name}
	if got := ask(s, "GET /player.js"); got != "200 JSMpeg" {
		t.Errorf("a file: got %s", got)
	}
	if got := ask(s, "GET /"); !strings.Contains(got, `data-player="player.js" data-integrity=""`) {
		t.Errorf("the page has another player: %s", got)
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
	b.js(t, fmt.Sprintf("(document.getElementById(%q).closest('details') ?? {}).open = true", id))
	for i := 0; i < len(fields); i += 2 {
		b.js(t, fmt.Sprintf("document.getElementById(%q).elements[%q].value = %q", id, fields[i], fields[i+1]))
	}
	b.tap(t, fmt.Sprintf("document.querySelector('#%s button')", id))
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

// npmPlayer is the file of JSMpeg in its npm package.
func npmPlayer(t *testing.T) string {
	t.Helper()
	needs(t, "npm")
	if out, err := exec.Command("testdata/player/install.sh").CombinedOutput(); err != nil {
		t.Fatalf("install JSMpeg: %v\n%s", err, out)
	}
	name, err := filepath.Abs("testdata/player/node_modules/@cycjimmy/jsmpeg-player/dist/jsmpeg-player.umd.min.js")
	if err != nil {
		t.Fatal(err)
	}
	return name
}

// Elements of the page, as expressions.
func row(list, key string) string {
	return fmt.Sprintf("document.querySelector('#%s > [data-key=%q]')", list, key)
}

func part(row, class string) string { return row + "?.querySelector('." + class + "')" }

// TestPage: everything that the page is for, in a browser, with real ffmpegs
// and a relay that is not ours.
func TestPage(t *testing.T) {
	t.Parallel()
	v := startVW(t, "VW_PLAYER="+npmPlayer(t))
	b := pageBrowser{startBrowser(t)}
	b.open(t, v.url+"/")
	b.until(t, "live", "document.getElementById('link').textContent")
	b.look(t, "empty")

	s := &programStream{vw: v, relay: startRelay(t, "127.0.0.1:0")}
	startFFmpeg(t, realTime, videoInput, videoCodec, []string{v.url + "/ts/video0"})
	startFFmpeg(t, realTime, audioInput, audioCodec, []string{"-user_agent", "<img src=x onerror=alert(1)>", v.url + "/ts/audio0"})
	startFFmpeg(t, realTime, videoInput, liveCodec, []string{v.url + "/ts/video1"})
	for feed, codec := range map[string]string{"video0": "mpeg1video", "audio0": "mp2", "video1": "h264"} {
		b.until(t, "live", part(row("feeds", feed), "state")+".textContent")
		b.until(t, "true", part(row("feeds", feed), "rate")+".textContent.endsWith('bit/s')")
		b.until(t, "true", part(row("feeds", feed), "detail")+".textContent.startsWith('"+codec+"')")
	}
	if got := b.js(t, part(row("feeds", "audio0"), "publisher")+".textContent"); !strings.Contains(got, "<img src=x") {
		t.Errorf("the publisher is %q, want its agent in it", got)
	}
	if got := b.js(t, "document.images.length"); got != "0" {
		t.Errorf("the agent became %s elements", got)
	}

	// Rules are added; what is refused is told beside the form.
	b.submit(t, "addStream", "stream", "test", "feeds", "video0, audio0")
	b.until(t, "audio0 video0", "["+row("streams", "stream/test")+"?.querySelectorAll('.switch[aria-checked=true]')].flatMap(l => [...l].map(e => e.dataset.key)).sort().join(' ')")
	b.submit(t, "addDestination", "id", "0", "stream", "stream/test", "destination", "http://relay")
	b.until(t, "true", "document.querySelector('#addDestination .error').textContent.includes('must be ws')")
	b.look(t, "refused")
	b.submit(t, "addDestination", "destination", "ws://u:hidden@"+s.relay.addr+"/in/test?code=hidden")
	destination := row("destinations", "0")
	b.until(t, "open", part(destination, "state")+".textContent")
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
	switchOf := func(feed string) string {
		return row("streams", "stream/test") + fmt.Sprintf(".querySelector('[data-key=%s]')", feed)
	}
	b.tap(t, switchOf("audio0"))
	b.until(t, "false", switchOf("audio0")+".ariaChecked")
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
	b.tap(t, switchOf("audio0"))
	b.until(t, "true", switchOf("audio0")+".ariaChecked")
	grow(audio, 20)
	b.tap(t, switchOf("video0"))
	b.tap(t, switchOf("audio0")) // before the first is known to have worked
	b.until(t, "false false", switchOf("video0")+".ariaChecked + ' ' + "+switchOf("audio0")+".ariaChecked")
	if got := rule(); got != `[]` {
		t.Errorf("both muted: the rule is %s, want none", got)
	}
	b.tap(t, switchOf("audio0"))
	b.tap(t, switchOf("video0"))
	b.until(t, "true true", switchOf("video0")+".ariaChecked + ' ' + "+switchOf("audio0")+".ariaChecked")
	if got := rule(); got != `["video0","audio0"]` {
		t.Errorf("heard again: the rule is %s, want it in its order", got)
	}

	// Preview of a stream, with sound at a tap.
	// The browser checks the file against the hash that the CDN's must have.
	const note = "document.querySelector('#preview .note').textContent"
	b.js(t, fmt.Sprintf("document.body.dataset.integrity = %q", defaultIntegrity))
	b.tap(t, part(row("streams", "stream/test"), "watch"))
	b.until(t, "true", "watching.pictures > 50")
	b.until(t, "true", "/ (2[0-9]|1[5-9]|30) pictures/.test(' ' + "+note+")")
	b.look(t, "preview")
	b.tap(t, "document.querySelector('#preview .sound')")
	b.until(t, "true", "watching.sound && watching.sounds > 50 && watching.pictures > 25")
	var clip struct{ X, Y, Width, Height, Scale float64 }
	b.evaluate(t, "(() => { const {x, y, width, height} = document.querySelector('canvas').getBoundingClientRect(); return {x, y: y + scrollY, width, height, scale: 1}; })()", &clip)
	picture := b.capture(t, "canvas.png", map[string]any{"clip": map[string]any{"x": clip.X, "y": clip.Y, "width": clip.Width, "height": clip.Height, "scale": 1}})
	if got := bars(picture); got < 0.65 {
		t.Errorf("%.2f of the bars from red to cyan are as they should be, want at least 0.65", got)
	}
	b.tap(t, part(row("feeds", "audio0"), "watch"))
	b.until(t, "Sound is off.", note)
	b.tap(t, "document.querySelector('#preview .sound')")
	b.until(t, "true", "watching.sounds > 20")
	b.tap(t, part(row("feeds", "video1"), "watch"))
	b.until(t, "true", note+".startsWith('This is h264')")
	if got, want := b.js(t, "document.querySelector('.ffplay').textContent"), "ffplay -fflags nobuffer -analyzeduration 1000000 "+v.url+"/ts/video1"; got != want {
		t.Errorf("the line is %q, want %q", got, want)
	}
	b.look(t, "h264")
	b.tap(t, "document.querySelector('#preview .close')")

	// A relay that dies shows as such, with its reason.
	s.relay.kill(t)
	died := time.Now()
	b.until(t, "true", part(destination, "state")+".textContent !== 'open' && "+part(destination, "reason")+".textContent.includes('refused')")
	t.Logf("the relay's death showed after %.1f s: %s", time.Since(died).Seconds(), b.js(t, part(destination, "reason")+".textContent"))
	b.look(t, "dead")

	// Deleting takes two taps.
	b.tap(t, part(destination, "delete"))
	b.until(t, "Really delete?", part(destination, "delete")+".textContent")
	b.tap(t, part(destination, "delete"))
	b.until(t, "null", destination)
	if got := v.call(t, 200, "GET", "/api/destinations/all", ""); got != "{}" {
		t.Errorf("deleted: got %s, want none", got)
	}
	// What a rule was refused with, what Chromium thinks of WebGL without a GPU,
	// and taps that come before a preview is connected.
	known := regexp.MustCompile(`status of 400|"source":"rendering"|closed before the connection is established`)
	for _, line := range b.console {
		if !known.MatchString(line) {
			t.Errorf("console: %s", line)
		}
	}
}

// TestPageDestinations: how a destination is, in words and in colour: green is
// only what sends something, and what helps stands before what Go says.
func TestPageDestinations(t *testing.T) {
	t.Parallel()
	v := startVW(t)
	b := pageBrowser{startBrowser(t)}
	b.open(t, v.url+"/")
	b.until(t, "live", "document.getElementById('link').textContent")
	b.js(t, "source.close(), clearTimeout(overdue)") // what follows is ours
	b.js(t, `window.colour = (e, name) => {
		const probe = document.body.appendChild(document.createElement('i'));
		probe.style.color = 'var(--' + name + ')';
		const same = getComputedStyle(e).color === getComputedStyle(probe).color;
		probe.remove();
		return same;
	}`)
	const all = `{version: 'v', uptime: 1, feeds: {
		video0: {state: 'live', publisher: {remote: 'r', agent: '', since: 0}, tracks: []},
		video1: {state: 'absent', publisher: null, tracks: []}},
	streams: {
		'stream/a': {feeds: ['video0'], present: ['video0'], muted: []},
		'stream/absent': {feeds: ['video1'], present: [], muted: []},
		'stream/empty': {feeds: [], present: [], muted: []},
		'stream/muted': {feeds: [], present: [], muted: ['video0']}},
	destinations: {x: {id: 'x', destination: 'ws://relay', since: 0, bytes: 0, %s}}}`
	for _, tt := range []struct{ name, destination, state, colour, reason, raw string }{
		{"a stream", "stream: 'stream/a', state: 'open'", "open", "good", "", ""},
		{"a feed", "stream: 'video0', state: 'open'", "open", "good", "", ""},
		{"no such stream", "stream: 'stream/b', state: 'open'", "no such stream", "warn", "", ""},
		{"no such feed", "stream: 'video9', state: 'open'", "open, not published", "warn", "", ""},
		{"a feed that left", "stream: 'video1', state: 'open'", "open, not published", "warn", "", ""},
		{"a stream whose feeds left", "stream: 'stream/absent', state: 'open'", "open, not published", "warn", "", ""},
		{"a stream without feeds", "stream: 'stream/empty', state: 'open'", "open, no feeds", "warn", "", ""},
		{"a muted stream", "stream: 'stream/muted', state: 'open'", "open, all muted", "warn", "", ""},
		{"the control link", "id: 'apiRule', stream: 'api', state: 'open'", "open", "good", "", ""},
		{"an error", "stream: 'video0', state: 'waiting', error: 'dial: no'", "waiting", "bad", "dial: no", ""},
		{"advice", "stream: 'video0', state: 'waiting', error: 'dial: no', advice: 'Nothing listens.'", "waiting", "bad", "Nothing listens.", "dial: no"},
		{"advice of the past", "stream: 'video0', state: 'open', error: 'dial: no', advice: 'Nothing listens.'", "open", "good", "", "Last error: dial: no"},
	} {
		b.js(t, "show("+fmt.Sprintf(all, tt.destination)+")")
		x := row("destinations", "x")
		for what, want := range map[string]string{
			part(x, "state") + ".textContent":                       tt.state,
			part(x, "reason") + ".textContent":                      tt.reason,
			part(x, "raw") + ".textContent":                         tt.raw,
			"colour(" + part(x, "state") + ", '" + tt.colour + "')": "true",
		} {
			if got := b.js(t, what); got != want {
				t.Errorf("%s: %s: got %q, want %q", tt.name, what, got, want)
			}
		}
	}
	b.look(t, "advice")
	if got, want := b.js(t, "[...document.querySelectorAll('#feeds .watch')].map((e) => e.ariaLabel).join()"), "Preview video0,Preview video1"; got != want {
		t.Errorf("the buttons are named %s, want %s", got, want)
	}
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
	destination := row("destinations", "0")
	b.until(t, "open", part(destination, "state")+".textContent")
	b.until(t, "true", part(destination, "rate")+".textContent.endsWith('bit/s')")
	stopped := time.Now()
	relay.signal(t, syscall.SIGSTOP)
	defer relay.signal(t, syscall.SIGCONT)
	b.until(t, "true", part(destination, "state")+".textContent !== 'open' && "+part(destination, "reason")+".textContent !== ''")
	t.Logf("the silent relay showed after %.1f s: %s", time.Since(stopped).Seconds(), b.js(t, part(destination, "reason")+".textContent"))
}

// TestPagePlayerURL: the policy lets the page load a player from where
// VW_PLAYER says.
func TestPagePlayerURL(t *testing.T) {
	t.Parallel()
	elsewhere := httptest.NewServer(http.FileServer(http.Dir(filepath.Dir(npmPlayer(t)))))
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
	b.until(t, "true", "document.querySelector('#preview .note').textContent.includes('VW_PLAYER=')")
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
