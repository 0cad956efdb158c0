package main

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestUnits: what vw writes on a machine with all kinds of devices is right to
// systemd, and closed enough.
func TestUnits(t *testing.T) {
	analyze := needs(t, "systemd-analyze")
	root := machine(t)
	for _, dir := range []string{"units", "proc/self"} {
		if err := os.Mkdir(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Join(root, "units"), 0o777); err != nil { // vw runs as nobody there
		t.Fatal(err)
	}
	if err := os.Symlink("/vw", filepath.Join(root, "proc/self/exe")); err != nil {
		t.Fatal(err)
	}
	out := runOn(t, root, "units", "/units")
	for _, want := range []string{
		"# wrote /units/vw.service\n", "# wrote /units/vw-audio3.service\n", "# note: video2: no permission: add the user to the group video\n",
		"# note: no unit for /dev/video11: ffmpeg reads none of its formats\n",
		"\nsudo systemctl daemon-reload\nsudo systemctl enable --now vw vw-video0 vw-video1 vw-video2 vw-video3 vw-video4 vw-audio0 vw-audio1 vw-audio2 vw-audio3\n",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("got\n%s\nwant in it %q", out, want)
		}
	}
	dir := filepath.Join(root, "units")
	folder, err := readUnits(dir)
	if err != nil {
		t.Fatal(err)
	}
	if want := ` -i "/dev/v4l/by-id/usb-Acme_It's_$$(reboot)-video-index0" `; !strings.Contains(folder["vw-video0.service"], want) {
		t.Errorf("got\n%s\nwant in it %s", folder["vw-video0.service"], want)
	}
	for name, text := range folder {
		// There the programs have other paths than here.
		text = strings.NewReplacer("=/vw ", "="+build(t, "linux/amd64")+" ", "/usr/bin/ffmpeg", needs(t, "ffmpeg")).Replace(text)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for name := range folder {
		path := filepath.Join(dir, name)
		out, _ := exec.Command(analyze, "verify", "--man=no", "--recursive-errors=no", path).CombinedOutput()
		for line := range strings.Lines(string(out)) {
			if strings.Contains(line, "vw") {
				t.Errorf("verify: %s", line)
			}
		}
		out, err := exec.Command(analyze, "security", "--offline=true", "--no-pager", "--threshold=20", path).CombinedOutput()
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		t.Logf("%s: %s", name, lines[len(lines)-1])
		if err != nil {
			t.Errorf("security: got %v, want an exposure of at most 2.0\n%s", err, out)
		}
	}
}

// TestUnitsStay: what exists is not changed, and a device keeps its feed.
func TestUnitsStay(t *testing.T) {
	dir := t.TempDir()
	write := func(paths ...string) string {
		t.Helper()
		m := &unitMaker{vw: "/usr/local/bin/vw", ffmpeg: "/usr/bin/ffmpeg", port: 8888, devices: devices{Microphones: []microphoneInfo{{Card: "Device"}}}}
		for _, p := range paths {
			m.devices.Cameras = append(m.devices.Cameras, cameraInfo{Path: p, Node: "/dev/video" + p[len(p)-1:]})
		}
		var err error
		if m.folder, err = readUnits(dir); err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		if err := m.run(dir, &out); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	change := func(name, old, new string) {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || !strings.Contains(string(b), old) {
			t.Fatalf("%s: got %q, %v, want %q in it", name, b, err, old)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(strings.ReplaceAll(string(b), old, new)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	const enable = "sudo systemctl daemon-reload\nsudo systemctl enable --now vw vw-video0 vw-video1 vw-audio0\n"
	for _, step := range []struct {
		name string
		out  string
	}{
		{"new", write("/dev/b 1", "/dev/c2")},
		{"again", write("/dev/b 1", "/dev/c2")},
	} {
		if !strings.HasSuffix(step.out, enable) || strings.Contains(step.out, "wrote") != (step.name == "new") || strings.Contains(step.out, "differs") {
			t.Errorf("%s: got\n%s", step.name, step.out)
		}
	}

	// Two are edited, one is somebody's own, and a camera comes that is first.
	change("vw.service", "DynamicUser=yes", "User=lab")
	change("vw-video0.service", "1000k", "2000k")
	change("vw-video1.service", "/dev/c2", "/dev/video2")
	change("vw-audio0.service", "plughw:CARD=Device,DEV=0", "hw:CARD=Device")
	if err := os.Symlink("/dev/null", filepath.Join(dir, "vw-video2.service")); err != nil {
		t.Fatal(err)
	}
	before, err := readUnits(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := write("/dev/a3", "/dev/b 1", "/dev/c2")
	after, err := readUnits(dir)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range before {
		if after[name] != text {
			t.Errorf("%s: got\n%s\nwant\n%s", name, after[name], text)
		}
	}
	if !strings.Contains(after["vw-video3.service"], " -i /dev/a3 ") || len(after) != len(before)+1 {
		t.Errorf("got %q, want one more, vw-video3.service for /dev/a3", after)
	}
	if got := strings.Count(out, "it differs from what would be written"); got != 4 {
		t.Errorf("got %d that differ, want 4\n%s", got, out)
	}
}

// TestUnitsPrinted: without a folder nothing is written, and what is printed
// says which file it is.
func TestUnitsPrinted(t *testing.T) {
	m := &unitMaker{vw: "/home/pi/vw", port: 9999}
	var out bytes.Buffer
	if err := m.run("", &out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"# vw.service\n\n[Unit]\n", "\nExecStart=/home/pi/vw stream\n", "\nEnvironment=VW_PORT=9999 VW_STATE=/var/lib/vw/rules\n",
		"\n# note: vw.service cannot see /home/pi/vw: ", "\n# note: ffmpeg is missing: ", "\n# note: no camera or microphone was found: ",
		"\n# sudo systemctl enable --now vw\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("got\n%s\nwant in it %q", &out, want)
		}
	}
}

// TestUnitsRefused: a folder that does not exist, or that may not be written.
func TestUnitsRefused(t *testing.T) {
	var stdout, stderr bytes.Buffer
	if got := run(t.Context(), []string{"units", filepath.Join(t.TempDir(), "none")}, nil, &stdout, &stderr); got != 1 || !strings.Contains(stderr.String(), "no such file") || stdout.Len() > 0 {
		t.Errorf("got status %d, %q and %q, want 1 and why", got, &stdout, &stderr)
	}
}

// TestFifoLine: the line of docs/odroid.md goes on by itself when vw is killed
// and started again; a test picture stands for its camera.
func TestFifoLine(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile("docs/odroid.md")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`(?s)ffmpeg -f v4l2 [^\n]*? -i /dev/video0 (-map [^\n]*\n.*?) http://localhost:8888(/ts/video0)\n`).FindStringSubmatch(string(b))
	if found == nil {
		t.Fatal("docs/odroid.md has no such line")
	}
	vw := build(t, "linux/amd64")
	listen := func(port string) (p *process, addr string) {
		cmd := exec.Command(vw, "stream")
		cmd.Env = []string{"VW_PORT=" + port, "VW_HOST=127.0.0.1"}
		p = start(t, "vw", cmd)
		return p, p.expect(t, 0, startupTime, `addr=(127\.0\.0\.1:\d+)\n`)[1]
	}
	p, addr := listen("0")
	options := strings.Fields(strings.ReplaceAll(found[1], "\\\n", " "))
	ffmpeg := startFFmpeg(t, realTime, videoInput, options, []string{"http://" + addr + found[2]})
	flows := func() error {
		a, err := http.Get("http://" + addr + "/metrics")
		if err != nil {
			return err
		}
		defer a.Body.Close()
		b, err := io.ReadAll(a.Body)
		if !strings.Contains(string(b), `vw_feed_live{feed="video0"} 1`) {
			return fmt.Errorf("video0 is not live: %v", err)
		}
		return err
	}
	eventually(t, startupTime, flows)
	p.kill(t)
	_, port, _ := strings.Cut(addr, ":")
	_, addr = listen(port)
	eventually(t, startupTime, flows)
	if ffmpeg.ended() {
		t.Errorf("ffmpeg ended: %s", ffmpeg.out.String())
	}
}

func TestUnitQuote(t *testing.T) {
	for in, want := range map[string]string{
		"-i": "-i", "/dev/video0": "/dev/video0", "100%": "100%%", "$(x)": "$$(x)", "a b": `"a b"`, `a"b\`: `"a\"b\\"`,
		"it's": `"it's"`, ";": `";"`, "": `""`,
	} {
		if got := unitQuote(in); got != want {
			t.Errorf("%q: got %s, want %s", in, got, want)
		}
	}
}
