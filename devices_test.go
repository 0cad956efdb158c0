package main

import (
	"bytes"
	"encoding/json"
	"math"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// TestPick: of what a camera offers, the input that serves best.
func TestPick(t *testing.T) {
	for _, tt := range []struct {
		name    string
		formats []format
		want    choice
		ok      bool
	}{
		{"nothing", nil, choice{}, false},
		{"unknown", []format{{"INZI", "", []size{{Width: 640, Height: 480}}}}, choice{}, false},
		{"raw before MJPEG", []format{
			{"MJPG", "", []size{{Width: 640, Height: 480, Rates: []float64{30}}}},
			{"YUYV", "", []size{{Width: 640, Height: 480, Rates: []float64{30}}}},
		}, choice{"yuyv422", 640, 480, 30}, true},
		{"MJPEG before slow raw", []format{
			{"YUYV", "", []size{{Width: 640, Height: 480, Rates: []float64{20}}}},
			{"MJPG", "", []size{{Width: 640, Height: 480, Rates: []float64{60, 30}}}},
		}, choice{"mjpeg", 640, 480, 30}, true},
		{"the size before the rate", []format{
			{"YUYV", "", []size{{Width: 320, Height: 240, Rates: []float64{30}}, {Width: 640, Height: 480, Rates: []float64{15}}}},
		}, choice{"yuyv422", 640, 480, 15}, true},
		{"the nearest size", []format{
			{"YUYV", "", []size{{Width: 1280, Height: 720}, {Width: 640, Height: 360}, {Width: 320, Height: 240}}},
		}, choice{"yuyv422", 640, 360, 0}, true},
		{"sizes are not told", []format{{"UYVY", "", nil}}, choice{"uyvy422", 640, 480, 0}, true},
		{"any size", []format{
			{"NV12", "", []size{{Width: 32, Height: 32, MaxWidth: 4056, MaxHeight: 3040, Rates: []float64{90, 1}, AnyRate: true}}},
		}, choice{"nv12", 640, 480, 25}, true},
		{"any size, but large", []format{
			{"NV12", "", []size{{Width: 800, Height: 600, MaxWidth: 4056, MaxHeight: 3040, Rates: []float64{24.5, 1}, AnyRate: true}}},
		}, choice{"nv12", 800, 600, 24}, true},
		{"any size, but small", []format{
			{"NV12", "", []size{{Width: 16, Height: 16, MaxWidth: 320, MaxHeight: 240}}},
		}, choice{"nv12", 320, 240, 0}, true},
		{"NTSC", []format{{"YUYV", "", []size{{Width: 720, Height: 480, Rates: []float64{59.94, 29.97}}}}}, choice{"yuyv422", 720, 480, 29.97}, true},
		{"25 before 30", []format{{"MJPG", "", []size{{Width: 640, Height: 480, Rates: []float64{30, 25}}}}}, choice{"mjpeg", 640, 480, 25}, true},
		{"no rate of MPEG-1", []format{{"MJPG", "", []size{{Width: 640, Height: 480, Rates: []float64{120, 90}}}}}, choice{"mjpeg", 640, 480, 120}, true},
		{"colours before grey", []format{
			{"GREY", "", []size{{Width: 640, Height: 480, Rates: []float64{30}}}},
			{"MJPG", "", []size{{Width: 640, Height: 480, Rates: []float64{30}}}},
		}, choice{"mjpeg", 640, 480, 30}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := cameraInfo{Formats: tt.formats}
			if got, ok := c.pick(); got != tt.want || ok != tt.ok {
				t.Errorf("got %v, %v, want %v, %v", got, ok, tt.want, tt.ok)
			}
		})
	}
}

func TestPerSecond(t *testing.T) {
	for _, tt := range []struct {
		name                   string
		numerator, denominator uint32
		want                   float64
	}{
		{"30", 1, 30, 30},
		{"100 ns", 333333, 10000000, 30},
		{"NTSC", 1001, 30000, 29.97},
		{"slow", 2, 15, 7.5},
		{"no time", 0, 30, 0},
		{"for ever", 1, 0, 0},
		{"all ones", math.MaxUint32, math.MaxUint32, 1},
	} {
		if got := perSecond(tt.numerator, tt.denominator); got != tt.want {
			t.Errorf("%s: got %v, want %v", tt.name, got, tt.want)
		}
	}
}

// TestLinesInShell: a shell takes the path of a device as it is, whatever is
// in it, and runs nothing of it.
func TestLinesInShell(t *testing.T) {
	for _, name := range []string{"/dev/video0", "a b", "it's", "'", "$(echo x)", "`echo x`", `\`, "a;b", "a\nb", "~", "*", "&", "#", "-x", `"`, ""} {
		c := cameraInfo{Path: name}
		out, err := exec.Command(needs(t, "sh"), "-c", `ffmpeg() { printf '%s\0' "$@"; }; `+shellLine(c.args()...)).Output()
		args := strings.Split(string(out), "\x00")
		want := []string{"-f", "v4l2", "-framerate", "25", "-video_size", "640x480", "-i", name}
		if err != nil || len(args) < len(want) || !slices.Equal(args[:len(want)], want) {
			t.Errorf("%q: got %q, %v, want %q", name, args, err, want)
		}
	}
}

// TestLinesInREADME: what the lines do to picture and sound is what README.md
// explains.
func TestLinesInREADME(t *testing.T) {
	b, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		videoOutput + " " + postURL("localhost", 8888, "video0"),
		audioOutput + " " + postURL("localhost", 8888, "audio0"),
	} {
		if !strings.Contains(string(b), want) {
			t.Errorf("README.md: got no %q", want)
		}
	}
}

// TestInputs: ffmpeg knows the formats by the names that we have for them.
func TestInputs(t *testing.T) {
	known := make(map[string]bool)
	for _, list := range []string{"-pix_fmts", "-decoders"} {
		out, err := exec.Command(needs(t, "ffmpeg"), "-hide_banner", list).Output()
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(out)) {
			if words := strings.Fields(line); len(words) > 1 {
				known[words[1]] = true
			}
		}
	}
	for _, in := range inputs {
		if !known[in.name] {
			t.Errorf("%s: ffmpeg does not know %q", in.fourCC, in.name)
		}
	}
}

// TestNoDevices: a machine without any says so, with status 0.
func TestNoDevices(t *testing.T) {
	d, err := listDevices(t.TempDir(), 8888)
	if err != nil {
		t.Fatal(err)
	}
	var text bytes.Buffer
	d.text(&text)
	if want := "no camera on this machine\nno microphone on this machine\n"; text.String() != want {
		t.Errorf("got %q, want %q", &text, want)
	}
	b, err := json.Marshal(d)
	if want := `{"cameras":[],"microphones":[]}`; string(b) != want || err != nil {
		t.Errorf("got %s, %v, want %s", b, err, want)
	}
}

// TestDevicesOfThisMachine: command and API say the same, whatever is here.
func TestDevicesOfThisMachine(t *testing.T) {
	v := startVW(t)
	_, port, _ := strings.Cut(v.addr, ":")
	var stdout, stderr, compact bytes.Buffer
	if got := run(t.Context(), []string{"devices", "-json"}, []string{"VW_PORT=" + port}, &stdout, &stderr); got != 0 || stderr.Len() > 0 {
		t.Errorf("got status %d and %q, want 0 and nothing", got, &stderr)
	}
	if err := json.Compact(&compact, stdout.Bytes()); err != nil {
		t.Fatal(err)
	}
	if got := v.call(t, 200, "GET", "/api/devices", ""); got != compact.String() {
		t.Errorf("got %s, want %s", got, &compact)
	}
}
