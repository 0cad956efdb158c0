// The remultiplexer: the feeds of a stream become one program that every
// player plays, on one clock. Pure: packets in, packets out; its callers say
// what time it is. Nothing is decoded, and PES bytes are never altered but for
// their timestamps.

package main

import (
	"bytes"
	"encoding/binary"
	"slices"
	"time"
)

const (
	maxPSIGap = second / 10
	psiEvery  = second / 20 // with the next frame's 40 ms this stays under maxPSIGap
)

const (
	outPMT   = 0x1000 // PIDs of what is ours
	firstPID = 0x0100 // of what had to be moved
	lastPID  = 0x1ffe
)

// remuxer makes one program of the packets of several feeds. Its zero value
// is ready; it is owned by its stream.
type remuxer struct {
	sources []*source // in the order of the rule

	blocked kindSet // kinds of tracks that are not in the program
	section []byte  // the PMT as it is to go out, without its CRC
	told    []byte  // and as it went out last; nil before
	version byte    // of told
	psi     []byte  // PAT and PMT as they went out last
	patCC   byte
	pmtCC   byte
	last    [8192]byte        // continuity counter, by PID; kept when a feed goes
	origins map[origin]uint16 // the PIDs of tracks, of those that are gone too
	taken   [8192]bool        // by PID
	sent    ticks             // when PSI went out
	pcr     ticks             // and the last PCR

	out []byte // what remux returns
}

// origin is a track of a feed. Its PID in a program is kept when it goes, since
// no player takes another kind of track on a PID that it knows.
type origin struct {
	feed       string
	pid        uint16
	streamType byte
}

// maxOrigins is how many are kept, unless more are in the program.
const maxOrigins = 1000

// source is a feed in a stream.
type source struct {
	feed    string    // its name
	since   time.Time // when it came into the stream
	gate    gate
	replay  replay
	program *program
	tracks  []*outTrack
}

// outTrack is one elementary stream in the program.
type outTrack struct {
	track
	out    uint16
	listed bool // in the PMT
	shift  byte // from the feed's continuity counters to ours
	fresh  bool // its next packet begins anew
	skip   bool // until its next PES
}

// source returns the source of a feed; nil without one.
func (x *remuxer) source(feed string) *source {
	for _, s := range x.sources {
		if s.feed == feed {
			return s
		}
	}
	return nil
}

// arrange makes feeds the sources, in their order. It reports whether the
// program differs from the one that went out last.
func (x *remuxer) arrange(feeds []string, at time.Time) bool {
	sources := make([]*source, len(feeds))
	for i, f := range feeds {
		if sources[i] = x.source(f); sources[i] == nil {
			sources[i] = &source{feed: f, since: at, gate: gate{since: at}}
		}
	}
	x.sources = sources
	return x.describe()
}

// block takes tracks of these kinds out of the program, and puts others back. It
// reports whether the program differs from the one that went out last.
func (x *remuxer) block(kinds kindSet) bool {
	x.blocked = kinds
	return x.describe()
}

// follow gives s the tracks of a program map. It reports whether the program
// differs from the one that went out last because of it.
func (x *remuxer) follow(s *source, g *program) bool {
	if s.program == g {
		return false
	}
	s.program = g
	if len(x.origins) > maxOrigins {
		x.forget()
	}
	old := s.tracks
	s.tracks = nil
	for _, t := range g.tracks {
		i := slices.IndexFunc(old, func(o *outTrack) bool { return o.pid == t.pid && o.streamType == t.streamType })
		if i >= 0 {
			old[i].track = t
			s.tracks = append(s.tracks, old[i])
		} else if pid, ok := x.assign(origin{s.feed, t.pid, t.streamType}); ok {
			s.tracks = append(s.tracks, &outTrack{track: t, out: pid, fresh: true, skip: true})
		}
	}
	return x.describe()
}

// assign returns the PID that o has in the program: the one that it had before,
// its own where nobody had that, or the first that nobody had.
func (x *remuxer) assign(o origin) (pid uint16, ok bool) {
	if pid, ok := x.origins[o]; ok {
		return pid, true
	}
	free := func(pid uint16) bool { return !x.taken[pid] && pid != outPMT && pid != outPCR }
	pid = o.pid
	if pid < 0x20 || pid > lastPID || !free(pid) { // below are tables of DVB
		for pid = firstPID; !free(pid); pid++ {
			if pid == lastPID {
				return 0, false
			}
		}
	}
	if x.origins == nil {
		x.origins = make(map[origin]uint16)
	}
	x.origins[o], x.taken[pid] = pid, true
	return pid, true
}

// forget frees the PIDs of tracks that are gone.
func (x *remuxer) forget() {
	clear(x.origins)
	clear(x.taken[:])
	for _, s := range x.sources {
		for _, t := range s.tracks {
			x.origins[origin{s.feed, t.pid, t.streamType}], x.taken[t.out] = t.out, true
		}
	}
}

// describe makes the PMT of the tracks that exist. It reports whether that
// differs from the one that went out last. ISO 13818-1 2.4.4.8.
func (x *remuxer) describe() bool {
	b := make([]byte, 0, 64)
	b = append(b, 0x02, 0, 0, 0, 1, 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, 0xe000|outPCR)
	b = binary.BigEndian.AppendUint16(b, 0xf000)
	for _, s := range x.sources {
		for _, t := range s.tracks {
			was := t.listed
			t.listed = !x.blocked.has(t.coding().kind) &&
				len(b)+5+len(t.descriptors)+4 <= maxSection // a program map is one section
			if !t.listed {
				continue
			}
			if !was {
				t.fresh, t.skip = true, true
			}
			b = append(b, t.streamType)
			b = binary.BigEndian.AppendUint16(b, 0xe000|t.out)
			b = binary.BigEndian.AppendUint16(b, 0xf000|uint16(len(t.descriptors)))
			b = append(b, t.descriptors...)
		}
	}
	x.section = b
	return !bytes.Equal(b, x.told)
}

// appendPSI appends PAT, PMT and PCR, as of now. The version of the PMT changes
// when, and only when, it is not as it went out last.
func (x *remuxer) appendPSI(b []byte, now ticks) []byte {
	start := len(b)
	if x.told != nil && !bytes.Equal(x.section, x.told) {
		x.version = (x.version + 1) & 31
	}
	x.told = x.section
	pat := []byte{0x00, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0xe0 | outPMT>>8, outPMT & 0xff}
	b = appendSection(b, patPID, &x.patCC, pat, 0)
	b = appendSection(b, outPMT, &x.pmtCC, bytes.Clone(x.section), x.version)
	x.psi = append(x.psi[:0], b[start:]...)
	// After a pause in which nothing flowed there may be a gap; else not.
	if now-x.pcr < second {
		for t := x.pcr + maxPSIGap*9/10; t < now-maxPSIGap/10; t += maxPSIGap * 9 / 10 {
			b = appendPCR(b, t)
		}
	}
	x.pcr = max(now, x.pcr+1)
	x.sent = now
	return appendPCR(b, x.pcr)
}

// newPSI returns what appendPSI appends, as a message.
func (x *remuxer) newPSI(at time.Time, now ticks) *message {
	info := chunkInfo{start: true, hasPAT: true, marks: x.psiMarks()} // as they stand before it
	return newMessage(x.appendPSI(nil, now), at, info)
}

// kinds returns what k says of the PIDs of s, of those that they have here.
func (s *source) kinds(k *kindReader, to *kindReader) {
	for _, t := range s.tracks {
		if of := k.listed(t.pid); of != nil {
			to.tracks = append(to.tracks, pidKind{t.out, of.listed, of.open})
		}
	}
}

// marks tells where the PIDs of s stand.
func (x *remuxer) marks(s *source) []mark {
	m := make([]mark, 0, len(s.tracks))
	for _, t := range s.tracks {
		if t.listed {
			m = append(m, mark{t.out, x.last[t.out]})
		}
	}
	return m
}

// psiMarks tells where the PIDs of PAT and PMT stand.
func (x *remuxer) psiMarks() []mark { return []mark{{patPID, x.patCC}, {outPMT, x.pmtCC}} }

// opening returns m with the parameter sets that its keyframe lacks, or nil if
// it lacks none.
func (s *source) opening(m *message) *message {
	sets := m.info.sets
	if sets == nil {
		return nil
	}
	i := slices.IndexFunc(s.tracks, func(t *outTrack) bool { return t.pid == sets.pid })
	if i < 0 {
		return nil
	}
	b := (&insertion{s.tracks[i].out, sets.at, sets.bytes}).into(m.payload())
	if b == nil {
		return nil
	}
	o := newMessage(b, m.at, m.info)
	o.feed, o.has = m.feed, m.has
	o.kinds.copy(&m.kinds)
	return o
}

// renew makes the next packets of s begin anew.
func (s *source) renew() {
	for _, t := range s.tracks {
		t.fresh, t.skip = true, true
	}
}

// remux returns the packets of a chunk of s as they go into the program, with
// the timestamps of its PES as stamps has them; they are only valid until the
// next call. What is not an elementary stream of the program, damaged or
// scrambled is left out, as is a PES that the clock leaves out.
func (x *remuxer) remux(s *source, chunk []byte, stamps []stamp) []byte {
	b := x.out[:0]
	var t *outTrack
	for from := 0; from+packetSize <= len(chunk); from += packetSize {
		in := packet(chunk[from : from+packetSize])
		if in.damaged() || in.scrambled() {
			continue
		}
		if pid := in.pid(); t == nil || t.pid != pid {
			i := slices.IndexFunc(s.tracks, func(t *outTrack) bool { return t.pid == pid })
			if i < 0 {
				continue
			}
			t = s.tracks[i]
		}
		payload := in.payload()
		if payload == nil {
			t.fresh = t.fresh || in.discontinuity() // some packets were muted
			continue
		}
		var st *stamp
		if in.unitStart() {
			for len(stamps) > 0 && stamps[0].at < from {
				stamps = stamps[1:]
			}
			if len(stamps) > 0 && stamps[0].at == from {
				st = &stamps[0]
			}
			t.skip = cutHeader(payload) || st != nil && st.fate != fateGoes
			t.fresh = t.fresh || t.skip
		}
		if t.skip || !t.listed {
			continue
		}
		cc := byte(in.continuity())
		if t.fresh {
			t.fresh = false
			t.shift = x.last[t.out] + 1 - cc
			b = appendAdaptation(b, t.out, x.last[t.out], 0x80) // discontinuity_indicator
		}
		at := len(b)
		b = append(b, in...)
		p := packet(b[at:])
		p[1] = p[1]&0xe0 | byte(t.out>>8)
		p[2] = byte(t.out)
		cc = (cc + t.shift) & 15
		p[3] = p[3]&0xf0 | cc
		x.last[t.out] = cc
		clearPCR(p)
		if st != nil {
			st.write(p.payload())
		}
	}
	x.out = b
	return b
}
