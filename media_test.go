package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/websocket"
)

// TestRefusedPost: a publisher that is refused is told, and cut off, while its
// body goes on. The log says once what it was and why.
func TestRefusedPost(t *testing.T) {
	addr, log, _ := runVW(t, "VW_TOKEN="+secretToken)
	waitFor(t, "the log", func() bool { return strings.Contains(log.String(), "msg=\"listening") })
	const chunked = "Transfer-Encoding: chunked\r\n"
	chunk := func(data string) string { return fmt.Sprintf("%x\r\n%s\r\n", len(data), data) }
	clip := testClip(12, 1000)
	tests := []struct{ name, path, header, data, want, logged string }{
		{"a bad name", "/ts/stream/x", chunked, "", "400", `path=/ts/stream/x `},
		{"another bad name", "/ts/a//b", chunked, "", "400", `path=/ts/a//b `},
		{"no name", "/ts", chunked, "", "400", `path=/ts `},
		{"no MPEG-TS", "/ts/video0", chunked, chunk(strings.Repeat("this is text ", 6000)), "415", `err="not MPEG-TS: `},
		{"a wrong path", "/video0", chunked, "", "404", ""},
		{"no length and no chunks", "/ts/video1", "", string(clip), "411", `status=411 err="the request has no body: `},
		{"an empty body", "/ts/video2", "Connection: close\r\nContent-Length: 0\r\n", "", "400", `err="the body is empty: `},
		{"no chunk but the last", "/ts/video3", "Connection: close\r\n" + chunked, "0\r\n\r\n", "400", `err="the body is empty: `},
		{"no token", "/ts/video4", "X-Forwarded-For: 192.0.2.1\r\n" + chunked, "", "401", `status=401 err="VW_TOKEN must be presented: `},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			told := log.len()
			for range 3 {
				conn, err := net.Dial("tcp", addr)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				start := time.Now()
				conn.SetDeadline(start.Add(3 * time.Second))
				fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: %s\r\n%s\r\n%s", tt.path, addr, tt.header, tt.data)
				answer, err := io.ReadAll(conn) // ends when the connection does
				if tt.want == "411" && errors.Is(err, syscall.ECONNRESET) {
					err = nil // its body is none to read
				}
				if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 "+tt.want) || !strings.Contains(string(answer), `{"error":`) {
					t.Errorf("after %v got %q, %v, want %s", time.Since(start), answer, err, tt.want)
				}
			}
			lines := 1
			if tt.logged == "" {
				lines = 0
			}
			if lines == 1 {
				waitFor(t, "the log", func() bool { return strings.Contains(log.String()[told:], `level=INFO msg="publisher refused`) })
			}
			if got := log.String()[told:]; strings.Count(got, "\n") != lines || !strings.Contains(got, tt.logged) {
				t.Errorf("the log says %q, want %d lines with %q", got, lines, tt.logged)
			}
		})
	}
}

// TestShortRequests: a feed that comes as one request for each buffer is told of
// once, and not with two lines a buffer. One that comes and goes is logged as ever.
func TestShortRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &logBuffer{}
		r := newRules(t.Context(), newMux(), time.Second, slog.New(slog.NewTextHandler(log, nil)))
		s := newServer(t.Context(), r, "", r.log)
		whole, clip := testClip(12, 1000), testClip(500, 5000)
		buffer := func() (b []byte) { // some have no frame that begins
			b, clip = clip[:7*packetSize], clip[7*packetSize:]
			return b
		}
		post := func(pause time.Duration, n int, body func() []byte) (lines string) {
			t.Helper()
			told := log.len()
			for range n {
				if got := ask(s, "POST /ts/video0 "+string(body())); got != `200 "ok"` {
					t.Fatalf("got %s", got)
				}
				time.Sleep(pause)
			}
			return log.String()[told:]
		}
		count := func(lines, word string) int { return strings.Count(lines, word) }
		got := post(40*time.Millisecond, 500, buffer)
		if count(got, "\n") > 2*fewShort+1 || count(got, "publisher left feed=video0") != 0 || count(got, "level=WARN") != 1 || count(got, "curlhttpsink") != 1 {
			t.Errorf("500 buffers: the log has\n%s", got)
		}
		time.Sleep(2 * seriesPause)
		if got := post(2*seriesPause, 10, func() []byte { return whole }); count(got, `"publisher arrived"`) != 10 || count(got, `"publisher left"`) != 10 || count(got, "level=WARN") != 0 {
			t.Errorf("10 publishers: the log has\n%s", got)
		}
		if got := post(time.Second, 10, buffer); count(got, "level=WARN") != 1 {
			t.Errorf("buffers again: the log has\n%s", got)
		}
		if len(s.media.series.feeds) != 1 {
			t.Errorf("%d feeds are remembered", len(s.media.series.feeds))
		}
	})
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

// TestSilence: while nothing flows, a reader on /ts gets what keeps its connection
// open: null packets of a feed, the program map and a PCR of a stream. A player
// notices nothing, and what is muted stays so.
func TestSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, "")
		ask(s, `POST /api/streams {"stream":"stream/x","feeds":["video0"]}`)
		ctx, cancel := context.WithCancel(t.Context())
		var tasks sync.WaitGroup
		read := func(name string) *logBuffer {
			got := &logBuffer{}
			tasks.Go(func() {
				r := httptest.NewRequest("GET", "/ts/"+name, nil).WithContext(ctx)
				r.RemoteAddr, r.Host = "127.0.0.1:50000", "localhost"
				s.ServeHTTP(&pipeWriter{got}, r)
			})
			return got
		}
		feed, stream, nobody := read("video0"), read("stream/x"), read("stream/nobody")
		body, in := io.Pipe()
		tasks.Go(func() { s.commands.rules.mux.publish("video0", &publisher{interrupt: func() {}}, body) })
		camera, posted := newCamera(), []byte(nil)
		var longest atomic.Int64
		film := func(d time.Duration) {
			for range d / (40 * time.Millisecond) {
				b := camera.next()
				posted = append(posted, b...)
				in.Write(b)
				time.Sleep(40 * time.Millisecond)
			}
		}
		silence := func(d time.Duration, readers ...*logBuffer) {
			for _, r := range readers {
				tasks.Go(func() {
					for last, end := time.Now(), time.After(d); ; last = time.Now() {
						ended := false
						select {
						case <-r.changed():
						case <-end:
							ended = true
						}
						if pause := int64(time.Since(last)); pause > longest.Load() {
							longest.Store(pause)
						}
						if ended {
							return
						}
					}
				})
			}
			time.Sleep(d)
			synctest.Wait()
		}
		silence(20*time.Second, feed, nobody)
		film(2 * time.Second)
		silence(20*time.Second, feed, stream)
		film(2 * time.Second)
		ask(s, `PUT /api/mute {"audio":true,"video":true}`)
		muted := len(posted)
		silence(20*time.Second, feed, stream)
		tasks.Go(func() { silence(10*time.Second, feed) })
		film(10 * time.Second)
		in.Close()
		cancel()
		tasks.Wait()
		if pause, most := time.Duration(longest.Load()), pingEvery*3/2; pause > most {
			t.Errorf("nothing came for %v, want %v at most", pause, most)
		}
		withoutNull := func(b string) (rest []byte) {
			for p := range slices.Chunk([]byte(b), packetSize) {
				if !bytes.Equal(p, nullPacket) {
					rest = append(rest, p...)
				}
			}
			return rest
		}
		got := withoutNull(feed.String())
		if len(got) < muted || !bytes.Equal(got[:muted], posted[:muted]) {
			t.Fatalf("got %d bytes that are not those of the feed's %d before the mute", len(got), muted)
		}
		for p := range slices.Chunk(got[muted:], packetSize) {
			if _, _, ok := pesStart(packet(p).payload()); ok {
				t.Fatalf("got %x while all was muted", p)
			}
		}
		if got := nobody.String(); len(got) < 10*packetSize || strings.Trim(got, string(nullPacket)) != "" {
			t.Errorf("nobody's stream: got %x", got)
		}
		check := newTSCheck()
		check.read(withoutNull(stream.String()))
		if len(check.problems) > 0 || len(check.pts) != 1 {
			t.Errorf("the stream has %d PIDs of pictures, and the problems %q", len(check.pts), check.problems)
		}
	})
}

// TestWebsocketBody: a close frame after a whole message ends a publisher's last
// frame, as a body's end does; the end of the connection does not.
func TestWebsocketBody(t *testing.T) {
	clip := testClip(12, 3000)
	clip = clip[:len(clip)-packetSize] // which told that its frame ends
	whole := appendFrame(nil, opBinary, clip, masked)
	part := slices.Clone(whole)
	part[0] &^= 0x80 // not its final fragment
	for _, tt := range []struct {
		name string
		wire []byte
		want error
	}{
		{"closed", appendFrame(whole[:len(whole):len(whole)], opClose, []byte{3, 0xe8}, masked), nil},
		{"closed without a status", appendFrame(whole[:len(whole):len(whole)], opClose, nil, masked), nil},
		{"closed inside a message", appendFrame(part, opClose, []byte{3, 0xe8}, masked), closeError{status: 1000, inside: true}},
		{"lost", whole, io.ErrUnexpectedEOF},
	} {
		x, s := newMux(), newSubscriber(raw, time.Minute, nil)
		x.join("video0", s)
		err := x.publish("video0", &publisher{}, websocketBody{newInbox(bytes.NewReader(tt.wire), nil, masked, 512)})
		var got []byte
		for _, b := range s.take(nil, 1<<20, false, time.Now()) {
			got = append(got, b...)
		}
		if last := len(got) > len(clip)-3000; err != tt.want || last != (tt.want == nil) || len(got) < len(clip)*10/12 {
			t.Errorf("%s: got %d bytes of %d and %v, want %v and the last frame: %t", tt.name, len(got), len(clip), err, tt.want, tt.want == nil)
		}
	}
}

// TestE2EProxiedFeed: ffmpeg posts with VW_TOKEN through a proxy with TLS, as
// the README says; without the token, or a wrong one, it is refused.
func TestE2EProxiedFeed(t *testing.T) {
	t.Parallel()
	v := startVW(t, "VW_TOKEN=secret")
	certs := newCerts(t)
	proxy := startNginxWith(t, "ssl", fmt.Sprintf(`ssl_certificate %s;
		ssl_certificate_key %s;
		location / {
			proxy_pass http://%s;
			proxy_http_version 1.1;
			proxy_set_header X-Forwarded-For $remote_addr;
			proxy_request_buffering off;
			proxy_buffering off;
			client_max_body_size 0;
			lingering_close off;
		}`, certs.cert, certs.key, v.addr))
	trust := []string{"-tls_verify", "1", "-ca_file", certs.ca}

	for i, args := range [][]string{
		slices.Concat(trust, []string{"-auth_type", "basic", "https://any:secret@" + proxy + "/ts/video0"}),
		slices.Concat(trust, []string{"-headers", "Authorization: Bearer secret\r\n", "https://" + proxy + "/ts/video0"}),
	} {
		seen := v.out.len()
		f := startFFmpeg(t, realTime, videoInput, threeSecs, videoCodec, args)
		f.endsItself(t, 2*startupTime)
		v.expect(t, seen, startupTime, `msg="publisher left" feed=video0 remote=\S+\n`)
		if n := strings.Count(v.out.String(), `"publisher arrived"`); n != i+1 {
			t.Errorf("got %d publishers, want %d", n, i+1)
		}
	}
	for _, user := range []string{"", "any:wrong@"} {
		f := startFFmpeg(t, realTime, videoInput, eightSecs, videoCodec, trust, []string{"https://" + user + proxy + "/ts/video0"})
		<-f.done
		if f.err == nil || strings.Count(v.out.String(), `"publisher arrived"`) != 2 {
			t.Errorf("with %q: ffmpeg ended with %v, want it to be refused", user, f.err)
		}
	}
}

// TestOutTakesNoMedia: a viewer that sends media is closed with status 1008, one
// that sends text or pings is not; vw check says what is wrong.
func TestOutTakesNoMedia(t *testing.T) {
	h := httptest.NewServer(newTestServer(t, ""))
	defer h.Close()
	addr := h.Listener.Addr().String()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(settleTime))
	u, _ := cleanURL("ws://" + addr + "/out/video0")
	in, err := upgrade(t.Context(), conn, u, nil)
	if err != nil {
		t.Fatal(err)
	}
	var pong []byte
	in.pong = func(payload []byte) { pong = slices.Clone(payload) }
	conn.Write(appendFrame(appendFrame(nil, opText, []byte("hello"), masked), opPing, []byte("ping"), masked))
	if opcode, err := in.next(); opcode != opPong || err != nil || string(pong) != "ping" {
		t.Fatalf("got %d, %v and the pong %q", opcode, err, pong)
	}
	conn.Write(appendFrame(nil, opBinary, testClip(2, 500), masked))
	if _, err := in.next(); err != (closeError{status: 1008}) {
		t.Errorf("got %v, want a close frame with status 1008", err)
	}
	status, out := runCheck(t, u.String())
	checkOutput(t, status, out, "send", "an address to watch, such as /out/…, takes none")
}

// TestE2EProxiedReaders: proxies that cut off who is silent for 5 s, and compress,
// let the events and the readers of a silent camera through; haproxy's own check
// finds vw up.
func TestE2EProxiedReaders(t *testing.T) {
	t.Parallel()
	v := startVW(t, "VW_TOKEN="+secretToken)
	v.call(t, http.StatusOK, "POST", "/api/streams", `{"stream":"stream/front","feeds":["video0"]}`)
	proxies := map[string]string{
		"nginx": startNginxWith(t, "", fmt.Sprintf(`
			gzip on; gzip_types *; gzip_proxied any; gzip_min_length 1;
			proxy_read_timeout 5s; send_timeout 5s;
			location / { proxy_pass http://%[1]s; }
			location /out/ {
				proxy_pass http://%[1]s;
				proxy_http_version 1.1;
				proxy_set_header Host $http_host;
				proxy_set_header X-Forwarded-For $remote_addr;
				proxy_set_header Upgrade $http_upgrade;
				proxy_set_header Connection "upgrade";
			}`, v.addr)),
		"haproxy": startHAProxyWith(t, "5s", "\n\toption forwardfor\n\tcompression algo gzip\n\tcompression type text/event-stream video/mp2t",
			"option httpchk\n\tserver vw "+v.addr+" check inter 200ms fall 1 rise 1"),
		"caddy": startCaddyWith(t, "http", "encode {\n gzip\n match {\n header Content-Type *\n }\n }",
			"reverse_proxy "+v.addr+" {\n transport http {\n read_timeout 5s\n }\n }"),
	}
	camera, p := newCamera(), startPost(t, v.addr, "video0")
	film := func() {
		for range 25 {
			p.write(t, camera.next())
			time.Sleep(40 * time.Millisecond)
		}
	}
	film()
	type reader struct {
		name string
		got  atomic.Int64
	}
	var readers []*reader
	var reading sync.WaitGroup
	t.Cleanup(reading.Wait)
	for proxy, addr := range proxies {
		for _, path := range []string{"/api/events", "/ts/video0", "/ts/stream/front", "/out/stream/front"} {
			body := openReader(t, addr, path)
			r := &reader{name: path + " by " + proxy}
			readers = append(readers, r)
			reading.Go(func() {
				buf := make([]byte, 1<<16)
				for {
					n, err := body.Read(buf)
					if r.got.Add(int64(n)); err != nil {
						return
					}
				}
			})
		}
	}
	const idle = 8 * time.Second
	time.Sleep(idle)
	before := make([]int64, len(readers))
	for i, r := range readers {
		before[i] = r.got.Load()
		if events := strings.HasPrefix(r.name, "/api/events"); events && before[i] < int64(idle/time.Second)*100 {
			t.Errorf("%s: got %d bytes of events in %v", r.name, before[i], idle)
		}
	}
	film()
	for i, r := range readers {
		eventually(t, settleTime, func() error {
			if n := r.got.Load() - before[i]; n < 1000 {
				return fmt.Errorf("%s: got %d bytes more after the silence", r.name, n)
			}
			return nil
		})
	}
}

// openReader asks for what a path of vw streams, through a proxy, with compression
// allowed; it is closed when the test ends.
func openReader(t *testing.T, addr, path string) io.Reader {
	t.Helper()
	if strings.HasPrefix(path, "/out/") {
		c, err := websocket.NewConfig("ws://"+addr+path, "http://"+addr)
		if err != nil {
			t.Fatal(err)
		}
		c.Header.Set("Authorization", "Bearer "+secretToken)
		var ws *websocket.Conn
		eventually(t, startupTime, func() (err error) {
			ws, err = websocket.DialConfig(c)
			return err
		})
		t.Cleanup(func() { ws.Close() })
		return ws
	}
	r, err := http.NewRequest("GET", "http://"+addr+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+secretToken)
	r.Header.Set("Accept-Encoding", "gzip")
	var body io.ReadCloser
	eventually(t, startupTime, func() error {
		a, err := (&http.Transport{DisableKeepAlives: true, ResponseHeaderTimeout: settleTime}).RoundTrip(r)
		if err != nil {
			return err
		}
		if body = a.Body; a.StatusCode != http.StatusOK || a.Header.Get("Content-Encoding") == "gzip" {
			a.Body.Close()
			return fmt.Errorf("%s: got %s with %v", path, a.Status, a.Header)
		}
		return nil
	})
	t.Cleanup(func() { body.Close() })
	return body
}
