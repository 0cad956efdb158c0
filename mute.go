// The mute switch: what may leave this room, by the kind of track (I6).
//
// It is an allow-list. While sound is muted, what goes out is program specific
// information, clock references, and what is known to be picture: the program
// map lists it as that, and so does the stream_id of its PES packet. Likewise
// for picture. Other programs, PIDs that are not listed, what is scrambled or
// damaged, and private data do not go out while anything is muted.
//
// Nothing that was captured while it was muted is ever sent. After a lift a PES
// packet passes only if it began after it by the clock of its own feed, and no
// part of one that arrived before. Nothing here does I/O or waits.

package main

import (
	"slices"
	"sync"
)

// muting is what the mute switch says. The zero value mutes nothing.
type muting struct {
	blocked kindSet
	lifted  [tableTrack]ticks // by kind: when it was last unblocked, on vw's clock; 0: never
}

// set mutes kinds from now on, and lifts the mute of the others. Data is blocked
// while anything is muted. It reports whether something is blocked that was not.
func (m *muting) set(muted kindSet, now ticks) (more bool) {
	if muted != 0 {
		muted |= kindsOf(dataTrack)
	}
	more = muted&^m.blocked != 0
	for k := range m.lifted {
		if k := trackKind(k); m.blocked.has(k) && !muted.has(k) {
			m.lifted[k] = now
		}
	}
	m.blocked = muted
	return more
}

// used reports whether anything is muted or ever was.
func (m *muting) used() bool { return *m != muting{} }

// kindSet is a set of kinds of tracks.
type kindSet uint8

func kindsOf(kinds ...trackKind) (s kindSet) {
	for _, k := range kinds {
		s |= 1 << k
	}
	return s
}

func (s kindSet) has(k trackKind) bool { return s&(1<<k) != 0 }

// tableTrack is the kind of program specific information, which is never muted.
const tableTrack = pictureTrack + 1

// muteFilter takes out of the messages of a feed what may not go out.
type muteFilter struct {
	muting
	reader  kindReader
	gates   map[uint16]*pidGate // by PID
	mutes   [tableTrack]int     // how often each kind was blocked
	timed   bool                // the publisher's PES packets have times
	reached ticks               // when the newest PES packet so far began
	arrived ticks               // when the last message did
	resumed ticks               // when one did after a pause
	keyless bool                // picture was unmuted, and waits for a keyframe
	first   bool                // the first message of a publisher was left out
	lost    bool                // one that came after a loss was
	out     []byte
	stamps  []stamp
}

// setMuting makes f obey m.
func (f *muteFilter) setMuting(m muting) {
	for _, g := range f.gates {
		g.passing = g.passing && m.lifted[g.kind] == f.lifted[g.kind]
	}
	for k := range f.mutes {
		if k := trackKind(k); m.blocked.has(k) && !f.blocked.has(k) {
			f.mutes[k]++
		}
	}
	f.keyless = (f.keyless || m.lifted[pictureTrack] != f.lifted[pictureTrack]) && !m.blocked.has(pictureTrack)
	f.muting = m
}

// apply returns m, which arrived now, without what may not go out; stamps are its
// PES packets, nil if what was captured is of no interest. The caller's hold of m becomes a hold of what is
// returned. That has no payload if nothing is left.
func (f *muteFilter) apply(m *message, stamps []stamp, now ticks) *message {
	f.reader.copy(&m.kinds)
	f.arrive(m, now)
	cut := cutting{in: m.payload(), out: f.out[:0], stamps: f.stamps[:0]}
	key := m.info.key // the first picture in it is a keyframe
	for ; cut.at+packetSize <= len(cut.in); cut.at += packetSize {
		p := packet(cut.in[cut.at : cut.at+packetSize])
		cut.stamp = nil
		kind := f.reader.kind(p)
		if kind == tableTrack {
			continue
		}
		g := f.gate(p.pid(), kind)
		switch {
		case p.unitStart():
			g.passing, g.began = true, max(g.began, f.reached-blindMargin)
			if len(stamps) > 0 && stamps[0].at == cut.at {
				cut.stamp, stamps = &stamps[0], stamps[1:]
			}
			if s := cut.stamp; s != nil && s.began != 0 {
				f.timed, g.began = true, s.began
				f.reached = max(f.reached, g.began)
			}
			if kind == pictureTrack {
				g.passing, key = f.passesPicture(key, g.began, now), false
			}
		case f.reader.find(p.pid()) == nil: // there is no telling where it began
			g.passing, g.began = true, f.reached-blindMargin
		}
		if !f.blocked.has(kind) && g.passing && f.isAfterLift(kind, g.began) {
			if g.mutes != f.mutes[kind] { // queues lost some, if nothing else did
				g.gap, g.mutes = true, f.mutes[kind]
			}
			cut.keep(p, kind, g)
		} else {
			cut.leaveOut(p, g)
		}
	}
	cut.flush()
	f.out, f.stamps = cut.out, cut.stamps
	return f.cut(m, &cut)
}

// cut returns m as c has it, which takes over the caller's hold.
func (f *muteFilter) cut(m *message, c *cutting) *message {
	pictures := !f.blocked.has(pictureTrack) && !f.keyless
	marks := f.allowedMarks(m)
	if !c.changed && !f.first && !f.lost && (pictures || !m.info.hasVideo) && len(marks) == len(m.info.marks) {
		return m
	}
	info := m.info
	info.start, info.frames = c.start, c.frames
	info.hasVideo = info.hasVideo && pictures
	info.key = info.key && c.has.has(pictureTrack)
	if info.marks = marks; !info.key {
		info.sets = nil
	}
	info.lost = info.lost || f.lost
	out := newMessage(c.out, m.at, info)
	out.feed, out.first, out.offered, out.has = m.feed, m.first || f.first, m.offered, c.has
	out.muted = m.has != 0 && out.has == 0
	out.stamps = append(out.stamps, c.stamps...)
	out.kinds.copy(&m.kinds)
	f.first, f.lost = out.size == 0 && out.first, out.size == 0 && info.lost
	m.release()
	return out
}

// arrive notes that m arrived now. Of a feed without timestamps it is not known
// when what comes was captured: after a pause it may be as old as that.
func (f *muteFilter) arrive(m *message, now ticks) {
	if m.first {
		f.timed, f.reached, f.arrived = false, 0, 0
		for _, g := range f.gates {
			g.began = 0
		}
	}
	if !f.timed && now-f.arrived > burstGap {
		f.resumed = now
	}
	if !f.timed && now-f.resumed > blindMargin {
		f.reached = now
	}
	f.arrived = now
}

// gate returns the gate of a PID whose packets are now of that kind.
func (f *muteFilter) gate(pid uint16, kind trackKind) *pidGate {
	g := f.gates[pid]
	if g == nil {
		if f.gates == nil {
			f.gates = make(map[uint16]*pidGate)
		}
		g = &pidGate{passing: f.lifted[kind] == 0}
		f.gates[pid] = g
	}
	g.kind = kind
	return g
}

// isAfterLift reports whether what began then was not captured while its kind
// was blocked.
func (f *muteFilter) isAfterLift(kind trackKind, began ticks) bool {
	return f.lifted[kind] == 0 || began > f.lifted[kind]+liftMargin
}

// passesPicture reports whether a picture may be the next one. The first after a
// lift is a keyframe, or any if none comes for long (I5).
func (f *muteFilter) passesPicture(key bool, began, now ticks) bool {
	late := now-f.lifted[pictureTrack] > toTicks(noKeyframe)
	if f.keyless && (key || late) && f.isAfterLift(pictureTrack, began) {
		f.keyless = false
	}
	return !f.keyless
}

// allowedMarks returns the marks of m without those of tracks that are blocked.
func (f *muteFilter) allowedMarks(m *message) []mark {
	if f.blocked == 0 {
		return m.info.marks
	}
	return slices.DeleteFunc(slices.Clone(m.info.marks), func(k mark) bool {
		t := m.kinds.listed(k.pid)
		return t != nil && f.blocked.has(t.listed)
	})
}

// pidGate is what became of the packets of a PID.
type pidGate struct {
	kind    trackKind
	passing bool  // the PES packet in progress passes, while its kind is not blocked
	began   ticks // when it did
	gap     bool  // packets were left out since the last one that passed
	mutes   int   // those of its kind until then
	cc      byte  // the continuity counter of that one
	told    bool  // a clock reference that went on alone has announced the gap
}

const (
	// liftMargin is by how much a PES packet must have begun after a lift: a track's
	// clock may be late by so much.
	liftMargin = slack
	// blindMargin is how much older than the newest PES packet before it something
	// is taken for that has no time of its own. Muxers interleave within less.
	blindMargin = second
	// burstGap is a pause after which a backlog may arrive.
	burstGap = second / 2
)

// cutting is a message while what may not go out is taken out of it.
type cutting struct {
	in, out  []byte
	at, from int     // of the packet in hand, and of the first that is not yet in out
	stamp    *stamp  // of the packet in hand; nil: it has none
	stamps   []stamp // of what was kept

	changed bool
	has     kindSet // what was kept
	frames  int     // PES packets that begin in it
	start   bool    // the first thing kept is the start of one
}

// keep keeps p, the packet at c.at. The first after a gap is announced.
func (c *cutting) keep(p packet, kind trackKind, g *pidGate) {
	if g.gap {
		c.flush()
		c.out = appendAdaptation(c.out, p.pid(), byte(p.continuity()-1)&15, discontinuityFlag)
		g.gap, c.changed = false, true
	}
	if c.stamp != nil {
		s := *c.stamp
		s.at = len(c.out) + c.at - c.from
		c.stamps = append(c.stamps, s)
	}
	if p.payload() == nil {
		return
	}
	if _, _, isPES := pesStart(p.payload()); isPES && p.unitStart() {
		c.start = c.start || c.has == 0
		c.frames++
	}
	c.has |= kindsOf(kind)
}

// leaveOut leaves out p, the packet at c.at. A clock reference in it goes on alone.
func (c *cutting) leaveOut(p packet, g *pidGate) {
	c.flush()
	c.from, c.changed = c.at+packetSize, true
	if p.damaged() || p.pid() == nullPID {
		return // it counts for nothing
	}
	if !g.gap {
		g.gap, g.told, g.cc = true, false, byte(p.continuity())
		if p.payload() != nil {
			g.cc = (g.cc - 1) & 15
		}
	}
	if a := p.adaptation(); len(a) >= 7 && a[0]&pcrFlag != 0 {
		flags := byte(pcrFlag)
		if !g.told {
			flags, g.told = flags|discontinuityFlag, true
		}
		c.out = appendAdaptation(c.out, p.pid(), g.cc, append([]byte{flags}, a[1:7]...)...)
	}
}

// flush moves what was kept to out.
func (c *cutting) flush() {
	c.out = append(c.out, c.in[c.from:c.at]...)
	c.from = c.at
}

// Flags of an adaptation field. ISO 13818-1 2.4.3.4.
const (
	discontinuityFlag = 0x80
	pcrFlag           = 0x10
)

// kindReader finds the kinds of the packets of a feed, which it is given in
// order. A message holds the state before its first packet.
type kindReader struct {
	program *program
	tracks  []pidKind
	tables  [mapTable + 1]uint16 // by PID: bytes to come of the section in progress; at mapTable: on that of the program map
	stale   bool                 // the program map is not what came last: nothing that begins is known
	found   int                  // index of the track that was looked up last
}

// pidKind is a PID that a program map lists: the kind of its track, and that of
// the PES packet which is in progress on it.
type pidKind struct {
	pid    uint16
	listed trackKind
	open   trackKind
}

const (
	tablePIDs = 0x20 // PIDs below are of PSI, and of the service information of DVB
	mapTable  = tablePIDs
)

// follow makes g the program of the packets to come.
func (r *kindReader) follow(g *program) {
	if r.program == g {
		return
	}
	old := r.tracks
	r.program, r.tracks, r.stale, r.found = g, nil, false, 0
	if g == nil {
		return
	}
	for _, t := range g.tracks {
		k := pidKind{t.pid, t.coding().kind, dataTrack}
		if i := slices.IndexFunc(old, func(o pidKind) bool { return o.pid == k.pid && o.listed == k.listed }); i >= 0 {
			k.open = old[i].open
		}
		r.tracks = append(r.tracks, k)
	}
}

// note gives m the state before it, and the kinds that it holds.
func (r *kindReader) note(m *message) {
	if m.first {
		*r = kindReader{}
	}
	r.follow(m.info.program)
	m.kinds.copy(r)
	for b := m.payload(); len(b) >= packetSize; b = b[packetSize:] {
		p := packet(b[:packetSize])
		if k := r.kind(p); p[3]&0x10 != 0 { // it has payload
			m.has |= 1 << k
		}
	}
}

// copy makes r as o is.
func (r *kindReader) copy(o *kindReader) {
	tracks := append(r.tracks[:0], o.tracks...)
	*r = *o
	r.tracks = tracks
}

// openAll sets r as if a PES packet of each track was in progress, and returns the
// kinds of those.
func (r *kindReader) openAll() (all kindSet) {
	for i := range r.tracks {
		r.tracks[i].open = r.tracks[i].listed
		all |= kindsOf(r.tracks[i].open)
	}
	return all
}

// listed returns the track on a PID; nil without one. It leaves r as it is.
func (r *kindReader) listed(pid uint16) *pidKind {
	for i := range r.tracks {
		if r.tracks[i].pid == pid {
			return &r.tracks[i]
		}
	}
	return nil
}

// find is listed, which remembers the track.
func (r *kindReader) find(pid uint16) *pidKind {
	if t := r.found; t < len(r.tracks) && r.tracks[t].pid == pid {
		return &r.tracks[t]
	}
	for i := range r.tracks {
		if r.tracks[i].pid == pid {
			r.found = i
			return &r.tracks[i]
		}
	}
	return nil
}

// kind returns the kind of the next packet.
func (r *kindReader) kind(p packet) trackKind {
	t := r.find(p.pid())
	if t == nil {
		return r.unlisted(p)
	}
	unreadable := p.damaged() || p.scrambled()
	if p.unitStart() {
		t.open = dataTrack
		if !unreadable && !r.stale {
			t.open = kindOfPES(t.listed, p.payload())
		}
	}
	if unreadable {
		return dataTrack
	}
	return t.open
}

// unlisted returns the kind of a packet on a PID that is not that of a track: a
// table has its sections there, and nothing beside them.
func (r *kindReader) unlisted(p packet) trackKind {
	pid, at, payload := p.pid(), p.pid()%tablePIDs, p.payload()
	isMap := r.program != nil && pid == r.program.pid && pid != patPID
	switch {
	case p.damaged() || p.scrambled() || len(payload) == 0 || pid >= tablePIDs && !isMap:
		return dataTrack
	case isMap:
		at = mapTable
	}
	left := int(r.tables[at])
	r.tables[at] = uint16(max(0, left-len(payload)))
	if !p.unitStart() {
		if left == 0 {
			return dataTrack
		}
		return tableTrack
	}
	rest, ok := sectionStart(payload, pid == patPID)
	if r.tables[at] = uint16(rest); !ok || int(payload[0]) > left {
		return dataTrack
	}
	if isMap {
		r.stale = !r.program.matches(payload)
	}
	return tableTrack
}

// kindOfPES returns the kind of a PES packet on a PID whose track is listed as
// that: of data, where its stream_id does not say the same. Sound that is not of
// MPEG has the stream_id of private data. ISO 13818-1 table 2-22.
func kindOfPES(listed trackKind, payload []byte) trackKind {
	id, _, ok := pesStart(payload)
	switch {
	case !ok:
	case listed == pictureTrack && (isVideoID(id) || id == privateStream1 && isAV1(payload)):
		return pictureTrack
	case listed == soundTrack && (id&0xe0 == 0xc0 || id == privateStream1):
		return soundTrack
	}
	return dataTrack
}

// isAV1 reports whether a PES packet begins with a temporal delimiter, as each of
// AV1 does: its stream_id is that of private data.
func isAV1(pes []byte) bool {
	if len(pes) < 9 || len(pes) < 9+int(pes[8]) {
		return false
	}
	const delimiter = "\x00\x00\x01\x12\x00"
	es := pes[9+int(pes[8]):]
	return len(es) >= len(delimiter) && string(es[:len(delimiter)]) == delimiter
}

const privateStream1 = 0xbd

// sift takes what is muted out of messages that are queued, once for all queues
// that hold them. Safe for concurrent use.
type sift struct {
	blocked kindSet

	mu     sync.Mutex
	filter muteFilter
	done   map[*message]*message // both are held
}

func newSift(blocked kindSet) *sift {
	return &sift{blocked: blocked, filter: muteFilter{muting: muting{blocked: blocked}}, done: make(map[*message]*message)}
}

// touches reports whether m holds something that is muted.
func (f *sift) touches(m *message) bool {
	return m.has&f.blocked != 0 || slices.ContainsFunc(m.info.marks, func(k mark) bool {
		t := m.kinds.listed(k.pid)
		return t != nil && f.blocked.has(t.listed)
	})
}

// apply returns m without what is muted, nil if nothing is left. The caller holds
// it.
func (f *sift) apply(m *message) *message {
	f.mu.Lock()
	defer f.mu.Unlock()
	out, ok := f.done[m]
	if !ok {
		m.holders.Add(2) // one for done, one for the filter
		clear(f.filter.gates)
		out = f.filter.apply(m, nil, 0)
		if out != m && m.opening != nil && !f.blocked.has(pictureTrack) {
			m.opening.holders.Add(1)
			clear(f.filter.gates)
			out.opening = f.filter.apply(m.opening, nil, 0)
		}
		f.filter.first, f.filter.lost = false, false
		f.done[m] = out
	}
	if out.size == 0 {
		return nil
	}
	out.holders.Add(1)
	return out
}
