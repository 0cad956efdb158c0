// ISO 13818-1 on 188-byte packets, reading and writing: headers, program specific
// information and its CRC, timestamps, stream types by name. Nothing here does
// I/O or keeps time, and nothing trusts its input: every accessor is defined for
// any 188 bytes.

package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"time"
)

const (
	packetSize = 188
	syncByte   = 0x47
	patPID     = 0x0000
	nullPID    = 0x1fff
)

// packet is one transport packet of 188 bytes. ISO 13818-1 2.4.3.2.
type packet []byte

func (p packet) pid() uint16     { return binary.BigEndian.Uint16(p[1:]) & 0x1fff }
func (p packet) damaged() bool   { return p[1]&0x80 != 0 } // transport_error_indicator
func (p packet) unitStart() bool { return p[1]&0x40 != 0 } // payload_unit_start_indicator
func (p packet) scrambled() bool { return p[3]&0xc0 != 0 } // transport_scrambling_control
func (p packet) continuity() int { return int(p[3] & 0x0f) }

// adaptation returns the adaptation field after its length byte; nil without
// one, and when its length does not fit the packet. ISO 13818-1 2.4.3.4.
func (p packet) adaptation() []byte {
	if p[3]&0x20 == 0 || int(p[4]) > packetSize-5 {
		return nil
	}
	return p[5 : 5+int(p[4])]
}

// payload returns the bytes after the header and the adaptation field; nil
// when there are none.
func (p packet) payload() []byte {
	at := 4
	if p[3]&0x20 != 0 {
		at = 5 + int(p[4])
	}
	if p[3]&0x10 == 0 || at >= packetSize {
		return nil
	}
	return p[at:]
}

// randomAccess reports whether random_access_indicator is set.
func (p packet) randomAccess() bool {
	a := p.adaptation()
	return len(a) > 0 && a[0]&0x40 != 0
}

// discontinuity reports whether discontinuity_indicator is set.
func (p packet) discontinuity() bool {
	a := p.adaptation()
	return len(a) > 0 && a[0]&0x80 != 0
}

// stuffed reports whether the adaptation field holds stuffing: the sign of a
// packet whose payload did not fill it, which is the last one of a PES.
// ISO 13818-1 2.4.3.5.
func (p packet) stuffed() bool {
	if p[3]&0x20 == 0 {
		return false
	}
	a := p.adaptation()
	if len(a) == 0 {
		return p[4] == 0 // a length of 0 is one byte of stuffing
	}
	used := 1
	for _, f := range [...]struct{ flag, bytes byte }{{0x10, 6}, {0x08, 6}, {0x04, 1}} {
		if a[0]&f.flag != 0 { // PCR, OPCR, splice_countdown
			used += int(f.bytes)
		}
	}
	for _, flag := range [...]byte{0x02, 0x01} { // private data, extension
		if a[0]&flag != 0 && used < len(a) {
			used += 1 + int(a[used])
		}
	}
	return used < len(a)
}

// pesStart reads the start of a PES packet: its stream_id and its size in
// bytes, header included, or 0 if the packet does not state a length.
// ISO 13818-1 2.4.3.6.
func pesStart(payload []byte) (streamID byte, size int, ok bool) {
	if len(payload) < 4 || payload[0] != 0 || payload[1] != 0 || payload[2] != 1 {
		return 0, 0, false
	}
	if len(payload) >= 6 {
		if size = int(binary.BigEndian.Uint16(payload[4:])); size > 0 {
			size += 6
		}
	}
	return payload[3], size, true
}

// sectionStart reads the payload of a packet in which sections begin, and returns
// how many bytes are to come of the last of them. ok is false where none begins.
// What begins with zeros outside the association, whose table_id is 0, may be the
// start code of a PES packet. ISO 13818-1 2.4.4.1.
func sectionStart(payload []byte, isAssociation bool) (left int, ok bool) {
	if len(payload) < 2 || len(payload) <= 1+int(payload[0]) {
		return 0, false
	}
	if _, _, isPES := pesStart(payload); isPES || payload[0] == 0 && payload[1] == 0 && !isAssociation {
		return 0, false
	}
	b := payload[1+int(payload[0]):]
	for len(b) >= 3 && b[0] != 0xff { // 0xff: stuffing to the end
		n := 3 + int(binary.BigEndian.Uint16(b[1:])&0x0fff)
		if n > len(b) {
			return n - len(b), true
		}
		b = b[n:]
	}
	if len(b) == 0 || b[0] == 0xff {
		return 0, true
	}
	return maxSection, true // it does not say yet
}

// isVideoID reports whether a PES stream_id is one of video. ISO 13818-1 table 2-22.
func isVideoID(streamID byte) bool { return streamID&0xf0 == 0xe0 }

// Stream types, the kinds of elementary streams that a program map lists.
// ISO 13818-1 table 2-34; from 0x80 on as ATSC and SMPTE-RA assign them.
const (
	typeMPEG1Video   = 0x01
	typeMPEG2Video   = 0x02
	typeMPEG1Audio   = 0x03
	typeMPEG2Audio   = 0x04
	typeAAC          = 0x0f // ADTS
	typeMPEG4Video   = 0x10
	typeAACLATM      = 0x11
	typeH264         = 0x1b
	typeMPEG4Raw     = 0x1c // MPEG-4 audio without a transport syntax
	typeAuxVideo     = 0x1e
	typeSVC          = 0x1f
	typeMVC          = 0x20
	typeJPEG2000     = 0x21
	typeMPEG2Stereo  = 0x22
	typeH264Stereo   = 0x23
	typeHEVC         = 0x24
	typeHEVCTemporal = 0x25
	typeJPEGXS       = 0x32
	typeVVC          = 0x33
	typeVVCTemporal  = 0x34
	typeEVC          = 0x35
	typeAVS          = 0x42
	typeAC3          = 0x81
	typeDTS          = 0x82
	typeEAC3         = 0x87
	typeDirac        = 0xd1
	typeAVS2         = 0xd2
	typeAVS3         = 0xd4
	typeVC1          = 0xea
)

// Descriptor tags. ISO 13818-1 table 2-45; from 0x40 on ETSI EN 300 468.
const (
	tagRegistration = 0x05
	tagTeletext     = 0x56
	tagSubtitling   = 0x59
	tagAC3          = 0x6a
	tagEAC3         = 0x7a
	tagDTS          = 0x7b
	tagAAC          = 0x7c
	tagExtension    = 0x7f
)

// trackKind is what a viewer gets from a track.
type trackKind int

const (
	dataTrack trackKind = iota // or one that is not known
	soundTrack
	pictureTrack
)

// String returns the kind as the API has it.
func (k trackKind) String() string { return [...]string{"data", "audio", "video"}[k] }

// coding is the format of a track: its common name, as ffmpeg has it, and
// its kind.
type coding struct {
	name string
	kind trackKind
}

var codingsByType = map[byte]coding{
	typeMPEG1Video: {"mpeg1video", pictureTrack}, typeMPEG2Video: {"mpeg2video", pictureTrack},
	typeMPEG4Video: {"mpeg4", pictureTrack}, typeH264: {"h264", pictureTrack}, typeAuxVideo: {"aux video", pictureTrack},
	typeSVC: {"h264", pictureTrack}, typeMVC: {"h264", pictureTrack}, typeJPEG2000: {"jpeg2000", pictureTrack},
	typeMPEG2Stereo: {"mpeg2video", pictureTrack}, typeH264Stereo: {"h264", pictureTrack}, typeHEVC: {"hevc", pictureTrack},
	typeHEVCTemporal: {"hevc", pictureTrack}, typeJPEGXS: {"jpegxs", pictureTrack}, typeVVC: {"vvc", pictureTrack},
	typeVVCTemporal: {"vvc", pictureTrack}, typeEVC: {"evc", pictureTrack}, typeAVS: {"cavs", pictureTrack},
	typeDirac: {"dirac", pictureTrack}, typeAVS2: {"avs2", pictureTrack}, typeAVS3: {"avs3", pictureTrack},
	typeVC1: {"vc1", pictureTrack},

	typeMPEG1Audio: {"mp2", soundTrack}, typeMPEG2Audio: {"mp2", soundTrack}, typeAAC: {"aac", soundTrack},
	typeAACLATM: {"aac_latm", soundTrack}, typeMPEG4Raw: {"aac", soundTrack}, typeAC3: {"ac3", soundTrack},
	typeDTS: {"dts", soundTrack}, typeEAC3: {"eac3", soundTrack},
}

// codingsByRegistration has the format_identifiers of SMPTE-RA that name one.
var codingsByRegistration = map[string]coding{
	"AV01": {"av1", pictureTrack}, "HEVC": {"hevc", pictureTrack}, "VC-1": {"vc1", pictureTrack},
	"drac": {"dirac", pictureTrack}, "VVC ": {"vvc", pictureTrack}, "AVSV": {"cavs", pictureTrack},
	"AVS2": {"avs2", pictureTrack}, "AVS3": {"avs3", pictureTrack},

	"AC-3": {"ac3", soundTrack}, "EAC3": {"eac3", soundTrack}, "AC-4": {"ac4", soundTrack}, "Opus": {"opus", soundTrack},
	"BSSD": {"s302m", soundTrack}, "DTS1": {"dts", soundTrack}, "DTS2": {"dts", soundTrack}, "DTS3": {"dts", soundTrack},

	"KLVA": {"klv", dataTrack}, "ID3 ": {"timed_id3", dataTrack}, "VANC": {"smpte_2038", dataTrack},
}

var codingsByTag = map[byte]coding{
	tagAC3: {"ac3", soundTrack}, tagEAC3: {"eac3", soundTrack}, tagDTS: {"dts", soundTrack}, tagAAC: {"aac", soundTrack},
	tagTeletext: {"dvb_teletext", dataTrack}, tagSubtitling: {"dvb_subtitle", dataTrack},
}

// codingsByExtension has the descriptor_tag_extensions of tagExtension.
var codingsByExtension = map[byte]coding{0x0e: {"dts", soundTrack}, 0x15: {"ac4", soundTrack}, 0x80: {"opus", soundTrack}}

// track is one elementary stream of a program map. Immutable.
type track struct {
	pid         uint16
	streamType  byte
	descriptors []byte
}

// coding returns what the stream_type says or, where that leaves it open,
// what the descriptors do.
func (t track) coding() coding {
	if f, ok := codingsByType[t.streamType]; ok {
		return f
	}
	for d := t.descriptors; len(d) >= 2 && len(d) >= 2+int(d[1]); d = d[2+int(d[1]):] {
		f, ok := codingsByTag[d[0]]
		switch body := d[2 : 2+int(d[1])]; {
		case d[0] == tagRegistration && len(body) >= 4:
			f, ok = codingsByRegistration[string(body[:4])]
		case d[0] == tagExtension && len(body) >= 1:
			f, ok = codingsByExtension[body[0]]
		}
		if ok {
			return f
		}
	}
	return coding{fmt.Sprintf("type 0x%02x", t.streamType), dataTrack}
}

// isMPEG12 reports whether t is MPEG-1 or MPEG-2 video or audio, where the
// stream_type does not settle the codec: ffmpeg labels MPEG-1 video as MPEG-2,
// and all layers of audio share one number.
func (t track) isMPEG12() bool {
	return typeMPEG1Video <= t.streamType && t.streamType <= typeMPEG2Audio
}

// mpegCodec returns the name of the codec from the first payload of a PES of
// MPEG video or audio, or "" if the payload does not tell. In MPEG-2 a
// sequence_extension follows the sequence header (ISO 13818-2 6.2.2); the
// layer of audio is in its header (ISO 11172-3 2.4.2.3).
func mpegCodec(payload []byte) string {
	if len(payload) < 9 || len(payload) < 9+int(payload[8])+4 {
		return ""
	}
	id, es := payload[3], payload[9+int(payload[8]):]
	switch {
	case isVideoID(id) && bytes.HasPrefix(es, []byte{0, 0, 1, 0xb3}):
		if bytes.Contains(es, []byte{0, 0, 1, 0xb5}) {
			return "mpeg2video"
		}
		if bytes.Contains(es, []byte{0, 0, 1, 0xb8}) || bytes.Contains(es, []byte{0, 0, 1, 0x00}) {
			return "mpeg1video"
		}
	case id&0xe0 == 0xc0 && es[0] == 0xff && es[1]&0xe0 == 0xe0:
		return [...]string{"", "mp3", "mp2", "mp1"}[es[1]>>1&3]
	}
	return ""
}

// program is one parsed program map. Immutable; two feeds never share one.
type program struct {
	number  uint16 // program_number
	pid     uint16 // of its map
	section []byte // as it came
	tracks  []track
}

// matches reports whether the section that begins in payload, on the PID of the
// map of g, leaves g in force: it is the same, or not for this program or time.
func (g *program) matches(payload []byte) bool {
	if len(payload) == 0 || len(payload) < 1+int(payload[0])+6 {
		return false
	}
	b := payload[1+int(payload[0]):]
	if b[0] != 0x02 || b[5]&1 == 0 || !bytes.Equal(b[3:5], g.section[3:5]) {
		return true
	}
	n := min(len(b), len(g.section))
	return bytes.Equal(b[:n], g.section[:n])
}

// find returns the track on a PID; nil without one, and for a nil program.
func (g *program) find(pid uint16) *track {
	if g != nil {
		for i := range g.tracks {
			if g.tracks[i].pid == pid {
				return &g.tracks[i]
			}
		}
	}
	return nil
}

// maxPrograms is how many programs of a feed are followed.
const maxPrograms = 64

// psi follows the program association and the program maps that it names.
// Owned by one goroutine. ISO 13818-1 2.4.4.
type psi struct {
	programs []programEntry // in the order of the program association
	pat      sections
	patLast  []byte // the last section of the PAT
	patRaw   []byte // the packets that it came in

	maps  []sections  // one for each PID that carries program maps
	index [8192]uint8 // by PID, one more than the index into maps; 0: no maps there
}

// programEntry is a program as the program association lists it.
type programEntry struct {
	number  uint16
	pmtPID  uint16
	section byte     // the section_number of the PAT that lists it
	program *program // nil until its map was read
	raw     []byte   // the packets of its last map, as they came
}

// add reads a packet of PSI and reports whether its PID carries any.
func (s *psi) add(p packet) bool {
	pid := p.pid()
	if pid == patPID {
		s.pat.add(p, s.association)
		return true
	}
	if i := s.index[pid]; i > 0 {
		s.maps[i-1].add(p, s.programMap)
		return true
	}
	return false
}

// raw returns the packets of the last PAT and PMTs as they came, nil until
// there are both.
func (s *psi) raw() []byte {
	var maps, last []byte
	for _, e := range s.programs {
		if !bytes.Equal(e.raw, last) { // else two maps came in one packet
			maps = append(maps, e.raw...)
		}
		last = e.raw
	}
	if maps == nil {
		return nil
	}
	return bytes.Join([][]byte{s.patRaw, maps}, nil)
}

// association reads a section of the PAT. ISO 13818-1 2.4.4.3.
func (s *psi) association(b, packets []byte) {
	if b[0] != 0x00 || len(b) < 12 || b[5]&1 == 0 {
		return
	}
	s.patRaw = bytes.Clone(packets)
	if bytes.Equal(b, s.patLast) {
		return
	}
	s.patLast = bytes.Clone(b)
	section, last := b[6], b[7]
	var entries []programEntry
	for e := b[8 : len(b)-4]; len(e) >= 4; e = e[4:] {
		number, pid := binary.BigEndian.Uint16(e), binary.BigEndian.Uint16(e[2:])&0x1fff
		if number != 0 && pid != patPID && pid != nullPID { // 0: the network information
			entries = append(entries, programEntry{number: number, pmtPID: pid, section: section})
		}
	}
	for _, e := range s.programs {
		i := slices.IndexFunc(entries, func(n programEntry) bool { return n.number == e.number && n.pmtPID == e.pmtPID })
		if i >= 0 {
			entries[i].program, entries[i].raw = e.program, e.raw
		} else if e.section != section && e.section <= last {
			entries = append(entries, e)
		}
	}
	slices.SortStableFunc(entries, func(a, b programEntry) int { return int(a.section) - int(b.section) })
	s.programs = entries[:min(len(entries), maxPrograms)]
	s.findMaps()
}

// findMaps makes maps and index those of the programs.
func (s *psi) findMaps() {
	old, index := s.maps, s.index
	s.maps, s.index = nil, [8192]uint8{}
	for _, e := range s.programs {
		if s.index[e.pmtPID] > 0 {
			continue // two programs share the PID
		}
		m := sections{}
		if i := index[e.pmtPID]; i > 0 {
			m = old[i-1]
		}
		s.maps = append(s.maps, m)
		s.index[e.pmtPID] = uint8(len(s.maps))
	}
}

// programMap reads a section of a PMT. ISO 13818-1 2.4.4.8.
func (s *psi) programMap(b, packets []byte) {
	if b[0] != 0x02 || len(b) < 16 || b[5]&1 == 0 {
		return
	}
	number := binary.BigEndian.Uint16(b[3:])
	i := slices.IndexFunc(s.programs, func(e programEntry) bool { return e.number == number })
	if i < 0 {
		return
	}
	e := &s.programs[i]
	if e.program == nil || !bytes.Equal(e.program.section, b) {
		g := parseProgramMap(bytes.Clone(b))
		if g == nil {
			return
		}
		g.tracks = slices.DeleteFunc(g.tracks, func(t track) bool { return t.pid == patPID || t.pid == nullPID || t.pid == e.pmtPID })
		g.pid, e.program = e.pmtPID, g
	}
	e.raw = bytes.Clone(packets)
}

// parseProgramMap parses a section of a PMT, which the program keeps. It
// returns nil if the lengths in it do not fit.
func parseProgramMap(b []byte) *program {
	g := &program{number: binary.BigEndian.Uint16(b[3:]), section: b}
	end := len(b) - 4
	at := 12 + int(binary.BigEndian.Uint16(b[10:])&0x0fff)
	if at > end {
		return nil
	}
	for at+5 <= end {
		info := at + 5 + int(binary.BigEndian.Uint16(b[at+3:])&0x0fff)
		if info > end {
			return nil
		}
		t := track{binary.BigEndian.Uint16(b[at+1:]) & 0x1fff, b[at], b[at+5 : info]}
		if g.find(t.pid) == nil {
			g.tracks = append(g.tracks, t)
		}
		at = info
	}
	return g
}

// sections puts the sections of one PID together. ISO 13818-1 2.4.4.1.
type sections struct {
	buf     []byte // the section that is not whole yet
	packets []byte // the packets that it came in
	cc      int    // continuity counter of the last of them
}

const (
	maxSection        = 1024 // bytes; section_length is at most 1021. ISO 13818-1 2.4.4.5
	maxSectionPackets = 16   // that one section may be spread over
)

// add takes one packet, and calls take with each whole section whose CRC is
// right and the packets in which it came. Both are only valid during the call.
func (s *sections) add(p packet, take func(section, packets []byte)) {
	b := p.payload()
	if len(b) == 0 || p.damaged() || p.scrambled() {
		return
	}
	fresh := []byte(nil)
	if p.unitStart() {
		pointer := 1 + int(b[0])
		if pointer > len(b) {
			s.buf = s.buf[:0]
			return
		}
		b, fresh = b[1:pointer], b[pointer:]
	} else if len(s.buf) > 0 && p.continuity() != (s.cc+1)&15 {
		if p.continuity() == s.cc {
			return // ISO 13818-1 2.4.3.3: a packet may be sent twice
		}
		s.buf = s.buf[:0] // lost one: wait for the next start
	}
	s.cc = p.continuity()
	if len(s.packets) >= maxSectionPackets*packetSize {
		s.buf = s.buf[:0] // no muxer spreads a section so thin
	}
	if len(s.buf) > 0 {
		s.buf = append(s.buf, b...)
		s.packets = append(s.packets, p...)
		s.drain(take)
	}
	if len(fresh) > 0 {
		s.buf = append(s.buf[:0], fresh...)
		s.packets = append(s.packets[:0], p...)
		s.drain(take)
	}
}

func (s *sections) drain(take func(section, packets []byte)) {
	for len(s.buf) >= 3 && s.buf[0] != 0xff { // 0xff: stuffing to the end
		n := 3 + int(binary.BigEndian.Uint16(s.buf[1:])&0x0fff)
		if n > maxSection || n < 12 {
			break
		}
		if len(s.buf) < n {
			return
		}
		if crc32MPEG(s.buf[:n]) == 0 {
			take(s.buf[:n], s.packets)
		}
		s.buf = s.buf[:copy(s.buf, s.buf[n:])]
		s.packets = s.packets[:copy(s.packets, s.packets[len(s.packets)-packetSize:])] // the next section begins in it
	}
	if len(s.buf) >= 3 || len(s.buf) > 0 && s.buf[0] == 0xff {
		s.buf = s.buf[:0]
	}
}

var crcTable = func() (t [256]uint32) {
	for i := range t {
		c := uint32(i) << 24
		for range 8 {
			c = c<<1 ^ 0x04c11db7*(c>>31)
		}
		t[i] = c
	}
	return t
}()

// crc32MPEG is the CRC of ISO 13818-1 annex A; 0 over a section that ends in
// its right CRC. (hash/crc32 has the reflected form only.)
func crc32MPEG(b []byte) uint32 {
	c := ^uint32(0)
	for _, v := range b {
		c = c<<8 ^ crcTable[byte(c>>24)^v]
	}
	return c
}

// ticks counts 1/90000 s, unwrapped. On the wire it has 33 bits.
type ticks int64

const (
	second ticks = 90000
	wrap   ticks = 1 << 33
)

// signed33 is a difference of two 33-bit timestamps, nearest to zero.
func signed33(d ticks) ticks { return (d+wrap/2)&(wrap-1) - wrap/2 }

// toTicks is a duration on vw's clock.
func toTicks(d time.Duration) ticks { return ticks(d) * 9 / 100_000 }

func (t ticks) duration() time.Duration { return time.Duration(t) * 100_000 / 9 }

// timestamps returns the 5 bytes of the PTS and of the DTS of a PES header;
// nil for what it does not have. ISO 13818-1 2.4.3.6.
func timestamps(pes []byte) (pts, dts []byte) {
	id, _, ok := pesStart(pes)
	if !ok || len(pes) < 14 || pes[6]&0xc0 != 0x80 {
		return nil, nil
	}
	switch id {
	case 0xbc, 0xbe, 0xbf, 0xf0, 0xf1, 0xf2, 0xf8, 0xff:
		return nil, nil // these have no such header
	}
	if pes[7]&0x80 != 0 {
		pts = pes[9:14]
	}
	if pes[7]&0xc0 == 0xc0 && len(pes) >= 19 {
		dts = pes[14:19]
	}
	return pts, dts
}

// readTime reads a PTS or DTS of 5 bytes.
func readTime(b []byte) ticks {
	return ticks(b[0]>>1&7)<<30 | ticks(binary.BigEndian.Uint16(b[1:])>>1)<<15 | ticks(binary.BigEndian.Uint16(b[3:])>>1)
}

// writeTime writes a PTS or DTS; the four bits before it are kept.
func writeTime(b []byte, t ticks) {
	b[0] = b[0]&0xf0 | byte(t>>29)&0x0e | 1
	binary.BigEndian.PutUint16(b[1:], uint16(t>>15)<<1|1)
	binary.BigEndian.PutUint16(b[3:], uint16(t)<<1|1)
}

// mark is where a PID stands: its last continuity counter.
type mark struct {
	pid uint16
	cc  byte
}

// appendSection appends the packets of a section, whose length, version and
// CRC are set. ISO 13818-1 2.4.4.
func appendSection(b []byte, pid uint16, cc *byte, section []byte, version byte) []byte {
	binary.BigEndian.PutUint16(section[1:], 0xb000|uint16(len(section)+4-3))
	section[5] = 0xc1 | version<<1
	section = binary.BigEndian.AppendUint32(section, crc32MPEG(section))
	rest := append([]byte{0}, section...) // pointer_field
	for start := byte(0x40); len(rest) > 0; start = 0 {
		*cc = (*cc + 1) & 15
		b = append(b, syncByte, start|byte(pid>>8), byte(pid), 0x10|*cc)
		n := min(len(rest), packetSize-4)
		b = append(b, rest[:n]...)
		rest = rest[n:]
		for ; n < packetSize-4; n++ {
			b = append(b, 0xff)
		}
	}
	return b
}

// nullPacket is what a receiver ignores. ISO 13818-1 2.4.1
var nullPacket = append([]byte{syncByte, nullPID >> 8, nullPID & 0xff, 0x10}, bytes.Repeat([]byte{0xff}, packetSize-4)...)

// appendAdaptation appends a packet that has an adaptation field only.
// ISO 13818-1 2.4.3.4.
func appendAdaptation(b []byte, pid uint16, cc byte, field ...byte) []byte {
	b = append(b, syncByte, byte(pid>>8), byte(pid), 0x20|cc, packetSize-5)
	b = append(b, field...)
	for n := len(field); n < packetSize-5; n++ {
		b = append(b, 0xff)
	}
	return b
}

// appendPCR appends a packet with a PCR. ISO 13818-1 2.4.3.5.
func appendPCR(b []byte, t ticks) []byte {
	base := uint64(t & (wrap - 1))
	return appendAdaptation(b, outPCR, 0,
		0x10, byte(base>>25), byte(base>>17), byte(base>>9), byte(base>>1), byte(base<<7)|0x7e, 0)
}

// appendMarks appends what tells a reader that the counters of PIDs, which
// go on after marks, do not go on from where it was.
func appendMarks(b []byte, marks []mark) []byte {
	for _, m := range marks {
		b = appendAdaptation(b, m.pid, m.cc, 0x80) // discontinuity_indicator
	}
	return b
}

// insertion is what a decoder needs inside a PES to be able to begin there.
type insertion struct {
	pid   uint16
	at    int // bytes of the PES before it
	bytes []byte
}

// find returns the indices in packets of the one that starts the first PES on
// the PID and of the one that the insertion goes into, and how many bytes of the
// payload of the latter stay before it. ok is false if there is no such place.
func (n *insertion) find(packets []byte) (first, at, before int, ok bool) {
	first, before = -1, n.at
	for ; at < len(packets); at += packetSize {
		p := packet(packets[at : at+packetSize])
		payload := p.payload()
		if p.pid() != n.pid || payload == nil || first < 0 && !p.unitStart() {
			continue
		}
		if first >= 0 && p.unitStart() {
			break
		}
		if first < 0 {
			if first = at; len(payload) < 6 { // lengthen has to know PES_packet_length
				break
			}
		}
		if before <= len(payload) {
			return first, at, before, true
		}
		before -= len(payload)
	}
	return 0, 0, 0, false
}

// into returns a copy of packets with the insertion in the first PES that
// begins on its PID, or nil if there is no place for it. The continuity counters
// end as they did; that they begin elsewhere is announced.
func (n *insertion) into(packets []byte) []byte {
	first, at, before, ok := n.find(packets)
	if !ok {
		return nil
	}
	const room = packetSize - 4
	split := packet(packets[at : at+packetSize])
	payload := split.payload()
	added := n.bytes
	if len(added)%room == room-1 { // one byte cannot be filled but by stuffing
		added = append(bytes.Clone(added), 0) // ISO 14496-10 B.1.1, ISO 13818-2 5.2.3
	}
	data := slices.Concat(payload[:before], added, payload[before:])
	b := append(make([]byte, 0, len(packets)+len(added)+3*packetSize), packets[:first]...)
	b = appendAdaptation(b, n.pid, 0, 0x80) // discontinuity_indicator
	b = append(append(b, packets[first:at]...), split[:packetSize-len(payload)]...)
	b = append(b, data[:len(payload)]...)
	for data = data[len(payload):]; len(data) > 0; data = data[min(room, len(data)):] {
		b = append(b, syncByte, split[1]&^0x40, split[2], 0x10)
		b = appendFilled(b, data[:min(room, len(data))], room)
	}
	renumber(b, n.pid, split.continuity())
	for i := first; ; i += packetSize {
		if p := packet(b[i : i+packetSize]); p.pid() == n.pid && p.unitStart() {
			lengthen(p.payload(), len(added))
			return append(b, packets[at+packetSize:]...)
		}
	}
}

// appendFilled appends the payload of a packet whose header is at the end of b.
// What is left of room goes to an adaptation field that holds private data:
// stuffing would say that the PES ends here. ISO 13818-1 2.4.3.4.
func appendFilled(b, payload []byte, room int) []byte {
	if fill := room - len(payload); fill > 0 {
		b[len(b)-1] |= 0x20 // adaptation_field_control
		b = append(b, byte(fill-1))
		if fill == 2 {
			b = append(b, 0)
		} else if fill > 2 {
			b = append(b, 0x02, byte(fill-3)) // transport_private_data_flag
			b = append(b, bytes.Repeat([]byte{0xff}, fill-3)...)
		}
	}
	return append(b, payload...)
}

// renumber makes cc the continuity counter of the last packet of a PID, and
// makes those before it go up to it. ISO 13818-1 2.4.3.3.
func renumber(packets []byte, pid uint16, cc int) {
	for at := len(packets) - packetSize; at >= 0; at -= packetSize {
		p := packet(packets[at : at+packetSize])
		if p.pid() != pid {
			continue
		}
		p[3] = p[3]&0xf0 | byte(cc&0x0f)
		if p[3]&0x10 != 0 { // it has a payload
			cc--
		}
	}
}

// lengthen adds to the PES_packet_length, if there is one. ISO 13818-1 2.4.3.7.
func lengthen(pes []byte, by int) {
	size := int(binary.BigEndian.Uint16(pes[4:]))
	if size == 0 {
		return
	}
	if size += by; size > 0xffff {
		size = 0 // which video may have
	}
	binary.BigEndian.PutUint16(pes[4:], uint16(size))
}

// clearPCR takes PCR and OPCR out of the adaptation field.
func clearPCR(p packet) {
	a := p.adaptation()
	if len(a) == 0 || a[0]&0x18 == 0 {
		return
	}
	n := 0
	for _, flag := range []byte{0x10, 0x08} {
		if a[0]&flag != 0 {
			n += 6
		}
	}
	a[0] &^= 0x18
	if n = min(n, len(a)-1); n > 0 && a[0]&0x06 == 0 { // private data, since stuffing would say that the PES ends here
		a[0] |= 0x02
		a[1] = byte(n - 1)
		for i := range n - 1 {
			a[2+i] = 0xff
		}
	} else if n > 0 {
		copy(a[1:], a[1+n:])
		for i := len(a) - n; i < len(a); i++ {
			a[i] = 0xff
		}
	}
}

// cutHeader reports whether the timestamps of a PES reach beyond its first
// packet: they could not be moved.
func cutHeader(pes []byte) bool {
	_, _, ok := pesStart(pes)
	if !ok || len(pes) >= 19 {
		return false
	}
	return len(pes) < 9 || pes[7]&0x80 != 0 && len(pes) < 14 || pes[7]&0xc0 == 0xc0
}

const outPCR = 0x1001
