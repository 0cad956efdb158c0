package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

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
		{"GET /api/streams", `200 {"stream/front/large":["video0","audio0"]}`},
		{"GET /api/streams/stream%2Ffront%2Flarge", `200 ["video0","audio0"]`},
		{"GET /api/streams/stream/none", `404 {"error":"stream \"stream/none\" does not exist"}`},
		{`POST /api/streams {"stream":"stream/front/large","feeds":[]}`, `200 {"stream":"stream/front/large","feeds":[]}`},
		{"GET /api/streams/stream/front/large", `200 []`},

		{"POST /api/destinations " + dest, "200 " + dest},
		{`PUT /api/destinations {"stream":"/stream/front/large","destination":"ws://127.0.0.1:1/in/a?x=1&y=<2>","id":0}`, "200 " + dest},
		{"UPDATE /api/destinations " + dest, "200 " + dest},
		{"GET /api/destinations/all", `200 {"0":` + dest + `}`},
		{"GET /api/destinations/0", "200 " + dest},
		{"GET /api/destinations", `200 {"0":` + dest + `}`},
		{"GET /api/destinations/1", `404 {"error":"destination \"1\" does not exist"}`},
		{`POST /api/destinations {"id":"a/b","stream":"video0","destination":"wss://127.0.0.1:1"}`, `200 {"id":"a/b","stream":"video0","destination":"wss://127.0.0.1:1"}`},
		{"DELETE /api/destinations/a/b", `200 "a/b"`},

		// A stream, then its destination; and the reverse; twice.
		{"DELETE /api/streams/stream/front/large", `200 "stream/front/large"`},
		{"DELETE /api/streams/stream/front/large", `404 {"error":"stream \"stream/front/large\" does not exist"}`},
		{"DELETE /api/destinations/0", `200 "0"`},
		{"DELETE /api/destinations/0", `404 {"error":"destination \"0\" does not exist"}`},
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
		{"OPTIONS *", `200 "ok"`},
		{"POST /api/streams/ \ufeff" + front, "200 " + front},
		{"PUT /api/mute/ " + `{"audio":false}`, `200 {"audio":false,"video":false}`},
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
		{"GET /index.html", 404, "nothing at /index.html; the page is at /"},
		{"GET /nope", 404, "nothing at /nope; the page is at /"},
		{"DELETE /api/streams", 405, "GET, HEAD, POST, PUT, UPDATE"},
		{"DELETE /api/destinations", 405, "GET, HEAD, POST, PUT, UPDATE"},
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

		{"POST /api/streams ", 400, "the body is empty: a JSON rule is expected"},
		{"POST /api/streams {", 400, "the JSON ends too early: is a } or ] missing?"},
		{"POST /api/streams []", 400, `the JSON must be an object: {"stream":…}`},
		{"POST /api/streams null", 400, "missing"},
		{`POST /api/streams {"stream":"stream/x","feeds":[]} {}`, 400, "more after the end"},
		{`POST /api/streams {"stream":"stream/x","feeds":[],"mute":true}`, 400, `"mute"`},
		{`POST /api/streams {"stream":"stream/x"}`, 400, `"feeds" is missing`},
		{`POST /api/streams {"stream":"stream/x","feeds":null}`, 400, `"feeds" is missing`},
		{`POST /api/streams {"stream":"stream/x","feeds":"video0"}`, 400, `feeds must be a list: ["video0"]`},
		{`POST /api/streams {"stream":"stream/x","feeds":["a","/a"]}`, 400, `"a" is listed twice`},
		{`POST /api/streams {"stream":"stream/x","feeds":["a"` + strings.Repeat(`,"a"`, maxFeeds) + `]}`, 400, "65 feeds"},
		{"POST /api/streams " + strings.Repeat(" ", maxBody) + "{}", 413, "65536"},
		{"POST /api/streams " + strings.Repeat("[", 60000), 400, "JSON"},
		{`POST /api/streams {"stream":"stream/x","feed":[]}`, 400, `unknown field "feed"; did you mean "feeds"?`},
		{`PUT /api/mute {"sound":true}`, 400, `unknown field "sound"; did you mean "audio"?`},
		{`POST /api/destinations {"id":0,"stream":"video0","url":"ws://relay/"}`, 400, `unknown field "url"; did you mean "destination"?`},
		{`POST /api/streams {"stream":"stream/x","feeds":["video0"],"feeds":[]}`, 400, `the field "feeds" is there twice`},
		{`PUT /api/mute {"audio":true,"Audio":false}`, 400, `the field "audio" is there twice`},
		{`POST /api/destinations {"id":0,"stream":"video0","destination":"ws://relay/","headers":{"X-Key":"a","X-Key":"b"}}`, 400, `the field "x-key" is there twice`},
		{`POST /api/streams {"stream":"stream/x","feeds":[],"colour":1}`, 400, `unknown field "colour"; the fields are stream, feeds, with, without`},
		{`POST /api/streams {"stream":5,"feeds":[]}`, 400, `stream must be a string`},
		{`POST /api/streams {"stream":"stream/x","feeds":[1]}`, 400, `feeds must be a list: ["video0"]`},
		{`POST /api/streams {"stream":"stream/x","feeds":["a",]}`, 400, `']' at byte 35 is out of place; is there a comma too many?`},
		{`POST /api/streams {'stream':"stream/x"}`, 400, "stand in double quotes"},
		{`POST /api/streams {stream:"stream/x"}`, 400, "stand in double quotes"},
		{`POST /api/streams {"stream":"stream/x" "feeds":[]}`, 400, "is a comma missing?"},
		{`POST /api/streams hello`, 400, "this is no JSON: 'h' at byte 1 is out of place"},
		{`POST /api/destinations {"id":"0","stream":"a","destination":"ws://a","headers":[]}`, 400, `"headers" must be an object of strings`},
		{`POST /api/destinations {"id":"0","stream":"a","destination":"ws://a","token":["secret"]}`, 400, `token must be a string`},
		{"PUT /api/mute {\"audio\":\"yes\"}", 400, "audio must be true or false"},
		{"PUT /api/mute {\"Video1\":true}", 400, `did you mean "video"?`},
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
		{`POST /api/destinations {"stream":"video0","destination":"ws://a"}`, 400, `"id" is missing: any name`},
		{`POST /api/destinations {"id":"0","destination":"ws://a"}`, 400, `"stream" is missing: the feed or stream`},
		{`POST /api/destinations {"id":"0","stream":"x y","destination":"ws://a"}`, 400, "x y"},
		{to(""), 400, `"destination" is missing`},
		{to("relay"), 400, "the URL must begin with ws:// or wss://; did you mean ws://relay?"},
		{to("http://relay"), 400, `"http"`},
		{to("localhost:9999/in/x?code=1"), 400, "the URL must begin with ws:// or wss://; did you mean ws://localhost:9999/in/x?"},
		{to("ftp://relay/in/x"), 400, "did you mean ws://relay/in/x?"},
		{to("127.0.0.1:80"), 400, "not a URL; did you mean ws://127.0.0.1:80?"},
		{to("wss//relay/in/x"), 400, "did you mean wss://relay/in/x?"},
		{to("WSS;//relay:443/in/x?code=1"), 400, "did you mean wss://relay:443/in/x?"},
		{to("wss:/relay/in/x"), 400, "the host is missing; did you mean wss://relay/in/x?"},
		{to("http:relay/in/x"), 400, "the host is missing; did you mean http://relay/in/x?"},
		{to("wss//me:secret@relay/in/x"), 400, `destination "…": the URL must begin with ws:// or wss://`},
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

// TestBodyEncoding: a rule may come with gzip, within the same limit.
func TestBodyEncoding(t *testing.T) {
	s := newTestServer(t, "")
	const rule = `{"stream":"stream/x","feeds":[]}`
	zip := func(text string) string {
		var b bytes.Buffer
		w := gzip.NewWriter(&b)
		w.Write([]byte(text))
		w.Close()
		return b.String()
	}
	for _, tt := range []struct{ encoding, body, want string }{
		{"gzip", zip(rule), "200 " + rule},
		{"GZIP", zip(rule), "200 " + rule},
		{"identity", rule, "200 " + rule},
		{"gzip", rule, `400 {"error":"body: it is not gzip`},
		{"gzip", zip(strings.Repeat(" ", 1<<20) + rule), `413 {"error":"body: more than 65536 bytes"}`},
		{"br", rule, `415 {"error":"Content-Encoding \"br\": send the rule as it is, or with gzip"}`},
	} {
		if got := ask(s, "POST /api/streams "+tt.body, "Content-Encoding", tt.encoding); !strings.HasPrefix(got, tt.want) {
			t.Errorf("%s: got %s, want %s", tt.encoding, got, tt.want)
		}
	}
}

// FuzzAPI: whatever is asked, the answer is one line of JSON, an error changes
// nothing, a rule that is answered is there, and the log is what we wrote.
func FuzzAPI(f *testing.F) {
	const rule = `{"stream":"stream/a","feeds":["b","c"]}`
	f.Add("POST", "/api/streams", "", rule)
	f.Add("PUT", "/api/streams", "Origin: http://a", `{"feeds":[],"stream":"/stream/\u0061"} `)
	f.Add("UPDATE", "/api/destinations", "X-Forwarded-For: 1", `{"id":0,"stream":"a","destination":"wss://u:p@h:1/x?y"}`)
	f.Add("POST", "/api/destinations", "Sec-Fetch-Site: cross-site", `{"id":1e400,"stream":"\ud800"}`)
	f.Add("GET", "/api/streams/stream%2Fold", "Host: evil.example", "")
	f.Add("DELETE", "/api/streams/all", "Via: x", "")
	f.Add("DELETE", "//api/destinations/../old", "", "")
	f.Add("POST", "/ts/a%0ab", "User-Agent: \x1b[2J\xff", "GGGG")
	f.Add("GET", "/out/a?b", "Connection: upgrade", "")
	f.Add("OPTIONS", "*", "", "")
	f.Add("GET", "/api/stats", "", "")
	f.Add("GET", "/metrics", "", "")
	f.Add("CONNECT", "a:80", "Authorization: Basic Og==", "")
	log := &logBuffer{}
	r := newRules(f.Context(), newMux(), time.Second, slog.New(slog.NewTextHandler(log, nil)))
	r.dialer = deadEnd
	s := newServer(f.Context(), r, secretToken, r.log)
	f.Cleanup(func() {
		r.deleteDestinations()
		r.tasks.Wait()
	})
	ended, end := context.WithCancel(f.Context())
	end() // who reads video leaves at once
	f.Fuzz(func(t *testing.T, method, target, header, body string) {
		text := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n%s\r\n\r\n%s", method, target, len(body), header, body)
		request, err := http.ReadRequest(bufio.NewReader(strings.NewReader(text)))
		if err != nil || strings.HasPrefix(request.URL.Path, "/in") || strings.HasPrefix(request.URL.Path, "/out") && request.Header.Get("Upgrade") != "" {
			return
		}
		request.RemoteAddr = "127.0.0.1:50000"
		ask(s, `POST /api/streams {"stream":"stream/old","feeds":["x"]}`)
		ask(s, `POST /api/destinations {"id":"old","stream":"x","destination":"ws://old"}`)
		before := r.set().encode()
		w := httptest.NewRecorder()
		s.ServeHTTP(w, request.WithContext(ended))
		after := r.set().encode()
		if kind := w.Header().Get("Content-Type"); w.Code != http.StatusOK && kind != "application/json" ||
			kind == "application/json" && (!json.Valid(w.Body.Bytes()) || bytes.ContainsAny(w.Body.Bytes(), "\n\r\x1b")) {
			t.Errorf("got %d %q", w.Code, w.Body)
		}
		if w.Code != http.StatusOK && !bytes.Equal(before, after) {
			t.Errorf("got %d, and the rules are %s", w.Code, after)
		}
		if set, err := decodeState(after); err != nil || !bytes.Equal(set.encode(), after) {
			t.Errorf("the rules are %s, which reads as %v, %v", after, set, err)
		}
		if strings.Contains(w.Body.String(), secretToken) {
			t.Errorf("the token is in %s", w.Body)
		}
		r.deleteStreams()
		r.deleteDestinations()
		checkLog(t, log.String())
		log.mu.Lock()
		log.text = nil
		log.mu.Unlock()
	})
}
