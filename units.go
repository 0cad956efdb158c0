// The services that vw writes for systemd: one for vw, and one for each camera
// and microphone, which starts ffmpeg again whenever it ends.
//
// A file that exists is never changed. A device that a unit in the folder
// reads already keeps that unit, so its feed keeps its name when another
// device is plugged in.

package main

import (
	"cmp"
	_ "embed"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

//go:embed units/vw.service
var vwTemplate string

//go:embed units/feed.service
var feedTemplate string

// unitFile is a service of systemd.
type unitFile struct{ name, text string }

// unitMaker makes units of what is on this machine.
type unitMaker struct {
	vw, ffmpeg string // paths of the programs; ffmpeg is "" if it is missing
	port       int
	devices    devices
	folder     map[string]string // the units that exist: their text by file name

	units []unitFile
	notes []string // what somebody should see to
}

// vwUnit makes the unit of vw itself.
func (m *unitMaker) vwUnit() {
	text := strings.NewReplacer("{{vw}}", unitQuote(m.vw), "{{port}}", strconv.Itoa(m.port)).Replace(vwTemplate)
	m.units = append(m.units, unitFile{"vw.service", text})
	for _, hidden := range []string{"/home/", "/root/", "/run/user/", "/tmp/", "/var/tmp/"} { // ProtectHome, PrivateTmp
		if strings.HasPrefix(m.vw, hidden) {
			m.notes = append(m.notes, fmt.Sprintf("vw.service cannot see %s: copy it to /usr/local/bin/vw, and let that write the units", m.vw))
		}
	}
}

// feedUnits makes a unit for each device that ffmpeg can read.
func (m *unitMaker) feedUnits() {
	if m.ffmpeg == "" {
		m.notes = append(m.notes, "ffmpeg is missing: sudo apt-get install ffmpeg")
	}
	for _, c := range m.devices.Cameras {
		if _, ok := c.pick(); !ok && len(c.Formats) > 0 {
			m.notes = append(m.notes, fmt.Sprintf("no unit for %s: %s", c.Path, c.Problem))
			continue
		}
		m.feedUnit("video", "camera", "char-video4linux", c.Problem, c.args(), c.Path, c.Node)
	}
	for _, mic := range m.devices.Microphones {
		inputs := []string{mic.input(), strings.TrimPrefix(mic.input(), "plug")}
		if card, ok := strings.CutSuffix(inputs[1], ",DEV=0"); ok {
			inputs = append(inputs, card, "plug"+card)
		}
		m.feedUnit("audio", "microphone", "char-alsa", mic.Problem, mic.args(), inputs...)
	}
	if len(m.devices.Cameras)+len(m.devices.Microphones) == 0 {
		m.notes = append(m.notes, "no camera or microphone was found: plug one in, and run this again")
	}
}

// feedUnit makes the unit of a device that ffmpeg knows by any of inputs. kind
// is the name of its feeds and of the group that may open it.
func (m *unitMaker) feedUnit(kind, device, nodes, problem string, args []string, inputs ...string) {
	feed := m.feedOf(kind, inputs)
	words := slices.Concat([]string{cmp.Or(m.ffmpeg, "/usr/bin/ffmpeg"), "-nostdin", "-v", "warning"},
		args, []string{postURL("127.0.0.1", m.port, feed)})
	for i, w := range words {
		words[i] = unitQuote(w)
	}
	text := strings.NewReplacer("{{ffmpeg}}", strings.Join(words, " "), "{{device}}", device,
		"{{feed}}", feed, "{{group}}", kind, "{{nodes}}", nodes).Replace(feedTemplate)
	m.units = append(m.units, unitFile{"vw-" + feed + ".service", text})
	if problem != "" {
		m.notes = append(m.notes, fmt.Sprintf("%s: %s", feed, problem))
	}
}

// feedOf returns the feed of the unit in the folder that reads the device, or
// the first that no unit has.
func (m *unitMaker) feedOf(kind string, inputs []string) string {
	taken := func(file string) bool {
		return slices.ContainsFunc(m.units, func(u unitFile) bool { return u.name == file })
	}
	for file, text := range m.folder {
		reads := func(input string) bool { return strings.Contains(text, " -i "+unitQuote(input)+" ") }
		if strings.HasPrefix(file, "vw-"+kind) && !taken(file) && slices.ContainsFunc(inputs, reads) {
			return strings.TrimSuffix(strings.TrimPrefix(file, "vw-"), ".service")
		}
	}
	for i := 0; ; i++ {
		feed := fmt.Sprint(kind, i)
		file := "vw-" + feed + ".service"
		if _, exists := m.folder[file]; !exists && !taken(file) {
			return feed
		}
	}
}

// unitQuote returns s as one word of a command line in a unit.
// systemd.service(5), COMMAND LINES
func unitQuote(s string) string {
	s = strings.NewReplacer("%", "%%", "$", "$$").Replace(s)
	if s != "" && !strings.ContainsAny(s, " \t\"'\\;") {
		return s
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
}

// write writes a unit into dir, unless there is a file of that name.
func (m *unitMaker) write(dir string, u unitFile, out io.Writer) error {
	name := filepath.Join(dir, u.name)
	if text, ok := m.folder[u.name]; ok {
		how := "it is as it would be written"
		if text != u.text {
			how = "it differs from what would be written"
		}
		_, err := fmt.Fprintf(out, "# kept %s: %s\n", name, how)
		return err
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = io.WriteString(f, u.text)
	if err := cmp.Or(err, f.Close()); err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "# wrote %s\n", name)
	return err
}

// run writes all units into dir, or prints them if dir is "", and what to do next.
func (m *unitMaker) run(dir string, out io.Writer) error {
	m.vwUnit()
	m.feedUnits()
	names := ""
	for _, u := range m.units {
		names += " " + strings.TrimSuffix(u.name, ".service")
		if dir == "" {
			fmt.Fprintf(out, "# %s\n\n%s\n", u.name, u.text)
		} else if err := m.write(dir, u, out); err != nil {
			return err
		}
	}
	for _, note := range m.notes {
		fmt.Fprintln(out, "# note:", note)
	}
	prefix := ""
	if dir == "" {
		prefix = "# "
	}
	_, err := fmt.Fprintf(out, "%[1]ssudo systemctl daemon-reload\n%[1]ssudo systemctl enable --now%[2]s\n", prefix, names)
	return err
}

// readUnits returns the text of the units of vw in dir, by file name.
func readUnits(dir string) (map[string]string, error) {
	folder := make(map[string]string)
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		if strings.HasPrefix(f.Name(), "vw") && strings.HasSuffix(f.Name(), ".service") {
			b, err := os.ReadFile(filepath.Join(dir, f.Name()))
			if err != nil {
				return nil, err
			}
			folder[f.Name()] = string(b)
		}
	}
	return folder, nil
}

// printUnits runs vw units DIR, or prints the units if dir is "". It returns the
// exit status.
func printUnits(dir string, port int, stdout, stderr io.Writer) int {
	m := &unitMaker{port: port}
	var err error
	if m.vw, err = os.Executable(); err == nil {
		m.devices, err = listDevices("/", port)
	}
	if err == nil && dir != "" {
		m.folder, err = readUnits(dir)
	}
	m.ffmpeg, _ = exec.LookPath("ffmpeg")
	if err == nil {
		err = m.run(dir, stdout)
	}
	if err != nil {
		fmt.Fprintln(stderr, "vw:", err)
		return 1
	}
	return 0
}
