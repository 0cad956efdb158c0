// The first bytes of a picture: whether a decoder can begin with it, and the
// parameter sets that it brings.
//
// A look is bounded: it reads at most maxLook bytes of a PES, ends with the
// first slice, never reads past the PES, and gives the same answer however
// the bytes are split. Nothing is decoded. In the steady state it does not
// allocate.

package main

import (
	"bytes"
	"slices"
)

// syntax is the video syntax that a look can read.
type syntax int

const (
	unreadSyntax syntax = iota // random_access_indicator must do
	mpegSyntax                 // ISO 11172-2, ISO 13818-2
	h264Syntax                 // ISO 14496-10
	h265Syntax                 // ISO 23008-2
	av1Syntax                  // AOM: Carriage of AV1 in MPEG-2 TS
)

// syntax returns the syntax of a track.
func (t track) syntax() syntax {
	switch t.coding().name {
	case "mpeg1video", "mpeg2video":
		return mpegSyntax
	case "h264":
		return h264Syntax
	case "hevc":
		return h265Syntax
	case "av1":
		return av1Syntax
	}
	return unreadSyntax
}

// verdict is what a look has found.
type verdict int

const (
	undecided  verdict = iota // more bytes are needed
	unreadable                // the bytes do not tell
	keyframe                  // a decoder can begin here
	dependent                 // it cannot
)

const (
	maxLook = 8 << 10 // bytes of a PES, its header included
	enough  = 8       // bytes of a slice, with which its type is known
	ahead   = 2       // bytes at the end of a unit that may be of the next start code
)

// look reads the first bytes of one PES after another of a video track. The
// zero value is ready; it is owned by one goroutine.
type look struct {
	syntax  syntax
	verdict verdict

	buf    [maxLook]byte // the first bytes of the PES
	n      int           // how many
	es     int           // where the elementary stream begins; 0: not known yet
	insert int           // where parameter sets would have to be put; 0: not known yet
	unit   int           // where the unit that is being read begins, after its start code; 0: none has
	at     int           // where the search for the next start code goes on

	hasHeader   bool // a sequence header or SPS was seen
	hasGroup    bool // MPEG: a group of pictures begins
	hasRecovery bool // a recovery point SEI was seen
	header      int  // MPEG: where the sequence header begins that is being read; 0: none is

	sets parameterSets
}

// begin starts the look at the next PES.
func (l *look) begin() {
	l.verdict, l.n, l.es, l.insert, l.unit, l.at = undecided, 0, 0, 0, 0, 0
	l.hasHeader, l.hasGroup, l.hasRecovery, l.header = false, false, false, 0
	l.sets.picture++
	if l.syntax == unreadSyntax {
		l.verdict = unreadable
	}
}

// add reads more bytes of the PES, and returns what is known then.
func (l *look) add(b []byte) verdict {
	if l.verdict == undecided {
		l.n += copy(l.buf[l.n:], b)
		l.scan(false)
		if l.verdict == undecided && l.n == maxLook {
			l.conclude()
		}
	}
	return l.verdict
}

// end returns the verdict on a PES that has no more bytes.
func (l *look) end() verdict {
	if l.verdict == undecided {
		l.scan(true)
		if l.header > 0 {
			l.sets.keep(sequenceHeader, 0, 0, l.buf[l.header:l.n])
		}
	}
	if l.verdict == undecided {
		l.conclude()
	}
	return l.verdict
}

// conclude gives the verdict on a PES in whose first bytes no slice was found.
func (l *look) conclude() {
	l.verdict = unreadable
	if l.hasHeader || l.hasRecovery {
		l.verdict = keyframe
	}
}

// decide ends the look.
func (l *look) decide(key bool) {
	l.verdict = dependent
	if key {
		l.verdict = keyframe
	}
}

var startCode = []byte{0, 0, 1}

// scan reads the units between start codes. whole says that the PES ends
// with the bytes that are here.
func (l *look) scan(whole bool) {
	if l.unit == 0 && !l.findStart() {
		return
	}
	for l.verdict == undecided {
		i := bytes.Index(l.buf[l.at:l.n], startCode)
		if i < 0 {
			l.read(l.buf[l.unit:l.n], whole)
			l.at = max(l.unit, l.n-len(startCode)+1)
			return
		}
		end := l.at + i
		l.read(l.buf[l.unit:end], true)
		l.unit = end + len(startCode)
		l.at = l.unit
	}
}

// findStart finds the first start code, which must be the first thing in the
// elementary stream: what begins elsewhere is not the start of a picture.
func (l *look) findStart() bool {
	if l.es == 0 {
		if l.n < 9 || l.n < 9+int(l.buf[8]) {
			return false
		}
		if l.buf[6]&0xf0 != 0x80 { // PES_scrambling_control. ISO 13818-1 2.4.3.6
			l.verdict = unreadable
			return false
		}
		l.es = 9 + int(l.buf[8])
		l.at, l.insert = l.es, l.es
	}
	for l.at < l.n && l.buf[l.at] == 0 {
		l.at++
	}
	switch {
	case l.at == l.n:
		return false
	case l.buf[l.at] == 1 && l.at >= l.es+2:
		l.unit = l.at + 1
		l.at = l.unit
		return true
	default:
		l.verdict = unreadable
	}
	return false
}

// read looks at a unit. It may be called again with more of one that is not
// whole.
func (l *look) read(unit []byte, whole bool) {
	if len(unit) == 0 {
		return
	}
	switch l.syntax {
	case mpegSyntax:
		l.readMPEG(unit, whole)
	case h264Syntax:
		l.readH264(unit, whole)
	case h265Syntax:
		l.readH265(unit, whole)
	case av1Syntax:
		l.readOBU(unit, whole)
	}
}

// Start codes of MPEG video. ISO 13818-2 table 6-1.
const (
	mpegPicture   = 0x00
	mpegLastSlice = 0xaf
	mpegSequence  = 0xb3
	mpegExtension = 0xb5
	mpegGroup     = 0xb8
)

// readMPEG reads a unit of MPEG-1 or MPEG-2 video. A decoder can begin with an
// I picture that follows a sequence header or a group header.
func (l *look) readMPEG(unit []byte, whole bool) {
	code := unit[0]
	if l.header > 0 && code != mpegExtension && l.unit > l.header+len(startCode) {
		l.sets.keep(sequenceHeader, 0, 0, l.buf[l.header:l.unit-len(startCode)])
		l.header = 0
	}
	switch {
	case code == mpegSequence:
		l.hasHeader, l.header = true, l.unit-len(startCode)
	case code == mpegGroup:
		l.hasGroup = true
	case code == mpegPicture && len(unit) >= 3: // ISO 13818-2 6.2.3: 10 bits of temporal_reference, 3 of picture_coding_type
		const intra = 1
		l.decide(unit[2]>>3&7 == intra && (l.hasHeader || l.hasGroup))
	case mpegPicture < code && code <= mpegLastSlice, code == mpegPicture && whole:
		l.decide(false)
	}
}

// NAL unit types of H.264. ISO 14496-10 table 7-1.
const (
	h264Slice              = 1
	h264LastPartition      = 4
	h264IDR                = 5
	h264SEI                = 6
	h264SPS                = 7
	h264PPS                = 8
	h264AccessUnit         = 9
	recoveryPoint          = 6 // SEI payloadType. D.1.8
	forbiddenZero     byte = 0x80
)

// readH264 reads a NAL unit of H.264. A decoder can begin with an IDR picture,
// with an intra picture that brings its SPS, and at a recovery point.
func (l *look) readH264(unit []byte, whole bool) {
	kind := unit[0] & 0x1f
	switch {
	case unit[0]&forbiddenZero != 0:
	case h264Slice <= kind && kind <= h264IDR:
		if whole || len(unit) >= enough {
			first, intra := h264SliceHeader(unit[1:min(len(unit), enough)])
			l.decide(first == 0 && (kind == h264IDR || l.hasRecovery || l.hasHeader && intra))
		}
	case !whole:
	case kind == h264AccessUnit:
		l.insert = l.endOf(unit)
	case kind == h264SEI:
		l.hasRecovery = l.hasRecovery || hasRecoveryPoint(unit[1:])
	case kind == h264SPS:
		l.hasHeader = true
		r := bitReader{b: trimZeros(unit[1:])}
		r.bits(24) // profile_idc, constraint flags, level_idc
		l.keep(sequenceSet, r.golomb(), 0, unit)
	case kind == h264PPS:
		r := bitReader{b: trimZeros(unit[1:])}
		id := r.golomb()
		l.keep(pictureSet, id, r.golomb(), unit)
	}
}

// h264SliceHeader returns first_mb_in_slice, which is 0 for the first slice of a
// picture, and whether the slice is intra: its slice_type is 2 or 7.
// ISO 14496-10 7.3.3.
func h264SliceHeader(slice []byte) (first uint32, intra bool) {
	r := bitReader{b: slice}
	first = r.golomb()
	return first, r.golomb()%5 == 2
}

// NAL unit types of H.265. ISO 23008-2 table 7-1.
const (
	h265FirstIRAP  = 16
	h265LastIRAP   = 23
	h265LastSlice  = 31
	h265VPS        = 32
	h265SPS        = 33
	h265PPS        = 34
	h265AccessUnit = 35
	h265SEI        = 39
	h265HeaderSize = 2 // bytes of the NAL unit header
)

// readH265 reads a NAL unit of H.265. A decoder can begin with an IRAP
// picture and at a recovery point.
func (l *look) readH265(unit []byte, whole bool) {
	if len(unit) <= h265HeaderSize || !whole && len(unit) <= h265HeaderSize+ahead {
		return
	}
	kind, body := unit[0]>>1&0x3f, unit[h265HeaderSize:]
	switch {
	case unit[0]&forbiddenZero != 0:
	case kind <= h265LastSlice:
		first := body[0]&0x80 != 0 // first_slice_segment_in_pic_flag. ISO 23008-2 7.3.6.1
		l.decide(first && (l.hasRecovery || h265FirstIRAP <= kind && kind <= h265LastIRAP))
	case !whole:
	case kind == h265AccessUnit:
		l.insert = l.endOf(unit)
	case kind == h265SEI:
		l.hasRecovery = l.hasRecovery || hasRecoveryPoint(body)
	case kind == h265VPS:
		r := bitReader{b: trimZeros(body)}
		l.keep(videoSet, r.bits(4), 0, unit)
	case kind == h265SPS:
		l.hasHeader = true
		l.keep(sequenceSet, h265SequenceID(trimZeros(body)), 0, unit)
	case kind == h265PPS:
		r := bitReader{b: trimZeros(body)}
		id := r.golomb()
		l.keep(pictureSet, id, r.golomb(), unit)
	}
}

// h265SequenceID returns sps_seq_parameter_set_id. ISO 23008-2 7.3.2.2, 7.3.3.
func h265SequenceID(sps []byte) uint32 {
	r := bitReader{b: sps}
	r.bits(4) // sps_video_parameter_set_id
	layers := r.bits(3)
	r.bits(1)
	const profile, level = 88, 8 // bits
	r.skip(profile + level)
	flags := uint32(0)
	if layers > 0 {
		flags = r.bits(16) // two for each of 8 sub-layers
	}
	for i := range layers {
		if flags>>(15-2*i)&1 != 0 {
			r.skip(profile)
		}
		if flags>>(14-2*i)&1 != 0 {
			r.skip(level)
		}
	}
	return r.golomb()
}

// keep remembers the parameter set that is the unit being read.
func (l *look) keep(kind setKind, id, of uint32, unit []byte) {
	l.sets.keep(kind, id, of, l.buf[l.unit-len(startCode):l.endOf(unit)])
}

// endOf returns where the unit that is being read ends, its trailing zeros
// excluded.
func (l *look) endOf(unit []byte) int { return l.unit + len(trimZeros(unit)) }

// trimZeros returns a NAL unit without the zeros that may follow it.
// ISO 14496-10 B.1.1.
func trimZeros(unit []byte) []byte { return bytes.TrimRight(unit, "\x00") }

// hasRecoveryPoint reports whether an SEI holds a recovery point.
// ISO 14496-10 7.3.2.3.1, D.1.8; ISO 23008-2 7.3.5, D.2.8.
func hasRecoveryPoint(sei []byte) bool {
	r := bitReader{b: trimZeros(sei)}
	number := func() (n int) {
		for {
			b := r.bits(8)
			if n += int(b); b != 0xff || n > maxLook {
				return n
			}
		}
	}
	for !r.ended() {
		kind, size := number(), number()
		if kind == recoveryPoint {
			return true
		}
		if r.skip(8 * size); len(r.b) == 1 && r.b[0] == 0x80 { // rbsp_trailing_bits
			break
		}
	}
	return false
}

// OBU types of AV1, and the frame_type of a frame that needs no other.
const (
	obuSequence       = 1
	obuFrameHeader    = 3
	obuTileGroup      = 4
	obuFrame          = 6
	obuRedundantFrame = 7
	av1KeyFrame       = 0
)

// readOBU reads an OBU of AV1. A decoder can begin with a key frame, or one
// that is shown now, that follows a sequence header. AV1 5.3, 5.9.2.
func (l *look) readOBU(obu []byte, whole bool) {
	kind, at := obu[0]>>3&0x0f, 1
	if obu[0]&0x04 != 0 { // obu_extension_flag
		at++
	}
	if obu[0]&0x02 != 0 { // obu_has_size_field: leb128
		for at < len(obu) && obu[at]&0x80 != 0 {
			at++
		}
		at++
	}
	switch {
	case obu[0]&forbiddenZero != 0:
	case kind == obuSequence:
		l.hasHeader = true
	case kind == obuTileGroup:
		l.decide(false)
	case kind != obuFrameHeader && kind != obuFrame && kind != obuRedundantFrame:
	case at+ahead < len(obu) || whole && at < len(obu):
		shown, frameType := obu[at]&0x80 != 0, obu[at]>>5&3
		l.decide(l.hasHeader && (shown || frameType == av1KeyFrame))
	case whole:
		l.decide(false)
	}
}

// bitReader reads the bits of a NAL unit, without the bytes that prevent the
// emulation of start codes (ISO 14496-10 7.4.1). Past the end it reads zeros.
type bitReader struct {
	b     []byte
	zeros int    // zero bytes before b
	byte  uint32 // the last byte read
	left  int    // how many of its bits are not read
}

func (r *bitReader) ended() bool { return r.left == 0 && len(r.b) == 0 }

// bits reads at most 32 bits.
func (r *bitReader) bits(n int) (v uint32) {
	for range n {
		if r.left == 0 {
			r.next()
		}
		r.left--
		v = v<<1 | r.byte>>r.left&1
	}
	return v
}

// next reads the next byte.
func (r *bitReader) next() {
	if r.zeros >= 2 && len(r.b) > 0 && r.b[0] == 3 {
		r.b, r.zeros = r.b[1:], 0
	}
	r.byte, r.left = 0, 8
	if len(r.b) == 0 {
		return
	}
	r.byte = uint32(r.b[0])
	if r.b = r.b[1:]; r.byte == 0 {
		r.zeros++
	} else {
		r.zeros = 0
	}
}

// skip skips bits, and stops at the end.
func (r *bitReader) skip(n int) {
	for n > 0 && !r.ended() {
		step := min(n, r.left)
		if r.left == 0 {
			r.next()
			step = min(n, 8)
		}
		r.left -= step
		n -= step
	}
}

// golomb reads an unsigned Exp-Golomb code. ISO 14496-10 9.1.
func (r *bitReader) golomb() uint32 {
	zeros := 0
	for zeros < 31 && r.bits(1) == 0 {
		zeros++
	}
	return 1<<zeros - 1 + r.bits(zeros)
}

// setKind is a kind of parameter set, in the order in which they must come.
type setKind int

const (
	sequenceHeader setKind = iota // of MPEG, with its extensions
	videoSet                      // VPS
	sequenceSet                   // SPS
	pictureSet                    // PPS
)

// parameterSet is one parameter set as it came last.
type parameterSet struct {
	kind    setKind
	id      uint32
	of      uint32 // for a pictureSet: the id of its sequenceSet
	bytes   []byte // with its start code
	picture uint64 // the last one that brought it
}

const (
	maxSets     = 64 // of a track
	maxSetBytes = 16 << 10
)

// parameterSets remembers what a decoder needs before a keyframe. A set is
// forgotten when what it refers to changes.
type parameterSets struct {
	sets    []parameterSet // sorted by kind, then as they came
	picture uint64         // the number of the present one
	joined  []byte         // all sets, as put before a picture that brings none; nil: not made yet
}

// keep remembers a set that the present picture brings. b is copied.
func (s *parameterSets) keep(kind setKind, id, of uint32, b []byte) {
	is := func(p parameterSet) bool { return p.kind == kind && p.id == id }
	i := slices.IndexFunc(s.sets, is)
	if i >= 0 && bytes.Equal(s.sets[i].bytes, b) {
		s.sets[i].picture = s.picture
		return
	}
	s.joined = nil
	total := len(b)
	s.sets = slices.DeleteFunc(s.sets, func(p parameterSet) bool {
		old := is(p) || p.picture != s.picture && (kind == videoSet || kind == sequenceSet && p.kind == pictureSet && p.of == id)
		if !old {
			total += len(p.bytes)
		}
		return old
	})
	if len(s.sets) == maxSets || total > maxSetBytes {
		s.sets = nil // this is no stream that a decoder could follow
		return
	}
	at, _ := slices.BinarySearchFunc(s.sets, kind+1, func(p parameterSet, k setKind) int { return int(p.kind - k) })
	s.sets = slices.Insert(s.sets, at, parameterSet{kind, id, of, bytes.Clone(b), s.picture})
}

// brought reports whether the present picture brings a set of a kind.
func (s *parameterSets) brought(kind setKind) bool {
	return slices.ContainsFunc(s.sets, func(p parameterSet) bool { return p.kind == kind && p.picture == s.picture })
}

// missing returns the sets that are known and that the present picture does
// not bring, each after a start code; nil if there are none. Immutable.
func (s *parameterSets) missing() []byte {
	all := !slices.ContainsFunc(s.sets, func(p parameterSet) bool { return p.picture == s.picture })
	if all && s.joined != nil {
		return s.joined
	}
	var b []byte
	for _, p := range s.sets {
		if p.picture != s.picture {
			b = append(append(b, 0), p.bytes...) // zero_byte. ISO 14496-10 B.1.2
		}
	}
	if all {
		s.joined = b
	}
	return b
}

// complete reports whether the picture brings all the parameter sets that a
// decoder needs to begin with it.
func (l *look) complete() bool {
	switch l.syntax {
	case mpegSyntax:
		return l.sets.brought(sequenceHeader)
	case h264Syntax:
		return l.sets.brought(sequenceSet) && l.sets.brought(pictureSet)
	case h265Syntax:
		return l.sets.brought(videoSet) && l.sets.brought(sequenceSet) && l.sets.brought(pictureSet)
	}
	return true
}
