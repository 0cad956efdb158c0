// The clock: the timestamps of a feed's tracks are put onto vw's clock. Pure:
// its callers say what time it is.
//
// A publisher's timestamps are not to be trusted. They step when a wall clock
// is set, they run fast or slow when a camera gives another frame rate than it
// declares, and single ones are hours off. What vw knows for certain is when a
// PES arrived, and that it was made before that. The lag of a PES is its
// arrival less its time on vw's clock; of sound, which arrives when it has been
// recorded, its arrival less the end of its PES. The least lag of a while is
// the true one, and the rest is jitter.
//
// What goes out keeps these rules, whatever comes in. The DTS of a track
// strictly rises; of sound, it rises from the end of the PES before, as far as
// its samples fit into the time. Every DTS is within -2.5 s and +2 s of the
// PCR. The PTS of a track keep their order, and at rate 1 their distance from
// the DTS. A PES that cannot keep them is left out.

package main

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

const (
	// What a publisher sends in settleFor waits until its least lag is known.
	// Sound in long PES may need settleMost, since two of them must come.
	settleFor   = second * 15 / 100
	settleMost  = second / 2
	maxSettling = 200 // PES that are looked at meanwhile

	lookAhead = second * 22 / 1000 // an AAC encoder keeps one frame back
	maxTail   = second * 3 / 2     // sound that is longer would be too late, and sound with pauses is not

	leastApart = second / 1000 // DTS of a track: ffmpeg rounds those of sound to its samples

	lead = second / 5 // by which what goes out is ahead of the PCR

	// A PES whose DTS would be later than maxLate behind now is too late. That
	// is less than 2.5 s since the PCR may be a little ahead of now.
	maxLate    = second * 245 / 100
	maxAhead   = second * 17 / 10 // of now; with lead, this is less than 2 s
	maxReorder = 10 * second      // from DTS to PTS

	// lateMost is for how long a track that was too late waits for a keyframe.
	lateMost = 5 * second

	// sameClock is how far apart the timestamps of two tracks may be to be of
	// one clock.
	sameClock = 10 * second

	maxTracks = 32 // that the clock of a feed remembers
)

// fate is what becomes of a PES.
type fate uint8

const (
	fateGoes    fate = iota
	fateLate         // or it waits for a keyframe since one before it was too late
	fateInvalid      // its PTS is before its DTS or far after it, or there is no room for it
)

// stamp is a PES in a chunk. Its timestamps are those of the feed; after place
// they are on vw's clock, without lead.
type stamp struct {
	at       int // offset of its first packet in the chunk, in bytes
	track    *trackClock
	fields   int // how many timestamps it has; 1 is a PTS that is the DTS too
	pts, dts ticks
	fate     fate
	began    ticks // when it began by the clock of its track; 0: not known
}

// valid reports whether the PTS of a stamp as it came fits its DTS.
func (s *stamp) valid() bool {
	d := signed33(s.pts - s.dts)
	return 0 <= d && d <= maxReorder
}

// write writes the timestamps into the PES as they go out.
func (s *stamp) write(pes []byte) {
	switch pts, dts := timestamps(pes); s.fields {
	case 1:
		writeTime(pts, (s.dts+lead)&(wrap-1))
	case 2:
		writeTime(pts, (s.pts+lead)&(wrap-1))
		writeTime(dts, (s.dts+lead)&(wrap-1))
	}
}

// keyGoesOut reports whether the first PES of video goes out.
func keyGoesOut(stamps []stamp) bool {
	for i := range stamps {
		if s := &stamps[i]; s.track.kind == pictureTrack {
			return s.fate == fateGoes
		}
	}
	return true
}

// clock is the clock of a feed. Each track has its own, since picture and sound
// go wrong separately; they begin with one offset. Owned by the feed.
type clock struct {
	tracks   []*trackClock
	hasVideo bool
	settling bool
	renewed  bool  // a publisher came, and its first timestamp is yet to come
	since    ticks // when its first timestamp came
	noted    []sighting
	given    ticks // the last DTS of the tracks that were forgotten
	troubles [allTroubles]trouble
}

// sighting is a DTS, and when it came.
type sighting struct {
	track *trackClock
	dts   ticks
	at    ticks
}

// read appends the PES of a chunk to stamps. It knows none before the program
// map g is known.
func (c *clock) read(chunk []byte, g *program, stamps []stamp) []stamp {
	if g == nil {
		return stamps
	}
	for at := 0; at+packetSize <= len(chunk); at += packetSize {
		p := packet(chunk[at : at+packetSize])
		if !p.unitStart() || p.damaged() || p.scrambled() {
			continue
		}
		tr := g.find(p.pid())
		if tr == nil {
			continue
		}
		s := stamp{at: at, track: c.track(tr)}
		if pts, dts := timestamps(p.payload()); dts != nil {
			s.fields, s.pts, s.dts = 2, readTime(pts), readTime(dts)
		} else if pts != nil {
			s.fields, s.pts, s.dts = 1, readTime(pts), readTime(pts)
		}
		stamps = append(stamps, s)
	}
	return stamps
}

// track returns the clock of a track, made if need be. When there are too many,
// the one that was not used for longest is forgotten.
func (c *clock) track(tr *track) *trackClock {
	oldest := 0
	for i, t := range c.tracks {
		if t.pid == tr.pid && t.streamType == tr.streamType {
			return t
		}
		if t.seen < c.tracks[oldest].seen {
			oldest = i
		}
	}
	t := &trackClock{clock: c, pid: tr.pid, streamType: tr.streamType, kind: tr.coding().kind}
	if len(c.tracks) < maxTracks {
		c.tracks = append(c.tracks, t)
	} else {
		c.given = max(c.given, c.tracks[oldest].out)
		c.tracks[oldest] = t
	}
	t.out = c.given
	return t
}

// note looks at the stamps of a chunk that arrived at, which is the first of
// its publisher if restarted. Unless it is ready, the chunk has to wait for a
// later one, or until settle is called: to move frames together later would
// make players complain.
func (c *clock) note(stamps []stamp, at ticks, restarted, hasVideo bool) (ready bool) {
	c.renewed = c.renewed || restarted
	c.hasVideo = hasVideo
	if !c.renewed && !c.settling {
		return true
	}
	for i := range stamps {
		s := &stamps[i]
		if s.fields == 0 || !s.valid() {
			continue
		}
		if c.renewed {
			c.renewed, c.settling, c.since, c.noted = false, true, at, c.noted[:0]
		}
		if len(c.noted) < maxSettling {
			c.noted = append(c.noted, sighting{s.track, s.dts, at})
		}
	}
	if !c.settling {
		return true
	}
	age := at - c.since
	return age >= settleFor && (age >= settleMost || hasVideo || len(c.noted) > 1)
}

// settle starts the clocks of the tracks that were noted. Those whose
// timestamps are of one clock get one offset: the least lag. It reports
// whether the publisher is a new one.
func (c *clock) settle() (anew bool) {
	if !c.settling || len(c.noted) == 0 {
		return false
	}
	c.settling = false
	for _, t := range c.tracks {
		t.running = false
	}
	var first *trackClock
	least, push := ticks(0), ticks(0)
	for i, s := range c.noted {
		t := s.track
		if t.running {
			continue
		}
		lag := t.start(c.noted[i:])
		if first == nil {
			first, least = t, lag
		} else if t.follows(first) {
			least = min(least, lag)
		}
	}
	for _, t := range c.tracks {
		if t.running && t.follows(first) {
			push = max(push, t.end()-(t.from+least))
		}
	}
	if push > early { // what was given out before does not fit into the time
		push = 0
	}
	for _, t := range c.tracks {
		if t.running && t.follows(first) {
			t.to = t.from + least + push
		}
	}
	return true
}

// place puts the stamps of a chunk that arrived at onto vw's clock; now is when
// it goes out. The first PES of the video in it is a keyframe if key is set.
func (c *clock) place(stamps []stamp, key bool, at, now ticks) {
	c.settle()
	for i := range stamps {
		s := &stamps[i]
		isKey := key || s.track.kind != pictureTrack
		key = key && s.track.kind != pictureTrack
		switch {
		case s.fields == 0 && s.track.late:
			s.fate = fateLate
		case s.fields == 0:
		case !s.valid():
			s.fate = fateInvalid
		default:
			s.track.place(s, isKey, at, now)
		}
		switch s.fate {
		case fateLate:
			c.saw(troubleLate, at)
		case fateInvalid:
			c.saw(troubleInvalid, at)
		}
	}
}

const (
	// fit is by how much a stamp may differ from its neighbours, or from its
	// arrival, and still be one of them.
	fit = second / 10
	// regular is how many spacings in a row must be alike for a shorter one
	// to be a break.
	regular = 8
	// pause is what a gap in arrival must be longer than, beyond the usual, for
	// a step in it to go on by arrival. Otherwise it goes on in its place.
	pause = second * 3 / 10
	// together is how much the steps of two tracks may differ to be one, and
	// stepWithin how far apart they may come.
	together   = second * 3 / 10
	stepWithin = 2 * second

	mostApart   = 60 * second // stamps that agree
	usualPeriod = second / 25 // until two stamps have come
)

// trackClock is the clock of one track, in two parts. The first makes media
// time of the stamps, by taking steps and outliers out of them. The second, the
// tracker, puts media time onto vw's clock.
type trackClock struct {
	clock      *clock
	pid        uint16
	streamType byte
	kind       trackKind
	running    bool

	// From stamps to media time.
	ref    sighting    // the last stamp that fitted, unwrapped
	misses int         // stamps since then; none of them fitted
	stray  [2]sighting // the last of those
	shift  ticks       // from a stamp to its media time
	media  ticks       // of the last PES
	seen   ticks       // when that arrived
	period ticks       // between two stamps; 0: not known
	even   int         // how many spacings in a row were like it
	gap    ticks       // the longest in arrival of late
	step   ticks       // the last change of shift,
	stepAt ticks       // and when it was
	pauses ticks       // media time that steps were given for pauses in arrival,
	paused ticks       // and the strays since ref
	owed   backlog

	tracker // from media time to vw's clock

	// What goes out.
	out    ticks       // the last DTS
	length ticks       // media time of the longest PES of late
	seam   bool        // the next PES is the first after a restart or a step
	late   bool        // nothing goes out until a keyframe,
	lateAt ticks       // since when
	shown  [16]instant // the last PTS
	shows  int         // how many there were
}

// tail is how long what a PES holds had been recorded when it arrived. In a
// feed with video, sound waits its turn, and its lag is measured like that.
func (t *trackClock) tail() ticks {
	switch {
	case t.clock.hasVideo || t.kind != soundTrack:
		return 0
	case t.streamType == typeAAC || t.streamType == typeAACLATM:
		return min(t.period, maxTail) + lookAhead
	}
	return min(t.period, maxTail)
}

// follows reports whether the timestamps of t and u are of one clock.
func (t *trackClock) follows(u *trackClock) bool {
	d := signed33(t.ref.dts - u.ref.dts)
	return -sameClock < d && d < sameClock
}

// start begins anew with the stamps of t among those noted, and returns their
// least lag. The first of a publisher may be an outlier: it goes by those that
// most others agree with.
func (t *trackClock) start(noted []sighting) (lag ticks) {
	var own []sighting
	for _, s := range noted {
		if s.track == t {
			own = append(own, s)
		}
	}
	agreed := func(with sighting) (all []sighting, before int) {
		for _, s := range own {
			d := signed33(s.dts - with.dts)
			if off := d - (s.at - with.at); -second < off && off < second {
				all = append(all, sighting{t, with.dts + d, s.at})
			} else if len(all) == 0 {
				before++
			}
		}
		return all, before
	}
	all, before := agreed(own[0])
	for _, s := range own[1:] {
		if more, n := agreed(s); len(more) > len(all) {
			all, before = more, n
		}
	}
	first, newest := all[0].dts, all[0].dts
	for _, s := range all {
		first, newest = min(first, s.dts), max(newest, s.dts)
	}
	if newest > first {
		t.period = (newest - first) / ticks(len(all)-1)
	}
	t.begin(all[0].dts, all[0].at)
	t.misses -= before
	t.media -= ticks(before) * max(t.period, 1)
	lag = all[0].at - all[0].dts - t.tail()
	for _, s := range all[1:] {
		lag = min(lag, s.at-s.dts-t.tail())
	}
	return lag
}

// begin makes dts, which arrived at, the next stamp, in its place.
func (t *trackClock) begin(dts, at ticks) {
	t.running, t.seam = true, true
	t.ref, t.misses, t.shift, t.even, t.gap, t.shows = sighting{t, dts, at}, -1, 0, 0, 0, 0
	t.stray = [2]sighting{}
	t.media, t.seen = dts-max(t.period, 1), at
	t.pauses, t.paused, t.owed = 0, 0, backlog{last: t.media}
	t.late = false
	t.tracker = tracker{mapping: mapping{dts, at - t.tail(), 1}, last: dts, began: at, easing: true, behind: math.MaxInt64 / 2}
}

// join begins a track that came later than others of the feed, with their
// offset if their timestamps are of one clock.
func (t *trackClock) join(dts, at ticks) {
	t.begin(dts, at)
	for _, u := range t.clock.tracks {
		if u != t && u.running && t.follows(u) {
			t.ref.dts = u.ref.dts + signed33(dts-u.ref.dts)
			t.shift = u.shift
			m := t.ref.dts + t.shift
			t.media = m - max(t.period, 1)
			t.owed.last = t.media
			t.mapping = mapping{m, u.on(m), 1}
			return
		}
	}
}

// place puts s, which arrived at, onto vw's clock. It goes out now.
func (t *trackClock) place(s *stamp, key bool, at, now ticks) {
	if !t.running {
		t.join(s.dts, at)
	}
	ahead := signed33(s.pts - s.dts)
	m, fits := t.mediaTime(s.dts, at)
	end := at - t.tail()
	var out ticks
	if fits {
		out = t.follow(m, end, t.newest(m+ahead))
	} else {
		out = min(t.on(m), end+early)
	}
	if s.began = out; t.owed.size > 0 {
		s.began = min(out, end-min(t.owed.size, mostBacklog)-fit)
	}
	s.fate = t.emit(&out, end, now, key)
	s.dts = out
	s.pts = out + t.scaled(ahead)
	if s.fate == fateGoes && s.fields == 2 {
		s.pts = max(t.order(m+ahead, s.pts), out)
	}
}

// mediaTime returns the media time of the next stamp, and whether it fits those
// before it. One that does not gets the time of its place; if there are three
// in a row that fit each other, it is a step, and they go on from there.
func (t *trackClock) mediaTime(dts, at ticks) (m ticks, fits bool) {
	d := signed33(dts - t.ref.dts)
	n := ticks(t.misses + 1)
	da := at - t.ref.at
	lag := at - t.tail() - t.on(t.ref.dts+d+t.shift) - t.behind // if it fits
	// In a pause stamps and arrival agree; who wakes from one slowly is a little late.
	isPause := da > t.scaled(n*t.period)+pause && -fit <= lag && lag <= max(fit, da/8)
	if t.even >= regular && da <= t.gap*3/2 {
		da = 0 // as usual here
	}
	tooShort := d <= -fit || t.even >= regular && n <= 3 && d < n*t.period-fit && lag > fit
	tooLong := t.scaled(d) > max(t.scaled(n*t.period), da)+fit && !isPause
	place := t.media + t.placeAfter(at-t.seen)
	if d := place - t.media - t.placeAfter(0); d > 0 {
		t.paused += d
	}
	switch {
	case !tooShort && !tooLong:
		if n == 1 {
			t.pace(d)
		}
		if d > 0 || n > 1 {
			t.ref = sighting{t, t.ref.dts + d, at}
		}
		t.countStrays()
		t.misses, t.stray, t.paused = 0, [2]sighting{}, 0
		m, fits = t.ref.dts+min(d, 0)+t.shift, true
	case !t.agrees(dts, at):
		t.misses++
		if t.stray[0].track != nil {
			t.clock.saw(troubleOutlier, at)
		}
		t.stray = [2]sighting{t.stray[1], {t, dts, at}}
		m, fits = place, t.misses > 2*regular
	default:
		t.period = max(signed33(dts-t.stray[1].dts), 1)
		t.ref = sighting{t, t.ref.dts + d, at}
		t.misses, t.even, t.stray = 0, 0, [2]sighting{}
		if tooShort || lag < -fit {
			t.stepTo(place, at)
			t.pauses += t.paused
		}
		t.paused = 0
		m, fits = t.ref.dts+t.shift, true
	}
	here := m - t.pauses - t.paused
	if t.owed.size > 0 || at-t.seen > t.longPause() {
		t.owed.add(at-t.seen, here, t.rate)
	}
	t.owed.last = here
	t.gap = max(min(at-t.seen, t.longPause()), t.gap-(at-t.seen)/8) // one long pause is no habit
	t.media, t.seen = m, at
	return m, fits
}

// backlog follows how much a publisher has yet to send of what it recorded: by how
// much a pause in arrival was longer than in media time, less what it has caught
// up with since. What goes out forgets that it is late, when that lasts; the mute
// switch must not.
type backlog struct {
	size ticks   // 0: there is none
	last ticks   // media time, without what was given for pauses
	rate float64 // of the clock before the pause
}

// add notes that a PES with that media time came da after the last.
func (b *backlog) add(da, media ticks, rate float64) {
	if b.size == 0 {
		b.rate = rate
	}
	b.size = min(max(0, b.size+da-ticks(b.rate*float64(media-b.last))), wrap)
}

// mostBacklog is how much a publisher is believed to have. One that has recorded
// nothing in a pause looks the same, and is not heard for so long after a mute.
const mostBacklog = 60 * second

// countStrays counts the last strays as outliers, which they were.
func (t *trackClock) countStrays() {
	for _, s := range t.stray {
		if s.track != nil {
			t.clock.saw(troubleOutlier, s.at)
		}
	}
}

// longPause is what a gap in arrival must be longer than to be a pause.
func (t *trackClock) longPause() ticks { return 2*t.gap + t.scaled(t.period) + pause }

// placeAfter returns the distance in media time of two PES that arrived da
// apart, by the place of the second.
func (t *trackClock) placeAfter(da ticks) ticks {
	if t.running && da > t.longPause() {
		return ticks(float64(da) / t.rate)
	}
	if t.period == 0 {
		return usualPeriod
	}
	return t.period
}

// agrees reports whether dts and the two strays before it fit each other: they
// are as far apart as stamps are here, or evenly far apart.
func (t *trackClock) agrees(dts, at ticks) bool {
	a, b := t.stray[0], t.stray[1]
	if a.track == nil {
		return false
	}
	d1, d2 := signed33(b.dts-a.dts), signed33(dts-b.dts)
	if d1 <= -fit || d2 <= -fit {
		return false
	}
	near := func(d, da ticks) bool { return t.scaled(d) <= max(t.scaled(t.period), da)+fit }
	return near(d1, b.at-a.at) && near(d2, at-b.at) ||
		d2 < mostApart && max(d1-d2, d2-d1) <= max(fit, d2/4)
}

// pace follows the spacing of stamps.
func (t *trackClock) pace(d ticks) {
	if d <= 0 {
		return
	}
	if t.even++; max(d-t.period, t.period-d) > t.period/8 {
		t.even = 0
	}
	if t.period == 0 {
		t.period = d
	} else {
		t.period += (min(d, 2*t.period+fit) - t.period) / 4
	}
	if d < second {
		t.length = max(d, t.length-(t.length-d)/8)
	}
}

// stepTo makes m the media time of the last stamp, which is that of its place.
// Where another track has just stepped by about as much, they step together.
func (t *trackClock) stepTo(m, at ticks) {
	t.clock.saw(troubleStep, at)
	by := m - t.ref.dts - t.shift
	for _, u := range t.clock.tracks {
		if u != t && at-u.stepAt < stepWithin && max(u.step-by, by-u.step) < together {
			by = u.step
		}
	}
	t.shift += by
	t.step, t.stepAt = by, at
	t.seam = true
	t.forget()
}

// end is the earliest DTS for the next PES, so that the samples of the last one
// have their time.
func (t *trackClock) end() ticks {
	if t.kind != soundTrack || t.out == 0 {
		return t.out + 1
	}
	return t.out + max(t.scaled(t.length), 1)
}

// emit decides whether a PES goes out at *out, which it moves behind what went
// out before. A PES that is too late is dropped, and those after it up to a
// keyframe.
func (t *trackClock) emit(out *ticks, end, now ticks, key bool) fate {
	floor := t.end()
	if !t.seam {
		floor -= (floor - t.out) / maxSlew
	}
	most := end - t.behind + 2*early
	if squeezed := t.out + min(t.scaled(t.period), t.gap)/4; !t.seam {
		*out = max(*out, min(squeezed, most))
	}
	*out = max(*out, min(floor, most), t.out+leastApart)
	switch {
	case *out > now+maxAhead:
		return fateInvalid
	case *out+lead < now-maxLate:
		if !t.late {
			t.late, t.lateAt = true, now
		}
		return fateLate
	case t.late && !key && now-t.lateAt < lateMost:
		return fateLate
	}
	t.late, t.seam, t.out = false, false, *out
	return fateGoes
}

// instant is a media time and where it is on vw's clock.
type instant struct{ media, at ticks }

// newest reports whether no picture with a later PTS than m went out.
func (t *trackClock) newest(m ticks) bool {
	for _, s := range t.shown[:min(t.shows, len(t.shown))] {
		if s.media > m {
			return false
		}
	}
	return true
}

// order returns the PTS for the media time m, which is to be pts unless the
// order of pictures asks for another. Between two pictures it leaves some room
// for those that are yet to come.
func (t *trackClock) order(m, pts ticks) ticks {
	lo, hi := ticks(math.MinInt64), ticks(math.MaxInt64)
	for _, s := range t.shown[:min(t.shows, len(t.shown))] {
		if room := max(s.media-m, m-s.media)/64 + 1; s.media < m {
			lo = max(lo, s.at+room)
		} else if s.media > m {
			hi = min(hi, s.at-room)
		}
	}
	pts = max(min(pts, hi), lo)
	t.shown[t.shows%len(t.shown)] = instant{m, pts}
	t.shows++
	return pts
}

const (
	// early is what the jitter of stamps may come to. A PES cannot arrive
	// before it was made, so what is earlier than this is cut off at once. But
	// when a busy machine starts a publisher, its first PES come late, and
	// players complain of a cut: for startFor only what is muchEarly is cut,
	// and then the rest is slewed away.
	early     = second / 10
	muchEarly = second * 8 / 10
	startFor  = 8 * second
	// slack is not followed.
	slack = second * 15 / 1000
	// jumpOver is the lateness beyond which the line jumps; less is slewed.
	jumpOver = second * 15 / 100
	// maxSlew is the part of media time that the line is slewed by at most.
	maxSlew = 20

	learnFor  = second * 3 / 2  // in which a track learns how far it is behind others
	windowFor = second * 6 / 10 // of which one least lag is kept
	maxPoints = 24              // least lags that are kept

	// A lateness is for good when it lasts: until then it may be a stall. It
	// ends that sooner when what is late would be dropped.
	goodAfter     = 8 * second
	fallingBy     = 10 // the part of the time by which it falls when it is being caught up with
	muchLate      = 2 * second
	muchLateAfter = second * 18 / 10

	// A rate is wrong when the lag has grown or fallen evenly for a while, by
	// more than jitter would.
	rateAfter  = second * 35 / 10
	ratePoints = 4
	rateLeast  = 0.01  // what a clock may be wrong by
	rateAgain  = 0.003 // and what one that is known to be wrong is corrected by
	rateGrowth = second / 10
	mostRate   = 50
)

// mapping is a clock: rate ticks of vw's clock pass for one of media time.
type mapping struct {
	from, to ticks
	rate     float64
}

// on returns where media time m is on vw's clock.
func (l *mapping) on(m ticks) ticks { return l.to + l.scaled(m-l.from) }

// scaled returns how long d of media time is on vw's clock.
func (l *mapping) scaled(d ticks) ticks {
	if l.rate == 1 {
		return d
	}
	return ticks(math.Round(l.rate * float64(d)))
}

// point is the least lag of a window: a media time and when it arrived, and the
// lag as it was then.
type point struct{ media, at, lag ticks }

// tracker puts media time onto vw's clock, along a line that follows the least
// lag of what arrives.
type tracker struct {
	mapping
	slew   ticks // to be added to the line, slowly
	last   ticks // media time
	behind ticks // the least lag of the first moments, behind the other tracks
	began  ticks // when they did
	easing bool  // what came late at the start is still to be slewed away

	window point // of the present window
	opened ticks // when that began
	open   bool  // it did
	points [maxPoints]point
	known  int // how many of them there are

	planned bool // next is to become the line, and left the slew
	next    mapping
	left    ticks
}

// follow returns where m is on vw's clock; what it holds ended at. The line may
// jump forward or change its rate only where no picture that is to be shown
// earlier is still to come.
func (k *tracker) follow(m, at ticks, newest bool) ticks {
	k.look(at)
	if k.planned && newest {
		k.mapping, k.slew, k.planned = k.next, k.left, false
	}
	if d := m - k.last; d > 0 {
		step := k.scaled(d) / maxSlew
		by := max(min(k.slew, step), -step)
		k.to += by
		k.slew -= by
		k.last = m
	}
	lag := at - k.on(m)
	age := at - k.began
	switch {
	case lag < -muchEarly || lag < -early && !k.easing:
		k.to += lag + early
		k.slew, k.planned, lag = min(k.slew, 0), false, -early
	case lag < -early && age > startFor:
		k.slew = min(k.slew, lag)
	}
	if at-k.began < learnFor {
		k.behind = max(min(k.behind, lag), 0)
	}
	if !k.open {
		k.open, k.opened, k.window = true, at, point{m, at, lag}
	}
	if lag <= k.window.lag {
		k.window = point{m, at, lag}
	}
	return k.on(m)
}

// forget drops what was observed.
func (k *tracker) forget() { k.known, k.open, k.planned = 0, false, false }

// look ends the window if it is over, and looks at what it says.
func (k *tracker) look(at ticks) {
	if !k.open || at-k.opened < windowFor {
		return
	}
	if k.known == maxPoints {
		k.known = copy(k.points[:], k.points[1:])
	}
	if at-k.began > startFor && k.window.lag > -early {
		k.easing = false
	}
	k.points[k.known] = k.window
	k.known++
	k.open = false
	if at-k.began >= learnFor && !k.planned {
		k.judge()
	}
}

// judge looks at the least lags of the last while, whenever there is a new one,
// and moves the line if they say so.
func (k *tracker) judge() {
	var at, lag [maxPoints]float64 // on the line, and beyond what is usual
	n, early := k.known, 0         // the points from early on were not late when they came
	for i, p := range k.points[:n] {
		on := k.on(p.media) + k.slew
		at[i], lag[i] = float64(on), float64(p.at-on-k.behind)
		if p.lag-k.behind > fit {
			early = i + 1
		}
	}
	if k.points[n-1].lag-k.behind > -slack {
		early = n
	}
	if slope, end, from, ok := trend(at[:n], lag[:n], early, k.rate != 1); ok {
		rate := k.rate * (1 + slope)
		if math.Abs(rate-1) < rateLeast {
			rate = 1
		}
		k.plan(min(max(rate, 1.0/mostRate), mostRate), ticks(end))
		k.known = copy(k.points[:], k.points[from:k.known])
		return
	}
	newest := ticks(lag[n-1])
	late := lateness(at[:n], lag[:n], goodAfter)
	if much := lateness(at[:n], lag[:n], muchLateAfter); much > muchLate {
		late = much
	}
	switch {
	case late > slack:
		k.plan(k.rate, late)
	case newest < -slack && k.behind > 0: // unless it is a trend, it is less behind now
		for i := range lag[:n] {
			lag[i] = -lag[i]
		}
		k.behind = max(k.behind-lateness(at[:n], lag[:n], rateAfter+second), 0)
	case newest < -slack && k.points[n-1].at-k.began > startFor:
		k.slew += newest
	}
}

// plan makes the line go on at rate, and later by some: that is slewed if it is
// little.
func (k *tracker) plan(rate float64, by ticks) {
	p := k.points[k.known-1]
	k.planned, k.next, k.left = true, mapping{p.media, k.on(p.media), rate}, k.slew+by
	if k.left > jumpOver || k.left < -jumpOver {
		k.next.to += k.left
		k.left = 0
	}
}

// lateness returns the least of the lags since span before the last, if that
// is known and they do not fall as they do when a publisher catches up; else 0.
func lateness(at, lag []float64, span ticks) ticks {
	n := len(at)
	least := lag[n-1]
	for i := n - 2; i >= 0; i-- {
		least = min(least, lag[i])
		if took := at[n-1] + lag[n-1] - at[i] - lag[i]; took >= float64(span) {
			if lag[n-1] < lag[i]-took/fallingBy {
				return 0
			}
			return max(ticks(least), 0)
		}
	}
	return 0
}

// trend looks for a while up to now in which the lag grew evenly, or fell evenly
// from the point early on, and by more than jitter would. It returns by how much it does in a tick, the lag
// that is reached, and with which point that began.
func trend(at, lag []float64, early int, again bool) (slope, end float64, from int, ok bool) {
	least, growth := rateLeast, float64(rateGrowth)
	if again {
		least, growth = rateAgain, growth/2
	}
	n := len(at)
	for from = n - ratePoints; from >= 0; from-- {
		x, y := at[from:], lag[from:]
		span := x[len(x)-1] - x[0]
		if span+y[len(y)-1]-y[0] < float64(rateAfter) {
			continue
		}
		slope, base := under(x, y)
		grown := slope * span
		end = base + grown
		if math.Abs(slope) < least || math.Abs(grown) < growth || grown > 0 && lag[n-1] < growth/2 || grown < 0 && from < early {
			continue
		}
		if even(x, y, slope, max(float64(slack)*4/3, math.Abs(grown)/12)) {
			return slope, end, from, true
		}
	}
	return 0, 0, 0, false
}

// even reports whether each third of the points grows as slope says, give or
// take by.
func even(x, y []float64, slope, by float64) bool {
	n := len(x) - 1
	for i := range 3 {
		a, b := i*n/3, (i+1)*n/3
		one, _ := under(x[a:b+1], y[a:b+1])
		if math.Abs(one-slope)*(x[b]-x[a]) > by {
			return false
		}
	}
	return true
}

// under returns the line under the points (x, y) that is nearest to them in the
// middle: y = base + slope*(x-x[0]). It is an edge of their lower hull.
func under(x, y []float64) (slope, base float64) {
	n := len(x)
	middle := (x[0] + x[n-1]) / 2
	var hull [maxPoints]int
	h := 0
	for i := range x {
		for h > 1 {
			a, b := hull[h-2], hull[h-1]
			if (y[b]-y[a])*(x[i]-x[a]) < (y[i]-y[a])*(x[b]-x[a]) {
				break
			}
			h--
		}
		hull[h] = i
		h++
	}
	for j := 1; j < h; j++ {
		a, b := hull[j-1], hull[j]
		if x[b] >= middle && x[b] > x[a] {
			slope = (y[b] - y[a]) / (x[b] - x[a])
			return slope, y[a] - slope*(x[a]-x[0])
		}
	}
	return 0, y[0]
}

// troubleKind is a kind of what is wrong with timestamps.
type troubleKind int

const (
	troubleRate    troubleKind = iota // a clock runs fast or slow
	troubleStep                       // the timestamps of a track stepped
	troubleOutlier                    // a single one did not fit its neighbours
	troubleLate                       // a PES was too late to go out
	troubleInvalid                    // the timestamps of a PES make no sense
	allTroubles
)

var troubleWords = [allTroubles]string{
	troubleStep:    "timestamps stepped",
	troubleOutlier: "timestamps out of place",
	troubleLate:    "too late, dropped",
	troubleInvalid: "PTS before DTS or far after",
}

// trouble is what the clock of a feed has seen of one kind. An episode ends when
// there was none for episodeGap.
type trouble struct {
	count  uint64
	began  ticks // when the episode did
	last   ticks // when it was seen
	untold bool  // an episode began that nobody was told of
}

const (
	episodeGap = 60 * second
	showFor    = 5 * second // in the state of a feed
)

// saw counts a trouble.
func (c *clock) saw(kind troubleKind, at ticks) {
	t := &c.troubles[kind]
	if t.count == 0 || at-t.last > episodeGap {
		t.began, t.untold = at, true
	}
	t.count++
	t.last = max(t.last, at)
}

// news returns in words what troubles began since the last call, mostly "".
func (c *clock) news(at ticks) string {
	for _, t := range c.tracks {
		if t.running && t.rate != 1 {
			c.saw(troubleRate, at)
			break
		}
	}
	var words []string
	for kind := range c.troubles {
		if t := &c.troubles[kind]; t.untold {
			t.untold = false
			words = append(words, c.describe(troubleKind(kind)))
		}
	}
	return strings.Join(words, ", ")
}

// describe returns what a trouble is, in words.
func (c *clock) describe(kind troubleKind) string {
	if kind == troubleRate {
		return c.rateWords()
	}
	return troubleWords[kind]
}

// clockStats is what the clock of a feed has seen. Rate is that of the track
// that is the most wrong: media time in a second, 1 if it is right.
type clockStats struct {
	Rate     float64 `json:"rate"`
	Steps    uint64  `json:"steps"`
	Outliers uint64  `json:"outliers"`
	Late     uint64  `json:"late"`
	Invalid  uint64  `json:"invalid"`
}

func (c *clock) stats() clockStats {
	worst := 1.0
	for _, t := range c.tracks {
		if t.running && math.Abs(math.Log(t.rate)) > math.Abs(math.Log(worst)) {
			worst = t.rate
		}
	}
	return clockStats{
		1 / worst, c.troubles[troubleStep].count, c.troubles[troubleOutlier].count,
		c.troubles[troubleLate].count, c.troubles[troubleInvalid].count,
	}
}

// state returns what is wrong now, in words, and for how long it has been; "" if
// nothing is.
func (c *clock) state(now ticks) (words string, ago ticks) {
	if words := c.rateWords(); words != "" {
		return words, now - c.troubles[troubleRate].began
	}
	for kind := troubleStep; kind < allTroubles; kind++ {
		if t := &c.troubles[kind]; t.count > 0 && now-t.last < showFor {
			return troubleWords[kind], now - t.began
		}
	}
	return "", 0
}

// rateWords returns by how much clocks run fast or slow, such as "clock 20 %
// fast"; "" if they do not. Where the tracks of a feed differ, it says which.
func (c *clock) rateWords() string {
	var all []string // of each running track
	for _, t := range c.tracks {
		words := ""
		if percent := math.Round(100 * (1/t.rate - 1)); t.running && percent > 0 {
			words = fmt.Sprintf("clock %g %% fast", percent)
		} else if t.running && percent < 0 {
			words = fmt.Sprintf("clock %g %% slow", -percent)
		}
		if t.running {
			all = append(all, words)
		}
	}
	if same := slices.Compact(slices.Clone(all)); len(same) == 1 {
		return same[0]
	}
	running := slices.DeleteFunc(slices.Clone(c.tracks), func(t *trackClock) bool { return !t.running })
	for i, t := range running {
		if all[i] != "" {
			all[i] = t.kind.String() + " " + all[i]
		}
	}
	return strings.Join(slices.DeleteFunc(all, func(s string) bool { return s == "" }), ", ")
}
