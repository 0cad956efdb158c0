package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/websocket"
)

// TestCommands is the contract of the control link, row by row, byte for byte.
func TestCommands(t *testing.T) {
	s := newTestServer(t, "")
	s.startControl(destinationRule{ID: controlID, Stream: "api", Destination: "ws://me:pass@127.0.0.1:1/control", Token: "t"})
	const (
		api  = `"apiRule":{"id":"apiRule","stream":"api","destination":"ws://***@127.0.0.1:1/control","token":"***"}`
		dest = `{"id":"0","stream":"stream/x","destination":"ws://127.0.0.1:1/?a=<1>","token":"***"}`
	)
	add := func(what, rule string) string { return `{"verb":"add","what":"` + what + `","rule":` + rule + `}` }
	wrong := func(text string) string { return `{"error":"` + strings.ReplaceAll(text, `"`, `\"`) + `"}` }
	noVerb := func(verb string) string {
		return `verb "` + verb + `": it must be add, list, delete, mute, healthcheck, devices or stats`
	}
	steps := []struct{ message, want string }{
		{`{"verb":"healthcheck"}`, `{"healthcheck":"ok"}`},
		{add("stream", `{"stream":"/stream/x","feeds":["video0","audio0"]}`), `{"stream":"stream/x","feeds":["video0","audio0"]}`},
		{add("stream", `{"stream":"stream/y","feeds":[]}`), `{"stream":"stream/y","feeds":[]}`},
		{`{"verb":"list","what":"stream","which":"stream/x"}`, `{"feeds":["video0","audio0"]}`},
		{`{"verb":"list","what":"stream","which":"/stream/y"}`, `{"feeds":[]}`},
		{`{"verb":"list","what":"stream","which":"stream/none"}`, `{"feeds":null}`},
		{`{"verb":"list","what":"stream","which":"all"}`, `{"stream/x":["video0","audio0"],"stream/y":[]}`},
		{`{"verb":"list","what":"stream","which":"x"}`, wrong(`stream "x": the name of a stream begins with stream/; did you mean "stream/x"?`)},
		{`{"verb":"list","what":"stream"}`, wrong(`stream: the name is missing`)},
		{add("destination", `{"id":0,"stream":"stream/x","destination":"ws://127.0.0.1:1/?a=<1>","token":"secret"}`), dest},
		{`{"verb":"list","what":"destination","which":"0"}`, dest},
		{`{"verb":"list","what":"destination","which":"1"}`, wrong(`destination "1" does not exist`)},
		{`{"verb":"list","what":"destination","which":"all"}`, `{"0":` + dest + `,` + api + `}`},
		{`{"verb":"list","what":"destination","which":"apiRule"}`, strings.TrimPrefix(api, `"apiRule":`)},

		{`{"verb":"delete","what":"destination","which":"apiRule"}`, wrong("Cannot delete apiRule")},
		{add("destination", `{"id":"apiRule","stream":"x","destination":"ws://a"}`), wrong(`id "apiRule": the name is reserved`)},
		{add("destination", `{"id":"/apiRule","stream":"x","destination":"ws://a"}`), wrong(`id "apiRule": the name is reserved`)},
		{add("stream", `{"stream":"apiRule","feeds":[]}`), wrong(`stream "apiRule": the name is reserved`)},

		{`{"verb":"healthcheck","ref":7}`, `{"healthcheck":"ok","ref":7}`},
		{`{"ref":{"a":[1,"<x>"]},"verb":"nope"}`, strings.TrimSuffix(wrong(noVerb("nope")), "}") + `,"ref":{"a":[1,"<x>"]}}`},
		{`{"verb":"healthcheck","ref":null}`, `{"healthcheck":"ok","ref":null}`},
		{`{"ref":1,"verb":7}`, strings.TrimSuffix(wrong(`verb must be a string: "…"`), "}") + `,"ref":1}`},
		{"{\"verb\":\"healthcheck\",\"ref\":[1,\n2]}", `{"healthcheck":"ok","ref":[1,2]}`},

		{`{"verb":"healthcheck","ref":1}{"verb":"healthcheck","ref":2}` + "\n" + `{"verb":"healthcheck"}` + "\n",
			`{"healthcheck":"ok","ref":1} {"healthcheck":"ok","ref":2} {"healthcheck":"ok"}`},
		{`{"verb":"nope"}{"verb":"healthcheck"}`, wrong(noVerb("nope")) + ` {"healthcheck":"ok"}`},
		{`{"verb":"healthcheck"} garbage {"verb":"healthcheck"}`, `{"healthcheck":"ok"} ` + wrong(`this is no JSON: 'g' at byte 24 is out of place`)},
		{`1 2 3`, wrong(`command "1": it must be an object`)},
		{``, wrong(`there is no JSON: an object is expected, such as {"verb":…}`)},
		{`{"verb":"healthcheck"`, wrong("the JSON ends too early: is a } or ] missing?")},
		{"\xff\x00", wrong(`this is no JSON: '�' at byte 1 is out of place`)},
		{`{}`, wrong(noVerb(""))},
		{`{"verb":"healthcheck","more":1}`, wrong(`unknown field "more"; the fields are verb, what, which, rule, ref, to`)},
		{`{"verb":"add","what":"stream"}`, wrong(`add stream: "rule" is missing`)},
		{`{"verb":"add","what":"feed","rule":{}}`, wrong(`add "feed": it must be stream or destination`)},
		{`{"verb":"list","which":"all"}`, wrong(`list "": it must be stream, destination or mute`)},
		{add("stream", `{"stream":"stream/x","feeds":["a"],"x":1}`), wrong(`unknown field "x"; the fields are stream, feeds, with, without`)},
		{add("stream", `{"stream":"stream/x"}`), wrong(`stream "stream/x": "feeds" is missing; [] mutes everything`)},
		{add("stream", `null`), wrong(`"stream" is missing: a name such as "stream/front"`)},
		{add("stream", `{"stream":"`+strings.Repeat("x", maxBody)+`"}`), wrong("command: more than 65536 bytes")},

		{`{"verb":"mute","rule":{"audio":true}}`, `{"audio":true,"video":false}`},
		{`{"verb":"list","what":"mute","ref":1}`, `{"audio":true,"video":false,"ref":1}`},
		{`{"verb":"mute","rule":{"audio":false}}`, `{"audio":false,"video":false}`},
		{`{"verb":"mute","rule":{"audio":false,"control":false}}`, wrong(`"control" is not for the control link, which lifts what it has muted itself`)},
		{`{"verb":"mute"}`, wrong(`mute: "rule" is missing`)},
		{`{"verb":"healthcheck","to":"box1"}`, ``}, // we have no name
		{`{"verb":"healthcheck","from":"box1"}`, ``},

		// The answer of another vw that hears us; to an error nothing is said.
		{`{"healthcheck":"ok"}`, wrong(`unknown field "healthcheck"; the fields are verb, what, which, rule, ref, to`)},
		{`{"error":"JSON: unknown field","ref":1}`, ``},

		{`{"verb":"delete","what":"stream","which":"/stream/y"}`, `{"deleted":"stream/y"}`},
		{`{"verb":"delete","what":"stream","which":"stream/y"}`, wrong(`stream "stream/y" does not exist`)},
		{`{"verb":"delete","what":"stream","which":"all"}`, `{"deleted":"deleteAll"}`},
		{`{"verb":"list","what":"stream","which":"all"}`, `{}`},
		{`{"verb":"delete","what":"destination","which":"0"}`, `{"deleted":"0"}`},
		{`{"verb":"delete","what":"destination","which":"0"}`, wrong(`destination "0" does not exist`)},
		{`{"verb":"delete","what":"destination","which":"all"}`, `{"deleted":"deleteAll"}`},
		{`{"verb":"list","what":"destination","which":"all"}`, `{` + api + `}`},
	}
	for i, step := range steps {
		var got []string
		for a := range s.commands.answers([]byte(step.message), nil) {
			got = append(got, string(a))
			if !json.Valid(a) {
				t.Errorf("step %d: not JSON: %s", i, a)
			}
		}
		if got := strings.Join(got, " "); got != step.want {
			t.Errorf("step %d, %.100s\n got %s\nwant %s", i, step.message, got, step.want)
		}
	}
	if got, want := ask(s, "GET /api/destinations/all"), "200 {"+api+"}"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// TestControlRoom: several vw on one path obey one command, each answers with
// its name, and none answers the others.
func TestControlRoom(t *testing.T) {
	var room []*commands
	for _, name := range []string{"box1", "box2", "box3"} {
		c := newTestServer(t, "").commands
		c.name = name
		room = append(room, c)
	}
	// say lets everybody in the room hear a message, and the answers to it.
	say := func(message string) (heard []string) {
		pending := []string{message}
		for len(pending) > 0 && len(heard) < 100 {
			for _, c := range room {
				for a := range c.answers([]byte(pending[0]), nil) {
					if from := `"from":"` + c.name + `"}`; !strings.HasSuffix(string(a), from) || !json.Valid(a) {
						t.Errorf("%s: got %s, want it to end with %s", message, a, from)
					}
					heard = append(heard, string(a))
					pending = append(pending, string(a))
				}
			}
			pending = pending[1:]
		}
		return heard
	}
	for _, step := range []struct {
		message string
		answers int
	}{
		{`{"verb":"mute","rule":{"audio":true}}`, 3},
		{`{"verb":"list","what":"mute"}`, 3},
		{`{"verb":"list","what":"stream","which":"all"}`, 3},
		{`{"verb":"mute","rule":{"video":true},"to":"box2"}`, 1},
		{`{"verb":"healthcheck","to":"box4"}`, 0},
		{`{"verb":"healthcheck","to":["box1"]}`, 0},
		{`{"verb":"nope"}`, 3},
		{`nonsense`, 3},
		{`{"verb":"healthcheck","from":"somebody"}`, 0},
	} {
		if got := say(step.message); len(got) != step.answers {
			t.Errorf("%s: got %d answers, want %d: %s", step.message, len(got), step.answers, got)
		}
	}
	for i, c := range room {
		if got := c.listMute(handHere); !got.Audio || got.Video != (i == 1) {
			t.Errorf("%s has muted %+v", c.name, got)
		}
	}
}

// TestE2EControlRoom: three vw on one path of a relay that is not ours. One message
// mutes all of them, each answers once with its name, and nobody answers the others.
func TestE2EControlRoom(t *testing.T) {
	t.Parallel()
	_, relay := startTokenRelay(t, "127.0.0.1:0")
	names := []string{"box1", "box2", "box3"}
	var room []*vwProcess
	for _, name := range names {
		v := startVW(t, "VW_API=ws://"+relay+"/control", "VW_NAME="+name)
		v.expect(t, 0, startupTime, `msg=connected dest=apiRule `)
		room = append(room, v)
	}
	c := newController(t, "ws://"+relay+"/control")
	// say sends a message, and returns the names of those who answer, and when the
	// last of them did.
	say := func(message string, n int) (heard []string, took time.Duration) {
		start := time.Now()
		c.send(t, message)
		for _, a := range c.answers(t, n) {
			var answer struct{ From, Error string }
			if err := json.Unmarshal([]byte(a), &answer); err != nil || answer.Error != "" {
				t.Errorf("%s: got %s, %v", message, a, err)
			}
			heard = append(heard, answer.From)
		}
		slices.Sort(heard)
		return heard, time.Since(start)
	}
	var took []time.Duration
	for i := range scaled(10, 40, 1000) {
		muted := i%2 == 0
		heard, last := say(fmt.Sprintf(`{"verb":"mute","rule":{"audio":%v}}`, muted), len(names))
		if took = append(took, last); !slices.Equal(heard, names) {
			t.Fatalf("mute %d: got answers from %v, want one from each of %v", i, heard, names)
		}
		if i > 1 {
			continue
		}
		for _, v := range room {
			want := map[bool]string{true: `{"audio":true,"video":false,"by":{"audio":["control"]}}`, false: `{"audio":false,"video":false}`}[muted]
			if got := v.call(t, http.StatusOK, "GET", "/api/mute", ""); got != want {
				t.Errorf("mute %d: got %s, want %s", i, got, want)
			}
		}
	}
	if heard, _ := say(`{"verb":"mute","rule":{"video":true},"to":"box2"}`, 1); heard[0] != "box2" {
		t.Errorf("to box2: got an answer from %s", heard[0])
	}
	if heard, _ := say(`{"verb":"list","what":"mute"}`, len(names)); !slices.Equal(heard, names) { // nothing else was said
		t.Errorf("at the end: got answers from %v, want one from each of %v", heard, names)
	}
	slices.Sort(took)
	n := len(took)
	t.Logf("the last of three answers to %d messages: median %v, p99 %v, slowest %v", n, took[n/2], took[n*99/100], took[n-1])
}

// TestControlCannotLift: what is muted here stays so whatever the control link says,
// a destination to vw's own API and feeds among it.
func TestControlCannotLift(t *testing.T) {
	r, ctx, tasks := realRules(t, io.Discard)
	s := newServer(ctx, r, "", discardLog)
	self := httptest.NewServer(s)
	t.Cleanup(self.Close)
	var pictures, sounds atomic.Int64
	look := func(b []byte) {
		for p := range slices.Chunk(b, packetSize) {
			switch id, _, ok := pesStart(packet(p).payload()); {
			case ok && isVideoID(id):
				pictures.Add(1)
			case ok:
				sounds.Add(1)
			}
		}
	}
	relay := &chaosRelay{t: t, see: look}
	relay.start()
	if got := ask(s, `PUT /api/mute {"audio":true}`); got != `200 {"audio":true,"video":false}` {
		t.Fatal(got)
	}
	tasks.Go(func() { load(ctx, r, "both") })
	tasks.Go(func() { load(ctx, r, "audio0") })
	readers := make(map[string]*subscriber)
	for _, name := range []string{"both", "audio0", "loop", "stream/x", "stream/y"} {
		readers[name] = newSubscriber(raw, time.Minute, nil)
		r.mux.join(name, readers[name])
	}
	host := strings.TrimPrefix(self.URL, "http://")
	commands := []string{
		`{"verb":"mute","rule":{"audio":false}}`,
		`{"verb":"mute","rule":{"audio":false,"video":false}}`,
		`{"verb":"mute","rule":{"audio":false,"control":false}}`,
		`{"verb":"mute","rule":{"audio":false,"control":true}}`,
		`{"verb":"mute","rule":{"audio":null,"video":false}}`,
		`{"verb":"mute","rule":{"audio":false},"by":"here"}`,
		`{"verb":"mute","rule":{"audio":true}}`,
		`{"verb":"mute","what":"here","rule":{"audio":false}}`,
		`{"verb":"add","what":"mute","rule":{"audio":false}}`,
		`{"verb":"delete","what":"mute","which":"all"}`,
		`{"verb":"add","what":"stream","rule":{"stream":"stream/x","feeds":["both","audio0","loop"]}}`,
		`{"verb":"add","what":"stream","rule":{"stream":"stream/y","with":["audio0"]}}`,
		`{"verb":"add","what":"stream","rule":{"stream":"stream/y","feeds":["audio0"]}}`,
		`{"verb":"delete","what":"stream","which":"all"}`,
		`{"verb":"delete","what":"destination","which":"all"}`,
	}
	for id, to := range []string{
		"ws://" + relay.addr, "ws://" + host + "/in/loop", "ws://" + host + "/api/mute", "ws://" + host + "/out/both", self.URL + "/api/mute", self.URL + "/api/mute/",
		self.URL + `/api/mute?audio=false`, self.URL + "/api/streams", self.URL + "/ts/loop",
	} {
		for _, of := range []string{"both", "audio0", "loop", "stream/x"} {
			token := ""
			if to[0] == 'h' {
				token = `,"token":"{\"audio\":false}","headers":{"Content-Type":"application/json"}`
			}
			commands = append(commands, fmt.Sprintf(`{"verb":"add","what":"destination","rule":{"id":"%d","stream":"%s","destination":"%s"%s}}`, id, of, to, token))
		}
	}
	for i := range scaled(100, 300, 1000) {
		c := commands[rand.N(len(commands))]
		if i < len(commands) {
			c = commands[i]
		}
		for range s.commands.answers([]byte(c), nil) {
		}
		if i%50 == 0 {
			r.to(t, "seen", "stream/x", "ws://"+relay.addr)
			if _, err := r.setStream(streamRule{"stream/x", []string{"both", "audio0"}}); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(2 * time.Millisecond)
		for _, sub := range readers {
			n := 0
			for _, b := range sub.take(nil, 16<<20, false, time.Now()) {
				look(b)
				n += len(b)
			}
			sub.wrote(n)
		}
		if got := s.commands.listMute(handHere); !got.Audio {
			t.Fatalf("%s: got %+v, want it to stay muted", c, got)
		}
	}
	if sounds.Load() > 0 || pictures.Load() < 100 {
		t.Errorf("got %d sounds and %d pictures, want none and many", sounds.Load(), pictures.Load())
	}
	if got := ask(s, "GET /api/mute"); !strings.Contains(got, `"audio":true`) || strings.Contains(got, `"audio":["control"]`) {
		t.Errorf("at the end: got %s, want what is muted here", got)
	}
	for name, sub := range readers {
		r.mux.leave(name, sub)
		sub.end()
	}
}

func FuzzCommands(f *testing.F) {
	f.Add(`{"verb":"healthcheck","ref":1}{"verb":"list","what":"stream","which":"all"}`)
	f.Add(`{"verb":"add","what":"stream","rule":{"stream":"stream/x","feeds":["a"]}}`)
	f.Add(`{"verb":"delete","what":"destination","which":"all"} [`)
	s := newServer(context.Background(), newRules(context.Background(), newMux(), time.Second, discardLog), "", discardLog)
	f.Fuzz(func(t *testing.T, message string) {
		if strings.Contains(message, "destination") && strings.Contains(message, "add") {
			return // it would dial
		}
		n := 0
		for a := range s.commands.answers([]byte(message), nil) {
			n++
			var object map[string]any
			if err := json.Unmarshal(a, &object); err != nil || object == nil {
				t.Errorf("%q: the answer %q is no object", message, a)
			}
		}
		if n > len(message)/2+1 {
			t.Errorf("%q: got %d answers", message, n)
		}
	})
}

// controller is somebody on the path of a control link.
type controller struct {
	*websocket.Conn
	d *json.Decoder // of the messages, one after the other
}

func newController(t *testing.T, url string) *controller {
	t.Helper()
	ws, err := websocket.Dial(url, "", "http://controller")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ws.Close() })
	ws.SetReadDeadline(time.Now().Add(time.Minute))
	return &controller{ws, json.NewDecoder(ws)}
}

func (c *controller) send(t *testing.T, message any) {
	t.Helper()
	if err := websocket.Message.Send(c.Conn, message); err != nil {
		t.Fatal(err)
	}
}

// answers reads n answers.
func (c *controller) answers(t *testing.T, n int) (all []string) {
	t.Helper()
	for len(all) < n {
		var a json.RawMessage
		if err := c.d.Decode(&a); err != nil {
			t.Fatalf("got %d answers, then %v; want %d", len(all), err, n)
		}
		all = append(all, string(a))
	}
	return all
}

// ask sends one command and returns its answer.
func (c *controller) ask(t *testing.T, message any) string {
	t.Helper()
	c.send(t, message)
	return c.answers(t, 1)[0]
}

// TestE2EControl: a controller on a relay that is not ours. A thousand commands
// at full speed are a thousand answers in their order; what is not a command
// is refused, and the link stays; so it does when everything is deleted.
func TestE2EControl(t *testing.T) {
	t.Parallel()
	_, relay := startTokenRelay(t, "127.0.0.1:0")
	v := startVW(t, "VW_API=ws://"+relay+"/control")
	v.expect(t, 0, startupTime, `msg=connected dest=apiRule `)
	c := newController(t, "ws://"+relay+"/control")
	if got, want := c.ask(t, `{"verb":"add","what":"stream","rule":{"stream":"stream/x","feeds":["video0","audio0"]}}`), `{"stream":"stream/x","feeds":["video0","audio0"]}`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	c.ask(t, `{"verb":"add","what":"stream","rule":{"stream":"stream/x","feeds":["video0"]}}`)
	if got, want := v.call(t, http.StatusOK, "GET", "/api/streams/stream/x", ""), `["video0"]`; got != want {
		t.Errorf("after the mute: got %s, want %s", got, want)
	}
	const n = 1000
	sent := make(chan error, 1)
	go func() {
		var err error
		for i := 0; i < n && err == nil; i++ {
			command := fmt.Sprintf(`{"verb":"add","what":"stream","rule":{"stream":"stream/%d","feeds":[]},"ref":%d}`, i%100, i)
			switch i % 4 {
			case 1:
				command = fmt.Sprintf(`{"verb":"list","what":"stream","which":"all","ref":%d}`, i)
			case 2:
				command = fmt.Sprintf(`{"verb":"nope","ref":%d}`, i)
			}
			err = websocket.Message.Send(c.Conn, command)
		}
		sent <- err
	}()
	for i, a := range c.answers(t, n) {
		if !strings.HasSuffix(a, fmt.Sprintf(`,"ref":%d}`, i)) || (i%4 == 2) != strings.HasPrefix(a, `{"error":`) {
			t.Fatalf("answer %d is %.200s", i, a)
		}
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name    string
		message any
		want    string
	}{
		{"garbage", "\x00garbage", "JSON"},
		{"binary", []byte(`{"verb":"healthcheck"}`), "binary"},
		{"1 MB", strings.Repeat("x", 1000000), "JSON"},
		{"2 MB", strings.Repeat("x", 2<<20), "more than 1048576 bytes"},
		{"a command of 100 KB", `{"verb":"` + strings.Repeat("x", 100000) + `"}`, "more than 65536 bytes"},
		{"deep", strings.Repeat("[", 100000), "JSON"},
	} {
		if got := c.ask(t, tt.message); !strings.HasPrefix(got, `{"error":"`) || !strings.Contains(got, tt.want) || len(got) > 400 {
			t.Errorf("%s: got %.400s, want an error with %q", tt.name, got, tt.want)
		}
	}
	for _, feed := range []string{"api", "control"} { // no feed reaches the link: the next message is the next answer
		p := startPost(t, v.addr, feed)
		p.write(t, testClip(24, 500))
		p.end(t)
	}
	for _, what := range []string{"stream", "destination"} {
		if got, want := c.ask(t, `{"verb":"delete","what":"`+what+`","which":"all"}`), `{"deleted":"deleteAll"}`; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	if got, want := c.ask(t, `{"verb":"healthcheck"}`), `{"healthcheck":"ok"}`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if log := v.out.String(); strings.Count(log, "dest=apiRule") != 1 {
		t.Errorf("got the log\n%swant one line of the link", log)
	}
}
