package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"unsafe"
)

// machine makes the files of a machine with cameras and microphones below a
// root: the nodes are plain files.
func machine(t *testing.T) (root string) {
	t.Helper()
	root = t.TempDir()
	files := map[string]string{
		"proc/asound/cards": ` 0 [PCH            ]: HDA-Intel - HDA Intel PCH
                      HDA Intel PCH at 0xf7e10000 irq 30
 1 [Device_1       ]: USB-Audio - USB "PnP"` + "\x1b[31m" + ` Sound Device
                      C-Media Electronics Inc. USB PnP Sound Device at usb-3f980000.usb-1.3, full speed
10 [Device         ]: USB-Audio - USB PnP Sound Device
`,
		"sys/class/sound/card0/id":                "PCH\n",
		"sys/class/sound/card1/id":                "Device_1\n",
		"sys/class/sound/card10/id":               "Device\n",
		"sys/class/sound/card2/id":                "a,b $(reboot)\n",
		"proc/asound/card1/pcm0c/sub0/status":     "state: RUNNING\nowner_pid   : 77\n",
		"proc/asound/card10/pcm0c/sub0/status":    "state: RUNNING\nowner_pid   : 78\n",
		"proc/asound/card10/pcm0c/sub1/status":    "closed\n",
		"sys/class/video4linux/v4l-subdev0/index": "0\n",
	}
	for _, n := range []string{"pcmC0D0p", "pcmC0D2c", "pcmC1D0c", "pcmC10D0c", "pcmC2D0c", "controlC0", "timer", "seq", "pcmC0D0cx"} {
		files["sys/class/sound/"+n+"/dev"] = "116:1\n"
		if n != "pcmC0D2c" {
			files["dev/snd/"+n] = ""
		}
	}
	for n, index := range map[int]int{0: 0, 1: 1, 2: 0, 3: 0, 4: 1, 5: 0, 10: 0, 11: 0, 12: 0} {
		files[fmt.Sprintf("sys/class/video4linux/video%d/index", n)] = fmt.Sprintln(index)
		files[fmt.Sprintf("sys/class/video4linux/video%d/name", n)] = fmt.Sprintln("Name", n, "\x1b")
		if n != 5 {
			files[fmt.Sprintf("dev/video%d", n)] = ""
		}
	}
	for name, text := range files {
		name = filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(name, "/dev/") && !strings.HasPrefix(name, filepath.Join(root, "sys")) {
			mode := os.FileMode(0o666)
			if base := filepath.Base(name); base == "video3" || base == "video4" || base == "pcmC2D0c" {
				mode = 0o444 // ffmpeg wants to write too
			}
			if err := os.Chmod(name, mode); err != nil {
				t.Fatal(err)
			}
		}
	}
	for link, node := range map[string]string{
		"by-id/usb-Acme_It's_$(reboot)-video-index0": "video0",
		"by-id/usb-Acme_It's_$(reboot)-video-index1": "video1",
		"by-id/usb-\x1b[2J-video-index0":             "video10",
		"by-id/usb-Spaced Out-video-index0":          "video2",
		"by-path/platform-1.2-video-index0":          "video2",
		"by-path/platform-1.1-video-index0":          "video0",
	} {
		link = filepath.Join(root, "dev/v4l", link)
		if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("../../"+node, link); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// compile builds a program of testdata/v4l2.
func compile(t *testing.T, name string, flags ...string) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), name)
	args := append(flags, "-Wall", "-Wextra", "-Werror", "-o", path, "testdata/v4l2/"+name+".c")
	if out, err := exec.Command(needs(t, "gcc"), args...).CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	return path
}

// runOn runs the shipped vw on a machine whose kernel is testdata/v4l2.
func runOn(t *testing.T, root string, args ...string) string {
	t.Helper()
	if runtime.GOARCH != "amd64" {
		t.Fatalf("this test runs the binary for linux/amd64, here is %s", runtime.GOARCH)
	}
	cameras := compile(t, "cameras")
	b, err := os.ReadFile(build(t, "linux/amd64"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "vw"), b, 0o755); err != nil {
		t.Fatal(err)
	}
	c := exec.Command(cameras, append([]string{root, "/vw"}, args...)...)
	c.Env = []string{"VW_PORT=8889"}
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("got %v\n%s", err, out)
	}
	return string(out)
}

// TestDevices: what the shipped program lists on a machine with all kinds of
// devices, as JSON and as text.
func TestDevices(t *testing.T) {
	root := machine(t)
	text := runOn(t, root, "devices", "-json")
	if hostile := regexp.MustCompile("[^ -~\n\uFFFD]").FindString(text); hostile != "" {
		t.Errorf("got %q in it, want what can be printed", hostile)
	}
	var got devices
	if err := json.Unmarshal([]byte(text), &got); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	const (
		video   = " -f mpegts -codec:v mpeg1video -b:v 1000k -bf 0 -g 12 http://localhost:8889/ts/video"
		audio   = " -f mpegts -codec:a mp2 -b:a 128k -muxdelay 0.001 http://localhost:8889/ts/audio"
		byID    = "/dev/v4l/by-id/usb-Acme_It's_$(reboot)-video-index0"
		byPath  = "/dev/v4l/by-path/platform-1.2-video-index0"
		mic     = "ffmpeg -f alsa -channels 1 -sample_rate 48000 -i plughw:CARD="
		generic = " -framerate 25 -video_size 640x480 -i "
	)
	want := devices{
		Cameras: []cameraInfo{
			{Feed: "video0", Name: "HD Pro Webcam", Path: byID, Node: "/dev/video0", Formats: []format{
				{"YUYV", "format 0", []size{{Width: 640, Height: 480, Rates: []float64{30, 15, 7.5}}, {Width: 1280, Height: 720, Rates: []float64{10}}}},
				{"MJPG", "format 1", []size{{Width: 1280, Height: 720, Rates: []float64{30, 25}}, {Width: 640, Height: 480, Rates: []float64{30, 25}}}},
			}, FFmpeg: `ffmpeg -f v4l2 -input_format yuyv422 -framerate 30 -video_size 640x480 -i '/dev/v4l/by-id/usb-Acme_It'\''s_$(reboot)-video-index0'` + video + "0"},
			{Feed: "video1", Name: "\uFFFD[2J$(reboot)`'\"\uFFFD\uFFFD\uFFFD1234567890", Path: byPath, Node: "/dev/video2", Formats: []format{
				{"YUYV", "format 0", []size{{Width: 640, Height: 480, Rates: []float64{5}}}},
				{"MJPG", "format 1", []size{{Width: 640, Height: 480, Rates: []float64{15}}}},
			}, FFmpeg: "ffmpeg -f v4l2 -input_format mjpeg -framerate 15 -video_size 640x480 -i " + byPath + " -r 25" + video + "1"},
			{Feed: "video2", Name: "Name 3 \uFFFD", Path: "/dev/video3", Node: "/dev/video3", Formats: []format{}, Problem: "no permission: add the user to the group video",
				FFmpeg: "ffmpeg -f v4l2" + generic + "/dev/video3" + video + "2"},
			{Feed: "video3", Name: "Name 5 \uFFFD", Path: "/dev/video5", Node: "/dev/video5", Formats: []format{}, Problem: "not in /dev: unplugged, or kept from this service (PrivateDevices)",
				FFmpeg: "ffmpeg -f v4l2" + generic + "/dev/video5" + video + "3"},
			{Feed: "video4", Name: "mmal service", Path: "/dev/video10", Node: "/dev/video10", Formats: []format{
				{"YU12", "format 0", []size{{Width: 32, Height: 32, MaxWidth: 2592, MaxHeight: 1944, Rates: []float64{90, 1}, AnyRate: true}}},
			}, FFmpeg: "ffmpeg -f v4l2 -input_format yuv420p" + generic + "/dev/video10" + video + "4"},
			{Feed: "video5", Name: "Depth", Path: "/dev/video11", Node: "/dev/video11", Formats: []format{
				{"INZI", "format 0", []size{{Width: 640, Height: 480, Rates: []float64{30}}}},
			}, Problem: "ffmpeg reads none of its formats", FFmpeg: "ffmpeg -f v4l2" + generic + "/dev/video11" + video + "5"},
		},
		Microphones: []microphoneInfo{
			{Feed: "audio0", Name: "", Card: "2", Device: 0, Node: "/dev/snd/pcmC2D0c", Problem: "no permission: add the user to the group audio", FFmpeg: mic + "2,DEV=0" + audio + "0"},
			{Feed: "audio1", Name: "USB PnP Sound Device", Card: "Device", Device: 0, Node: "/dev/snd/pcmC10D0c", FFmpeg: mic + "Device,DEV=0" + audio + "1"},
			{Feed: "audio2", Name: "USB \"PnP\"\uFFFD[31m Sound Device", Card: "Device_1", Device: 0, Node: "/dev/snd/pcmC1D0c", Problem: "in use by another program", FFmpeg: mic + "Device_1,DEV=0" + audio + "2"},
			{Feed: "audio3", Name: "HDA Intel PCH", Card: "PCH", Device: 2, Node: "/dev/snd/pcmC0D2c", Problem: "not in /dev: unplugged, or kept from this service (PrivateDevices)", FFmpeg: mic + "PCH,DEV=2" + audio + "3"},
		},
	}
	compare(t, "camera", got.Cameras, want.Cameras)
	compare(t, "microphone", got.Microphones, want.Microphones)

	text = runOn(t, root, "devices")
	for _, want := range []string{`video0: "HD Pro Webcam"
    ` + byID + `, now /dev/video0
    "YUYV": "format 0"
        640x480 at 30, 15, 7.5/s
        1280x720 at 10/s
    "MJPG": "format 1"
        1280x720 at 30, 25/s
        640x480 at 30, 25/s

    ffmpeg -f v4l2 `, `
video2: "Name 3 ` + "\uFFFD" + `"
    /dev/video3
    problem: no permission: add the user to the group video

    ffmpeg `, `
        32x32 to 2592x1944 at 90 to 1/s
`, `
audio1: "USB PnP Sound Device"
    card Device, device 0, now /dev/snd/pcmC10D0c

    ffmpeg -f alsa`} {
		if !strings.Contains(text, want) {
			t.Errorf("got\n%s\nwant in it\n%s", text, want)
		}
	}
}

func compare[T any](t *testing.T, what string, got, want []T) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("got %d of %s, want %d", len(got), what, len(want))
	}
	for i := range min(len(got), len(want)) {
		if !reflect.DeepEqual(got[i], want[i]) {
			t.Errorf("%s %d\n got %+v\nwant %+v", what, i, got[i], want[i])
		}
	}
}

// layoutOf is a structure of ours as testdata/v4l2/layout.c prints the kernel's.
func layoutOf(request uintptr, v any) string {
	s := reflect.TypeOf(v)
	text := fmt.Sprintf("%s %#x", s.Name(), request)
	for i := range s.NumField() {
		text += fmt.Sprintf(" %d", s.Field(i).Offset)
	}
	return text + fmt.Sprintf(" %d\n", s.Size())
}

// TestLayout: the structures of the ioctls and their numbers are those of the
// kernel's headers, here and in a program for arm64, which is this test again.
func TestLayout(t *testing.T) {
	t.Parallel()
	got := layoutOf(vidiocQueryCap, v4l2Capability{}) + layoutOf(vidiocEnumFmt, v4l2FmtDesc{}) +
		layoutOf(vidiocEnumFrameSizes, v4l2FrmSizeEnum{}) + layoutOf(vidiocEnumFrameIntervals, v4l2FrmIvalEnum{})
	want, again := os.LookupEnv("VW_LAYOUT")
	if !again {
		out, err := exec.Command(compile(t, "layout")).Output()
		if err != nil {
			t.Fatal(err)
		}
		want = regexp.MustCompile(`[a-z_]+=`).ReplaceAllString(string(out), "") // they have other names in C
	}
	if got != want {
		t.Errorf("%s\n got\n%s\nwant\n%s", runtime.GOARCH, got, want)
	}
	if again {
		fmt.Println("compared on", runtime.GOARCH, unsafe.Sizeof(uintptr(0)))
		return
	}
	qemu, name := needs(t, "qemu-aarch64-static"), filepath.Join(t.TempDir(), "arm64.test")
	c := exec.Command("go", "test", "-c", "-vet=off", "-o", name, ".")
	c.Env = append(os.Environ(), "GOOS=linux", "GOARCH=arm64", "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("go test -c for arm64: %v\n%s", err, out)
	}
	c = exec.Command(qemu, name, "-test.run=^TestLayout$")
	c.Env = append(os.Environ(), "VW_LAYOUT="+want)
	if out, err := c.CombinedOutput(); err != nil || !strings.Contains(string(out), "compared on arm64 8") {
		t.Errorf("on arm64: got %v\n%s", err, out)
	}
}
