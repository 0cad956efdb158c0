package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"
)

// writes is a reader of which each Read gives what one write gave.
type writes struct {
	parts [][]byte
	end   error
}

func (w *writes) Read(p []byte) (int, error) {
	if len(w.parts) == 0 {
		return 0, w.end
	}
	n := copy(p, w.parts[0])
	w.parts = w.parts[1:]
	return n, nil
}

// TestFramerChunks holds I1: which chunks come out of which writes.
func TestFramerChunks(t *testing.T) {
	var m tsMaker
	m.tables(testVideo, 0x01, testAudio, 0x03)
	psi := bytes.Clone(m.Bytes())
	video := func(key bool, size int) []byte {
		return m.packets(pes{pid: testVideo, id: 0xe0, key: key, size: size})
	}
	audio := func(size int) []byte { return m.packets(pes{pid: testAudio, id: 0xc0, size: size, length: true}) }
	const full = 5*184 - 14 // bytes that fill 5 packets, so that there is no stuffing
	key, p1, p2 := video(true, 3000), video(false, 1000), video(false, 700)
	exact := video(false, full)
	a1, a2 := audio(full), audio(500)
	long := video(false, 2<<20)
	m.Reset()
	m.tables(testVideo, 0x01, 0x102, 0x86)
	psiCue := bytes.Clone(m.Bytes())
	m.Reset()
	m.section(0x102, 0xfc, 0, 0, 0, 0, 0, 0, 0, 0)
	cue := bytes.Clone(m.Bytes())
	cat := func(b ...[]byte) []byte { return slices.Concat(b...) }
	tests := []struct {
		name   string
		writes [][]byte
		end    error
		want   [][]byte
	}{
		{"a frame a write", [][]byte{cat(psi, key), p1, p2}, io.EOF, [][]byte{cat(psi, key), p1, p2}},
		{"frames read together", [][]byte{cat(psi, key, p1, p2)}, io.EOF, [][]byte{cat(psi, key, p1, p2)}},
		{"a keyframe starts a chunk", [][]byte{cat(psi, p1, p2, psi, key, p1)}, io.EOF, [][]byte{cat(psi, p1, p2), cat(psi, key, p1)}},
		{"half a frame waits", [][]byte{cat(psi, key[:376]), key[376:940], key[940:]}, io.EOF, [][]byte{cat(psi, key)}},
		{"PSI waits for its frame", [][]byte{cat(psi, key), psi, p1}, io.EOF, [][]byte{cat(psi, key), cat(psi, p1)}},
		{"an end that does not show waits for the next start", [][]byte{cat(psi, key), exact, p1}, io.EOF, [][]byte{cat(psi, key), cat(exact, p1)}},
		{"and is not torn from it by a keyframe", [][]byte{cat(psi, key), exact, cat(psi, key)}, io.EOF, [][]byte{cat(psi, key), exact, cat(psi, key)}},
		{"a proper end is one", [][]byte{cat(psi, key), exact}, io.EOF, [][]byte{cat(psi, key), exact}},
		{"a lost connection is none", [][]byte{cat(psi, key), exact}, io.ErrUnexpectedEOF, [][]byte{cat(psi, key)}},
		{"a length is an end", [][]byte{cat(psi, key), a1, a2}, io.EOF, [][]byte{cat(psi, key), a1, a2}},
		{"null packets inside a frame", [][]byte{cat(psi, key[:376], nullPacket, key[376:])}, io.EOF, [][]byte{cat(psi, key[:376], nullPacket, key[376:])}},
		{"PSI inside a frame", [][]byte{cat(psi, key[:376], psi, key[376:]), p1}, io.EOF, [][]byte{cat(psi, key[:376], psi, key[376:]), p1}},
		{"interleaved: the next video is a start", [][]byte{cat(psi, key, a1[:376]), cat(p1, a1[376:])}, io.EOF, [][]byte{cat(psi, key), cat(a1[:376], p1, a1[376:])}},
		{"interleaved: a keyframe is one", [][]byte{cat(psi, p1, a1[:376], psi, key), a1[376:]}, io.EOF, [][]byte{cat(psi, p1, a1[:376]), cat(psi, key, a1[376:])}},
		{"a feed that began before", [][]byte{cat(key[376:], psi, p1)}, io.EOF, [][]byte{cat(psi, p1)}},
		{"sections on a PID of the map", [][]byte{cat(psiCue, key), cue, p1, p2}, io.EOF, [][]byte{cat(psiCue, key), cat(cue, p1), p2}},
		{"a long frame in parts", [][]byte{cat(psi, key), long[:64<<10]}, io.EOF, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.want == nil { // the long one: more than one write of 64 KiB
				var r io.Reader = bytes.NewReader(cat(psi, key, long, p1))
				all, err := frames(r)
				if err != nil || !bytes.Equal(joined(all), cat(psi, key, long, p1)) {
					t.Fatalf("got %v, or not what was written", err)
				}
				for i, m := range all {
					if m.size > maxChunk {
						t.Errorf("message %d has %d bytes", i, m.size)
					}
					if wrong := m.info.start != (packet(m.payload()).unitStart()); wrong {
						t.Errorf("message %d: start is %v", i, m.info.start)
					}
				}
				return
			}
			all, err := frames(&writes{slices.Clone(tt.writes), tt.end})
			if (err == nil) != (tt.end == io.EOF) {
				t.Errorf("got error %v", err)
			}
			var got []int
			for i, m := range all {
				got = append(got, m.size)
				if i < len(tt.want) && !bytes.Equal(m.payload(), tt.want[i]) {
					t.Errorf("message %d is not the one that is wanted", i)
				}
			}
			var want []int
			for _, b := range tt.want {
				want = append(want, len(b))
			}
			if !slices.Equal(got, want) {
				t.Errorf("got messages of %v bytes, want %v", got, want)
			}
		})
	}
}

// TestFramerInfo: what readers are told of a chunk.
func TestFramerInfo(t *testing.T) {
	var m tsMaker
	m.tables(testVideo, 0x1b, testAudio, 0x0f)
	m.frame(pes{pid: testAudio, id: 0xc0, size: 100, length: true})
	m.frame(pes{pid: testVideo, id: 0xe0, key: true, size: 400})
	m.frame(pes{pid: testVideo, id: 0xe0, size: 400})
	all, err := frames(&m)
	if err != nil || len(all) != 2 {
		t.Fatalf("got %d messages, %v, want 2", len(all), err)
	}
	a, k := all[0].info, all[1].info
	if !a.start || a.key || !a.hasVideo || !a.hasPAT || len(a.psi) != 376 {
		t.Errorf("audio: got %+v", a)
	}
	if !k.start || !k.key || !k.hasVideo || k.hasPAT || len(k.psi) != 376 || len(k.program.tracks) != 2 {
		t.Errorf("keyframe: got %+v", k)
	}
	var only tsMaker
	only.tables(testAudio, 0x03)
	only.frame(pes{pid: testAudio, id: 0xc0, key: true, size: 100, length: true})
	all, err = frames(&only)
	if err != nil || len(all) != 1 || all[0].info.hasVideo || all[0].info.key || !all[0].info.start {
		t.Errorf("audio alone: got %v, %v", all, err)
	}
}

// TestFramerMidStuffing: an encoder that stuffs inside a frame is found out,
// and its frames are whole from the second on.
func TestFramerMidStuffing(t *testing.T) {
	var m tsMaker
	m.tables(testVideo, 0x1b)
	psi := bytes.Clone(m.Bytes())
	stuffs := func() []byte {
		head := m.packets(pes{pid: testVideo, id: 0xe0, size: 10})
		tail := m.packets(pes{pid: testVideo, id: 0xe0, size: 1000})
		tail[1] &^= 0x40 // the same PES goes on
		return slices.Concat(head, tail)
	}
	one, two, three := stuffs(), stuffs(), stuffs()
	all, err := frames(&writes{[][]byte{slices.Concat(psi, one), two, three}, io.EOF})
	if err != nil || !bytes.Equal(joined(all), slices.Concat(psi, one, two, three)) {
		t.Fatalf("got %v, or not what was written", err)
	}
	for i, m := range all {
		if m.info.start != (i != 1) { // 1 is the rest of the first frame
			t.Errorf("message %d: start is %v", i, m.info.start)
		}
	}
}

// TestFramerOpen: PES that stay open do not hold the feed back: two tracks that
// always overlap, other programs, a video that stops, or leaves the map.
func TestFramerOpen(t *testing.T) {
	const full = 5*184 - 14 // bytes: the end does not show
	audio := func(m *tsMaker, pid uint16) []byte {
		return m.packets(pes{pid: pid, id: 0xc0, size: 576, length: true})
	}
	tests := []struct {
		name  string
		first func(m *tsMaker)
		next  func(m *tsMaker, i int)
	}{
		{"overlap", func(m *tsMaker) { m.tables(0x101, 3, 0x102, 3); m.Write(audio(m, 0x101)[:packetSize]) }, func(m *tsMaker, i int) {
			m.Write(audio(m, 0x101+uint16(i+1)%2)[:packetSize]) // and the rest is lost
		}},
		{"another program's video", func(m *tsMaker) { m.tables(0x101, 3) }, func(m *tsMaker, i int) {
			m.frame(pes{pid: 0x200, id: 0xe0, size: full})
			m.Write(audio(m, 0x101))
		}},
		{"the video stops", func(m *tsMaker) {
			m.tables(0x100, 1, 0x101, 3)
			m.frame(pes{pid: 0x100, id: 0xe0, size: full})
		}, func(m *tsMaker, i int) { m.Write(audio(m, 0x101)) }},
		{"the map drops the video", func(m *tsMaker) {
			m.tables(0x100, 1, 0x101, 3)
			m.frame(pes{pid: 0x100, id: 0xe0, size: full})
		}, func(m *tsMaker, i int) { m.tables(0x101, 3); m.Write(audio(m, 0x101)) }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var m tsMaker
			tt.first(&m)
			var parts [][]byte
			for i := range 1000 {
				tt.next(&m, i)
				parts = append(parts, bytes.Clone(m.Bytes()))
				m.Reset()
			}
			all, err := frames(&writes{parts, io.EOF})
			if err != nil {
				t.Fatal(err)
			}
			for i, m := range all {
				if !m.info.start || m.size > 100<<10 {
					t.Errorf("message %d of %d: %d bytes, start %v", i, len(all), m.size, m.info.start)
				}
			}
		})
	}
}

// TestFramerDuplicate: ISO 13818-1 2.4.3.3 lets a packet be sent twice.
func TestFramerDuplicate(t *testing.T) {
	var m tsMaker
	m.tables(testVideo, 1)
	first := slices.Concat(m.Bytes(), m.packets(pes{pid: testVideo, id: 0xe0, key: true, size: 1000}))
	next := m.packets(pes{pid: testVideo, id: 0xe0, size: 1000})
	for at := 0; at < len(first); at += packetSize {
		twice := slices.Concat(first[:at+packetSize], first[at:])
		all, err := frames(&writes{[][]byte{twice, next}, io.EOF})
		if err != nil || len(all) != 2 || all[0].size != len(twice) && all[0].size != len(twice)-packetSize {
			t.Errorf("packet %d twice: got %d messages, %v", at/packetSize, len(all), err)
		}
	}
}

// TestFramerNotTS: nothing of what is not MPEG-TS comes out.
func TestFramerNotTS(t *testing.T) {
	noise := make([]byte, 100_000)
	for i := range noise {
		noise[i] = byte(rand.Uint32())
	}
	text := bytes.Repeat([]byte("G is the letter that a packet begins with. "), 3000)
	tests := []struct {
		name string
		in   []byte
		want error
	}{
		{"nothing", nil, nil},
		{"noise", noise, errNotTS},
		{"text", text, errNotTS},
		{"a little text", []byte("hello"), errNotTS},
		{"JSON with a G 188 bytes from its end", append(bytes.Repeat([]byte(" "), 800), append([]byte("G"), bytes.Repeat([]byte("x"), 187)...)...), errNotTS},
		{"one packet", nullPacket, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, r := range []io.Reader{bytes.NewReader(tt.in), splitUp(tt.in, 100)} {
				all, err := frames(r)
				if !errors.Is(err, tt.want) {
					t.Errorf("got %v, want %v", err, tt.want)
				}
				if tt.want != nil && len(all) > 0 {
					t.Errorf("got %d messages, want none", len(all))
				}
			}
		})
	}
}

// TestFramerDamage: after bytes are lost, whole frames follow, and the
// unfinished one is not sent.
func TestFramerDamage(t *testing.T) {
	clip := testClip(24, 2000)
	cut := len(clip)/2 - 50
	damaged := slices.Concat(clip[:cut], clip[cut+100:])
	all, err := frames(bytes.NewReader(damaged))
	if err != nil {
		t.Fatal(err)
	}
	lost, torn := 0, 0
	for _, m := range all {
		if !m.info.start {
			t.Errorf("a message begins inside a frame")
		}
		for b := m.payload(); len(b) > 0; b = b[packetSize:] {
			if !bytes.Contains(clip, b[:packetSize]) {
				torn++ // the one that lost its end: nothing tells, where packets come one by one
			}
		}
		if m.info.lost {
			lost++
		}
	}
	if torn > 1 {
		t.Errorf("got %d packets that are not the clip's, want 1 at most", torn)
	}
	if lost != 1 {
		t.Errorf("got %d messages marked as after a loss, want 1", lost)
	}
	if got := len(joined(all)); got < len(clip)-3*2500 {
		t.Errorf("got %d bytes of %d", got, len(clip))
	}
}

// TestFramerSplits: any split of a valid input gives the same packets.
func TestFramerSplits(t *testing.T) {
	clip := testClip(60, 5000)
	for _, r := range []io.Reader{
		iotest.OneByteReader(bytes.NewReader(clip)), iotest.HalfReader(bytes.NewReader(clip)),
		iotest.DataErrReader(bytes.NewReader(clip)),
		splitUp(clip, 187), splitUp(clip, 189), splitUp(clip, 10000),
	} {
		all, err := frames(r)
		if err != nil || !bytes.Equal(joined(all), clip) {
			t.Errorf("%T: got %v, or not what was written", r, err)
		}
		for i, m := range all {
			if !m.info.start {
				t.Errorf("%T: message %d begins inside a frame", r, i)
			}
		}
	}
}

// FuzzFramer: whatever is posted, split anyhow, comes out as whole packets of
// it, the same for every split, in messages of bounded size.
func FuzzFramer(f *testing.F) {
	clip := testClip(3, 300)
	f.Add(clip, uint16(100))
	f.Add(slices.Concat(clip[:500], clip[600:]), uint16(188))
	f.Add([]byte("not MPEG-TS"), uint16(3))
	var m tsMaker
	m.tables(testVideo, typeH264)
	for i, es := range []string{avcAUD + avcSPS + avcPPS + avcIDR, avcAUD + avcP, avcIDR} {
		m.elementary(testVideo, unitOfClip{pts: ticks(i) * 3600, dts: ticks(i) * 3600, es: []byte(es)}, 150)
	}
	f.Add(m.Bytes(), uint16(50))
	f.Fuzz(func(t *testing.T, in []byte, most uint16) {
		whole, err1 := frames(bytes.NewReader(in))
		parts, err2 := frames(splitUp(in, 1+uint32(most)))
		if (err1 == nil) != (err2 == nil) {
			t.Fatalf("got %v in one read, %v in parts", err1, err2)
		}
		if !bytes.Equal(joined(whole), joined(parts)) {
			t.Fatalf("got %d bytes in one read, others in parts", len(joined(whole)))
		}
		if a, b := len(keyList(keysOf(whole))), len(keyList(keysOf(parts))); a != b {
			t.Fatalf("got %d keyframes in one read, %d in parts", a, b)
		}
		for _, m := range whole {
			if m.size == 0 || m.size%packetSize != 0 || m.size > maxChunk {
				t.Fatalf("got a message of %d bytes", m.size)
			}
			for b := m.payload(); len(b) > 0; b = b[packetSize:] {
				if b[0] != syncByte || !bytes.Contains(in, b[:packetSize]) {
					t.Fatal("got a packet that was not posted")
				}
			}
		}
	})
}

// TestFramerPSI: the PSI of a chunk is what came before its first frame, also
// when newer PSI has been read with it.
func TestFramerPSI(t *testing.T) {
	var m tsMaker
	m.tables(testAudio, 0x03)
	first := bytes.Clone(m.Bytes())
	m.frame(pes{pid: testAudio, id: 0xc0, size: 300, length: true})
	m.tables(testAudio, 0x03)
	m.frame(pes{pid: testAudio, id: 0xc0, size: 300, length: true})
	var all []*message
	f := newFramer(func(msg *message) { all = append(all, msg) })
	f.read(bytes.NewReader(m.Bytes()[:m.Len()-2*packetSize])) // without the second frame
	if len(all) != 1 || !bytes.Equal(all[0].info.psi, first) {
		t.Fatalf("got %d messages, the first with PSI % x, want % x", len(all), all[0].info.psi[:8], first[:8])
	}
}

// TestFramerPrograms: the program that is there is the one in force, and what
// is posted of the others is not held back.
func TestFramerPrograms(t *testing.T) {
	const step = 40 * time.Millisecond
	type maker = *tsMaker
	tables := func(programs ...int) func(m maker) { // number, PID of the map, PID and type of the track
		return func(m maker) {
			pat := []byte{0, 0, 0, 0, 1, 0xc1, 0, 0}
			for p := range slices.Chunk(programs, 4) {
				pat = append(pat, 0, byte(p[0]), 0xe0|byte(p[1]>>8), byte(p[1]))
			}
			m.section(patPID, pat...)
			for p := range slices.Chunk(programs, 4) {
				if p[3] != 0 {
					m.section(uint16(p[1]), m.mapOf(p[0], nil, p[2], p[3])...)
				}
			}
		}
	}
	video := func(pid uint16) func(m maker, i int) {
		return func(m maker, i int) {
			m.frame(pes{pid: pid, id: 0xe0, key: i%25 == 0, pts: ticks(i) * 3600, size: 2000})
		}
	}
	sound := func(pid uint16) func(m maker, i int) {
		return func(m maker, i int) { m.frame(pes{pid: pid, id: 0xc0, pts: ticks(i) * 3600, size: 300, length: true}) }
	}
	data := func(pid uint16) func(m maker, i int) {
		return func(m maker, i int) { m.section(pid, 0xfc, 0, 0, 0, 0, 0, 0, 0, byte(i)) }
	}
	nulls := func(m maker, i int) { m.Write(nullPacket) }
	during := func(from, to int, make func(m maker, i int)) func(m maker, i int) {
		return func(m maker, i int) {
			if from <= i && i < to {
				make(m, i)
			}
		}
	}
	both := tables(1, 0x1000, 0x100, typeH264, 2, 0x1001, 0x200, typeH264)
	for _, tt := range []struct {
		name   string
		tables func(m maker)
		tracks []func(m maker, i int)
		want   string        // the programs in force, as they change
		lag    time.Duration // of the bytes that go out, at most
	}{
		{"both come", both, []func(maker, int){video(0x100), video(0x200)}, "[1]", 2 * step},
		{"both come, the second at once", both, []func(maker, int){video(0x200), video(0x100)}, "[2 1]", 2 * step},
		{"the first is off air", both, []func(maker, int){video(0x200)}, "[2]", 2 * step},
		{"the first comes a little later", both, []func(maker, int){video(0x200), during(10, 1000, video(0x100))}, "[2 1]", 2 * step},
		{"the first comes when it is too late", both, []func(maker, int){video(0x200), during(100, 1000, video(0x100))}, "[2]", 2 * step},
		{"the first falls silent", both, []func(maker, int){during(0, 100, video(0x100)), video(0x200)}, "[1 2]", 2 * step},
		{"and comes back", both, []func(maker, int){during(0, 50, video(0x100)), during(200, 1000, video(0x100)), video(0x200)}, "[1 2]", 2 * step},
		{"the first has sound alone", tables(1, 0x1000, 0x100, typeAAC, 2, 0x1001, 0x200, typeH264), []func(maker, int){sound(0x100), video(0x200)}, "[1 2]", 2 * step},
		{"the first has data", tables(1, 0x1000, 0x100, 0x05, 2, 0x1001, 0x200, typeH264), []func(maker, int){data(0x100), video(0x200)}, "[2]", 2 * step},
		{"one PID for both maps", tables(1, 0x1000, 0x100, typeH264, 2, 0x1000, 0x200, typeH264), []func(maker, int){video(0x200)}, "[2]", 2 * step},
		{"the second has no map", tables(1, 0x1000, 0x100, typeH264, 2, 0x1001, 0x200, 0), []func(maker, int){video(0x200)}, "[1]", 2 * step},
		{"all are off air", both, []func(maker, int){nulls}, "[1]", blindAfter + 4*step},
		{"data alone", tables(1, 0x1000, 0x100, 0x05), []func(maker, int){data(0x100)}, "[1]", blindAfter + 4*step}, // it begins with the fifth packet,
		{"the first stops inside a frame", both, []func(maker, int){during(0, 50, video(0x100)), during(50, 51, func(m maker, i int) {
			m.Write(m.packets(pes{pid: 0x100, id: 0xe0, size: 2000})[:3*packetSize])
		}), video(0x200)}, "[1 2]", abandonAfter + 2*step},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var out, in int
				var programs []uint16
				var arrived []time.Time // of each packet
				var lag time.Duration
				starts := 0
				f := newFramer(func(m *message) {
					for n := 0; n < m.size; n += packetSize {
						lag = max(lag, time.Since(arrived[(out+n)/packetSize]))
					}
					out += m.size
					if n := m.info.program.number; len(programs) == 0 || programs[len(programs)-1] != n {
						programs = append(programs, n)
					}
					if m.info.start {
						starts++
					}
				})
				var m tsMaker
				for i := range 300 {
					m.Reset()
					if i%5 == 0 {
						tt.tables(&m)
					}
					for _, track := range tt.tracks {
						track(&m, i)
					}
					in += m.Len()
					for range m.Len() / packetSize {
						arrived = append(arrived, time.Now())
					}
					f.read(&writes{[][]byte{bytes.Clone(m.Bytes())}, io.EOF})
					time.Sleep(step)
				}
				if got := fmt.Sprint(programs); got != tt.want || starts == 0 {
					t.Errorf("got programs %s in %d chunks that a reader can begin with, want %s", got, starts, tt.want)
				}
				if lag > tt.lag || in-out > 10*packetSize {
					t.Errorf("got %d of %d bytes, the last %v late, want %v at most", out, in, lag, tt.lag)
				}
			})
		})
	}
}

// TestFramerLimit holds I1: no chunk and no message of it, with all that a stream
// adds, is over 1 MiB, whatever was read together.
func TestFramerLimit(t *testing.T) {
	notUnderRace(t)
	var m tsMaker
	m.tables(testVideo, typeH264, testAudio, typeMPEG1Audio)
	for range 300 {
		m.frame(pes{pid: testAudio, id: 0xc0, size: 9000, length: true})
	}
	for _, size := range []int{maxChunk - 1000, maxChunk + 1000, 3 << 20, 100} {
		m.frame(pes{pid: testVideo, id: 0xe0, key: true, size: size})
	}
	for _, most := range []uint32{1 << 16, 1 << 12, 1} {
		all, err := frames(splitUp(m.Bytes(), most))
		if err != nil || !bytes.Equal(joined(all), m.Bytes()) {
			t.Fatalf("reads of %d bytes: got %v, or not what was written", most, err)
		}
		for i, msg := range all {
			if n := len(msg.wire(masked)); n > messageLimit {
				t.Errorf("reads of %d bytes: message %d has %d bytes", most, i, n)
			}
		}
	}
}
