// What real encoders and muxers write: ffmpeg makes the pictures, tests change
// the packets around them (flags, start codes, parameter sets, programs), and
// ffmpeg decodes what readers get. One wrong picture is one complaint.

package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// unitOfClip is one PES of a clip.
type unitOfClip struct {
	pts, dts ticks
	es       []byte
	key      bool // as its muxer says
}

// pictures are the PES of a track of video, in their order.
type pictures struct {
	kind int // stream_type
	info []byte
	all  []unitOfClip
}

// readPictures reads the video of a transport stream with one program.
func readPictures(t *testing.T, ts []byte) (c pictures) {
	t.Helper()
	messages, err := frames(bytes.NewReader(ts))
	if err != nil || len(messages) == 0 {
		t.Fatal(err)
	}
	program := messages[len(messages)-1].info.program
	i := slices.IndexFunc(program.tracks, func(tr track) bool { return tr.coding().kind == pictureTrack })
	if i < 0 {
		t.Fatalf("no video in %v", program.tracks)
	}
	tr := program.tracks[i]
	c.kind, c.info = int(tr.streamType), tr.descriptors
	for p := range slices.Chunk(ts, packetSize) {
		p := packet(p)
		payload := p.payload()
		if p.pid() != tr.pid || payload == nil {
			continue
		}
		if p.unitStart() {
			pts, dts := timestamps(payload)
			u := unitOfClip{pts: readTime(pts), key: p.randomAccess()}
			if u.dts = u.pts; dts != nil {
				u.dts = readTime(dts)
			}
			c.all = append(c.all, u)
			payload = payload[9+int(payload[8]):]
		}
		last := &c.all[len(c.all)-1]
		last.es = append(last.es, payload...)
	}
	return c
}

// ts writes the pictures, a part for each, with the PSI before each keyframe of
// the muxer's. header is how many bytes of stuffing each PES header has.
func (c pictures) ts(header int) (parts [][]byte) {
	var m tsMaker
	for _, u := range c.all {
		m.Reset()
		if u.key || len(parts) == 0 {
			m.program(testVideo, track{testVideo, byte(c.kind), c.info})
		}
		m.elementary(testVideo, u, header)
		parts = append(parts, bytes.Clone(m.Bytes()))
	}
	return parts
}

// mapOf is the section of a PMT with one track.
func (t *tsMaker) mapOf(number int, info []byte, pid, kind int) []byte {
	b := []byte{2, 0, 0, 0, byte(number), 0xc1, 0, 0, 0xe0 | byte(pid>>8), byte(pid), 0xf0, 0, byte(kind), 0xe0 | byte(pid>>8), byte(pid), 0xf0, byte(len(info))}
	return append(b, info...)
}

// elementary writes a PES of video.
func (t *tsMaker) elementary(pid uint16, u unitOfClip, header int) {
	b := append([]byte{0, 0, 1, 0xe0, 0, 0, 0x80, 0xc0, byte(10 + header)}, make([]byte, 10)...)
	b[9], b[14] = 0x31, 0x11
	writeTime(b[9:], u.pts&(wrap-1))
	writeTime(b[14:], u.dts&(wrap-1))
	b = append(append(b, bytes.Repeat([]byte{0xff}, header)...), u.es...)
	for start := byte(0x40); len(b) > 0; start = 0 {
		control, field := byte(0x10), []byte(nil)
		if start != 0 {
			pcr := u.dts - second/5
			control, field = 0x30, []byte{7, 0x10, byte(pcr >> 25), byte(pcr >> 17), byte(pcr >> 9), byte(pcr >> 1), byte(pcr<<7) | 0x7e, 0}
			if u.key {
				field[1] |= 0x40
			}
		}
		if pad := packetSize - 4 - len(field) - len(b); pad > 0 {
			if control = 0x30; field == nil {
				field = append(field, byte(pad-1))
				if pad--; pad > 0 {
					field = append(field, 0)
					pad--
				}
			} else {
				field[0] += byte(pad)
			}
			field = append(field, bytes.Repeat([]byte{0xff}, pad)...)
		}
		t.Write(append([]byte{syncByte, start | byte(pid>>8), byte(pid), control | t.counter(pid)}, field...))
		n := packetSize - 4 - len(field)
		t.Write(b[:n])
		b = b[n:]
	}
}

// units splits an elementary stream at its start codes.
func (c pictures) units(es []byte) (all [][]byte) {
	for len(es) > 0 {
		at := bytes.Index(es, startCode)
		if at < 0 {
			break
		}
		es = es[at+3:]
		end := bytes.Index(es, startCode)
		if end < 0 {
			end = len(es)
		} else if c.kind == typeH264 || c.kind == typeHEVC {
			end = len(bytes.TrimRight(es[:end], "\x00"))
		}
		all = append(all, es[:end])
		es = es[end:]
	}
	return all
}

// rewrite returns the pictures with the units for which keep says so, each
// after a start code.
func (c pictures) rewrite(code string, keep func(picture int, unit []byte) bool) pictures {
	out := c
	out.all = slices.Clone(c.all)
	for i := range out.all {
		var es []byte
		for _, u := range c.units(out.all[i].es) {
			if keep(i, u) {
				es = append(append(es, code...), u...)
			}
		}
		out.all[i].es = es
	}
	return out
}

// flag returns the pictures with random_access_indicator as is says.
func (c pictures) flag(is func(key bool) bool) pictures {
	c.all = slices.Clone(c.all)
	for i := range c.all {
		c.all[i].key = is(c.all[i].key)
	}
	return c
}

func never(bool) bool  { return false }
func always(bool) bool { return true }

// isSet reports whether a unit is a parameter set.
func (c pictures) isSet(u []byte) bool {
	switch c.kind {
	case typeH264:
		return u[0]&0x1f == h264SPS || u[0]&0x1f == h264PPS
	case typeHEVC:
		kind := u[0] >> 1 & 0x3f
		return kind == h265VPS || kind == h265SPS || kind == h265PPS
	}
	return u[0] == mpegSequence || u[0] == mpegExtension && u[1]>>4 != 8 // not the picture_coding_extension
}

func (c pictures) isAUD(u []byte) bool {
	return c.kind == typeH264 && u[0]&0x1f == h264AccessUnit || c.kind == typeHEVC && u[0]>>1&0x3f == h265AccessUnit
}

// encoder is a way of ffmpeg to make pictures.
type encoder struct {
	name    string
	args    string
	keys    int    // at least so many in 3 s
	leading int    // pictures that a decoder has to leave out where it begins, at most
	says    string // what ffmpeg says there, also of a clip that is cut at its own keyframe
}

var encoders = []encoder{
	{"MPEG-1", "-codec:v mpeg1video -g 12 -bf 0", 6, 0, ""},
	{"MPEG-2 with B pictures", "-codec:v mpeg2video -g 12 -bf 2", 6, 1, ""},
	{"MPEG-2 interlaced", "-codec:v mpeg2video -flags +ilme+ildct -g 12 -bf 2", 6, 1, ""},
	{"H.264 without B pictures", "-codec:v libx264 -preset ultrafast -tune zerolatency -g 25", 3, 0, ""},
	{"H.264 with B pictures", "-codec:v libx264 -preset veryfast -bf 3 -g 25", 3, 0, ""},
	{"H.264 open GOP", "-codec:v libx264 -preset veryfast -bf 3 -g 25 -x264-params open-gop=1", 3, 6, "mmco: unref short failure"},
	{"H.264 of 4 slices", "-codec:v libx264 -preset veryfast -g 25 -slices 4", 3, 0, ""},
	{"H.264 interlaced", "-codec:v libx264 -preset veryfast -flags +ilme+ildct -g 25", 3, 0, ""},
	{"H.264 4:2:2 of 10 bits", "-codec:v libx264 -preset veryfast -pix_fmt yuv422p10le -g 25", 3, 0, ""},
	{"H.264 intra refresh", "-codec:v libx264 -preset veryfast -bf 0 -g 25 -x264-params intra-refresh=1", 3, 25, ""},
	{"H.265", "-codec:v libx265 -preset ultrafast -x265-params keyint=25:min-keyint=25:log-level=none", 3, 0, ""},
	{"H.265 open GOP", "-codec:v libx265 -preset ultrafast -x265-params keyint=25:open-gop=1:bframes=3:log-level=none", 3, 0, ""},
}

// clip makes 3 s of pictures; two tests may ask for the same.
func (e encoder) clip(t *testing.T) pictures {
	t.Helper()
	needs(t, "ffmpeg") // a Once must not be left by a test that ends in it
	made, _ := encoded.LoadOrStore(e.name, sync.OnceValue(func() []byte {
		return runFFmpeg(t, strings.Fields("-f lavfi -i testsrc2=size=160x128:rate=25 -t 3"), strings.Fields(e.args), strings.Fields("-threads 1 -f mpegts -"))
	}))
	return readPictures(t, made.(func() []byte)())
}

var encoded sync.Map

// keysByProbe are the pictures at which ffprobe says that one can begin.
func keysByProbe(t *testing.T, ts []byte) (keys []bool) {
	t.Helper()
	c := exec.Command(needs(t, "ffprobe"), "-v", "error", "-select_streams", "v", "-show_entries", "packet=flags", "-of", "json", "-")
	c.Stdin = bytes.NewReader(ts)
	b, err := c.Output()
	var out struct{ Packets []struct{ Flags string } }
	if err != nil || json.Unmarshal(b, &out) != nil {
		t.Fatal(err, string(b))
	}
	for _, p := range out.Packets {
		keys = append(keys, strings.HasPrefix(p.Flags, "K"))
	}
	return keys
}

// keysByFramer are the pictures that the framer takes for keyframes.
func keysByFramer(t *testing.T, parts [][]byte) (keys []bool) {
	t.Helper()
	all, err := frames(bytes.NewReader(slices.Concat(parts...)))
	if err != nil {
		t.Fatal(err)
	}
	return keysOf(all)
}

// keysOf are the frames of messages, true for each keyframe.
func keysOf(all []*message) (keys []bool) {
	for _, m := range all {
		for i := range m.info.frames {
			keys = append(keys, m.info.key && i == 0)
		}
	}
	return keys
}

// TestEncoderKeyframes: keyframes are those at which ffprobe says that one can
// begin, whatever the flag says and however the units are written.
func TestEncoderKeyframes(t *testing.T) {
	t.Parallel()
	for _, e := range encoders {
		t.Run(e.name, func(t *testing.T) {
			t.Parallel()
			c := e.clip(t)
			want := keysByProbe(t, slices.Concat(c.ts(0)...))
			n := 0
			for _, k := range want {
				if k {
					n++
				}
			}
			if n < e.keys {
				t.Fatalf("ffprobe finds %d keyframes, want %d at least", n, e.keys)
			}
			all := func(int, []byte) bool { return true }
			for name, parts := range map[string][][]byte{
				"as muxed":               c.ts(0),
				"flag never set":         c.flag(never).ts(0),
				"flag always set":        c.flag(always).ts(0),
				"units in the second":    c.flag(never).ts(160),
				"a unit across packets":  c.flag(never).ts(151),
				"start codes of 3 bytes": c.flag(never).rewrite("\x00\x00\x01", all).ts(0),
				"start codes of 4 bytes": c.flag(never).rewrite("\x00\x00\x00\x01", all).ts(0),
				"without AUD":            c.flag(never).rewrite("\x00\x00\x00\x01", func(_ int, u []byte) bool { return !c.isAUD(u) }).ts(0),
				"parameter sets once":    c.flag(never).rewrite("\x00\x00\x00\x01", func(i int, u []byte) bool { return i == 0 || !c.isSet(u) }).ts(0),
			} {
				if got := keysByFramer(t, parts); !slices.Equal(got, want) {
					t.Errorf("%s: got keyframes %v, want %v", name, keyList(got), keyList(want))
				}
			}
		})
	}
}

func keyList(keys []bool) (at []int) {
	for i, k := range keys {
		if k {
			at = append(at, i)
		}
	}
	return at
}

// TestEncoderReaders: what each reader gets decodes without a complaint, from
// the next keyframe on: after joining, a stall, a mute, and another publisher.
func TestEncoderReaders(t *testing.T) {
	t.Parallel()
	for _, e := range encoders {
		t.Run(e.name, func(t *testing.T) {
			t.Parallel()
			c := e.clip(t)
			parts := c.ts(0)
			keys := keysByFramer(t, parts)
			next := func(picture int) int { return picture + slices.Index(keys[picture:], true) }
			setsOnce := c.flag(never).rewrite("\x00\x00\x00\x01", func(i int, u []byte) bool { return i == 0 || !c.isSet(u) })
			for name, parts := range map[string][][]byte{
				"flag always set":                     c.flag(always).ts(0),
				"flag never set, parameter sets once": setsOnce.ts(160),
			} {
				last := len(parts)
				for _, r := range playTo(t, parts) {
					if r.name == "feed" && strings.Contains(name, "once") {
						continue // byte for byte what was posted
					}
					got, complaints := decodePictures(t, r.got, e.says)
					want, leading := 0, 0
					for _, span := range r.spans(next, last) {
						want += span
						leading += e.leading
					}
					if complaints != "" || got > want || got < want-leading {
						t.Errorf("%s, %s: got %d pictures and %.500q, want %d and no complaint", name, r.name, got, complaints, want)
					}
				}
			}
		})
	}
}

// clipReader is a reader of a clip that is played.
type clipReader struct {
	name  string
	sub   *subscriber
	got   []byte
	spans func(next func(int) int, last int) []int // numbers of pictures that it ought to get
}

func (r *clipReader) take() {
	n := 0
	for _, b := range r.sub.take(nil, 64<<20, false, time.Now()) {
		r.got = append(r.got, b...)
		n += len(b)
	}
	r.sub.wrote(n)
}

// playTo posts a clip of 75 pictures in real time to readers that join at
// picture 10 and meet what their names say.
func playTo(t *testing.T, parts [][]byte) (readers []*clipReader) {
	const join, stall, stalled, mute, muted, another = 10, 27, 48, 30, 40, 30
	stall2 := func(next func(int) int, last int) []int { return []int{stall - next(join), last - next(stalled-7)} }
	synctest.Test(t, func(t *testing.T) {
		x := newMux()
		publish := func(name string) (post func([]byte), end func()) {
			body, in := io.Pipe()
			done := make(chan struct{})
			go func() {
				defer close(done)
				x.publish(name, &publisher{interrupt: func() { body.Close() }}, body)
			}()
			return func(b []byte) { in.Write(b); synctest.Wait() }, func() { in.Close(); <-done }
		}
		add := func(feed, name string, maxAge time.Duration, spans func(func(int) int, int) []int) *clipReader {
			r := &clipReader{name: name, sub: newSubscriber(raw, maxAge, nil), spans: spans}
			x.join(feed, r.sub)
			readers = append(readers, r)
			return r
		}
		for _, s := range []string{"stream/a", "stream/b"} {
			x.setStream(s, []string{"video0"}, true)
		}
		x.setStream("stream/c", []string{"video1"}, true)
		post, end := publish("video0")
		post1, end1 := publish("video1")
		var slow []*clipReader
		for i, part := range parts {
			switch i {
			case join:
				slow = []*clipReader{add("video0", "feed", 280*time.Millisecond, stall2), add("stream/a", "stream", 280*time.Millisecond, stall2)}
				add("stream/b", "mute", time.Minute, func(next func(int) int, last int) []int { return []int{mute - next(join), last - next(muted)} })
				add("stream/c", "publisher", time.Minute, func(next func(int) int, last int) []int { return []int{another - next(join), last - another} })
			case mute:
				x.setStream("stream/b", nil, true)
				end1()
				post1, end1 = publish("video1")
			case muted:
				x.setStream("stream/b", []string{"video0"}, true)
			}
			post(part)
			if i < another {
				post1(part)
			} else {
				post1(parts[i-another]) // it begins anew, and so does the clip
			}
			time.Sleep(40 * time.Millisecond)
			for _, r := range readers {
				if i < stall || i > stalled || !slices.Contains(slow, r) {
					r.take()
				}
			}
		}
		end()
		end1()
		for _, r := range readers {
			r.take()
		}
	})
	return readers
}

// decodePictures returns how many pictures ffmpeg decodes, and its complaints
// but for one that is expected.
func decodePictures(t *testing.T, ts []byte, but string) (n int, complaints string) {
	t.Helper()
	c := exec.Command(needs(t, "ffmpeg"), "-nostdin", "-v", "error", "-threads", "1", "-i", "-", "-map", "0:v", "-f", "framecrc", "-vsync", "passthrough", "-")
	var said bytes.Buffer
	c.Stdin, c.Stderr = bytes.NewReader(ts), &said
	out, err := c.Output()
	var text strings.Builder
	for line := range strings.Lines(said.String()) {
		if but == "" || !strings.Contains(line, but) && !strings.Contains(line, "Last message repeated") {
			text.WriteString(line)
		}
	}
	for line := range strings.Lines(string(out)) {
		if !strings.HasPrefix(line, "#") {
			n++
		}
	}
	if err != nil {
		fmt.Fprint(&text, err)
	}
	return n, text.String()
}

// TestEncoderAV1: AV1 in a transport stream has its keyframes where ffprobe finds
// them.
func TestEncoderAV1(t *testing.T) {
	t.Parallel()
	stream := runFFmpeg(t, strings.Fields("-f lavfi -i testsrc2=size=160x128:rate=25 -t 2 -codec:v libaom-av1 -cpu-used 8 -usage realtime -g 20 -threads 1 -f obu -"))
	want := keysByProbe(t, stream)
	if n := len(keyList(want)); n < 3 {
		t.Fatalf("ffprobe finds %d keyframes, want 3", n)
	}
	c := pictures{kind: 0x06, info: registration("AV01")}
	for len(stream) > 0 {
		size, n := binary.Uvarint(stream[1:]) // obu_size
		obu := stream[:1+n+int(size)]
		stream = stream[len(obu):]
		if obu[0]>>3&0x0f == 2 { // a temporal delimiter begins a picture
			c.all = append(c.all, unitOfClip{pts: ticks(len(c.all)) * 3600, dts: ticks(len(c.all)) * 3600})
		}
		u := &c.all[len(c.all)-1]
		u.es = append(append(u.es, startCode...), escaped(obu)...)
	}
	for _, header := range []int{0, 151, 160} {
		if got := keysByFramer(t, c.ts(header)); !slices.Equal(got, want) {
			t.Errorf("got keyframes %v, want %v", keyList(got), keyList(want))
		}
	}
}

// escaped returns b with bytes that prevent the emulation of start codes.
func escaped(b []byte) (out []byte) {
	zeros := 0
	for _, v := range b {
		if zeros == 2 && v <= 3 {
			out, zeros = append(out, 3), 0
		}
		if out = append(out, v); v == 0 {
			zeros++
		} else {
			zeros = 0
		}
	}
	return out
}
