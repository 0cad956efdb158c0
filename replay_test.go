package main

import (
	"context"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// recording is what ffmpeg made, as messages that come when their first picture
// is due.
type recording struct {
	messages []*message
	due      []time.Duration
}

// record runs ffmpeg with the arguments of two pictures and a sound, of which the
// mapping chooses.
func record(t *testing.T, args ...string) (r recording) {
	t.Helper()
	all := []string{
		"-v", "error", "-f", "lavfi", "-i", "testsrc2=size=160x120:rate=25", "-f", "lavfi", "-i", "testsrc=size=160x120:rate=25",
		"-f", "lavfi", "-i", "sine=sample_rate=48000", "-t", "9",
	}
	out, err := exec.Command(needs(t, "ffmpeg"), slices.Concat(all, args, []string{"-muxdelay", "0.001", "-f", "mpegts", "-"})...).Output()
	if err != nil {
		t.Fatal("ffmpeg: ", err)
	}
	if r.messages, err = frames(splitUp(out, packetSize)); err != nil {
		t.Fatal(err)
	}
	first, due := ticks(-1), time.Duration(0)
	for _, m := range r.messages {
		for p := packet(m.payload()); len(p) > 0; p = p[packetSize:] {
			pts, dts := timestamps(p[:packetSize].payload())
			if dts == nil {
				dts = pts
			}
			if !p.unitStart() || dts == nil {
				continue
			}
			if first < 0 {
				first = readTime(dts)
			}
			due = max(due, time.Duration(readTime(dts)-first)*100_000/9)
		}
		r.due = append(r.due, due)
	}
	return r
}

// play publishes the recording to feed f of stream/x of b in virtual time, and
// calls at after each message with its number.
func (r recording) play(b *bench, at func(i int)) {
	start := time.Now()
	b.attach("f", &publisher{interrupt: func() {}})
	for i, m := range r.messages {
		time.Sleep(time.Until(start.Add(r.due[i])))
		now := time.Now()
		again := newMessage(m.payload(), now, m.info)
		again.first = i == 0
		b.feeds["f"].publish(b.feeds["f"].pub, again, b.now(now))
		at(i)
	}
}

// takeAll returns what is queued for s.
func (b *bench) takeAll(s *subscriber) []byte {
	was := b.sub
	defer func() { b.sub = was }()
	b.sub = s
	return b.got()
}

// TestReplay: a reader that joins a stream between two keyframes has the pictures
// since the last one at once, squeezed, and from then on what everybody has.
func TestReplay(t *testing.T) {
	for _, tt := range []struct {
		name string
		args []string
		want bool
	}{
		{"x264 defaults", []string{"-map", "0", "-c:v", "libx264", "-preset", "fast"}, true},
		{"x264 without B-frames", []string{"-map", "0", "-c:v", "libx264", "-bf", "0"}, true},
		{"x265", []string{"-map", "0", "-c:v", "libx265", "-x265-params", "log-level=none"}, true},
		{"MPEG-1", []string{"-map", "0", "-c:v", "mpeg1video", "-g", "12"}, true},
		{"MPEG-1 with B-frames", []string{"-map", "0", "-c:v", "mpeg1video", "-g", "12", "-bf", "2"}, true},
		{"MPEG-1 with a long group", []string{"-map", "0", "-c:v", "mpeg1video", "-g", "100"}, false},
		{"picture and sound", []string{"-map", "0", "-map", "2", "-c:v", "libx264", "-c:a", "mp2"}, true},
		{"two videos", []string{"-map", "0", "-map", "1", "-c:v", "libx264"}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := record(t, tt.args...)
			var replayed, live []byte
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t, "stream/x", "f")
				late := newSubscriber(raw, time.Minute, nil)
				late.wantReplay()
				join := len(r.messages) * 2 / 3
				r.play(b, func(i int) {
					if i == join {
						b.join("stream/x", late)
						replayed = b.takeAll(late)
					}
				})
				live = b.takeAll(late)
				sum(t, late)
				all := b.takeAll(b.sub)
				checkReplay(t, b, slices.Concat(replayed, live), replayed, all, tt.want)
			})
			if tt.want {
				decodesFirst(t, slices.Concat(replayed, live))
			}
		})
	}
}

// checkReplay compares what a late reader got with what one had from the start.
func checkReplay(t *testing.T, b *bench, got, replayed, all []byte, want bool) {
	t.Helper()
	check, whole := newTSCheck(), newTSCheck()
	check.read(got)
	whole.read(all)
	if len(check.problems) > 0 {
		t.Errorf("got %d problems: %q", len(check.problems), check.problems[:min(5, len(check.problems))])
	}
	for _, src := range b.streams["stream/x"].remux.sources {
		for _, v := range src.videos() {
			first := pesTimes(replayed, v.out)
			if (len(first) > 0) != want {
				t.Fatalf("PID %#x: got %d pictures on joining, want some: %v", v.out, len(first), want)
			}
			if !want {
				continue
			}
			if !firstOn(replayed, v.out).randomAccess() {
				t.Errorf("PID %#x: the first picture is no keyframe", v.out)
			}
			span := slices.Max(first) - slices.Min(first)
			if most := squeezeInto + 4*second/25; span > most {
				t.Errorf("PID %#x: the replay spans %d ticks, want %d at most", v.out, span, most)
			}
			if n := len(slices.Compact(slices.Sorted(slices.Values(first)))); n != len(first) {
				t.Errorf("PID %#x: %d pictures of %d have the same PTS", v.out, len(first)-n, len(first))
			}
			rest := pesTimes(got, v.out)[len(first):]
			if !slices.Equal(rest, whole.pts[v.out][len(whole.pts[v.out])-len(rest):]) {
				t.Errorf("PID %#x: what came live has other timestamps than for others", v.out)
			}
			total := len(whole.pts[v.out])
			t.Logf("PID %#x: %d pictures at once, then %d of %d", v.out, len(first), len(rest), total)
		}
	}
}

// firstOn returns the first packet of the first PES on a PID.
func firstOn(ts []byte, pid uint16) packet {
	for p := packet(only(ts, pid)); len(p) > 0; p = p[packetSize:] {
		if p.unitStart() {
			return p[:packetSize]
		}
	}
	return nullPacket
}

// decodesFirst fails the test unless ffmpeg decodes each video of b from its
// first byte without a complaint.
func decodesFirst(t *testing.T, b []byte) {
	t.Helper()
	name := filepath.Join(t.TempDir(), "late.ts")
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(needs(t, "ffmpeg"), "-v", "error", "-i", name, "-map", "0", "-enc_time_base:v", "1:90000", "-f", "null", "-").CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("ffmpeg decodes with %v and says %.1000q, want nothing", err, out)
	}
}

// TestReplayNever: nothing is replayed from before a rule or a mute, of a video
// that stopped, or to a reader that is not new.
func TestReplayNever(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(b *bench)
		want bool
	}{
		{"nothing happens", func(*bench) {}, true},
		{"sound is muted", func(b *bench) { b.setMute(muteSound) }, false},
		{"sound is muted and unmuted", func(b *bench) { b.setMute(muteSound); b.setMute(0) }, false},
		{"picture is muted and unmuted", func(b *bench) { b.setMute(mutePicture); b.setMute(0) }, false},
		{"the feed is taken out and put back", func(b *bench) {
			b.setStream("stream/x", nil, true)
			b.setStream("stream/x", []string{"f"}, true)
		}, false},
		{"another feed is added", func(b *bench) { b.setStream("stream/x", []string{"f", "g"}, true) }, false},
		{"the video stops", func(*bench) { time.Sleep(1100 * time.Millisecond) }, false},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := newStudio(t)
			s.play(18)
			tt.do(s.bench)
			for _, isNew := range []bool{true, false} {
				late := newSubscriber(raw, time.Minute, nil)
				if isNew {
					late.wantReplay()
				}
				s.join("stream/x", late)
				if n := len(pesTimes(s.takeAll(late), 0x100)); n > 0 != (tt.want && isNew) {
					t.Errorf("%s, reader new %v: got %d pictures on joining", tt.name, isNew, n)
				}
			}
		})
	}
}

// TestReplayShared: readers that join together share what was made for them, and
// the store has its bounds and is freed with its stream.
func TestReplayShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStudio(t)
		s.play(18)
		var subs []*subscriber
		for range 100 {
			late := newSubscriber(raw, time.Minute, nil)
			late.wantReplay()
			s.join("stream/x", late)
			subs = append(subs, late)
		}
		for _, late := range subs {
			if n, first := len(late.items), subs[0]; n < 2 || late.items[n-1].message != first.items[n-1].message {
				t.Fatalf("got %d items, want the replay of the first reader", n)
			}
		}
		r := &s.streams["stream/x"].remux.sources[0].replay
		for i := range 3000 {
			m := newMessage(make([]byte, 20*packetSize), time.Now().Add(time.Duration(i)*time.Millisecond), chunkInfo{key: i%2500 == 0, hasVideo: true})
			r.add(m, &outTrack{track: track{0x100, typeH264, nil}}, 1)
			m.release()
			if r.bytes > maxReplay || len(r.kept) > 0 && r.bytes == 0 {
				t.Fatalf("message %d: %d bytes are kept in %d messages", i, r.bytes, len(r.kept))
			}
			if r.bytes == 0 {
				break // without a keyframe nothing is kept
			}
		}
		s.setStream("stream/x", nil, true)
		if r.bytes != 0 || r.made != nil {
			t.Errorf("%d bytes are kept after the feed was taken out", r.bytes)
		}
	})
}

// TestReplayNarrow: a reader that does not take its replay within its age bound
// loses it, and goes on as one that got none.
func TestReplayNarrow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, tt := range []struct {
			kbit int
			want bool
		}{{50_000, true}, {200, false}} {
			s := newStudio(t)
			s.play(20)
			late := newSubscriber(raw, 500*time.Millisecond, nil)
			late.wantReplay()
			s.join("stream/x", late)
			var got []byte
			for range 20 {
				room := tt.kbit * 5 // bytes in 40 ms
				for room > 0 {
					n := 0
					for _, b := range late.take(nil, 4096, true, time.Now()) {
						b = b[:min(len(b), room-n)]
						got, n = append(got, b...), n+len(b)
					}
					late.wrote(n)
					if room -= n; n == 0 {
						break
					}
				}
				s.play(1)
			}
			sum(t, late)
			gated, age := late.counters.dropped[dropLag]+late.counters.dropped[dropGate], late.age(time.Now())
			if (gated == 0) != tt.want || age > 500*time.Millisecond {
				t.Errorf("%d kbit/s: %d messages dropped, the oldest is %v old", tt.kbit, gated, age)
			}
			if tt.want && len(pesTimes(got, 0x100)) < 25 {
				t.Errorf("%d kbit/s: got %d pictures", tt.kbit, len(pesTimes(got, 0x100)))
			}
		}
	})
}

// TestSqueeze: the timestamps of a replay keep their order, rise by a tick at
// least, and what is from the newest DTS on stays.
func TestSqueeze(t *testing.T) {
	for _, tt := range []struct {
		name string
		dts  []ticks
		want []ticks
	}{
		{"none", nil, nil},
		{"one", []ticks{100}, []ticks{100}},
		{"short", []ticks{0, 3600, 7200}, []ticks{0, 3600, 7200}},
		{"long", []ticks{0, 450000, 900000}, []ticks{891000, 895500, 900000}},
		{"dense", []ticks{0, 899998, 899999, 900000}, []ticks{891000, 899998, 899999, 900000}},
	} {
		got := squeeze(slices.Clone(tt.dts)).dts
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s: got %v, want %v", tt.name, got, tt.want)
		}
	}
}

// TestReplayDestination: the first connection of a destination has a picture at
// once; one that comes back goes on from the next keyframe.
func TestReplayDestination(t *testing.T) {
	rec := record(t, "-map", "0", "-c:v", "libx264", "-g", "100", "-keyint_min", "100")
	r, ctx, tasks := realRules(t, io.Discard)
	if _, err := r.setStream(streamRule{"stream/x", []string{"f"}}); err != nil {
		t.Fatal(err)
	}
	var conn atomic.Pointer[net.Conn]
	dial := r.dialer.dial
	r.dialer.dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := dial(ctx, network, address)
		conn.Store(&c)
		return c, err
	}
	var pictures atomic.Int64 // since the connection was opened
	relay := &chaosRelay{t: t, see: func(b []byte) { pictures.Add(int64(len(pesTimes(b, 0x100)))) }}
	relay.start()
	begun := time.Now()
	tasks.Go(func() {
		p := &publisher{interrupt: func() {}}
		f := r.mux.attach("f", p)
		defer r.mux.detach(f, p)
		for i, m := range rec.messages {
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Until(begun.Add(rec.due[i]))):
			}
			m.at, m.first = time.Now(), i == 0
			f.publish(p, m, r.mux.now(m.at))
		}
	})
	time.Sleep(2 * time.Second) // two more to the next keyframe
	asked := time.Now()
	r.to(t, "0", "stream/x", "ws://"+relay.addr)
	waitFor(t, "the first picture", func() bool { return pictures.Load() > 0 })
	first := time.Since(asked)
	if n := pictures.Load(); first > 400*time.Millisecond || n < 20 {
		t.Errorf("got %d pictures after %v, want those since the keyframe within 400 ms", n, first)
	}
	pictures.Store(-1 << 40)
	(*conn.Load()).Close()
	waitFor(t, "the second connection", func() bool { return relay.conns.Load() == 2 })
	pictures.Store(0)
	waitFor(t, "its first picture", func() bool { return pictures.Load() > 0 })
	if at := time.Since(begun); at < 3900*time.Millisecond {
		t.Errorf("a connection that came back had a picture %v after the start, want it to wait for the keyframe at 4 s", at)
	}
	t.Logf("the first picture came after %v", first)
}
