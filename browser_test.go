// A browser for tests, and what its pictures show.

package main

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"image"
	"image/png"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// browser is a Chromium with one page, driven by the DevTools protocol over a
// pair of pipes. Owned by its test.
type browser struct {
	*process
	to      *os.File
	from    *bufio.Reader
	pipe    *os.File // below from
	session string
	last    int      // id of a command
	console []string // what is more than information
}

func startBrowser(t *testing.T, args ...string) *browser {
	t.Helper()
	dir := t.TempDir()
	theirs, to, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	from, theirs2, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(needs(t, "chromium"), append(args, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--user-data-dir="+dir,
		"--autoplay-policy=no-user-gesture-required", "--window-size=800,600", "--remote-debugging-pipe", "about:blank")...)
	cmd.ExtraFiles = []*os.File{theirs, theirs2} // 3 and 4
	b := &browser{process: start(t, "chromium", cmd), to: to, from: bufio.NewReader(from), pipe: from}
	theirs.Close()
	theirs2.Close()
	t.Cleanup(func() {
		to.Close()
		from.Close()
	})
	return b
}

// message is one of the DevTools protocol, in either direction.
type devToolsMessage struct {
	ID      int             `json:"id,omitempty"`
	Session string          `json:"sessionId,omitempty"`
	Method  string          `json:"method,omitempty"`
	Params  json.RawMessage `json:"params,omitempty"`
	Result  json.RawMessage `json:"result,omitempty"`
	Error   json.RawMessage `json:"error,omitempty"`
}

// open shows a page, in a tab whose console is listened to.
func (b *browser) open(t *testing.T, page string) {
	t.Helper()
	b.session = "" // of the browser: one that hangs on a page would end with that
	var target struct{ TargetID string }
	b.call(t, "Target.createTarget", map[string]any{"url": "about:blank", "newWindow": true}, &target)
	var attached struct{ SessionID string }
	b.call(t, "Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true}, &attached)
	b.session = attached.SessionID
	for _, domain := range []string{"Runtime", "Log", "Page"} {
		b.call(t, domain+".enable", nil, nil)
	}
	b.call(t, "Page.navigate", map[string]any{"url": page}, nil)
}

// call does a command, and hears what the browser has to say until its answer.
func (b *browser) call(t *testing.T, method string, params, result any) {
	t.Helper()
	b.last++
	text, err := json.Marshal(params)
	if err != nil {
		t.Fatal(err)
	}
	if params == nil {
		text = []byte("{}")
	}
	text, err = json.Marshal(devToolsMessage{ID: b.last, Session: b.session, Method: method, Params: text})
	if err != nil {
		t.Fatal(err)
	}
	b.pipe.SetReadDeadline(time.Now().Add(3 * startupTime))
	if _, err := b.to.Write(append(text, 0)); err != nil {
		t.Fatalf("%s: %v", method, err)
	}
	for {
		text, err := b.from.ReadBytes(0)
		if err != nil {
			t.Fatalf("%s: %v", method, err)
		}
		var m devToolsMessage
		if err := json.Unmarshal(text[:len(text)-1], &m); err != nil {
			t.Fatal(err)
		}
		b.hear(m)
		if m.ID != b.last {
			continue
		}
		if m.Error != nil {
			t.Fatalf("%s: %s", method, m.Error)
		}
		if result != nil {
			if err := json.Unmarshal(m.Result, result); err != nil {
				t.Fatal(err)
			}
		}
		return
	}
}

// hear keeps warnings and errors.
func (b *browser) hear(m devToolsMessage) {
	var p struct {
		Type  string
		Entry struct{ Level string }
	}
	json.Unmarshal(m.Params, &p)
	switch {
	case m.Method == "Runtime.consoleAPICalled" && !slices.Contains([]string{"log", "info", "debug"}, p.Type),
		m.Method == "Runtime.exceptionThrown",
		m.Method == "Log.entryAdded" && p.Entry.Level != "info" && p.Entry.Level != "verbose":
		b.console = append(b.console, string(m.Params))
	}
}

// evaluate gives result the value of an expression in the page.
func (b *browser) evaluate(t *testing.T, expression string, result any) {
	t.Helper()
	var r struct {
		Result    struct{ Value json.RawMessage }
		Exception json.RawMessage `json:"exceptionDetails"`
	}
	b.call(t, "Runtime.evaluate", map[string]any{"expression": expression, "returnByValue": true}, &r)
	if r.Exception != nil { // the page may not be there yet
		return
	}
	if err := json.Unmarshal(r.Result.Value, result); err != nil {
		t.Fatal(err)
	}
}

// capture takes a picture of the page, or of the clip in params, and leaves it
// among the artifacts of the test.
func (b *browser) capture(t *testing.T, name string, params map[string]any) image.Image {
	t.Helper()
	var shot struct{ Data string }
	b.call(t, "Page.captureScreenshot", params, &shot)
	data, err := base64.StdEncoding.DecodeString(shot.Data)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(t.ArtifactDir(), name), data, 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := png.Decode(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// screenshot captures the canvas as a person sees it.
func (b *browser) screenshot(t *testing.T, name string) image.Image {
	t.Helper()
	return b.capture(t, name, map[string]any{"clip": map[string]any{"x": 0, "y": 0, "width": 640, "height": 480, "scale": 1}})
}

// looks returns how many colours a picture has, of 4,096, and its brightness,
// of 255.
func looks(p image.Image) (colours, brightness int) {
	seen := make(map[[3]uint32]int)
	sum, n := 0, 0
	for y := p.Bounds().Min.Y; y < p.Bounds().Max.Y; y++ {
		for x := p.Bounds().Min.X; x < p.Bounds().Max.X; x++ {
			r, g, b, _ := p.At(x, y).RGBA()
			seen[[3]uint32{r >> 12, g >> 12, b >> 12}]++
			sum += int(r>>8+g>>8+b>>8) / 3
			n++
		}
	}
	for _, pixels := range seen {
		if pixels > n/1000 {
			colours++
		}
	}
	return colours, sum / n
}

// bars returns how much of the bars of ffmpeg's testsrc2 has their colours;
// before them something moves.
func bars(p image.Image) float64 {
	size := p.Bounds().Size()
	n := 0
	for y := range size.Y {
		for x := range size.X {
			want := x*6/size.X + 1 // red, green, yellow, blue, magenta, cyan
			r, g, b, _ := p.At(x, y).RGBA()
			fits := true
			for bit, v := range []uint32{r, g, b} {
				fits = fits && (want>>bit&1 == 1 && v > 0xd000 || want>>bit&1 == 0 && v < 0x3000)
			}
			if fits {
				n++
			}
		}
	}
	return float64(n) / float64(size.X*size.Y)
}

// difference returns how much of a picture is different in another.
func difference(a, b image.Image) float64 {
	size, n := a.Bounds().Size(), 0
	for y := range size.Y {
		for x := range size.X {
			r, g, _, _ := a.At(x, y).RGBA()
			r2, g2, _, _ := b.At(x, y).RGBA()
			if math.Abs(float64(r)-float64(r2)) > 0x2000 || math.Abs(float64(g)-float64(g2)) > 0x2000 {
				n++
			}
		}
	}
	return float64(n) / float64(size.X*size.Y)
}
