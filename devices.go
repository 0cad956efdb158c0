// The cameras and microphones of this machine, each with a name for its feed
// and an ffmpeg line to paste.
//
// They are read from /sys, /dev and /proc below a root directory, so that a
// test can present a machine of its own, and from cameras by ioctl
// (devices_linux.go). What a device reports is not trusted: of its names only
// printable characters are kept, and no ffmpeg line contains them. Paths in an
// ffmpeg line are quoted for the shell.

package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// devices is what vw devices and GET /api/devices list.
type devices struct {
	Cameras     []cameraInfo     `json:"cameras"`
	Microphones []microphoneInfo `json:"microphones"`
}

// cameraInfo is a V4L2 node that captures video.
type cameraInfo struct {
	Feed    string   `json:"feed"`
	Name    string   `json:"name"`
	Path    string   `json:"path"` // the stable name that udev gave it; else Node
	Node    string   `json:"node"` // its name in /dev now
	Formats []format `json:"formats"`
	Problem string   `json:"problem,omitempty"` // why it cannot be used now
	FFmpeg  string   `json:"ffmpeg"`
}

// format is a pixel format or codec that a camera offers.
type format struct {
	FourCC string `json:"fourcc"`
	Name   string `json:"name"`
	Sizes  []size `json:"sizes"`
}

// size is a frame size in pixels. With a maximum it stands for all sizes up to that.
type size struct {
	Width     int       `json:"width"`
	Height    int       `json:"height"`
	MaxWidth  int       `json:"maxWidth,omitempty"`
	MaxHeight int       `json:"maxHeight,omitempty"`
	Rates     []float64 `json:"rates"`             // pictures a second, the highest first
	AnyRate   bool      `json:"anyRate,omitempty"` // and any rate between the two
}

// microphoneInfo is a capture device of an ALSA card.
type microphoneInfo struct {
	Feed    string `json:"feed"`
	Name    string `json:"name"`
	Card    string `json:"card"` // its id in ALSA, which is stable
	Device  int    `json:"device"`
	Node    string `json:"node"`
	Problem string `json:"problem,omitempty"`
	FFmpeg  string `json:"ffmpeg"`
}

var errNotLinux = errors.New("devices are listed on Linux only, this is " + runtime.GOOS)

// listDevices lists the devices of the machine whose files are below root.
// Their ffmpeg lines post to vw on port.
func listDevices(root string, port int) (devices, error) {
	if runtime.GOOS != "linux" {
		return devices{}, errNotLinux
	}
	d := devices{listCameras(root), listMicrophones(root)}
	for i := range d.Cameras {
		c := &d.Cameras[i]
		c.Feed = fmt.Sprint("video", i)
		c.FFmpeg = shellLine(append(c.args(), postURL("localhost", port, c.Feed))...)
	}
	for i := range d.Microphones {
		m := &d.Microphones[i]
		m.Feed = fmt.Sprint("audio", i)
		m.FFmpeg = shellLine(append(m.args(), postURL("localhost", port, m.Feed))...)
	}
	return d, nil
}

// listCameras returns cameras in the order of their stable names, then those
// without one.
func listCameras(root string) []cameraInfo {
	const class = "sys/class/video4linux"
	nodes, _ := os.ReadDir(filepath.Join(root, class)) // it does not exist until a camera was plugged in
	byID, byPath := links(root, "/dev/v4l/by-id"), links(root, "/dev/v4l/by-path")
	all := []cameraInfo{}
	for _, n := range nodes {
		if number, ok := strings.CutPrefix(n.Name(), "video"); !ok || !isNumber(number) {
			continue
		}
		c := cameraInfo{Node: "/dev/" + n.Name(), Name: printable(attribute(root, class, n.Name(), "name")), Formats: []format{}}
		c.Path = cmp.Or(byID[n.Name()], byPath[n.Name()], c.Node)
		name, formats, err := queryCamera(filepath.Join(root, c.Node))
		switch {
		case errors.Is(err, errNoCamera):
			continue
		case err != nil:
			if attribute(root, class, n.Name(), "index") != "0" {
				continue // most likely the metadata node of a camera
			}
			c.Problem = problem(err, "video")
		default:
			c.Name = cmp.Or(name, c.Name)
			c.Formats = formats
			if _, ok := c.pick(); !ok {
				c.Problem = "ffmpeg reads none of its formats"
			}
		}
		all = append(all, c)
	}
	slices.SortFunc(all, func(a, b cameraInfo) int {
		// /dev/v4l/by-id sorts before by-path, and both before /dev/video.
		if a.Path == a.Node && b.Path == b.Node {
			return cmp.Or(cmp.Compare(len(a.Node), len(b.Node)), cmp.Compare(a.Node, b.Node))
		}
		return cmp.Compare(a.Path, b.Path)
	})
	return all
}

// errNoCamera is the error of a node that does not capture video.
var errNoCamera = errors.New("it does not capture video")

// links returns the names that udev has put into dir, by the nodes that they
// lead to. It ignores names that cannot be printed as they are.
func links(root, dir string) map[string]string {
	names := make(map[string]string)
	entries, _ := os.ReadDir(filepath.Join(root, dir))
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(root, dir, e.Name()))
		if node := path.Base(target); err == nil && isVisible(e.Name()) && names[node] == "" {
			names[node] = dir + "/" + e.Name()
		}
	}
	return names
}

// problem returns what to do about a device that cannot be opened.
func problem(err error, group string) string {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return "no permission: add the user to the group " + group
	case errors.Is(err, syscall.EBUSY):
		return "in use by another program"
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENODEV), errors.Is(err, syscall.ENXIO):
		return "not in /dev: unplugged, or kept from this service (PrivateDevices)"
	}
	return err.Error()
}

// listMicrophones returns the devices that capture sound, in the order of their
// cards' ids.
func listMicrophones(root string) []microphoneInfo {
	const class = "sys/class/sound"
	nodes, _ := os.ReadDir(filepath.Join(root, class))
	names := cardNames(root)
	all := []microphoneInfo{}
	for _, n := range nodes {
		var card, device int
		if _, err := fmt.Sscanf(n.Name(), "pcmC%dD%dc", &card, &device); err != nil || n.Name() != fmt.Sprintf("pcmC%dD%dc", card, device) {
			continue
		}
		m := microphoneInfo{Node: "/dev/snd/" + n.Name(), Name: names[card], Device: device}
		m.Card = attribute(root, class, fmt.Sprint("card", card), "id")
		if m.Card == "" || !isVisible(m.Card) || strings.Contains(m.Card, ",") {
			m.Card = strconv.Itoa(card)
		}
		if err := mayOpen(filepath.Join(root, m.Node)); err != nil {
			m.Problem = problem(err, "audio")
		} else if inUse(root, card, device) {
			m.Problem = problem(syscall.EBUSY, "audio")
		}
		all = append(all, m)
	}
	slices.SortFunc(all, func(a, b microphoneInfo) int {
		return cmp.Or(cmp.Compare(a.Card, b.Card), cmp.Compare(a.Device, b.Device))
	})
	return all
}

// cardNames reads /proc/asound/cards, where a card has a line as
// " 0 [Device         ]: USB-Audio - USB PnP Sound Device", and one more.
func cardNames(root string) map[int]string {
	names := make(map[int]string)
	b, _ := os.ReadFile(filepath.Join(root, "proc/asound/cards"))
	for line := range strings.Lines(string(b)) {
		number, rest, _ := strings.Cut(strings.TrimSpace(line), " [")
		_, name, ok := strings.Cut(rest, " - ")
		if n, err := strconv.Atoi(number); err == nil && ok {
			names[n] = printable(name)
		}
	}
	return names
}

// inUse reports whether every substream of a capture device is open. Opening the
// device would tell too, but would keep others out meanwhile.
func inUse(root string, card, device int) bool {
	all, _ := filepath.Glob(filepath.Join(root, fmt.Sprintf("proc/asound/card%d/pcm%dc/sub*/status", card, device)))
	for _, name := range all {
		if b, err := os.ReadFile(name); err != nil || string(b) == "closed\n" {
			return false
		}
	}
	return len(all) > 0
}

// attribute returns the one line of a file in /sys; "" if it cannot be read.
func attribute(root string, elem ...string) string {
	b, _ := os.ReadFile(filepath.Join(root, filepath.Join(elem...)))
	return strings.TrimSuffix(string(b), "\n")
}

func isNumber(s string) bool {
	_, err := strconv.ParseUint(s, 10, 31)
	return err == nil
}

// What ffmpeg makes of its input. README explains it; JSMpeg plays it.
const (
	videoOutput = "-f mpegts -codec:v mpeg1video -b:v 1000k -bf 0 -g 12"
	audioOutput = "-f mpegts -codec:a mp2 -b:a 128k -muxdelay 0.001"
)

// The frame size that is wanted of a camera; the nearest one is used.
const wantWidth, wantHeight = 640, 480

// inputs are the formats that ffmpeg's v4l2 input reads, with its names for
// them, the best first: raw ones in colour, then those that must be decoded.
var inputs = []struct{ fourCC, name string }{
	{"YUYV", "yuyv422"}, {"UYVY", "uyvy422"}, {"YU12", "yuv420p"}, {"NV12", "nv12"}, {"422P", "yuv422p"},
	{"RGB3", "rgb24"}, {"BGR3", "bgr24"}, {"MJPG", "mjpeg"}, {"JPEG", "mjpeg"}, {"H264", "h264"}, {"GREY", "gray"},
}

// mpegRates are the frame rates of MPEG-1, the best first.
// ISO 11172-2 2.4.3.2
var mpegRates = []float64{25, 30, 24, 29.97, 23.976, 50, 60, 59.94}

// choice is the format, size and rate that ffmpeg asks a camera for.
type choice struct {
	input         string
	width, height int
	rate          float64 // 0: not known
}

// pick chooses the size nearest to the wanted one, then a format that comes at a
// full rate, then the best format. It is false if ffmpeg reads none of them.
func (c *cameraInfo) pick() (choice, bool) {
	var best choice
	var least []int
	for preference, in := range inputs {
		for _, f := range c.Formats {
			if f.FourCC != in.fourCC {
				continue
			}
			sizes := f.Sizes
			if len(sizes) == 0 { // its driver does not tell
				sizes = []size{{Width: wantWidth, Height: wantHeight}}
			}
			for _, s := range sizes {
				w, h := s.nearest()
				rate := s.rate()
				slow := 0
				if rate > 0 {
					slow = max(0, int(24-rate))
				}
				score := []int{max(w-wantWidth, wantWidth-w) + max(h-wantHeight, wantHeight-h), slow, preference}
				if least == nil || slices.Compare(score, least) < 0 {
					best, least = choice{in.name, w, h, rate}, score
				}
			}
		}
	}
	return best, least != nil
}

// nearest returns the size in s that is nearest to the wanted one.
func (s size) nearest() (width, height int) {
	return max(s.Width, min(wantWidth, s.MaxWidth)), max(s.Height, min(wantHeight, s.MaxHeight))
}

// rate returns the best rate of s; 0 if none is known.
func (s size) rate() float64 {
	if len(s.Rates) == 0 {
		return 0
	}
	lowest, highest := s.Rates[len(s.Rates)-1], s.Rates[0]
	for _, r := range mpegRates {
		if slices.Contains(s.Rates, r) || s.AnyRate && lowest <= r && r <= highest {
			return r
		}
	}
	return highest
}

// args returns the ffmpeg arguments for a camera, without the URL.
func (c *cameraInfo) args() []string {
	use, ok := c.pick()
	if !ok { // a driver that has another size or rate takes the nearest
		use = choice{"", wantWidth, wantHeight, 25}
	}
	args := []string{"-f", "v4l2"}
	if use.input != "" {
		args = append(args, "-input_format", use.input)
	}
	if use.rate > 0 {
		args = append(args, "-framerate", decimal(use.rate))
	}
	args = append(args, "-video_size", fmt.Sprintf("%dx%d", use.width, use.height), "-i", c.Path)
	if !slices.Contains(mpegRates, use.rate) {
		args = append(args, "-r", "25")
	}
	return append(args, strings.Fields(videoOutput)...)
}

// args returns the ffmpeg arguments for a microphone, without the URL.
func (m *microphoneInfo) args() []string {
	return append([]string{"-f", "alsa", "-channels", "1", "-sample_rate", "48000", "-i", m.input()}, strings.Fields(audioOutput)...)
}

// input returns the microphone's name in ALSA. plughw converts where the card
// has another rate or number of channels.
func (m *microphoneInfo) input() string {
	return fmt.Sprintf("plughw:CARD=%s,DEV=%d", m.Card, m.Device)
}

// postURL returns where ffmpeg posts a feed to.
func postURL(host string, port int, feed string) string {
	return fmt.Sprintf("http://%s:%d/ts/%s", host, port, feed)
}

// shellLine returns an ffmpeg line to paste into a POSIX shell.
func shellLine(args ...string) string {
	line := "ffmpeg"
	for _, a := range args {
		line += " " + shellQuote(a)
	}
	return line
}

// shellQuote returns s as one word for a POSIX shell, quoted where needed.
func shellQuote(s string) string {
	if s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return !isLetterOrDigit(r) && !strings.ContainsRune("/._-:=,+@", r)
	}) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// decimal formats a frame rate.
func decimal(rate float64) string { return strconv.FormatFloat(rate, 'f', -1, 64) }

// perSecond returns the rate of a frame interval in seconds, to three decimals;
// 0 if the interval is invalid.
func perSecond(numerator, denominator uint32) float64 {
	if numerator == 0 {
		return 0
	}
	return math.Round(float64(denominator)/float64(numerator)*1000) / 1000
}

// text prints d for people to read.
func (d devices) text(w io.Writer) {
	for _, c := range d.Cameras {
		fmt.Fprintf(w, "%s: %q\n    %s", c.Feed, c.Name, c.Path)
		if c.Path != c.Node {
			fmt.Fprintf(w, ", now %s", c.Node)
		}
		fmt.Fprintln(w)
		for _, f := range c.Formats {
			fmt.Fprintf(w, "    %q: %q\n", f.FourCC, f.Name)
			for _, s := range f.Sizes {
				fmt.Fprintf(w, "        %s\n", s)
			}
		}
		printLine(w, c.Problem, c.FFmpeg)
	}
	for _, m := range d.Microphones {
		fmt.Fprintf(w, "%s: %q\n    card %s, device %d, now %s\n", m.Feed, m.Name, m.Card, m.Device, m.Node)
		printLine(w, m.Problem, m.FFmpeg)
	}
	if len(d.Cameras) == 0 {
		fmt.Fprintln(w, "no camera on this machine")
	}
	if len(d.Microphones) == 0 {
		fmt.Fprintln(w, "no microphone on this machine")
	}
}

// printLine prints the end of a device's entry: what is wrong, and the ffmpeg line.
func printLine(w io.Writer, problem, line string) {
	if problem != "" {
		fmt.Fprintf(w, "    problem: %s\n", problem)
	}
	fmt.Fprintf(w, "\n    %s\n\n", line)
}

func (s size) String() string {
	var rates []string
	for _, r := range s.Rates {
		rates = append(rates, decimal(r))
	}
	text := fmt.Sprintf("%dx%d", s.Width, s.Height)
	if s.MaxWidth > 0 {
		text += fmt.Sprintf(" to %dx%d", s.MaxWidth, s.MaxHeight)
	}
	switch {
	case len(rates) == 0:
		return text
	case s.AnyRate:
		return text + " at " + strings.Join(rates, " to ") + "/s"
	}
	return text + " at " + strings.Join(rates, ", ") + "/s"
}

// printDevices runs vw devices, and returns the exit status.
func printDevices(asJSON bool, port int, stdout, stderr io.Writer) int {
	d, err := listDevices("/", port)
	if err != nil {
		fmt.Fprintln(stderr, "vw:", err)
		return 1
	}
	if !asJSON {
		d.text(stdout)
		return 0
	}
	e := json.NewEncoder(stdout)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(d); err != nil {
		fmt.Fprintln(stderr, "vw:", err)
		return 1
	}
	return 0
}
