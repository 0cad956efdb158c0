// The first picture: what came of a video since its keyframe, for a reader that
// joins a stream before the next one.
//
// A player that obeys timestamps would begin at the old keyframe and stay that
// far behind live. So the timestamps of these pictures are squeezed into the last
// 0.1 s before the newest of them: one map for PTS and DTS, which leaves what is
// from there on as it is. Sound is not replayed, and nothing that came before a
// rule of the stream or the mute switch changed.

package main

import (
	"iter"
	"time"
)

const (
	// More than this is not kept: a viewer waits for the next keyframe, as a slow
	// reader would have to anyway.
	maxReplay     = 4 << 20 // bytes
	maxReplayTime = 15 * time.Second
	// JSMpeg decodes one picture a screen refresh, and keeps 512 KiB.
	maxReplayMPEG  = 256 << 10 // bytes
	maxReplayShown = 25        // pictures

	squeezeInto = second / 10
	replayPart  = 8 << 10              // bytes of whole pictures in a message, if one is not longer
	replayLook  = 2 * time.Millisecond // at what is acknowledged of it
	replayFresh = second               // a video whose newest picture is older has stopped
	replayShare = second / 10
)

// replay keeps the messages of a source since the keyframe of its video. The
// zero value is ready for use; it is owned by the source.
type replay struct {
	kept     []*message // held
	bytes    int
	pictures int

	made   []*message // what a reader gets; held. nil: it must be made
	madeAt ticks
}

// clear forgets everything.
func (r *replay) clear() {
	r.forgetMade()
	for _, m := range r.kept {
		m.release()
	}
	clear(r.kept)
	r.kept, r.bytes, r.pictures = r.kept[:0], 0, 0
}

func (r *replay) forgetMade() {
	for _, m := range r.made {
		m.release()
	}
	r.made = nil
}

// add keeps m, which has that many pictures. It begins with a keyframe of video,
// or follows what is kept.
func (r *replay) add(m *message, video *outTrack, pictures int) {
	if m.info.key {
		r.clear()
		m = m.asOpening()
	}
	r.forgetMade()
	m.holders.Add(1)
	r.kept = append(r.kept, m)
	r.bytes += m.size
	r.pictures += pictures
	most := maxReplay
	if video.streamType == typeMPEG1Video || video.streamType == typeMPEG2Video {
		most = maxReplayMPEG
		if r.pictures > maxReplayShown {
			most = 0
		}
	}
	if r.bytes > most || m.at.Sub(r.kept[0].at) > maxReplayTime {
		r.clear()
	}
}

// messages returns the pictures that are kept as a reader that joins now gets
// them, of the videos on pids; nil if there are none, or the video has stopped.
// They are made once for all who join before the next picture.
func (r *replay) messages(feed string, pids []uint16, at time.Time, now ticks) []*message {
	if len(r.kept) == 0 || toTicks(at.Sub(r.kept[len(r.kept)-1].at)) > replayFresh {
		return nil
	}
	if r.made != nil && now-r.madeAt < replayShare {
		return r.made
	}
	r.forgetMade()
	r.madeAt = now
	times := make(map[uint16]*squeezed)
	for _, pid := range pids {
		times[pid] = squeeze(r.decodeTimes(pid))
	}
	var part []byte
	frames := 0
	flush := func() {
		if len(part) > 0 {
			r.made = append(r.made, newReplayMessage(part, feed, pids, at, frames))
			part, frames = part[:0], 0
		}
	}
	for p := range r.packets() {
		to := times[p.pid()]
		if to == nil {
			continue
		}
		isStart := p.unitStart() && p.payload() != nil
		if isStart && len(part) >= replayPart || len(part)+packetSize > maxChunk {
			flush()
		}
		part = append(part, p...)
		if isStart {
			frames++
			to.write(packet(part[len(part)-packetSize:]).payload())
		}
	}
	flush()
	if n := len(r.made); n > 0 {
		r.made[n-1].replays = replayEnd
	}
	return r.made
}

// packets returns the packets of what is kept.
func (r *replay) packets() iter.Seq[packet] {
	return func(yield func(packet) bool) {
		for _, m := range r.kept {
			for b := m.payload(); len(b) >= packetSize; b = b[packetSize:] {
				if !yield(packet(b[:packetSize])) {
					return
				}
			}
		}
	}
}

// newReplayMessage returns a part of a replay. It opens no gate.
func newReplayMessage(part []byte, feed string, pids []uint16, at time.Time, frames int) *message {
	m := newMessage(part, at, chunkInfo{hasVideo: true, hasPAT: true, frames: frames})
	m.feed, m.replays, m.has = feed, replayPiece, kindsOf(pictureTrack)
	for _, pid := range pids {
		m.kinds.tracks = append(m.kinds.tracks, pidKind{pid, pictureTrack, pictureTrack})
	}
	return m
}

// replayRole is what a message is in a replay.
type replayRole uint8

const (
	noReplay replayRole = iota
	replayPiece
	replayEnd // the last one: now a viewer can watch
)

// decodeTimes returns the DTS of the pictures on pid, unwrapped.
func (r *replay) decodeTimes(pid uint16) (all []ticks) {
	for p := range r.packets() {
		if p.pid() != pid || !p.unitStart() {
			continue
		}
		pts, dts := timestamps(p.payload())
		if dts == nil {
			dts = pts
		}
		if dts == nil {
			continue
		}
		t := readTime(dts)
		if n := len(all); n > 0 {
			t = all[n-1] + signed33(t-all[n-1])
		}
		all = append(all, t)
	}
	return all
}

// squeezed maps the timestamps of a replay onto those that go out.
type squeezed struct {
	dts    []ticks // that go out, of the pictures yet to come
	newest ticks   // the DTS that stays
	span   ticks   // from the first DTS to it
}

// squeeze returns the map for pictures with these DTS.
func squeeze(dts []ticks) *squeezed {
	if len(dts) == 0 {
		return &squeezed{}
	}
	s := &squeezed{dts: dts, newest: dts[len(dts)-1], span: dts[len(dts)-1] - dts[0]}
	for i := len(dts) - 2; i >= 0; i-- {
		dts[i] = min(s.on(dts[i]), dts[i+1]-1) // by one tick at least
	}
	return s
}

// on returns where t goes: closer to the newest DTS, if it is before that.
func (s *squeezed) on(t ticks) ticks {
	d := s.newest - t
	if d <= 0 || s.span <= squeezeInto {
		return t
	}
	return s.newest - (d*squeezeInto+s.span-1)/s.span
}

// write writes the timestamps of the next picture.
func (s *squeezed) write(pes []byte) {
	pts, dts := timestamps(pes)
	if pts == nil || len(s.dts) == 0 {
		return
	}
	to := s.dts[0]
	s.dts = s.dts[1:]
	if dts == nil {
		writeTime(pts, to&(wrap-1))
		return
	}
	shown := s.on(s.newest + signed33(readTime(pts)-s.newest))
	writeTime(pts, max(shown, to)&(wrap-1))
	writeTime(dts, to&(wrap-1))
}

// videos returns the tracks of video in the program. The keyframes of s are those
// of the first.
func (s *source) videos() (all []*outTrack) {
	for _, t := range s.tracks {
		if t.listed && t.coding().kind == pictureTrack {
			all = append(all, t)
		}
	}
	return all
}

// replays returns the messages for a reader that joins now.
func (s *source) replays(at time.Time, now ticks) []*message {
	var pids []uint16
	for _, t := range s.videos() {
		pids = append(pids, t.out)
	}
	return s.replay.messages(s.feed, pids, at, now)
}

// keep keeps out, which was made of m, for readers that join later.
func (s *source) keep(out, m *message) {
	if !out.info.key && len(s.replay.kept) == 0 {
		return
	}
	videos := s.videos()
	if len(videos) == 0 {
		s.replay.clear()
		return
	}
	pictures := 0
	for i := range m.stamps {
		if st := &m.stamps[i]; st.track.kind == pictureTrack {
			if pictures++; st.fate != fateGoes { // the pictures after it lack it
				s.replay.clear()
				return
			}
		}
	}
	s.replay.add(out, videos[0], pictures)
}
