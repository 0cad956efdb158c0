package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestMuxForgets: names that nobody uses are not kept.
func TestMuxForgets(t *testing.T) {
	x := newMux()
	p := &publisher{interrupt: func() {}}
	s := newSubscriber(raw, time.Second, nil)
	f := x.attach("video0", p)
	x.setStream("stream/a", []string{"video0", "audio0"}, true)
	x.join("stream/a", s)
	x.join("other", s)
	x.setStream("stream/a", nil, false)
	x.detach(f, p)
	x.leave("stream/a", s)
	x.leave("other", s)
	if len(x.feeds) != 0 || len(x.streams) != 0 {
		t.Errorf("got feeds %v, streams %v, want none", x.feeds, x.streams)
	}
}

// TestReplace: the newest publisher has the feed, and nothing of the older
// one comes after it.
func TestReplace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := newMux()
		s := newSubscriber(raw, time.Hour, nil)
		x.join("video0", s)
		ended := 0
		old, next := &publisher{interrupt: func() { ended++ }}, &publisher{interrupt: func() {}}
		f := x.attach("video0", old)
		f.publish(old, testMessage("", time.Now(), true, 188), 0)
		x.attach("video0", next)
		f.publish(old, testMessage("", time.Now(), true, 188), 0)
		if len(s.items) != 1 || ended != 1 || !old.replaced.Load() {
			t.Errorf("got %d messages, %d interrupts, want 1 and 1", len(s.items), ended)
		}
		x.detach(f, old)
		f.publish(next, testMessage("", time.Now(), true, 188), 0)
		if len(s.items) != 2 {
			t.Error("the newest publisher does not have the feed")
		}
	})
}

// TestMuxLateDetach: a publisher that was taken over, and detaches after its
// feed was forgotten and made again, does not make the new one be forgotten.
func TestMuxLateDetach(t *testing.T) {
	x := newMux()
	a, b, c := &publisher{interrupt: func() {}}, &publisher{interrupt: func() {}}, &publisher{interrupt: func() {}}
	old := x.attach("v", a)
	x.detach(x.attach("v", b), b)
	now := x.attach("v", c)
	x.detach(old, a)
	if x.feeds["v"] != now {
		t.Errorf("got feed %p, want the live one, %p", x.feeds["v"], now)
	}
}

// TestFeedLimit: with as many feeds as may be, each can still be taken over,
// and one that has ended makes room.
func TestFeedLimit(t *testing.T) {
	x := newMux()
	publish := func(i int) error {
		p := &publisher{interrupt: func() {}}
		r, w := io.Pipe()
		t.Cleanup(func() { w.Close() })
		done := make(chan error, 1)
		begun := make(chan struct{})
		p.begun = func() { close(begun) }
		go func() { done <- x.publish(fmt.Sprintf("f%d", i), p, r) }()
		go w.Write(testClip(3, 500))
		select {
		case err := <-done:
			r.Close()
			return err
		case <-begun:
			if i < 0 {
				w.Close()
				return <-done
			}
			return nil
		}
	}
	for i := range maxPublishers - 1 {
		if err := publish(i); err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range []struct {
		feed int // below 0: it ends at once
		want error
	}{{-1, nil}, {maxPublishers - 1, nil}, {maxPublishers, errFull}, {0, nil}, {-1, errFull}} {
		if err := publish(step.feed); !errors.Is(err, step.want) {
			t.Errorf("feed %d: got %v, want %v", step.feed, err, step.want)
		}
	}
}

// TestSoundWithoutPicture holds I5: where a map lists a picture that does not come,
// a reader waits 1 s for the sound. When the picture comes, it is from its keyframe on.
func TestSoundWithoutPicture(t *testing.T) {
	for _, name := range []string{"video0", "stream/x"} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x := newMux()
				x.setStream("stream/x", []string{"video0"}, true)
				s := newSubscriber(raw, time.Minute, nil)
				x.join(name, s)
				body, in := net.Pipe()
				done := make(chan struct{})
				go func() {
					defer close(done)
					x.publish("video0", &publisher{interrupt: func() {}}, body)
				}()
				var m tsMaker
				var first time.Duration // after which sound comes
				var pictures [][]byte
				for i := range 200 {
					m.Reset()
					m.tables(testVideo, typeH264, testAudio, typeMPEG1Audio)
					m.frame(pes{pid: testAudio, id: 0xc0, size: 300, length: true, pts: ticks(i) * 3600})
					if i >= 100 { // the picture comes, with a keyframe at 125
						es := avcAUD + avcP
						if i%25 == 0 && i > 100 {
							es = avcAUD + avcSPS + avcPPS + avcIDR
						}
						m.elementary(testVideo, unitOfClip{pts: ticks(i) * 3600, dts: ticks(i) * 3600, es: []byte(es)}, 0)
					}
					in.Write(m.Bytes())
					synctest.Wait()
					n := 0
					for _, b := range s.take(nil, 1<<20, false, time.Now()) {
						n += len(b)
						for p := range slices.Chunk(b, packetSize) {
							switch p := packet(p); {
							case p.pid() == testAudio && p.payload() != nil && first == 0:
								first = time.Duration(i) * 40 * time.Millisecond
							case p.pid() == testVideo && p.unitStart():
								pictures = append(pictures, bytes.Clone(p.payload()))
							}
						}
					}
					s.wrote(n)
					time.Sleep(40 * time.Millisecond)
				}
				in.Close()
				<-done
				if first == 0 || first > 1200*time.Millisecond {
					t.Errorf("got sound after %v, want 1 s", first)
				}
				if len(pictures) < 74 || !bytes.Contains(pictures[0], []byte(avcIDR[:4])) {
					t.Errorf("got %d pictures, the first % x, want 75 from the keyframe on", len(pictures), pictures[:min(1, len(pictures))])
				}
			})
		})
	}
}

// TestSlowFeed: the first frame of a feed that has one every 10 s goes out at once,
// and none of it comes late: to a stream, and to a reader of the feed itself after
// something was muted.
func TestSlowFeed(t *testing.T) {
	data := func(id byte) func(*tsMaker, ticks) {
		return func(m *tsMaker, pts ticks) {
			m.frame(pes{pid: testVideo, id: id, size: 600, length: true, pts: pts})
		}
	}
	for _, tt := range []struct {
		name string
		track
		frame func(m *tsMaker, pts ticks)
	}{
		{"picture", track{testVideo, typeH264, nil}, func(m *tsMaker, pts ticks) {
			m.elementary(testVideo, unitOfClip{pts: pts, dts: pts, es: []byte(avcAUD + avcSPS + avcPPS + avcIDR + strings.Repeat("\x55", 500))}, 0)
		}},
		{"sound", track{testVideo, typeMPEG1Audio, nil}, data(0xc0)},
		{"KLV", track{testVideo, 0x06, registration("KLVA")}, data(privateStream1)},
	} {
		synctest.Test(t, func(t *testing.T) {
			x := newMux()
			x.setMute(muteSound | mutePicture)
			x.setMute(0)
			time.Sleep(time.Second) // what comes now was captured after the lift
			readers := map[string]*subscriber{"f": newSubscriber(raw, time.Minute, nil), "stream/x": newSubscriber(raw, time.Minute, nil)}
			x.setStream("stream/x", []string{"f"}, true)
			for name, s := range readers {
				x.join(name, s)
			}
			body, in := net.Pipe()
			done := make(chan struct{})
			go func() {
				defer close(done)
				x.publish("f", &publisher{interrupt: func() {}}, body)
			}()
			check := newTSCheck()
			got := map[string][]byte{}
			var m tsMaker
			for i := range ticks(4) {
				m.Reset()
				m.program(testVideo, tt.track)
				tt.frame(&m, i*10*second)
				in.Write(m.Bytes())
				time.Sleep(settleMost.duration() + time.Millisecond)
				synctest.Wait()
				for name, s := range readers {
					n := len(got[name])
					for _, b := range s.take(nil, 1<<20, false, time.Now()) {
						got[name] = append(got[name], b...)
					}
					s.wrote(len(got[name]) - n)
					if isStream(name) {
						check.read(got[name][n:])
					}
					if n := len(pesTimes(got[name], testVideo)); n != int(i)+1 {
						t.Errorf("%s, %s: %v after frame %d came, %d went out", tt.name, name, settleMost.duration(), i, n)
					}
				}
				if ahead := signed33(check.dts[testVideo] - ticks(check.pcr/300)); ahead < -maxLate || ahead > maxAhead {
					t.Errorf("%s: frame %d is %d ticks ahead of the PCR", tt.name, i, ahead)
				}
				time.Sleep(10*time.Second - settleMost.duration() - time.Millisecond)
			}
			in.Close()
			<-done
			if len(check.problems) > 0 {
				t.Errorf("%s: got %q", tt.name, check.problems)
			}
		})
	}
}
