// Ingest: a publisher's endless bytes become chunks of whole frames (I1).
//
// The framer is pure: bytes in, messages out, whatever way the bytes were
// split. A publisher owns one, in the goroutine that reads its body. The only
// clock it knows is when its reads returned.

package main

import (
	"bytes"
	"errors"
	"io"
	"sync/atomic"
	"time"
)

// errNotTS: a body that is not MPEG-TS.
var errNotTS = errors.New("not MPEG-TS")

// errReplaced: a newer publisher has the feed.
var errReplaced = errors.New("replaced by a newer publisher")

const (
	firstRead    = 8 << 10  // bytes of the first read: an idle publisher costs little
	readSize     = 64 << 10 // bytes of a read, once the publisher fills its reads
	messageLimit = 1 << 20  // bytes of a websocket message, its header included: common relays refuse more
	maxHunt      = 64 << 10 // bytes in which a body must show that it is MPEG-TS
	lockAfter    = 5        // packets in a row that begin with 0x47 before the first is taken for one
	relockWith   = 3        // and after a loss
	maxWaits     = 64       // PES that begin while one stays open: a track that stopped, or two that always overlap
	maxPIDs      = 255      // PIDs that are followed

	// maxChunk is how many bytes a chunk has at most; a longer frame goes out in
	// parts. What a stream adds to a chunk, and the header, fit into the rest.
	maxChunk = (messageLimit - 64<<10) / packetSize * packetSize
)

const (
	blindAfter    = time.Second            // without a packet of the video, nothing waits for it
	abandonAfter  = time.Second            // without a packet of an open PES, nothing waits for its end
	programQuiet  = 3 * time.Second        // without a frame, another program may take the place of the one in force
	programFirst  = time.Second            // in which the first program that comes may give way to one listed before it
	usualPause    = 500 * time.Millisecond // a longer one is part of a rhythm
	silentAfter   = 2 * time.Second
	firstPatience = 10 * time.Second // before the rhythm of a feed is known
	maxPatience   = 30 * time.Second // with a feed that has a slow one
)

// chunkInfo is what the readers of a chunk need to know of it.
type chunkInfo struct {
	key       bool       // it begins with a keyframe
	start     bool       // it begins with the start of a frame
	anew      bool       // in a stream: it opened the gate of its feed there
	hasVideo  bool       // its feed has video
	blind     bool       // and that has not come for blindAfter
	soundOnly bool       // and none of it is in the chunk
	hasPAT    bool       // it begins with the feed's own PAT
	frames    int        // that begin in it
	psi       []byte     // the feed's last PAT and PMT before its first frame, as they came; nil until known
	program   *program   // in force for it; nil until known
	sets      *insertion // parameter sets that its keyframe lacks; nil if none are known
	lost      bool       // packets or frames before it were lost on the way in
	marks     []mark     // in a stream: where its PIDs stood, if it can open a gate
}

// frameStart describes the place where a chunk starts.
type frameStart struct {
	begins  bool // a frame begins there, or what a reader gets for want of frames
	key     bool // it is a keyframe
	hasPAT  bool // a PAT is before it
	psi     []byte
	program *program
	sets    *insertion
}

// feedHealth is what tells how a feed is.
type feedHealth struct {
	heard     rhythm // of anything at all
	frames    rhythm // of the program in force
	pictures  rhythm // of its video
	program   uint16 // its program_number; 0: none is known
	scrambled bool   // the last frame was
	lacksSets bool   // the last keyframe lacked parameter sets
}

// frameCount counts the frames that begin in a chunk.
type frameCount struct{ frames, pictures int }

// pidState follows the PES packets of one PID.
type pidState struct {
	pid     uint16
	ours    bool          // a track of the program in force
	picture bool          // a track of video
	seen    time.Duration // when its last packet arrived, by framer.now
	es      bool          // it carries PES packets
	begun   bool          // a unit has started since synchronisation
	open    bool          // a PES has begun and its end is not known
	left    int           // bytes to come of the open PES; 0: it did not say

	stuffsInside bool // this PID stuffs in the middle of a PES, so stuffing does not mark its end
	stuffed      bool // the last PES was ended by stuffing

	counted bool   // counter is that of the last packet
	counter int    // continuity_counter
	codec   string // from the bytes of a PES; "": not known
}

// framer cuts bytes into messages. The held bytes are
//
//	buf[base:done]  whole frames, the next chunk
//	buf[done:next]  frames whose end is not known
//	buf[next:pos]   PSI and the like, which belong to the frame to come
//	buf[pos:]       not looked at yet
//
// up to one packet before base is kept too, to know a packet that is sent twice.
type framer struct {
	emit func(*message) // gets each chunk; must not block

	ask                   int // bytes in the next read
	buf                   []byte
	base, done, next, pos int
	head, tail            frameStart // what begins at base and at done
	whole, begun          frameCount // the frames in buf[base:done] and in buf[done:next]
	nextPAT               bool       // a PAT is in buf[next:pos]
	nextOther             bool       // packets of other programs are

	psi     psi
	rawPSI  []byte   // psi.raw(), nil when it must be asked again
	program *program // in force; nil until known
	since   time.Duration
	video   int // PID of the video; -1 without

	openPIDs int
	waits    int         // PES that began since a chunk could end
	index    [8192]uint8 // by PID, into pids; 0: not seen
	pids     []pidState  // pids[0] is nobody's

	look    look // at the video
	looking bool // the video's open PES begins at done, and is not judged yet
	access  bool // its random_access_indicator
	health  feedHealth

	locked, everLocked bool
	lost               bool          // the next chunk comes after a loss
	at                 time.Time     // of the last read
	now                time.Duration // the same, since the first
	first              time.Time
	counts             feedCounts   // not yet taken by the feed
	listed             []trackStats // the result of tracks; nil when it must be made
}

func newFramer(emit func(*message)) *framer {
	return &framer{emit: emit, ask: firstRead, video: -1, pids: make([]pidState, 1, 8)}
}

// read takes what one Read of r gives, and emits what it completes. At the
// proper end, io.EOF, an unfinished frame is whole; at any other error it is
// discarded. The error is the reader's, or errNotTS.
func (f *framer) read(r io.Reader) error {
	if need := len(f.buf) + f.ask; cap(f.buf) < need {
		f.buf = append(make([]byte, 0, need+f.ask), f.buf...)
	}
	n, err := r.Read(f.buf[len(f.buf) : len(f.buf)+f.ask])
	if n == f.ask {
		f.ask = min(2*f.ask, readSize)
	}
	f.buf = f.buf[:len(f.buf)+n]
	f.tick(time.Now())
	f.counts.bytes += uint64(n)
	if !f.parse(err == io.EOF) {
		return errNotTS
	}
	if err == io.EOF && f.locked {
		f.cut(f.pos)
	} else {
		f.passOthers()
	}
	f.flush()
	f.compact()
	return err
}

// tick sets the time of what was read, and leaves a program that fell silent.
func (f *framer) tick(at time.Time) {
	if f.first.IsZero() {
		f.first = at
	}
	f.at, f.now = at, at.Sub(f.first)
	f.health.heard.add(at)
	if len(f.psi.programs) > 1 {
		f.choose()
	}
}

// compact moves what is held to the front of buf.
func (f *framer) compact() {
	from := max(0, f.base-packetSize)
	if from == 0 {
		return
	}
	f.buf = f.buf[:copy(f.buf, f.buf[from:])]
	f.base -= from
	f.done -= from
	f.next -= from
	f.pos -= from
}

// parse looks at every whole packet. It is false when this is not MPEG-TS.
func (f *framer) parse(end bool) bool {
	for {
		if !f.locked && !f.hunt(end) {
			return f.everLocked || !end && len(f.buf) < maxHunt || end && len(f.buf) == 0
		}
		if len(f.buf)-f.pos < packetSize {
			return true
		}
		if f.buf[f.pos] != syncByte {
			f.unlock()
			continue
		}
		if f.pos+packetSize-f.base > maxChunk {
			f.makeRoom()
		}
		f.packet(packet(f.buf[f.pos : f.pos+packetSize]))
	}
}

// makeRoom emits what is whole, or else a part of a frame that is too long
// for a chunk (I1).
func (f *framer) makeRoom() {
	f.flush()
	if f.pos+packetSize-f.base > maxChunk {
		f.cut(f.pos)
		f.flush()
	}
}

// hunt looks for packets from pos on, and drops what comes before them. A
// body that ends early may be shorter, if it is packets from its first byte.
func (f *framer) hunt(end bool) bool {
	want := lockAfter
	if f.everLocked {
		want = relockWith
	}
	for ; f.pos < len(f.buf); f.pos++ {
		n := 0
		for n < want && f.pos+n*packetSize < len(f.buf) && f.buf[f.pos+n*packetSize] == syncByte {
			n++
		}
		ran := n > 0 && f.pos+n*packetSize >= len(f.buf) // what is here fits
		if n == want || end && ran && f.pos == 0 && len(f.buf) >= packetSize {
			f.locked, f.everLocked = true, true
			f.drop()
			return true
		}
		if ran && !end {
			break
		}
	}
	if f.everLocked {
		f.drop()
	}
	return false
}

// drop forgets the bytes before pos.
func (f *framer) drop() {
	f.base, f.done, f.next = f.pos, f.pos, f.pos
	f.head, f.tail = frameStart{}, frameStart{}
	f.whole, f.begun = frameCount{}, frameCount{}
	f.nextPAT, f.nextOther = false, false
}

// unlock gives up what is not whole: synchronisation is lost at pos.
func (f *framer) unlock() {
	f.flush()
	f.locked, f.lost, f.looking = false, true, false
	f.counts.resyncs++
	f.drop()
	f.openPIDs = 0
	for i := range f.pids {
		s := &f.pids[i]
		s.begun, s.open, s.counted = false, false, false
	}
}

// packet looks at the packet at pos and moves past it.
func (f *framer) packet(p packet) {
	pid, payload := p.pid(), p.payload()
	f.counts.packets++
	switch {
	case p.damaged():
		f.counts.damaged++
		f.pos += packetSize
	case pid == nullPID || payload == nil:
		f.pos += packetSize
	case f.psi.add(p):
		f.pos += packetSize
		f.rawPSI = nil
		f.nextPAT = f.nextPAT || pid == patPID
		f.choose()
	default:
		f.media(f.state(pid), p, payload)
	}
}

// state returns the state of a PID; nil when there are too many of them.
func (f *framer) state(pid uint16) *pidState {
	if i := f.index[pid]; i > 0 {
		return &f.pids[i]
	}
	if len(f.pids) > maxPIDs {
		return nil
	}
	f.pids = append(f.pids, pidState{pid: pid})
	f.index[pid] = uint8(len(f.pids) - 1)
	s := &f.pids[len(f.pids)-1]
	s.seen = f.now
	f.claim(s)
	if len(f.psi.programs) > 1 {
		f.choose()
	}
	return s
}

// claim settles whether a PID is one of the program in force.
func (f *framer) claim(s *pidState) {
	t := f.program.find(s.pid)
	s.ours = t != nil || f.program == nil
	s.es = t != nil
	s.picture = t != nil && t.coding().kind == pictureTrack
	if !s.es && s.open {
		f.end(s)
	}
}

// firstMedia is the first PID that is not reserved for tables of DVB.
// ETSI EN 300 468 table 1.
const firstMedia = 0x20

// media looks at the packet at pos, which is not of PSI, and moves past it.
func (f *framer) media(s *pidState, p packet, payload []byte) {
	if s == nil || !s.ours {
		if s != nil {
			s.seen = f.now
		}
		f.nextOther = f.nextOther || p.pid() >= firstMedia
		f.pos += packetSize
		return
	}
	s.seen = f.now
	if f.pos >= packetSize && bytes.Equal(p, f.buf[f.pos-packetSize:f.pos]) { // ISO 13818-1 2.4.3.3: a packet may be sent twice
		f.pos += packetSize
		return
	}
	if s.counted && p.continuity() != (s.counter+1)&0x0f && !p.discontinuity() {
		f.counts.continuityErrors++
	}
	s.counted, s.counter = true, p.continuity()
	if p.unitStart() {
		f.startUnit(s, p, payload)
	}
	switch {
	case !s.begun:
		f.discard() // the end of something that began before the first bytes
		return
	case !s.es: // sections of a table that is not ours to know
		f.pos += packetSize
		return
	case !s.open:
		f.resume(s)
	}
	f.pos += packetSize
	f.next = f.pos
	f.nextPAT, f.nextOther = false, false
	f.account(s, p, payload)
}

// startUnit looks at the first packet of a PES or section.
func (f *framer) startUnit(s *pidState, p packet, payload []byte) {
	id, size, ok := pesStart(payload)
	s.begun = true
	if s.es = ok || s.es && p.scrambled(); !s.es {
		if s.open {
			f.end(s)
		}
		return
	}
	if f.program == nil && f.video < 0 && isVideoID(id) || s.picture && int(s.pid) != f.video && f.blind() {
		if f.looking {
			f.judge(f.look.end())
		}
		f.video, f.look = int(s.pid), look{}
		if t := f.program.find(s.pid); t != nil {
			f.look.syntax = t.syntax()
		}
	}
	f.begin(s, p)
	s.left = size
	if s.codec == "" {
		s.codec = mpegCodec(payload)
		f.listed = nil
	}
}

// begin starts a PES at pos. Where a chunk may end, buf[:next] is then done.
func (f *framer) begin(s *pidState, p packet) {
	if s.open {
		f.end(s)
	}
	f.abandon()
	isVideo := int(s.pid) == f.video
	if f.waits++; isVideo || f.openPIDs == 0 {
		f.waits = 0
	}
	if (f.waits == 0 || f.waits > maxWaits) && f.next > f.done {
		f.cut(f.next)
	}
	if f.next == f.done && f.done > f.base && f.program != f.head.program {
		f.flush()
	}
	f.mark(frameStart{begins: true, hasPAT: f.nextPAT, psi: f.lastPSI(), program: f.program})
	f.begun.frames++
	if isVideo {
		f.begun.pictures++
		f.health.pictures.add(f.at)
		f.beginLook(p)
	}
	if isVideo || f.video < 0 {
		f.counts.frames++
	}
	f.health.frames.add(f.at)
	f.health.scrambled = p.scrambled()
	s.open = true
	f.openPIDs++
}

// resume goes on with a PES that had ended.
func (f *framer) resume(s *pidState) {
	s.stuffsInside = s.stuffsInside || s.stuffed
	s.open = true
	f.openPIDs++
	f.mark(frameStart{})
}

// mark notes what begins at pos, if that is the first since done.
func (f *framer) mark(start frameStart) {
	if f.next == f.done {
		f.tail = start
		if f.done == f.base {
			f.head = start
		}
	}
}

// end ends the open PES of s.
func (f *framer) end(s *pidState) {
	if f.looking && int(s.pid) == f.video {
		f.judge(f.look.end())
	}
	s.open = false
	f.openPIDs--
}

// abandon ends the PES whose packets have not come for a while: it would hold
// back everything else.
func (f *framer) abandon() {
	if f.openPIDs == 0 {
		return
	}
	for i := range f.pids {
		if s := &f.pids[i]; s.open && f.now-s.seen > abandonAfter {
			f.end(s)
		}
	}
}

// account counts a packet of an open PES, and ends it where it ends.
func (f *framer) account(s *pidState, p packet, payload []byte) {
	rest := payload
	if s.left > 0 {
		rest = payload[:min(len(payload), s.left)]
	}
	if f.looking && int(s.pid) == f.video {
		f.judge(f.look.add(rest))
	}
	s.stuffed = false
	if s.left > 0 {
		if s.left -= len(rest); s.left > 0 {
			return
		}
	} else if s.stuffed = !s.stuffsInside && p.stuffed(); !s.stuffed {
		return
	}
	if f.end(s); f.openPIDs == 0 {
		f.cut(f.pos)
	}
}

// cut makes buf[:to] done.
func (f *framer) cut(to int) {
	if f.looking {
		f.judge(f.look.end())
	}
	f.done, f.next = to, max(f.next, to)
	f.tail = frameStart{}
	f.whole.frames += f.begun.frames
	f.whole.pictures += f.begun.pictures
	f.begun = frameCount{}
	if to == f.pos {
		f.nextPAT, f.nextOther = false, false
	}
}

// beginLook starts the look at a PES of the video, which begins at done.
func (f *framer) beginLook(p packet) {
	f.look.begin()
	f.looking, f.access = true, p.randomAccess()
	if p.scrambled() {
		f.judge(unreadable)
	}
}

// judge takes what the look at the video has found. Where the bytes do not
// tell, random_access_indicator does. A keyframe starts a chunk (I1).
func (f *framer) judge(v verdict) {
	if v == undecided {
		return
	}
	f.looking = false
	if v != keyframe && !(v == unreadable && f.access) {
		return
	}
	f.counts.keyframes++
	f.flush()
	f.tail.key = true
	if v == keyframe {
		f.health.lacksSets = !f.look.complete()
		if b := f.look.sets.missing(); b != nil {
			f.tail.sets = &insertion{pid: uint16(f.video), at: f.look.insert, bytes: b}
		}
	}
	f.head = f.tail
}

// passOthers lets packets go that belong to no frame of the program in force,
// when no frame of it has its end yet to come: the choice of a program holds
// nothing back. When no frames come at all, everything goes, and a reader may
// begin with it.
func (f *framer) passOthers() {
	idle := f.at.Sub(f.lastFrame()) > blindAfter
	if f.pos == f.done || !f.nextOther && !idle {
		return
	}
	if f.abandon(); f.openPIDs > 0 {
		return
	}
	if f.next > f.done {
		f.cut(f.next)
	}
	f.mark(frameStart{begins: idle, hasPAT: f.nextPAT, psi: f.lastPSI(), program: f.program})
	f.cut(f.pos)
}

// lastFrame returns when a frame of the program in force began, or when the
// program was put in force.
func (f *framer) lastFrame() time.Time {
	if f.health.frames.last.IsZero() {
		return f.first.Add(f.since)
	}
	return f.health.frames.last
}

// choose puts the program in force that is there: of those whose video comes,
// else of those of which anything comes, the first in the program association.
// It stays until it falls silent; only in its first moments it gives way to
// one that is listed before it.
func (f *framer) choose() {
	var best *program
	most, present := -1, -1 // the ranks of best and of the program in force
	for _, e := range f.psi.programs {
		if e.program == nil {
			continue
		}
		if f.program != nil && f.program.number == e.number {
			if f.program != e.program { // its map has changed
				f.enforce(e.program)
			}
			present = f.rank(e.program)
		}
		if rank := f.rank(e.program); rank > most {
			most, best = rank, e.program
		}
	}
	switch {
	case best == nil || best == f.program:
	case present < 0, most > present, most > 0 && f.now-f.since <= programFirst:
		f.enforce(best)
	}
}

// rank is 2 for a program whose video comes, 1 for one of which anything
// comes, and 0 for one that is off air. The one in force keeps its rank while
// anything of it comes.
func (f *framer) rank(g *program) int {
	quiet := programQuiet
	if g == f.program {
		quiet = f.health.frames.patience(programQuiet)
	}
	comes, video := false, false
	for _, t := range g.tracks {
		if i := f.index[t.pid]; i > 0 {
			recent := f.now-f.pids[i].seen <= quiet
			comes = comes || recent
			video = video || t.coding().kind == pictureTrack && (recent || g == f.program)
		}
	}
	switch {
	case comes && video:
		return 2
	case comes:
		return 1
	}
	return 0
}

// enforce makes g the program in force.
func (f *framer) enforce(g *program) {
	another := f.program == nil || f.program.number != g.number
	was := f.program.find(uint16(max(f.video, 0)))
	if f.looking {
		f.judge(f.look.end())
	}
	if f.program, f.listed = g, nil; another {
		f.since, f.health.frames, f.health.pictures, f.health.lacksSets = f.now, rhythm{}, rhythm{}, false
		f.health.program = g.number
	}
	for i := range f.pids[1:] {
		f.claim(&f.pids[i+1])
	}
	f.video = -1
	for _, t := range g.tracks {
		if t.coding().kind == pictureTrack {
			f.video = int(t.pid)
			if another || was == nil || was.pid != t.pid || was.streamType != t.streamType {
				f.look = look{syntax: t.syntax()}
			}
			break
		}
	}
}

// blind reports whether the video has not come for a while.
func (f *framer) blind() bool {
	if f.video < 0 {
		return true
	}
	seen := f.since
	if i := f.index[f.video]; i > 0 {
		seen = f.pids[i].seen
	}
	return f.now-seen > blindAfter
}

// discard takes the packet at pos out.
func (f *framer) discard() {
	if f.base == f.pos {
		f.pos += packetSize
		f.drop()
		return
	}
	f.buf = append(f.buf[:f.pos], f.buf[f.pos+packetSize:]...)
}

// lastPSI is the PSI as it came last; not to be changed.
func (f *framer) lastPSI() []byte {
	if f.rawPSI == nil {
		f.rawPSI = f.psi.raw()
	}
	return f.rawPSI
}

// flush emits buf[base:done].
func (f *framer) flush() {
	if f.done == f.base {
		return
	}
	psi, program := f.head.psi, f.head.program
	if !f.head.begins { // no frame, or one that goes on
		psi, program = f.lastPSI(), f.program
	}
	f.emit(newMessage(f.buf[f.base:f.done], f.at, chunkInfo{
		key: f.head.key, start: f.head.begins, hasVideo: f.video >= 0, blind: f.blind(), hasPAT: f.head.hasPAT,
		soundOnly: f.video >= 0 && f.head.begins && f.whole.pictures == 0,
		frames:    f.whole.frames, psi: psi, program: program, sets: f.head.sets, lost: f.lost,
	}))
	f.lost = false
	f.base, f.head, f.whole = f.done, f.tail, frameCount{}
}

// tracks returns what the program in force lists; not to be changed.
func (f *framer) tracks() []trackStats {
	if f.listed != nil || f.program == nil {
		return f.listed
	}
	for _, t := range f.program.tracks {
		coding := t.coding()
		codec := coding.name
		if i := f.index[t.pid]; t.isMPEG12() && i != 0 && f.pids[i].codec != "" {
			codec = f.pids[i].codec
		}
		f.listed = append(f.listed, trackStats{t.pid, codec, coding.kind.String()})
	}
	return f.listed
}

// rhythm follows when something comes, to tell a pause that is usual from one
// that is not. Its zero value is ready.
type rhythm struct {
	last  time.Time     // when something came
	burst time.Time     // since when it has come without a pause
	usual time.Duration // the pause between bursts; 0: there is none
}

func (r *rhythm) add(at time.Time) {
	switch pause := at.Sub(r.last); {
	case r.last.IsZero():
		r.burst = at
	case pause > usualPause:
		r.burst, r.usual = at, max(pause, r.usual*3/4)
	case at.Sub(r.burst) > r.usual:
		r.usual = 0
	}
	r.last = at
}

// patience returns for how long nothing may come before that means something:
// at least least, and longer if that is usual.
func (r *rhythm) patience(least time.Duration) time.Duration {
	return max(least, min(r.usual*5/2, maxPatience))
}

// isSilent reports whether nothing has come for longer than is usual, by a
// publisher that began at since. Before the second frame of a slow one its rhythm
// is not known, so that waits longer.
func (r *rhythm) isSilent(now, since time.Time) bool {
	if r.last.IsZero() {
		return now.Sub(since) > silentAfter
	}
	least := silentAfter
	if r.usual == 0 && r.last.Sub(r.burst) < usualPause {
		least = firstPatience
	}
	return now.Sub(r.last) > r.patience(least)
}

// publisher is one body or connection that feeds a feed.
type publisher struct {
	remote, agent string // who it is, as it says
	since         time.Time
	interrupt     func()       // makes the read in progress fail, and every later one
	begun         func()       // called when it has its feed; nil: nobody asks
	warn          func(string) // called with what is wrong with its timestamps; nil: nobody asks
	replaced      atomic.Bool
}

// replace ends the publisher: a newer one has its feed. Does not block.
func (p *publisher) replace() {
	p.replaced.Store(true)
	p.interrupt()
}

// feedCounts is what a publisher has sent.
type feedCounts struct {
	bytes, packets, frames, keyframes  uint64
	continuityErrors, damaged, resyncs uint64 // damaged: transport_error_indicator
}

func (c *feedCounts) add(d feedCounts) {
	c.bytes += d.bytes
	c.packets += d.packets
	c.frames += d.frames
	c.keyframes += d.keyframes
	c.continuityErrors += d.continuityErrors
	c.damaged += d.damaged
	c.resyncs += d.resyncs
}

type trackStats struct {
	PID   uint16 `json:"pid"`
	Codec string `json:"codec"`
	Kind  string `json:"kind"` // video, audio, data
}
