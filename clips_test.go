// Transport streams for tests: made by tsMaker, a camera or ffmpeg, and judged
// by readers that share no code with the product.

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// tsMaker writes a valid transport stream of one program for tests.
type tsMaker struct {
	bytes.Buffer
	cc map[uint16]byte
}

const (
	testPMT   = 0x1000
	testVideo = 0x100
	testAudio = 0x101
)

func (t *tsMaker) counter(pid uint16) byte {
	if t.cc == nil {
		t.cc = make(map[uint16]byte)
	}
	t.cc[pid] = (t.cc[pid] + 1) & 15
	return t.cc[pid]
}

// section writes a section into one packet, with its CRC.
func (t *tsMaker) section(pid uint16, b ...byte) {
	binary.BigEndian.PutUint16(b[1:], 0xb000|uint16(len(b)+4-3))
	b = binary.BigEndian.AppendUint32(b, crc32MPEG(b))
	p := append([]byte{0x47, 0x40 | byte(pid>>8), byte(pid), 0x10 | t.counter(pid), 0}, b...)
	t.Write(append(p, bytes.Repeat([]byte{0xff}, packetSize-len(p))...))
}

// tables writes a PAT and a PMT; tracks are pairs of PID and stream_type.
func (t *tsMaker) tables(tracks ...int) {
	t.section(patPID, 0, 0, 0, 0, 1, 0xc1, 0, 0, 0, 1, 0xe0|testPMT>>8, testPMT&0xff)
	pmt := []byte{2, 0, 0, 0, 1, 0xc1, 0, 0, 0xe0 | byte(tracks[0]>>8), byte(tracks[0]), 0xf0, 0}
	for i := 0; i < len(tracks); i += 2 {
		pmt = append(pmt, byte(tracks[i+1]), 0xe0|byte(tracks[i]>>8), byte(tracks[i]), 0xf0, 0)
	}
	t.section(testPMT, pmt...)
}

// packets returns the packets of a frame: its last one is stuffed, unless the
// size fills it.
func (t *tsMaker) packets(f pes) []byte {
	b := []byte{0, 0, 1, f.id, 0, 0, 0x80, 0x80, 5, 0x21, 0, 1, 0, 1}
	writeTime(b[9:], f.pts&(wrap-1))
	if f.length {
		binary.BigEndian.PutUint16(b[4:], uint16(8+f.size))
	}
	for i := range f.size {
		b = append(b, byte(i*7)|1)
	}
	var out []byte
	for start := byte(0x40); len(b) > 0; start = 0 {
		var field []byte
		if start != 0 && f.key {
			field = []byte{7, 0x50, 0, 0, 0, 0, 0x7e, 0}
		}
		room := packetSize - 4 - len(field)
		if pad := room - len(b); pad > 0 {
			if field == nil {
				field, pad = []byte{byte(pad - 1)}, pad-1
				if pad > 0 {
					field, pad = append(field, 0), pad-1
				}
			} else {
				field[0] += byte(pad)
			}
			field = append(field, bytes.Repeat([]byte{0xff}, pad)...)
		}
		control := byte(0x10)
		if field != nil {
			control = 0x30
		}
		p := append([]byte{0x47, start | byte(f.pid>>8), byte(f.pid), control | t.counter(f.pid)}, field...)
		n := packetSize - len(p)
		out = append(append(out, p...), b[:n]...)
		b = b[n:]
	}
	return out
}

func (t *tsMaker) frame(f pes) { t.Write(t.packets(f)) }

// pes is one frame as tsMaker writes it.
type pes struct {
	pid    uint16
	id     byte // stream_id
	key    bool // random_access_indicator, and a PCR
	pts    ticks
	size   int  // bytes of payload
	length bool // PES_packet_length tells it
}

// testClip is n frames of video at 25/s, keyframes every 12 with PSI before.
func testClip(n, size int) []byte {
	var t tsMaker
	for i := range n {
		if i%12 == 0 {
			t.tables(testVideo, 0x01)
		}
		t.frame(pes{pid: testVideo, id: 0xe0, key: i%12 == 0, pts: 126000 + ticks(i)*3600, size: size})
	}
	return t.Bytes()
}

// camera makes the frames of an ffmpeg that begins at 1.4 s.
type camera struct {
	tsMaker
	pid  uint16
	kind int // stream_type
	id   byte
	n    int
	gop  int
	step ticks
	size int

	sound bool // there is a track of sound beside the picture
}

func newCamera() *camera {
	return &camera{pid: 0x100, kind: 1, id: 0xe0, gop: 12, step: 3600, size: 2000}
}

func newMicrophone() *camera {
	return &camera{pid: 0x100, kind: 3, id: 0xc0, gop: 1, step: 2160, size: 576}
}

func (c *camera) next() []byte {
	c.Reset()
	pts := 126000 + ticks(c.n)*c.step
	tracks := []int{int(c.pid), c.kind}
	if c.sound {
		tracks = append(tracks, testAudio, typeMPEG1Audio)
	}
	c.tables(tracks...)
	c.frame(pes{pid: c.pid, id: c.id, key: c.n%c.gop == 0, pts: pts, size: c.size, length: c.id != 0xe0})
	if c.sound {
		c.frame(pes{pid: testAudio, id: 0xc0, pts: pts, size: 576, length: true})
	}
	c.n++
	return c.Bytes()
}

// frames runs the framer over r, and returns its messages and how it ended.
func frames(r io.Reader) (all []*message, err error) {
	f := newFramer(func(m *message) { all = append(all, m) })
	for err == nil {
		err = f.read(r)
	}
	if err == io.EOF {
		err = nil
	}
	return all, err
}

func joined(all []*message) []byte {
	var b []byte
	for _, m := range all {
		b = append(b, m.payload()...)
	}
	return b
}

// split gives a part of what is asked for, at most so many bytes; always the
// same parts.
type split struct {
	io.Reader
	most uint32
	seed *uint32
}

func splitUp(b []byte, most uint32) split { return split{bytes.NewReader(b), most, new(uint32)} }

func (s split) Read(p []byte) (int, error) {
	*s.seed = *s.seed*1664525 + 1013904223
	return s.Reader.Read(p[:min(len(p), int(1+(*s.seed>>8)%s.most))])
}

// runFFmpeg returns what ffmpeg writes to its output "-".
func runFFmpeg(t *testing.T, args ...[]string) []byte {
	t.Helper()
	c := exec.Command(needs(t, "ffmpeg"), slices.Concat([]string{"-nostdin", "-v", "error"}, slices.Concat(args...))...)
	c.Stderr = t.Output()
	b, err := c.Output()
	if err != nil {
		t.Fatal("ffmpeg: ", err)
	}
	return b
}

// videoClip returns three seconds of video as the owner's ffmpeg makes it.
func videoClip(t *testing.T) []byte {
	t.Helper()
	return runFFmpeg(t, videoInput, threeSecs, videoCodec, []string{"-"})
}

// startFFmpeg starts ffmpeg; it is silent unless something is wrong.
func startFFmpeg(t *testing.T, args ...[]string) *process {
	t.Helper()
	return start(t, "ffmpeg", exec.Command(needs(t, "ffmpeg"), slices.Concat([]string{"-nostdin", "-v", "error"}, slices.Concat(args...))...))
}

// clip is what ffmpeg makes of a test picture, a message a frame.
type clip struct {
	frames [][]byte
	pts    map[ticks]int // frame by PTS
}

// ffmpegClip makes n seconds of 25 frames/s, keyframes every 480 ms.
func ffmpegClip(t *testing.T, kbit, n int) clip {
	t.Helper()
	rate := fmt.Sprint(kbit, "k")
	// Noise makes ffmpeg need the bits.
	out := runFFmpeg(t, []string{"-f", "lavfi", "-i", "testsrc2=size=640x480:rate=25,noise=alls=40:allf=t", "-t", fmt.Sprint(n),
		"-codec:v", "mpeg1video", "-b:v", rate, "-minrate", rate, "-maxrate", rate, "-bufsize", "400k", "-bf", "0", "-g", "12", "-f", "mpegts", "-"})
	c := clip{pts: make(map[ticks]int)}
	all, err := frames(splitUp(out, packetSize))
	if err != nil {
		t.Fatal(err)
	}
	for i, m := range all {
		c.frames = append(c.frames, m.payload())
		for p := packet(m.payload()); len(p) > 0; p = p[packetSize:] {
			if pts, _ := timestamps(p.payload()); p.unitStart() && pts != nil {
				c.pts[readTime(pts)] = i
			}
		}
	}
	return c
}

// film posts the clip to a feed in real time, through the framer, in a
// goroutine that ends with the clip or ctx. It returns when the first was.
func (c clip) film(ctx context.Context, x *mux, name string, tasks *sync.WaitGroup) time.Time {
	start := time.Now()
	r, w := io.Pipe()
	tasks.Go(func() {
		defer w.Close()
		for i, frame := range c.frames {
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Until(start.Add(time.Duration(i) * 40 * time.Millisecond))):
			}
			w.Write(frame)
		}
	})
	tasks.Go(func() { x.publish(name, &publisher{interrupt: func() { r.Close() }}, r) })
	return start
}

// decodes fails the test unless ffmpeg decodes every track of a file without a
// complaint.
func decodes(t *testing.T, name string, options ...string) {
	t.Helper()
	args := slices.Concat([]string{"-nostdin", "-v", "error", "-i", name, "-map", "0"}, options, []string{"-f", "null", "-"})
	out, err := exec.Command(needs(t, "ffmpeg"), args...).CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("ffmpeg decodes %s with %v and says %.2000q, want nothing", name, err, out)
	}
}

// tsCheck reads a program as a strict receiver would: the tests' own reading
// of ISO 13818-1, apart from the packet accessors.
type tsCheck struct {
	cc       map[uint16]int
	version  int
	versions int              // steps of the PMT
	pmt      []byte           // tracks of it
	types    map[uint16]byte  // stream_type by PID
	pcr      int64            // 27 MHz
	gap      int64            // the largest between two PCR
	dts      map[uint16]ticks // last, by PID
	pts      map[uint16][]ticks
	jumps    int // discontinuity_indicator
	problems []string
}

func newTSCheck() *tsCheck {
	return &tsCheck{cc: map[uint16]int{}, version: -1, types: map[uint16]byte{}, dts: map[uint16]ticks{}, pts: map[uint16][]ticks{}}
}

func (c *tsCheck) problem(format string, args ...any) {
	c.problems = append(c.problems, fmt.Sprintf(format, args...))
}

func (c *tsCheck) read(b []byte) {
	if len(b)%packetSize != 0 {
		c.problem("%d bytes are not whole packets", len(b))
		return
	}
	for ; len(b) > 0; b = b[packetSize:] {
		p := packet(b[:packetSize])
		if p[0] != syncByte {
			c.problem("a packet begins with %#x", p[0])
			return
		}
		c.packet(p)
	}
}

func (c *tsCheck) packet(p packet) {
	pid, payload := p.pid(), p.payload()
	a := p.adaptation()
	jump := len(a) > 0 && a[0]&0x80 != 0
	if jump {
		c.jumps++
	}
	if last, ok := c.cc[pid]; ok && !jump {
		want := last
		if payload != nil {
			want = (last + 1) & 15
		}
		if p.continuity() != want {
			c.problem("PID %#x: continuity counter %d, want %d", pid, p.continuity(), want)
		}
	}
	c.cc[pid] = p.continuity()
	switch {
	case payload == nil && pid != outPCR:
	case pid == patPID || pid == outPMT:
		c.section(pid, payload)
	case pid == outPCR:
		base := int64(a[1])<<25 | int64(a[2])<<17 | int64(a[3])<<9 | int64(a[4])<<1 | int64(a[5])>>7
		pcr := base*300 + int64(a[5]&1)<<8 + int64(a[6])
		if c.pcr > 0 {
			if pcr <= c.pcr {
				c.problem("PCR %d after %d", pcr, c.pcr)
			}
			c.gap = max(c.gap, pcr-c.pcr)
		}
		c.pcr = pcr
	case c.types[pid] == 0:
		c.problem("PID %#x is not in the PMT", pid)
	case len(a) > 0 && a[0]&0x18 != 0:
		c.problem("PID %#x: a feed's PCR", pid)
	case p.unitStart():
		pts, dts := timestamps(payload)
		if pts == nil {
			break
		}
		if dts == nil {
			dts = pts
		}
		if d := readTime(dts); c.dts[pid] != 0 && signed33(d-c.dts[pid]) <= 0 {
			c.problem("PID %#x: DTS %d after %d", pid, d, c.dts[pid])
		}
		c.dts[pid] = readTime(dts)
		c.pts[pid] = append(c.pts[pid], readTime(pts))
	}
}

func (c *tsCheck) section(pid uint16, payload []byte) {
	n := 3 + int(binary.BigEndian.Uint16(payload[2:])&0xfff)
	s := payload[1 : 1+n]
	if crc32MPEG(s) != 0 {
		c.problem("PID %#x: wrong CRC", pid)
	}
	if pid == patPID {
		return
	}
	version, tracks := int(s[5]>>1&31), bytes.Clone(s[12:n-4])
	switch {
	case version == c.version && !bytes.Equal(tracks, c.pmt):
		c.problem("the PMT changed, its version did not")
	case version != c.version && c.version >= 0:
		c.versions++
		if bytes.Equal(tracks, c.pmt) {
			c.problem("the version of the PMT changed, its content did not")
		}
	}
	c.version, c.pmt = version, tracks
	clear(c.types)
	for i := 0; i+5 <= len(tracks); i += 5 + int(binary.BigEndian.Uint16(tracks[i+3:])&0xfff) {
		c.types[binary.BigEndian.Uint16(tracks[i+1:])&0x1fff] = tracks[i]
	}
}

// unit is one PES packet in a transport stream: the packets from the one that
// starts it to the last one of its PID that has payload.
type unit struct {
	pid         int
	first, last int  // packets
	video, key  bool // key: random_access_indicator is set
}

// tsPID and tsPayload read one packet of 188 bytes. ISO 13818-1 2.4.3.2.
func tsPID(p []byte) int { return int(p[1]&0x1f)<<8 | int(p[2]) }

func tsPayload(p []byte) []byte {
	switch p[3] >> 4 & 3 {
	case 1:
		return p[4:188]
	case 3:
		return p[min(5+int(p[4]), 188):188]
	}
	return nil
}

func tsPacket(ts []byte, i int) []byte { return ts[i*188 : (i+1)*188] }

// units lists the PES packets of ts in the order of their starts.
func units(ts []byte) ([]unit, error) {
	var list []unit
	open := make(map[int]int) // PID: index in list
	for i := range len(ts) / 188 {
		p := tsPacket(ts, i)
		if p[0] != 0x47 {
			return nil, fmt.Errorf("packet %d begins with %#x", i, p[0])
		}
		pid, payload := tsPID(p), tsPayload(p)
		if len(payload) == 0 || pid == 0x1fff {
			continue
		}
		u, ok := open[pid]
		switch starts := p[1]&0x40 != 0; {
		case starts && bytes.HasPrefix(payload, []byte{0, 0, 1}):
			open[pid] = len(list)
			list = append(list, unit{
				pid: pid, first: i, last: i, video: payload[3]&0xf0 == 0xe0,
				key: p[3]&0x20 != 0 && p[4] > 0 && p[5]&0x40 != 0,
			})
		case !starts && ok:
			list[u].last = i
		}
	}
	return list, nil
}

// hasPAT tells whether a PAT comes before the first PES packet.
func hasPAT(ts []byte) bool {
	for i := range len(ts) / 188 {
		switch p := tsPacket(ts, i); {
		case tsPID(p) == 0:
			return true
		case bytes.HasPrefix(tsPayload(p), []byte{0, 0, 1}):
			return false
		}
	}
	return false
}

// lastTable returns the last packet of a PID in ts; nil without one.
func lastTable(ts []byte, pid int) []byte {
	for i := len(ts)/188 - 1; i >= 0; i-- {
		if p := tsPacket(ts, i); tsPID(p) == pid {
			return p
		}
	}
	return nil
}

// delivery says what arrived of a post.
type delivery struct {
	from     int    // packet of the post that it begins with
	joinPSI  bool   // PAT and PMT were sent ahead of it
	units    []unit // from there on
	messages int
	bytes    int
	largest  int // bytes of a frame
	longest  int // bytes of a message
	nulls    int // null packets
	inside   int // packets between a frame's own that are not of its PID
	byAudio  int // messages of a post with video that begin with another frame
}

func (d delivery) String() string {
	return fmt.Sprintf("%d messages, %d frames, %d bytes from packet %d on; PSI ahead %v; largest frame %d, longest message %d bytes; %d null packets, %d inside frames; %d messages begin with audio",
		d.messages, len(d.units), d.bytes, d.from, d.joinPSI, d.largest, d.longest, d.nulls, d.inside, d.byAudio)
}

// checkFrames tells whether the messages that start at those packets of ts hold
// whole frames, each with the tables before it, and a keyframe only as the
// first. What comes after the last frame of ts has no frame to be with.
func (d *delivery) checkFrames(ts []byte, starts []int, video bool) error {
	in := func(packet int) int { // message of a packet
		i, ok := slices.BinarySearch(starts, packet)
		if !ok {
			i--
		}
		return i
	}
	first := make([]*unit, len(starts)) // frame of each message
	end := make([]int, len(starts))     // packet after the last of its frames
	for i := range d.units {
		u := &d.units[i]
		m := in(u.first)
		if in(u.last) != m {
			return fmt.Errorf("message %d ends inside a frame: packets %d to %d, cut at %d", m, u.first, u.last, starts[m+1])
		}
		if first[m] == nil {
			first[m] = u
		} else if u.video && u.key {
			return fmt.Errorf("message %d has a keyframe that is not its first frame, at packet %d", m, u.first)
		}
		end[m] = max(end[m], u.last+1)
		size := 0
		for j := u.first; j <= u.last; j++ {
			if tsPID(tsPacket(ts, j)) == u.pid {
				size += 188
			} else {
				d.inside++
			}
		}
		d.largest = max(d.largest, size)
	}
	for m, u := range first {
		if u == nil {
			return fmt.Errorf("message %d, from packet %d on, has no frame", m, starts[m])
		}
		if video && !u.video {
			d.byAudio++
		}
		for i := starts[m]; i < u.first; i++ {
			p := tsPacket(ts, i)
			if pid := tsPID(p); pid == 0x1fff {
				d.nulls++
			} else if pid == u.pid && len(tsPayload(p)) > 0 {
				return fmt.Errorf("message %d begins inside a frame, at packet %d", m, i)
			}
		}
		if m+1 < len(starts) && end[m] < starts[m+1] {
			return fmt.Errorf("message %d has %d packets after its last frame, which belong to the next", m, starts[m+1]-end[m])
		}
	}
	return nil
}

// checkDelivery tells whether got is the end of what was posted, byte for byte,
// in binary messages of whole frames. Ahead of it there may be the PAT and PMT
// that were in force, in a message of their own, if it has no PAT itself.
func checkDelivery(posted []byte, got []recorded, video bool) (delivery, error) {
	var d delivery
	for i, m := range got {
		if m.kind != "binary" {
			return d, fmt.Errorf("message %d is %s, want binary", i, m.kind)
		}
		if len(m.payload) == 0 || len(m.payload)%188 != 0 {
			return d, fmt.Errorf("message %d has %d bytes, not whole packets", i, len(m.payload))
		}
	}
	var ahead []byte
	if len(got) > 0 && len(got[0].payload) == 2*188 {
		if none, err := units(got[0].payload); err == nil && len(none) == 0 {
			ahead, got = got[0].payload, got[1:]
		}
	}
	if len(got) == 0 {
		return d, errors.New("no message with a frame")
	}
	if own := hasPAT(got[0].payload); own && ahead != nil {
		return d, errors.New("a PAT was sent ahead of a frame that has its own PAT")
	} else if !own && ahead == nil {
		return d, errors.New("no PAT comes before the first frame")
	}

	var rest []byte
	var starts []int // packets, by message
	for _, m := range got {
		starts = append(starts, len(rest)/188)
		rest = append(rest, m.payload...)
		d.longest = max(d.longest, len(m.payload))
	}
	d.messages, d.bytes = len(got), len(rest)
	if len(rest) > len(posted) {
		return d, fmt.Errorf("got %d bytes, more than was posted, %d", len(rest), len(posted))
	}
	d.from = (len(posted) - len(rest)) / 188
	if want := posted[len(posted)-len(rest):]; !bytes.Equal(rest, want) {
		at := 0
		for rest[at] == want[at] {
			at++
		}
		return d, fmt.Errorf("what arrived, %d of %d bytes, differs from the end of the post at byte %d; its first packet is at byte %d of the post",
			len(rest), len(posted), at, bytes.Index(posted, rest[:188]))
	}
	if ahead != nil {
		pat := lastTable(posted[:d.from*188], 0)
		if pat == nil {
			return d, errors.New("a PAT was sent that is not of the post")
		}
		pmt := lastTable(posted[:d.from*188], int(binary.BigEndian.Uint16(pat[15:]))&0x1fff)
		if want := slices.Concat(pat, pmt); !bytes.Equal(ahead, want) {
			return d, fmt.Errorf("PSI ahead: got %x, want the last of the post, %x", ahead, want)
		}
		d.joinPSI = true
	}
	var err error
	if d.units, err = units(rest); err != nil {
		return d, err
	}
	return d, d.checkFrames(rest, starts, video)
}

// TestE2ECheckDelivery: what judges the other tests does find what is wrong.
func TestE2ECheckDelivery(t *testing.T) {
	t.Parallel()
	posted := videoClip(t)
	list, err := units(posted)
	if err != nil {
		t.Fatal(err)
	}
	// whole is the clip as it should arrive, from one keyframe on, two frames
	// a message; a keyframe is never the second.
	whole := func(from int) (all []recorded) {
		start := from
		for i, u := range list {
			end := (u.last + 1) * 188
			last := i == len(list)-1
			if last {
				end = len(posted)
			}
			if end > start && (last || list[i+1].key || end-start > 8000) {
				all = append(all, recorded{kind: "binary", payload: bytes.Clone(posted[start:end])})
				start = end
			}
		}
		return all
	}
	middle := 0 // where the tables before a keyframe in the middle begin
	for i, u := range list[:len(list)-1] {
		if next := list[i+1]; i > len(list)/2 && next.key {
			middle = (u.last + 1) * 188
			break
		}
	}
	tables := slices.Concat(posted[188 : 3*188]) // ffmpeg begins with SDT, PAT, PMT
	psi := recorded{kind: "binary", payload: tables}
	for _, tt := range []struct {
		name string
		from int
		harm func(all []recorded) []recorded
		want string // in the error; "": none
	}{
		{"all", 0, func(all []recorded) []recorded { return all }, ""},
		{"from the middle", middle, func(all []recorded) []recorded { return all }, ""},
		{"nothing", 0, func([]recorded) []recorded { return nil }, "no message"},
		{"byte changed", 0, func(all []recorded) []recorded { all[5].payload[1000] ^= 1; return all }, "differs"},
		{"byte lost", 0, func(all []recorded) []recorded { all[5].payload = all[5].payload[1:]; return all }, "not whole packets"},
		{"packet lost", 0, func(all []recorded) []recorded { all[5].payload = all[5].payload[188:]; return all }, "differs"},
		{"message lost", 0, func(all []recorded) []recorded { return slices.Delete(all, 5, 6) }, "differs"},
		{"message twice", 0, func(all []recorded) []recorded { return slices.Insert(all, 5, all[5]) }, "more than was posted"},
		{"first message lost", 0, func(all []recorded) []recorded { return all[1:] }, "no PAT"},
		{"last message lost", 0, func(all []recorded) []recorded { return all[:len(all)-1] }, "differs"},
		{"swapped", 0, func(all []recorded) []recorded { all[5], all[6] = all[6], all[5]; return all }, "differs"},
		{"text", 0, func(all []recorded) []recorded { all[5].kind = "text"; return all }, "text"},
		{"empty", 0, func(all []recorded) []recorded { return slices.Insert(all, 5, recorded{kind: "binary"}) }, "not whole packets"},
		{"cut in a frame", 0, func(all []recorded) []recorded {
			n := len(all[5].payload) - 188
			all[6].payload = slices.Concat(all[5].payload[n:], all[6].payload)
			all[5].payload = all[5].payload[:n]
			return all
		}, "inside a frame"},
		{"keyframe second", 0, func(all []recorded) []recorded {
			for i := range all[1:] {
				next := all[i+1].payload
				if list, err := units(next); err == nil && list[0].key {
					all[i].payload = slices.Concat(all[i].payload, next)
					return slices.Delete(all, i+1, i+2)
				}
			}
			return nil
		}, "keyframe"},
		{"tables with the frame before them", 0, func(all []recorded) []recorded {
			for i := range all[1:] {
				if next := &all[i+1]; hasPAT(next.payload) {
					all[i].payload = slices.Concat(all[i].payload, next.payload[:188])
					next.payload = next.payload[188:]
					return all
				}
			}
			return nil
		}, "after its last frame"},
		{"needless tables", middle, func(all []recorded) []recorded { return slices.Insert(all, 0, psi) }, "has its own PAT"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := checkDelivery(posted, tt.harm(whole(tt.from)), true)
			switch {
			case tt.want == "" && err != nil:
				t.Errorf("got error %q, want none", err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("got error %v, want one with %q", err, tt.want)
			}
		})
	}
}
