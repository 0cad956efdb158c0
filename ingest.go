// Ingest: a publisher's endless bytes become chunks of whole frames (I1).
//
// The framer is pure: bytes in, messages out, whatever way the bytes were
// split. A publisher owns one, in the goroutine that reads its body.

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
	firstRead  = 8 << 10  // bytes asked for at first: who sends nothing costs little
	readSize   = 64 << 10 // bytes asked for at once, when there are so many
	maxFrame   = 1 << 20  // bytes; a longer frame goes out in parts
	maxHunt    = 64 << 10 // bytes in which a body must show that it is MPEG-TS
	lockAfter  = 5        // packets in a row that begin with 0x47, to begin with
	relockWith = 3        // and after a loss
	maxWaits   = 64       // PES that begin while one stays open: a track that stopped, or two that always overlap
)

// chunkInfo is what the readers of a chunk need to know of it.
type chunkInfo struct {
	key      bool     // it begins with a keyframe
	start    bool     // it begins with the start of a frame
	anew     bool     // in a stream: it opened the gate of its feed there
	hasVideo bool     // its feed has video
	lead     bool     // it begins with the feed's own PAT
	frames   int      // that begin in it
	psi      []byte   // the feed's last PAT and PMT before its first frame, as they came; nil until known
	program  *program // in force for it; nil until known
	lost     bool     // packets or frames before it were lost on the way in
	marks    []mark   // in a stream: where its PIDs stood, if it can open a gate
}

// frameStart is what is known of the first frame of a chunk.
type frameStart struct {
	seen, begins, key, pat bool
	psi                    []byte
	program                *program
}

// pidState follows the PES packets of one PID.
type pidState struct {
	es      bool // carries PES packets
	begun   bool // a unit has started since synchronisation
	open    bool // a PES has begun and its end is not known
	left    int  // bytes to come of the open PES; 0: it did not say
	fills   bool // stuffing was seen in the middle of a PES here: it is no sign of the end
	stuffed bool // the last PES was ended by stuffing

	counted bool   // counter is that of the last packet
	counter int    // continuity_counter
	codec   string // as the bytes say; "": not known
}

// framer cuts bytes into messages. The held bytes are
//
//	buf[base:done]  whole frames, the next chunk
//	buf[done:lead]  frames whose end is not known
//	buf[lead:pos]   PSI and the like, which belong to the frame to come
//	buf[pos:]       not looked at yet
type framer struct {
	emit func(*message) // gets each chunk; must not block

	ask                   int // bytes in the next read
	buf                   []byte
	base, done, lead, pos int
	head                  frameStart // of the first frame from base on
	tail                  frameStart // of the first frame from done on
	leadPAT               bool       // a PAT is in buf[lead:pos]

	psi      psi
	rawPSI   []byte // psi.raw(), nil when it must be asked again
	video    int    // PID of the video; -1 without
	openPIDs int
	waits    int         // PES that began since a chunk could end
	index    [8192]uint8 // by PID, into pids; 0: not seen
	pids     []pidState

	locked, everLocked bool
	lost               bool // the next chunk comes after a loss
	at                 time.Time
	counts             feedCounts   // not yet taken by the feed
	listed             []trackStats // what tracks told; nil: it must look again
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
	f.at = time.Now()
	f.counts.bytes += uint64(n)
	if !f.parse(err == io.EOF) {
		return errNotTS
	}
	if err == io.EOF && f.locked {
		f.done = f.pos
	}
	f.flush()
	f.compact()
	return err
}

// compact moves what is held to the front of buf.
func (f *framer) compact() {
	f.buf = f.buf[:copy(f.buf, f.buf[f.base:])]
	f.done -= f.base
	f.lead -= f.base
	f.pos -= f.base
	f.base = 0
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
		f.packet(packet(f.buf[f.pos : f.pos+packetSize]))
		if f.pos-f.base > maxFrame && f.done == f.base {
			f.done, f.lead, f.leadPAT = f.pos, f.pos, false
			f.tail = frameStart{seen: f.openPIDs > 0}
			f.flush()
		}
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
	f.base, f.done, f.lead = f.pos, f.pos, f.pos
}

// unlock gives up what is not whole: synchronisation is lost at pos.
func (f *framer) unlock() {
	f.flush()
	f.locked = false
	f.lost = true
	f.counts.resyncs++
	f.drop()
	f.head, f.tail, f.leadPAT = frameStart{}, frameStart{}, false
	f.openPIDs = 0
	for i := range f.pids {
		f.pids[i].begun, f.pids[i].open, f.pids[i].counted = false, false, false
	}
}

// state returns the state of a PID; nil when there are too many of them.
func (f *framer) state(pid uint16) *pidState {
	if f.index[pid] == 0 {
		if len(f.pids) > 255 {
			return nil
		}
		f.pids = append(f.pids, pidState{es: f.psi.program.find(pid) != nil})
		f.index[pid] = uint8(len(f.pids) - 1)
	}
	return &f.pids[f.index[pid]]
}

// packet looks at the packet at pos and moves past it.
func (f *framer) packet(p packet) {
	pid, payload := p.pid(), p.payload()
	f.counts.packets++
	if p.damaged() || pid == nullPID || payload == nil {
		if p.damaged() {
			f.counts.damaged++
		}
		f.pos += packetSize
		return
	}
	before := f.psi.program
	if f.psi.add(p) {
		f.rawPSI = nil
		f.leadPAT = f.leadPAT || pid == patPID
		f.pos += packetSize
		if f.psi.program != before {
			f.follow(f.psi.program)
		}
		return
	}
	var s *pidState
	if g := f.psi.program; g == nil || g.find(pid) != nil { // else it is of another program
		s = f.state(pid)
	}
	sentTwice := f.pos-f.base >= packetSize && bytes.Equal(p, f.buf[f.pos-packetSize:f.pos]) // ISO 13818-1 2.4.3.3
	if s == nil || sentTwice {
		f.pos += packetSize
		return
	}
	if s.counted && p.continuity() != (s.counter+1)&0x0f && !p.discontinuity() {
		f.counts.continuityErrors++
	}
	s.counted, s.counter = true, p.continuity()
	if p.unitStart() {
		id, size, ok := pesStart(payload)
		s.begun = true
		if s.es = ok || s.es && p.scrambled(); !s.es && s.open {
			s.open = false
			f.openPIDs--
		}
		if ok && f.psi.program == nil && f.video < 0 && isVideoID(id) {
			f.video = int(pid)
		}
		if s.es {
			f.begin(s, int(pid) == f.video, p.randomAccess())
			s.left = size
			if s.codec == "" {
				s.codec = mpegCodec(payload)
				f.listed = nil
			}
		}
	}
	switch {
	case !s.begun: // the end of something that began before the first bytes
		f.discard()
		return
	case !s.es: // sections of a table that is not ours to know
		f.pos += packetSize
		return
	case !s.open: // it went on after its end
		s.fills = s.fills || s.stuffed
		s.open = true
		f.openPIDs++
		f.head.seen, f.tail.seen = true, true
	}
	f.pos += packetSize
	f.lead, f.leadPAT = f.pos, false
	f.account(s, p, len(payload))
}

// follow makes the program map in force.
func (f *framer) follow(g *program) {
	f.video, f.listed = -1, nil
	for _, t := range g.tracks {
		if t.coding().kind == pictureTrack && f.video < 0 {
			f.video = int(t.pid)
		}
	}
	for pid, i := range f.index {
		if s := &f.pids[i]; i != 0 {
			if s.es = g.find(uint16(pid)) != nil; !s.es && s.open {
				s.open = false
				f.openPIDs--
			}
		}
	}
}

// begin starts a PES at pos. Where a chunk may end, buf[:lead] is then done.
func (f *framer) begin(s *pidState, video, randomAccess bool) {
	if s.open {
		s.open = false
		f.openPIDs--
	}
	if f.waits++; video || f.openPIDs == 0 {
		f.waits = 0
	}
	if (f.waits == 0 || f.waits > maxWaits) && f.head.seen && f.lead > f.done {
		f.done, f.tail = f.lead, frameStart{}
	}
	first := frameStart{
		seen: true, begins: true, key: video && randomAccess, pat: f.leadPAT, psi: f.lastPSI(), program: f.psi.program,
	}
	if f.done == f.lead && f.done > f.base && (first.key || first.program != f.head.program) {
		f.flush()
	}
	if video || f.video < 0 {
		f.counts.frames++
	}
	if first.key {
		f.counts.keyframes++
	}
	if !f.tail.seen {
		f.tail = first
	}
	if !f.head.seen {
		f.head = first
	}
	s.open = true
	f.openPIDs++
}

// account counts n bytes of payload, and ends the PES where they end it.
func (f *framer) account(s *pidState, p packet, n int) {
	s.stuffed = false
	if s.left > 0 {
		if s.left -= n; s.left > 0 {
			return
		}
		s.left = 0
	} else if s.stuffed = !s.fills && p.stuffed(); !s.stuffed {
		return
	}
	s.open = false
	if f.openPIDs--; f.openPIDs == 0 {
		f.done, f.tail = f.pos, frameStart{}
	}
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
		psi, program = f.lastPSI(), f.psi.program
	}
	f.emit(newMessage(f.buf[f.base:f.done], f.at, chunkInfo{
		key: f.head.key, start: f.head.begins, hasVideo: f.video >= 0,
		lead: f.head.pat, frames: countFrames(f.buf[f.base:f.done]), psi: psi, program: program, lost: f.lost,
	}))
	f.lost = false
	f.base, f.head = f.done, f.tail
}

// countFrames returns how many PES begin in packets.
func countFrames(packets []byte) (n int) {
	for p := packet(packets); len(p) > 0; p = p[packetSize:] {
		if p.unitStart() {
			if _, _, ok := pesStart(p.payload()); ok {
				n++
			}
		}
	}
	return n
}

// tracks returns what the feed's program map lists; not to be changed.
func (f *framer) tracks() []trackStats {
	if f.listed != nil || f.psi.program == nil {
		return f.listed
	}
	for _, t := range f.psi.program.tracks {
		codec := t.coding().name
		if i := f.index[t.pid]; t.isMPEG12() && i != 0 && f.pids[i].codec != "" {
			codec = f.pids[i].codec
		}
		f.listed = append(f.listed, trackStats{t.pid, codec})
	}
	return f.listed
}

// publisher is one body or connection that feeds a feed.
type publisher struct {
	remote, agent string // who it is, as it says
	since         time.Time
	interrupt     func() // makes the read in progress fail, and every later one
	begun         func() // called when it has its feed; nil: nobody asks
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
}
