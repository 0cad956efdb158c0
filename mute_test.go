package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

const (
	muteSound   = 1 << soundTrack
	mutePicture = 1 << pictureTrack
)

// program writes a PAT and a PMT of tracks with descriptors; the PCR is on pcr.
func (t *tsMaker) program(pcr uint16, tracks ...track) {
	t.section(patPID, 0, 0, 0, 0, 1, 0xc1, 0, 0, 0, 1, 0xe0|testPMT>>8, testPMT&0xff)
	pmt := []byte{2, 0, 0, 0, 1, 0xc1, 0, 0, 0xe0 | byte(pcr>>8), byte(pcr), 0xf0, 0}
	for _, k := range tracks {
		pmt = append(pmt, k.streamType, 0xe0|byte(k.pid>>8), byte(k.pid), 0xf0, byte(len(k.descriptors)))
		pmt = append(pmt, k.descriptors...)
	}
	t.section(testPMT, pmt...)
}

// raw writes a PES packet whose payload is es.
func (t *tsMaker) raw(pid uint16, id byte, pts ticks, es []byte) {
	b := t.packets(pes{pid: pid, id: id, pts: pts, size: 100})
	header := bytes.Index(b, []byte{0, 0, 1, id})
	copy(b[header+14:], es)
	t.Write(b)
}

// registration is a registration_descriptor. ISO 13818-1 2.6.8.
func registration(name string) []byte { return append([]byte{tagRegistration, 4}, name...) }

// payloadsByPID counts the packets with payload by PID.
func payloadsByPID(ts []byte) map[uint16]int {
	n := make(map[uint16]int)
	for p := packet(ts); len(p) > 0; p = p[packetSize:] {
		if p.payload() != nil {
			n[p.pid()]++
		}
	}
	return n
}

// TestMuteKinds is the table of what passes while one kind is muted: what both
// the program map and the PES packet say is of another.
func TestMuteKinds(t *testing.T) {
	const none, sound, picture = 0, mutePicture, muteSound // what passes, by what has to be muted for it
	delimiter := []byte{0, 0, 1, 0x12, 0, 0, 0, 1, 0x0a}
	dvb := func(tag byte) []byte { return []byte{tag, 1, 0} }
	tests := []struct {
		name        string
		streamType  byte
		descriptors []byte
		id          byte
		es          []byte
		change      func(packet)
		passes      kindSet
	}{
		{"MP2", typeMPEG1Audio, nil, 0xc0, nil, nil, sound},
		{"MP3", typeMPEG2Audio, nil, 0xc0, nil, nil, sound},
		{"AAC", typeAAC, nil, 0xc0, nil, nil, sound},
		{"LATM", typeAACLATM, nil, 0xc0, nil, nil, sound},
		{"AC-3", typeAC3, nil, 0xbd, nil, nil, sound},
		{"E-AC-3", typeEAC3, nil, 0xbd, nil, nil, sound},
		{"DVB AC-3", 0x06, dvb(tagAC3), 0xbd, nil, nil, sound},
		{"DVB E-AC-3", 0x06, dvb(tagEAC3), 0xbd, nil, nil, sound},
		{"DTS", typeDTS, nil, 0xbd, nil, nil, sound},
		{"Opus", 0x06, registration("Opus"), 0xbd, nil, nil, sound},
		{"S302M", 0x06, registration("BSSD"), 0xbd, nil, nil, sound},
		{"MPEG-1", typeMPEG1Video, nil, 0xe0, nil, nil, picture},
		{"MPEG-2", typeMPEG2Video, nil, 0xe0, nil, nil, picture},
		{"H.264", typeH264, nil, 0xe1, nil, nil, picture},
		{"H.265", typeHEVC, nil, 0xe0, nil, nil, picture},
		{"AV1", 0x06, registration("AV01"), 0xe0, nil, nil, picture},
		{"AV1 in private data", 0x06, registration("AV01"), 0xbd, delimiter, nil, picture},
		{"sound in private data listed as AV1", 0x06, registration("AV01"), 0xbd, []byte{0x0b, 0x77}, nil, none},
		{"KLV", 0x15, registration("KLVA"), 0xfc, nil, nil, none},
		{"KLV in private data", 0x06, registration("KLVA"), 0xbd, nil, nil, none},
		{"private data", 0x06, nil, 0xbd, nil, nil, none},
		{"sound listed as picture", typeH264, nil, 0xc0, nil, nil, none},
		{"AC-3 listed as picture", typeH264, nil, 0xbd, nil, nil, none},
		{"picture listed as sound", typeMPEG1Audio, nil, 0xe0, nil, nil, none},
		{"sound listed as nothing known", 0xff, nil, 0xc0, nil, nil, none},
		{"scrambled picture", typeH264, nil, 0xe0, nil, func(p packet) { p[3] |= 0x80 }, none},
		{"damaged picture", typeH264, nil, 0xe0, nil, func(p packet) { p[1] |= 0x80 }, none},
		{"no PES packet", typeH264, nil, 0xe0, nil, func(p packet) { p.payload()[2] = 2 }, none},
	}
	for _, tt := range tests {
		for _, muted := range []kindSet{muteSound, mutePicture, muteSound | mutePicture, 0} {
			b := newBench(t, "stream/x", "f")
			onStream, onFeed := b.sub, newSubscriber(raw, time.Minute, nil)
			b.join("f", onFeed)
			b.setMute(muted)
			var ts tsMaker
			for i := range 8 {
				ts.program(0x1fff, track{0x100, typeMPEG1Video, nil}, track{0x101, tt.streamType, tt.descriptors})
				ts.frame(pes{pid: 0x100, id: 0xe0, key: true, pts: second * ticks(i+1) / 25, size: 300})
				at := ts.Len()
				ts.raw(0x101, tt.id, second*ticks(i+1)/25, tt.es)
				if tt.change != nil {
					tt.change(packet(ts.Bytes()[at:]))
				}
				b.at = b.at.Add(40 * time.Millisecond)
				b.post("f", ts.Bytes())
				ts.Reset()
			}
			for _, b.sub = range []*subscriber{onStream, onFeed} {
				where := fmt.Sprintf("%s, muted %03b, feed alone %v", tt.name, muted, b.sub == onFeed)
				n := payloadsByPID(b.got())
				if got, want := n[0x100] > 0, muted&mutePicture == 0; got != want {
					t.Errorf("%s: got %d packets of the picture beside it, want some: %v", where, n[0x100], want)
				}
				if muted == 0 {
					continue // a stream leaves out what cannot be read
				}
				if got, want := n[0x101] > 0, muted == tt.passes; got != want {
					t.Errorf("%s: got %d packets, want some: %v", where, n[0x101], want)
				}
				sum(t, b.sub)
			}
		}
	}
}

// studio publishes picture and sound in one feed, with the PCR on the PID of the
// sound, and has a reader of the feed and one of a stream. It runs in a bubble.
type studio struct {
	*bench
	ts     tsMaker
	n      int // frames so far
	start  time.Time
	onFeed *subscriber
	sent   []byte // all that was posted
}

func newStudio(t *testing.T) *studio {
	s := &studio{bench: newBench(t, "stream/x", "f"), start: time.Now(), onFeed: newSubscriber(raw, time.Minute, nil)}
	s.join("f", s.onFeed)
	return s
}

// captured is the PTS of what is captured now.
func (s *studio) captured() ticks { return second + toTicks(time.Since(s.start)) }

// record makes a picture and a sound of 40 ms, which began 40 ms ago, and returns
// their packets.
func (s *studio) record() []byte {
	time.Sleep(40 * time.Millisecond)
	s.ts.Reset()
	pts := s.captured() - second/25
	s.ts.program(0x101, track{0x100, typeMPEG1Video, nil}, track{0x101, typeMPEG1Audio, nil})
	s.ts.frame(pes{pid: 0x100, id: 0xe0, key: s.n%12 == 0, pts: pts, size: 2000})
	at := s.ts.Len()
	s.ts.frame(pes{pid: 0x101, id: 0xc0, key: true, pts: pts, size: 400, length: true}) // key: it has a PCR
	s.ts.Bytes()[at+5] &^= 0x40
	s.n++
	return bytes.Clone(s.ts.Bytes())
}

func (s *studio) play(frames int) {
	for range frames {
		b := s.record()
		s.arrive(b)
	}
}

// arrive posts what was recorded.
func (s *studio) arrive(b []byte) {
	s.at = time.Now()
	s.sent = append(s.sent, b...)
	s.post("f", b)
}

// read returns what a reader has got since the last call.
func (s *studio) read(sub *subscriber) []byte {
	sum(s.t, sub)
	return s.takeAll(sub)
}

// only returns the packets of a PID.
func only(ts []byte, pid uint16) (b []byte) {
	for ; len(ts) > 0; ts = ts[packetSize:] {
		if packet(ts).pid() == pid {
			b = append(b, ts[:packetSize]...)
		}
	}
	return b
}

// pesTimes returns the PTS on a PID.
func pesTimes(ts []byte, pid uint16) (all []ticks) {
	for p := packet(only(ts, pid)); len(p) > 0; p = p[packetSize:] {
		if pts, _ := timestamps(p[:packetSize].payload()); p.unitStart() && pts != nil {
			all = append(all, readTime(pts))
		}
	}
	return all
}

// breaks returns where the continuity counter of a PID does not go on and no
// discontinuity_indicator says so, and how many of those there are.
func breaks(ts []byte, pid uint16) (wrong, told int) {
	last := -1
	for p := packet(only(ts, pid)); len(p) > 0; p = p[packetSize:] {
		q := p[:packetSize]
		want := last
		if q.payload() != nil {
			want = (last + 1) & 15
		}
		switch {
		case q.discontinuity():
			told++
		case last >= 0 && q.continuity() != want:
			wrong++
		}
		last = q.continuity()
	}
	return wrong, told
}

// TestMuteFeed holds I6 on a feed alone and on a stream: the sound of a feed goes
// and the picture stays, byte for byte on the feed; then the other way round.
func TestMuteFeed(t *testing.T) {
	for _, tt := range []struct {
		muted      kindSet
		gone, here uint16
	}{{muteSound, 0x101, 0x100}, {mutePicture, 0x100, 0x101}} {
		synctest.Test(t, func(t *testing.T) {
			s := newStudio(t)
			check := newTSCheck()
			s.play(30)
			s.read(s.onFeed)
			check.read(s.read(s.sub))
			s.play(5)
			s.setMute(tt.muted) // what is queued now has both
			onFeed, onStream := s.read(s.onFeed), s.read(s.sub)
			from := len(s.sent)
			s.play(50)
			onFeed, onStream = append(onFeed, s.read(s.onFeed)...), append(onStream, s.read(s.sub)...)
			check.read(onStream)
			if n := payloadsByPID(onFeed)[tt.gone]; n > 0 {
				t.Errorf("muted %03b: %d packets of it on the feed", tt.muted, n)
			}
			if tt.gone == 0x101 && len(only(onFeed, 0x101)) < 50*packetSize {
				t.Errorf("got %d PCR on the PID of the sound, want 55", len(only(onFeed, 0x101))/packetSize)
			}
			if n := payloadsByPID(onStream)[tt.gone]; n > 0 || check.types[tt.gone] != 0 || check.types[tt.here] == 0 {
				t.Errorf("muted %03b: %d packets of it on the stream, tracks %v", tt.muted, n, check.types)
			}
			if got, want := only(onFeed, tt.here), only(s.sent[from:], tt.here); !bytes.HasSuffix(got, want) || len(got) < len(want)*55/50 {
				t.Errorf("muted %03b: got %d bytes of the other track, want the %d that were posted and those that were queued", tt.muted, len(got), len(want))
			}
			lifted := s.captured()
			s.setMute(0)
			s.play(50)
			after, stream := s.read(s.onFeed), s.read(s.sub)
			check.read(stream)
			for name, ts := range map[string][]byte{"feed": after, "stream": stream} {
				n := len(pesTimes(ts, tt.gone))
				if least := map[uint16]int{0x101: 45, 0x100: 36}[tt.gone]; n < least || n > 50 {
					t.Errorf("muted %03b: %d PES of it on the %s after the lift, want %d at least", tt.muted, n, name, least)
				}
			}
			if first := pesTimes(after, tt.gone)[0]; first < lifted {
				t.Errorf("muted %03b: the first PES after the lift began %d ticks before it", tt.muted, lifted-first)
			}
			if tt.gone == 0x100 && !packet(only(after, 0x100)).discontinuity() {
				t.Error("the first packet after the lift does not announce the gap")
			}
			if tt.gone == 0x100 && !firstOn(after, 0x100).randomAccess() || tt.gone == 0x100 && !firstOn(stream, 0x100).randomAccess() {
				t.Error("the first picture after the lift is no keyframe")
			}
			if n := len(pesTimes(stream, tt.here)); n != 50 {
				t.Errorf("muted %03b: %d PES of the other track on the stream after the lift, want 50", tt.muted, n)
			}
			all := append(onFeed, after...)
			if wrong, told := breaks(all, tt.gone); wrong > 0 || told == 0 {
				t.Errorf("muted %03b: %d breaks of continuity are not announced, %d are", tt.muted, wrong, told)
			}
			if wrong, told := breaks(all, tt.here); wrong > 0 || told > 0 {
				t.Errorf("muted %03b: %d and %d breaks of continuity on the other track, want none", tt.muted, wrong, told)
			}
			if len(check.problems) > 0 {
				t.Errorf("muted %03b: got %d problems: %q", tt.muted, len(check.problems), check.problems[:min(5, len(check.problems))])
			}
		})
	}
}

// TestMuteQueued holds I6 and I7 in a queue: messages that hold both kinds lose
// the muted one, but for the message that a write in progress has begun.
func TestMuteQueued(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for written := -1; written < 12000; written += 611 { // -1: no write is in progress
			s := newStudio(t)
			interrupted := 0
			s.onFeed = newSubscriber(raw, time.Minute, func() { interrupted++ })
			s.join("f", s.onFeed)
			s.play(20)
			var sent []byte
			if written < 0 {
				if ended := s.setMute(muteSound); len(ended) != 0 {
					t.Fatalf("got %d writes to wait for, want none", len(ended))
				}
			} else {
				batch := s.onFeed.take(nil, 20000, false, time.Now())
				ended := s.setMute(muteSound)
				if len(ended) != 1 || interrupted != 1 {
					t.Fatalf("got %d writes to wait for and %d interrupts, want 1", len(ended), interrupted)
				}
				left := written
				begun := 0 // bytes of the message that was begun
				for _, b := range batch {
					n := min(left, len(b))
					sent, left = append(sent, b[:n]...), left-n
					if begun += len(b); left == 0 {
						break
					}
				}
				s.onFeed.wrote(written)
				<-ended[0]
				rest := s.onFeed.take(nil, 1<<20, false, time.Now())
				n := len(sent)
				for _, b := range rest {
					sent = append(sent, b...)
				}
				s.onFeed.wrote(len(sent) - n)
				if n := payloadsByPID(sent[min(begun, len(sent)):])[0x101]; n > 0 {
					t.Errorf("%d written: %d packets of sound in messages begun after the mute", written, n)
				}
			}
			sent = append(sent, s.read(s.onFeed)...)
			if written < 0 && payloadsByPID(sent)[0x101] > 0 {
				t.Error("there are packets of sound in messages begun after the mute")
			}
			if !bytes.Equal(only(sent, 0x100), only(s.sent, 0x100)) {
				t.Errorf("%d written: got %d bytes of picture, want all %d", written, len(only(sent, 0x100)), len(only(s.sent, 0x100)))
			}
			if wrong, _ := breaks(sent, 0x101); wrong > 0 {
				t.Errorf("%d written: %d breaks of continuity on the PID of the sound are not announced", written, wrong)
			}
		}
	})
}

// TestMuteLiftedDuringWrite: a write that cannot be interrupted ends after the mute
// was lifted. What came after the lift is whole then, with its announcement.
func TestMuteLiftedDuringWrite(t *testing.T) {
	for _, again := range []bool{false, true} { // it is muted a second time
		synctest.Test(t, func(t *testing.T) {
			s := newStudio(t)
			s.play(20)
			var sent []byte
			for _, b := range s.onFeed.take(nil, 20000, false, time.Now()) {
				sent = append(sent, b...)
			}
			sent = sent[:3000] // of what is in flight, the rest is not begun
			s.setMute(muteSound)
			if again {
				s.play(3)
				s.setMute(0)
				s.play(3)
				s.setMute(muteSound)
			}
			s.play(5)
			s.setMute(0)
			from := s.captured()
			s.play(20)
			s.onFeed.wrote(len(sent))
			sent = append(sent, s.read(s.onFeed)...)
			after := slices.DeleteFunc(pesTimes(sent, 0x101), func(pts ticks) bool { return pts < from })
			if len(after) < 19 {
				t.Errorf("muted again %v: got %d sounds after the lift, want 19 of 20 at least", again, len(after))
			}
			if wrong, told := breaks(sent, 0x101); wrong > 0 || told == 0 {
				t.Errorf("muted again %v: %d breaks of continuity on the PID of the sound are not announced, %d are", again, wrong, told)
			}
			if !bytes.Equal(only(sent, 0x100), only(s.sent, 0x100)) {
				t.Errorf("muted again %v: the picture lost something", again)
			}
		})
	}
}

// TestMuteBacklog: nothing captured while the mute was on is ever sent, by the
// clock of the feed, when its packets arrive after the lift.
func TestMuteBacklog(t *testing.T) {
	tests := []struct {
		name               string
		before, stall      int // frames; stall: those from before the mute that arrive after the lift
		muted, after       int
		restart, fromStart bool
	}{
		{"no stall", 30, 0, 50, 50, false, false},
		{"stall from before the mute until after the lift", 30, 10, 50, 50, false, false},
		{"long stall", 100, 50, 500, 100, false, false},
		{"a new publisher brings the backlog", 30, 10, 50, 50, true, false},
		{"muted from the start", 0, 0, 50, 50, false, true},
		{"lifted at once", 0, 0, 2, 50, false, true},
	}
	for _, tt := range tests {
		for _, kind := range []kindSet{muteSound, mutePicture, muteSound | mutePicture} {
			synctest.Test(t, func(t *testing.T) {
				s := newStudio(t)
				stalls := tt.stall > 0
				if tt.fromStart {
					s.setMute(kind)
				}
				s.play(tt.before)
				s.read(s.onFeed)
				s.read(s.sub)
				var backlog []byte
				for range tt.stall {
					backlog = append(backlog, s.record()...)
				}
				began := s.captured()
				s.setMute(kind)
				for range tt.muted {
					if b := s.record(); stalls {
						backlog = append(backlog, b...)
					} else {
						s.arrive(b)
					}
				}
				lifted := s.captured()
				s.setMute(0)
				if tt.restart {
					s.restart("f")
				}
				if stalls {
					s.arrive(append(backlog, s.record()...))
				}
				s.play(tt.after)
				onFeed, onStream := s.read(s.onFeed), s.read(s.sub)
				for pid, k := range map[uint16]kindSet{0x100: mutePicture, 0x101: muteSound} {
					if kind&k == 0 {
						continue
					}
					all := pesTimes(onFeed, pid)
					if len(all) < tt.after-20 {
						t.Errorf("%s, %03b: got %d PES on %#x after the lift, want %d at least", tt.name, kind, len(all), pid, tt.after-20)
					}
					for _, at := range all {
						if at < lifted {
							t.Errorf("%s, %03b: a PES on %#x began %.2f s before the lift, and %.2f s after the mute",
								tt.name, kind, pid, float64(lifted-at)/float64(second), float64(at-began)/float64(second))
							break
						}
					}
					if n := len(pesTimes(onStream, pid)); n > len(all) || n < tt.after-20 {
						t.Errorf("%s, %03b: got %d PES on %#x of the stream, and %d on the feed", tt.name, kind, n, pid, len(all))
					}
				}
			})
		}
	}
}

// TestMuteLongSound: of sound in PES packets of 370 ms, as ffmpeg groups it, none
// goes out that began before a lift, at whatever moment that is, also of one that
// was muted from the start.
func TestMuteLongSound(t *testing.T) {
	const long = 370 * time.Millisecond
	for _, fromStart := range []bool{false, true} {
		for at := time.Duration(0); at < long; at += 37 * time.Millisecond {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t, "stream/x", "f")
				onFeed, onStream := newSubscriber(raw, time.Minute, nil), b.sub
				b.join("f", onFeed)
				start := time.Now()
				var lifted ticks
				turns := []struct {
					after time.Duration
					kinds kindSet
				}{{map[bool]time.Duration{false: 10 * long, true: 0}[fromStart], muteSound}, {20*long + at, 0}}
				var ts tsMaker
				for i := range 40 {
					due := time.Duration(i+1) * long
					for len(turns) > 0 && turns[0].after <= due {
						time.Sleep(turns[0].after - time.Since(start))
						b.setMute(turns[0].kinds)
						lifted = second + toTicks(time.Since(start))
						turns = turns[1:]
						if len(turns) == 0 { // what was queued is of before the mute
							for _, b.sub = range []*subscriber{onFeed, onStream} {
								b.got()
							}
						}
					}
					time.Sleep(due - time.Since(start))
					ts.Reset()
					ts.program(0x101, track{0x101, typeMPEG1Audio, nil})
					ts.frame(pes{pid: 0x101, id: 0xc0, key: true, pts: second + toTicks(time.Duration(i)*long), size: 5900, length: true})
					b.at = time.Now()
					b.post("f", ts.Bytes())
				}
				for name, sub := range map[string]*subscriber{"feed": onFeed, "stream": onStream} {
					b.sub = sub
					got := pesTimes(b.got(), 0x101)
					if len(got) < 17 || len(got) > 20 {
						t.Errorf("lifted after %v, from the start %v: got %d PES on the %s, want those of after it, 17 to 20", at, fromStart, len(got), name)
					}
					if name == "feed" && len(got) > 0 && got[0] < lifted {
						t.Errorf("lifted after %v, from the start %v: a PES began %v before that", at, fromStart, (lifted - got[0]).duration())
					}
				}
			})
		}
	}
}

// TestMuteDrain: a publisher that stalled from before the mute until after the lift
// delivers what it has as fast as its path lets it, or stays late for good; its
// timestamps may have stepped. Nothing of before the lift goes out, and what is of
// after it does.
func TestMuteDrain(t *testing.T) {
	for _, tt := range []struct {
		name   string
		stall  int     // frames
		speed  float64 // at which they come
		step   ticks   // of the timestamps
		stepAt int     // frame of the stall
	}{
		{"at once", 100, 1000, 0, 0},
		{"at 5 times", 250, 5, 0, 0},
		{"at 1.5 times", 250, 1.5, 0, 0},
		{"at 1.05 times", 250, 1.05, 0, 0},
		{"it stays late by 10 s", 250, 1, 0, 0},
		{"it stays late by 1 s", 25, 1, 0, 0},
		{"at once, a step before", 250, 1000, 30 * second, 0},
		{"at once, a step back before", 250, 1000, -3 * second, 0},
		{"at once, a step in it", 250, 1000, 30 * second, 100},
		{"at once, a step back in it", 250, 1000, -30 * second, 100},
		{"at 5 times, a step in it", 250, 5, 30 * second, 100},
		{"it stays late, a step before", 250, 1, 30 * second, 0},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := newStudio(t)
			s.play(100)
			s.read(s.onFeed)
			s.read(s.sub)
			captured := make(map[ticks]time.Time) // by PTS
			var kept [][]byte
			var lifted time.Time
			sent := 0.0
			const after = 300
			for i := range tt.stall + after {
				if i == tt.stepAt {
					s.start = s.start.Add(-tt.step.duration())
				}
				kept = append(kept, s.record())
				captured[(s.captured()-second/25)&(wrap-1)] = time.Now().Add(-40 * time.Millisecond)
				switch i {
				case 3:
					s.setMute(muteSound | mutePicture)
				case tt.stall - 2:
					s.setMute(0)
					lifted = time.Now()
				}
				if i >= tt.stall {
					for sent += tt.speed; sent >= 1 && len(kept) > 0; sent-- {
						s.arrive(kept[0])
						kept = kept[1:]
					}
				}
			}
			onFeed, onStream := s.read(s.onFeed), s.read(s.sub)
			for _, pid := range []uint16{0x100, 0x101} {
				n, before := 0, time.Duration(0)
				for _, pts := range pesTimes(onFeed, pid) {
					n++
					before = max(before, lifted.Sub(captured[pts]))
				}
				if before > time.Millisecond { // a tick is not a whole number of those
					t.Errorf("%s: a PES on %#x was captured %v before the lift", tt.name, pid, before)
				}
				if want := after - len(kept) - 20; n < want {
					t.Errorf("%s: got %d PES on %#x that were captured after the lift, want %d at least", tt.name, n, pid, want)
				}
				if got := len(pesTimes(onStream, pid)); got > n {
					t.Errorf("%s: got %d PES on %#x of the stream, and %d on the feed", tt.name, got, pid, n)
				}
			}
		})
	}
}

// soundMark is in each packet of sound of the tests below, so that it is found
// whatever the packet says of itself.
var soundMark = []byte("so this is sound")

// marked returns the packets of a PES packet of sound, each with the mark.
func (t *tsMaker) marked(pid uint16, id byte, pts ticks, size int) []byte {
	b := t.packets(pes{pid: pid, id: id, pts: pts, size: size, length: true})
	for p := b; len(p) > 0; p = p[packetSize:] {
		payload := packet(p[:packetSize]).payload()
		copy(payload[len(payload)-len(soundMark):], soundMark)
	}
	return b
}

// mapSection is the section of a program map of tracks, without its CRC.
func mapSection(number, version byte, tracks ...track) []byte {
	pmt := []byte{2, 0, 0, 0, number, 0xc1 | version<<1, 0, 0, 0xe1, 0x00, 0xf0, 0}
	for _, k := range tracks {
		pmt = append(pmt, k.streamType, 0xe0|byte(k.pid>>8), byte(k.pid), 0xf0, byte(len(k.descriptors)))
		pmt = append(pmt, k.descriptors...)
	}
	return pmt
}

// association writes a PAT: the PID of each program's map.
func (t *tsMaker) association(programs ...uint16) {
	pat := []byte{0, 0, 0, 0, 1, 0xc1, 0, 0}
	for i, pid := range programs {
		pat = append(pat, 0, byte(i+1), 0xe0|byte(pid>>8), byte(pid))
	}
	t.section(patPID, pat...)
}

// TestMuteHidden: no packet of sound goes out while sound is muted, however its
// program map, its PID and its headers lie, and the picture beside it does.
func TestMuteHidden(t *testing.T) {
	at := func(i int) ticks { return second * ticks(i+1) / 25 }
	video, audio := track{0x100, typeMPEG1Video, nil}, track{0x101, typeMPEG1Audio, nil}
	picture := func(ts *tsMaker, i int, pid uint16) {
		ts.frame(pes{pid: pid, id: 0xe0, key: i%12 == 0, pts: at(i), size: 700})
	}
	plain := func(ts *tsMaker, i int) {
		ts.association(testPMT)
		ts.section(testPMT, mapSection(1, 0, video, audio)...)
		picture(ts, i, 0x100)
	}
	sound := func(ts *tsMaker, i int, pid uint16, id byte) { ts.Write(ts.marked(pid, id, at(i), 500)) }
	bare := func(ts *tsMaker, pid uint16) { // a packet of payload alone
		p := append([]byte{0x47, byte(pid >> 8), byte(pid), 0x10 | ts.counter(pid)}, bytes.Repeat(soundMark, 12)...)
		ts.Write(p[:packetSize])
	}
	const muted = 24 // the frame with which the mute begins
	swapped := []track{{0x101, typeMPEG1Video, nil}, {0x100, typeMPEG1Audio, nil}}
	swap := func(version byte) func(ts *tsMaker, i int) {
		return func(ts *tsMaker, i int) {
			if i < muted+3 {
				plain(ts, i)
				sound(ts, i, 0x101, 0xc0)
				return
			}
			ts.association(testPMT)
			ts.section(testPMT, mapSection(1, version, swapped...)...)
			picture(ts, i, 0x101)
			sound(ts, i, 0x100, 0xc0)
		}
	}
	rows := []struct {
		name  string
		write func(ts *tsMaker, i int)
	}{
		{"as listed", func(ts *tsMaker, i int) { plain(ts, i); sound(ts, i, 0x101, 0xc0) }},
		{"on the PID of the picture", func(ts *tsMaker, i int) { plain(ts, i); sound(ts, i, 0x100, 0xc0) }},
		{"private data on the PID of the picture", func(ts *tsMaker, i int) { plain(ts, i); sound(ts, i, 0x100, 0xbd) }},
		{"PIDs swapped while muted", swap(1)},
		{"PIDs swapped, same version", swap(0)},
		{"a map with a wrong CRC that calls sound picture", func(ts *tsMaker, i int) {
			plain(ts, i)
			b := mapSection(1, 1, video, track{0x101, typeH264, nil})
			ts.section(testPMT, b...)
			ts.Bytes()[ts.Len()-packetSize+5+len(b)] ^= 0xff
			sound(ts, i, 0x101, 0xc0)
		}},
		{"a map for later", func(ts *tsMaker, i int) {
			plain(ts, i)
			b := mapSection(1, 1, video, track{0x101, typeH264, nil})
			b[5] &^= 1
			ts.section(testPMT, b...)
			sound(ts, i, 0x101, 0xc0)
		}},
		{"another program", func(ts *tsMaker, i int) {
			ts.association(testPMT, 0x1100)
			ts.section(testPMT, mapSection(1, 0, video)...)
			ts.section(0x1100, mapSection(2, 0, track{0x101, typeMPEG1Audio, nil})...)
			picture(ts, i, 0x100)
			sound(ts, i, 0x101, 0xc0)
		}},
		{"another program that lists it as picture", func(ts *tsMaker, i int) {
			ts.association(testPMT, 0x1100)
			ts.section(testPMT, mapSection(1, 0, video)...)
			ts.section(0x1100, mapSection(2, 0, track{0x101, typeMPEG1Video, nil})...)
			picture(ts, i, 0x100)
			sound(ts, i, 0x101, 0xc0)
		}},
		{"no program map", func(ts *tsMaker, i int) { plain(ts, i); sound(ts, i, 0x123, 0xc0) }},
		{"on the PID of the map", func(ts *tsMaker, i int) { plain(ts, i); sound(ts, i, testPMT, 0xc0) }},
		{"on the PID of the association", func(ts *tsMaker, i int) { plain(ts, i); sound(ts, i, patPID, 0xc0) }},
		{"on a PID of DVB", func(ts *tsMaker, i int) { plain(ts, i); sound(ts, i, 0x11, 0xc0) }},
		{"on the PID of null packets", func(ts *tsMaker, i int) { plain(ts, i); sound(ts, i, nullPID, 0xc0) }},
		{"around a map", func(ts *tsMaker, i int) {
			ts.association(testPMT)
			b := ts.marked(testPMT, 0xc0, at(i), 700)
			ts.Write(b[:packetSize])
			ts.section(testPMT, mapSection(1, 0, video, audio)...)
			ts.Write(b[packetSize:])
			picture(ts, i, 0x100)
		}},
		{"after a table of DVB", func(ts *tsMaker, i int) {
			plain(ts, i)
			ts.section(0x11, 0x42, 0, 0, 0, 1, 0xc1, 0, 0, 0, 1, 0xff)
			bare(ts, 0x11)
			bare(ts, 0x11)
		}},
		{"after an association", func(ts *tsMaker, i int) { plain(ts, i); bare(ts, patPID); bare(ts, patPID) }},
		{"packets that no PES packet begins", func(ts *tsMaker, i int) { plain(ts, i); bare(ts, 0x101); bare(ts, 0x101) }},
		{"a start of two bytes on the PID of the picture", func(ts *tsMaker, i int) {
			plain(ts, i)
			ts.Write(shortStart(ts.marked(0x100, 0xc0, at(i), 500)))
		}},
		{"a start of two bytes on a PID of DVB", func(ts *tsMaker, i int) {
			plain(ts, i)
			ts.Write(shortStart(ts.marked(0x11, 0xc0, at(i), 500)))
		}},
		{"scrambled on the PID of the picture", func(ts *tsMaker, i int) {
			plain(ts, i)
			b := ts.marked(0x100, 0xe0, at(i), 500)
			for p := b; len(p) > 0; p = p[packetSize:] {
				p[3] |= 0x80
			}
			ts.Write(b)
		}},
		{"damaged on the PID of the picture", func(ts *tsMaker, i int) {
			plain(ts, i)
			b := ts.marked(0x100, 0xe0, at(i), 500)
			for p := b; len(p) > 0; p = p[packetSize:] {
				p[1] |= 0x80
			}
			ts.Write(b)
		}},
		{"a map of two packets", func(ts *tsMaker, i int) {
			ts.association(testPMT)
			tracks := []track{video, audio}
			if i >= muted+3 {
				tracks = slices.Clone(swapped)
			}
			tracks[1].descriptors = append([]byte{0xe0, 200}, make([]byte, 200)...)
			b := mapSection(1, 0, tracks...)
			binary.BigEndian.PutUint16(b[1:], 0xb000|uint16(len(b)+1))
			b = binary.BigEndian.AppendUint32(b, crc32MPEG(b))
			ts.Write(slices.Concat([]byte{0x47, 0x40 | testPMT>>8, testPMT & 0xff, 0x10 | ts.counter(testPMT), 0}, b[:183]))
			if i%2 == 1 {
				picture(ts, i, tracks[0].pid)
			}
			rest := slices.Concat([]byte{0x47, testPMT >> 8, testPMT & 0xff, 0x10 | ts.counter(testPMT)}, b[183:])
			ts.Write(append(rest, bytes.Repeat([]byte{0xff}, packetSize-len(rest))...))
			if i%2 == 0 {
				picture(ts, i, tracks[0].pid)
			}
			sound(ts, i, tracks[1].pid, 0xc0)
		}},
		{"two maps in a packet", func(ts *tsMaker, i int) {
			ts.association(testPMT, testPMT)
			tracks := []track{video, audio}
			if i >= muted+3 {
				tracks = swapped
			}
			other := mapSection(2, 0, track{0x200, typeMPEG1Video, nil})
			ours := mapSection(1, 0, tracks...)
			var all []byte
			for _, b := range [][]byte{other, ours} {
				binary.BigEndian.PutUint16(b[1:], 0xb000|uint16(len(b)+1))
				all = append(all, binary.BigEndian.AppendUint32(b, crc32MPEG(b))...)
			}
			p := slices.Concat([]byte{0x47, 0x40 | testPMT>>8, testPMT & 0xff, 0x10 | ts.counter(testPMT), 0}, all)
			ts.Write(append(p, bytes.Repeat([]byte{0xff}, packetSize-len(p))...))
			picture(ts, i, tracks[0].pid)
			sound(ts, i, tracks[1].pid, 0xc0)
		}},
	}
	for _, row := range rows {
		for _, part := range []int{1 << 20, 1000} {
			got := playMuted(t, part, muted, row.write)
			for _, to := range []string{"feed", "stream"} {
				b := got[to]
				if n := bytes.Count(b, soundMark); n > 0 {
					t.Errorf("%s, in reads of %d: %d packets of sound on the %s while it is muted", row.name, part, n, to)
				}
				pictures := 0
				for p := range slices.Chunk(b, packetSize) {
					if id, _, ok := pesStart(packet(p).payload()); ok && isVideoID(id) {
						pictures++
					}
				}
				if pictures < 23 { // one may come before its map is whole
					t.Errorf("%s, in reads of %d: got %d pictures on the %s while the sound is muted, want 23 at least", row.name, part, pictures, to)
				}
			}
		}
	}
}

// playMuted posts 24 frames more than muted, in parts of a size, mutes the sound
// before frame muted, and returns what a feed and a stream sent from there on.
func playMuted(t *testing.T, part, muted int, write func(ts *tsMaker, i int)) map[string][]byte {
	got := make(map[string][]byte)
	synctest.Test(t, func(t *testing.T) {
		x := newMux()
		x.setStream("stream/x", []string{"f"}, true)
		readers := map[string]*bench{"f": {mux: x, t: t}, "stream/x": {mux: x, t: t}}
		for name, r := range readers {
			r.sub = newSubscriber(raw, time.Minute, nil)
			x.join(name, r.sub)
		}
		body, in := io.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			x.publish("f", &publisher{interrupt: func() { body.Close() }}, body)
		}()
		var ts tsMaker
		for i := range muted + 24 {
			if i == muted {
				x.setMute(muteSound)
				clear(got)
			}
			ts.Reset()
			write(&ts, i)
			for b := range slices.Chunk(ts.Bytes(), part) {
				in.Write(b)
			}
			synctest.Wait()
			time.Sleep(40 * time.Millisecond)
			got["feed"] = append(got["feed"], readers["f"].got()...)
			got["stream"] = append(got["stream"], readers["stream/x"].got()...)
		}
		in.Close()
		<-done
	})
	return got
}

// shortStart leaves of the first of the packets of a PES packet two bytes, which are
// the zeros of its start code.
func shortStart(b []byte) []byte {
	b = slices.Clone(b)
	p := b[:packetSize]
	p[3] |= 0x20
	p[4], p[5] = packetSize-5-2, 0
	copy(p[6:], bytes.Repeat([]byte{0xff}, packetSize-6-2))
	p[packetSize-2], p[packetSize-1] = 0, 0
	return b
}

// TestMuteCodecs is TestMuteKinds with what ffmpeg makes: a picture and a sound
// in one feed. While one is muted the other passes whole.
func TestMuteCodecs(t *testing.T) {
	ffmpeg := needs(t, "ffmpeg")
	pictures := map[string][]string{
		"mpeg1": {"mpeg1video"}, "mpeg2": {"mpeg2video"}, "h264": {"libx264"}, "h265": {"libx265", "-x265-params", "log-level=none"},
	}
	sounds := map[string][]string{
		"mp2": {"mp2"}, "mp3": {"libmp3lame"}, "aac": {"aac"}, "latm": {"aac", "-mpegts_flags", "latm"}, "ac3": {"ac3"}, "eac3": {"eac3"},
		"ac3 of DVB": {"ac3", "-mpegts_flags", "system_b"}, "eac3 of DVB": {"eac3", "-mpegts_flags", "system_b"},
		"opus": {"libopus"}, "dts": {"dca", "-strict", "-2"}, "s302m": {"s302m", "-strict", "-2"},
	}
	check := func(picture, sound string) {
		args := []string{"-v", "error", "-f", "lavfi", "-i", "testsrc2=size=64x48:rate=25", "-f", "lavfi", "-i", "sine=sample_rate=48000", "-t", "2", "-g", "12", "-c:v"}
		args = append(append(args, pictures[picture]...), "-ac", "2", "-c:a")
		out, err := exec.Command(ffmpeg, append(append(args, sounds[sound]...), "-f", "mpegts", "-")...).Output()
		if err != nil {
			t.Fatalf("%s with %s: %v", picture, sound, err)
		}
		all, err := frames(splitUp(out, 5000))
		if err != nil {
			t.Fatal(err)
		}
		g := all[len(all)-1].info.program
		if len(g.tracks) != 2 {
			t.Fatalf("%s with %s: got %d tracks", picture, sound, len(g.tracks))
		}
		whole := payloadsByPID(joined(all))
		for muted, kind := range map[kindSet]trackKind{muteSound: pictureTrack, mutePicture: soundTrack, muteSound | mutePicture: dataTrack} {
			b := newBench(t, "stream/x", "f")
			onFeed := newSubscriber(raw, time.Hour, nil)
			b.join("f", onFeed)
			b.setMute(muted)
			b.attach("f", &publisher{interrupt: func() {}})
			for i, m := range all {
				again := newMessage(m.payload(), b.at.Add(time.Duration(i)*40*time.Millisecond), m.info)
				again.first = i == 0
				b.feeds["f"].publish(b.feeds["f"].pub, again, b.now(again.at))
			}
			onStream := b.got()
			b.sub = onFeed
			got := payloadsByPID(b.got())
			for _, k := range g.tracks {
				want := 0
				if k.coding().kind == kind {
					want = whole[k.pid]
				}
				if got[k.pid] != want {
					t.Errorf("%s with %s, muted %03b: got %d packets of the %s, want %d of %d", picture, sound, muted, got[k.pid], k.coding().name, want, whole[k.pid])
				}
				if n := payloadsByPID(onStream)[k.pid]; n > 0 != (want > 0) {
					t.Errorf("%s with %s, muted %03b: got %d packets of the %s on the stream, want some: %v", picture, sound, muted, n, k.coding().name, want > 0)
				}
			}
		}
	}
	for sound := range sounds {
		check("mpeg1", sound)
	}
	for picture := range pictures {
		check(picture, "mp2")
	}
}

// TestMuteDirect holds I6 where publishers write themselves: of a frame that comes
// after the call, nothing does to the relay.
func TestMuteDirect(t *testing.T) {
	const step = 180 // ticks from frame to frame, 2 ms
	for _, scheme := range []string{"ws", "wss"} {
		t.Run(scheme, func(t *testing.T) {
			t.Parallel()
			r, _, tasks := realRules(t, io.Discard)
			var newest atomic.Int64 // of the frames that arrived
			relay := &chaosRelay{t: t, see: func(b []byte) {
				for _, pts := range pesTimes(b, 0x100) {
					newest.Store(int64(pts-126000) / step)
				}
			}}
			if scheme == "wss" {
				certs := newCerts(t)
				relay.tls, r.dialer.roots = certs.server, certs.roots
			}
			relay.start()
			mute := bySwitch(t, r)
			r.to(t, "0", "audio0", scheme+"://"+relay.addr)
			body, in := net.Pipe()
			t.Cleanup(func() { in.Close() })
			tasks.Go(func() { r.mux.publish("audio0", &publisher{interrupt: func() {}}, body) })
			var posted atomic.Int64
			tasks.Go(func() {
				c := newMicrophone()
				c.step = step
				for start := time.Now(); ; time.Sleep(time.Until(start.Add(ticks(c.n * step).duration()))) {
					posted.Store(int64(c.n))
					if _, err := in.Write(c.next()); err != nil {
						return
					}
				}
			})
			for i := range scaled(20, 100, 2000) {
				was := posted.Load()
				waitFor(t, "sound", func() bool { return newest.Load() > was })
				if err := mute(true); err != nil {
					t.Fatal(err)
				}
				last := posted.Load()
				waitFor(t, "frames", func() bool { return posted.Load() > last+2 })
				time.Sleep(2 * time.Millisecond)
				if n := newest.Load(); n > last {
					t.Fatalf("mute %d: frame %d arrived, want none after %d, of %d", i, n, last, posted.Load())
				}
				if err := mute(false); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestMuteMany: a mute is in force on 1,000 destinations when its call returns,
// which takes under 100 ms, but for one call in a hundred.
func TestMuteMany(t *testing.T) {
	notUnderRace(t)
	notShort(t, "1,000 connections")
	r, ctx, tasks := realRules(t, io.Discard)
	relay := &chaosRelay{t: t, see: func([]byte) {}}
	relay.start()
	mute := bySwitch(t, r)
	tasks.Go(func() { microphoneAndCamera(ctx, r) })
	for i := range 1000 {
		r.to(t, id(fmt.Sprint(i)), "stream/x", "ws://"+relay.addr)
	}
	eventually(t, time.Minute, func() error {
		if n := relay.conns.Load(); n < 1000 {
			return fmt.Errorf("got %d connections, want 1000", n)
		}
		return nil
	})
	var took []time.Duration
	for i := range scaled(100, 200, 1000) {
		time.Sleep(20 * time.Millisecond)
		start := time.Now()
		if err := mute(i%2 == 0); err != nil {
			t.Fatal(err)
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	n := len(took)
	t.Logf("of %d calls: median %v, p99 %v, slowest %v", n, took[n/2], took[n*99/100], took[n-1])
	if p99 := took[n*99/100]; p99 > 100*time.Millisecond {
		t.Errorf("p99 is %v, want 100 ms at most", p99)
	}
}

// TestE2EMuteKill: vw is killed at any moment of a loop of mutes and lifts. After
// each restart what was answered last, or that was waited for, is muted before the
// first byte goes out.
func TestE2EMuteKill(t *testing.T) {
	t.Parallel()
	rounds := scaled(3, 10, 200)
	file := filepath.Join(t.TempDir(), "state")
	addr, calls, unanswered, muted := "", 0, 0, 0
	want := []string{`{"audio":false,"video":false}`} // one of these
	for range rounds {
		var mu sync.Mutex
		came := make(map[uint16]int)
		relay := &chaosRelay{t: t, addr: addr, see: func(b []byte) {
			mu.Lock()
			defer mu.Unlock()
			for pid, n := range payloadsByPID(b) {
				came[pid] += n
			}
		}}
		relay.start()
		if addr == "" {
			to := func(id id, of string) destinationRule {
				return destinationRule{ID: id, Stream: of, Destination: "ws://" + relay.addr + "/"}
			}
			set := ruleSet{map[string][]string{"stream/x": {"f"}}, map[string]destinationRule{"0": to("0", "f"), "1": to("1", "stream/x")}, 0}
			if err := writeState(file, set.encode()); err != nil {
				t.Fatal(err)
			}
		}
		addr = relay.addr
		vw := startVW(t, "VW_STATE="+file)
		p := startPost(t, vw.addr, "f")
		var posting sync.WaitGroup
		posting.Go(func() { // until vw is killed
			c := newCamera()
			for c.sound = true; ; time.Sleep(5 * time.Millisecond) {
				if _, err := p.chunks.Write(c.next()); err != nil {
					return
				}
			}
		})
		got := vw.call(t, http.StatusOK, "GET", "/api/mute", "")
		if !slices.Contains(want, got) {
			t.Errorf("after %d calls: got %s, want one of %s", calls, got, want)
		}
		var now muteStatus
		if err := json.Unmarshal([]byte(got), &now); err != nil {
			t.Fatal(err)
		}
		if now.Audio || now.Video {
			muted++
		}
		waitFor(t, "what is not muted", func() bool {
			time.Sleep(10 * time.Millisecond)
			mu.Lock()
			defer mu.Unlock()
			return relay.conns.Load() == 2 && (now.Audio || came[testAudio] > 20) && (now.Video || came[testVideo] > 20)
		})
		if now.Audio && now.Video {
			time.Sleep(100 * time.Millisecond) // in which something would come
		}
		mu.Lock()
		if now.Audio && came[testAudio] > 0 || now.Video && came[testVideo] > 0 {
			t.Errorf("muted: %s, and there came packets by PID: %v", got, came)
		}
		mu.Unlock()
		var killed sync.WaitGroup
		killed.Go(func() {
			time.Sleep(rand.N(60 * time.Millisecond))
			vw.cmd.Process.Kill()
		})
		want = []string{got}
		for {
			body, after := "", now
			switch on := rand.N(2) == 0; rand.N(3) {
			case 0:
				body, after.Audio = fmt.Sprintf(`{"audio":%v}`, on), on
			case 1:
				body, after.Video = fmt.Sprintf(`{"video":%v}`, on), on
			default:
				body, after.Audio, after.Video = fmt.Sprintf(`{"audio":%v,"video":%v}`, on, on), on, on
			}
			req, _ := http.NewRequest("PUT", vw.url+"/api/mute", strings.NewReader(body))
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				want = append(want, string(encode(after)))
				unanswered++
				break
			}
			answer, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			calls++
			switch {
			case resp.StatusCode == http.StatusOK:
				want = nil
			case resp.StatusCode != http.StatusAccepted && !strings.Contains(string(answer), "in force, not stored: "): // the disk is slow
				t.Fatalf("%s: %s %s", body, resp.Status, answer)
			}
			now = after
			want = append(want, string(encode(now)))
		}
		killed.Wait()
		vw.kill(t)
		vw.err = nil // as it should
		http.DefaultClient.CloseIdleConnections()
		posting.Wait()
		relay.end()
	}
	t.Logf("%d kills, %d of them muted, %d calls answered, %d not", rounds, muted, calls, unanswered)
}

// microphoneAndCamera publishes video0 and audio0 at 25 frames/s until ctx is done.
func microphoneAndCamera(ctx context.Context, r *rules) {
	cameras := map[string]*camera{"video0": newCamera(), "audio0": newMicrophone()}
	p := &publisher{interrupt: func() {}}
	feeds := make(map[string]*feed)
	for name := range cameras {
		feeds[name] = r.mux.attach(name, p)
		defer r.mux.detach(feeds[name], p)
	}
	for first := true; ctx.Err() == nil; first = false {
		for name, c := range cameras {
			all, _ := frames(bytes.NewReader(c.next()))
			for _, m := range all {
				m.first = first
				feeds[name].publish(p, m, r.mux.now(m.at))
			}
		}
		time.Sleep(40 * time.Millisecond)
	}
}
