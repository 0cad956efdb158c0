package main

import (
	"bytes"
	"crypto/rand"
	"slices"
	"testing"
	"time"
)

// testMessage is one frame of a feed.
func testMessage(f string, at time.Time, key bool, size int) *message {
	m := newMessage(make([]byte, size), at, chunkInfo{key: key, start: true, hasVideo: true, hasPAT: true})
	m.feed = f
	return m
}

// sum checks I7, and returns the counters.
func sum(t *testing.T, s *subscriber) counters {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.counters
	total := c.delivered + uint64(len(s.items))
	for _, n := range c.dropped {
		total += n
	}
	if c.published != total {
		t.Errorf("I7: published %d, but delivered, dropped and queued are %d: %+v", c.published, total, c)
	}
	bytes := 0
	for _, it := range s.items {
		bytes += it.size
	}
	if bytes != s.bytes {
		t.Errorf("queued %d bytes, but counted %d", bytes, s.bytes)
	}
	return c
}

// TestQueueAge holds I5: what is older than the limit goes, up to the next
// keyframe, in the queue or to come; and the sum of I7.
func TestQueueAge(t *testing.T) {
	f := "video0"
	at := time.Now()
	s := newSubscriber(raw, 500*time.Millisecond, nil)
	keys := 0
	for i := range 100 { // 4 s at 25/s, a keyframe every 480 ms; nobody takes
		now := at.Add(time.Duration(i) * 40 * time.Millisecond)
		s.offer(testMessage(f, now, i%12 == 0, 188))
		sum(t, s)
		if len(s.items) == 0 {
			continue
		}
		keys++
		if head := s.items[0]; !head.info.key || now.Sub(head.at) > 500*time.Millisecond {
			t.Fatalf("frame %d: the queue begins with one that is %v old, keyframe %v", i, now.Sub(head.at), head.info.key)
		}
	}
	if keys != 100 {
		t.Errorf("the queue was empty %d times: a keyframe in it should have been kept", 100-keys)
	}
	c := sum(t, s)
	if c.dropped[dropLag] == 0 || c.dropped[dropGate] == 0 {
		t.Errorf("got %+v, want drops of old ones and of those up to the keyframe", c)
	}
}

// TestQueueGate holds I5 on joining: from a keyframe, or after 5 s from any
// frame; a feed without video at once.
func TestQueueGate(t *testing.T) {
	at := time.Now()
	f := "video0"
	s := newSubscriber(raw, time.Hour, nil)
	s.offer(testMessage(f, at, false, 188))
	s.offer(testMessage(f, at.Add(5*time.Second), false, 188))
	if len(s.items) != 0 {
		t.Error("a frame passed before a keyframe")
	}
	s.offer(testMessage(f, at.Add(5001*time.Millisecond), false, 188))
	if len(s.items) != 1 {
		t.Error("nothing passed after 5 s without a keyframe")
	}
	again := testMessage(f, at.Add(6*time.Second), false, 188)
	again.first = true
	s.offer(again)
	if len(s.items) != 1 {
		t.Error("the first frame of a new publisher passed, and is no keyframe")
	}
	audio := newMessage(make([]byte, 188), at, chunkInfo{start: true, psi: make([]byte, 376)})
	audio.feed = "audio0"
	s.offer(audio)
	if len(s.items) != 3 || s.items[1].size != 376 {
		t.Errorf("got %d messages, want audio to pass at once, after its PSI", len(s.items))
	}
	sum(t, s)
}

// TestQueueBytes: a burst that is too much is dropped up to a keyframe.
func TestQueueBytes(t *testing.T) {
	f := "video0"
	at := time.Now()
	s := newSubscriber(raw, time.Hour, nil)
	for i := range 40 {
		s.offer(testMessage(f, at, i%5 == 0, 1<<20))
		if s.bytes > maxQueue {
			t.Fatalf("message %d: %d bytes queued, want %d at most", i, s.bytes, maxQueue)
		}
	}
	if len(s.items) == 0 || !s.items[0].info.key {
		t.Error("the queue does not begin with a keyframe")
	}
	if c := sum(t, s); c.dropped[dropBytes] == 0 {
		t.Errorf("got %+v, want drops", c)
	}
}

// TestQueueRemoveFeed holds I6 where a write is in progress: what it did not begin
// of the removed feed goes, the rest stays in order, and the word comes after.
func TestQueueRemoveFeed(t *testing.T) {
	for _, written := range []int{0, 1, 1000, 1001, 2500, 3000, 4000} {
		f, g := "video0", "audio0"
		at := time.Now()
		interrupted := 0
		s := newSubscriber(raw, time.Hour, func() { interrupted++ })
		for i := range 6 {
			s.offer(testMessage([]string{f, g}[i%2], at, true, 1000))
		}
		s.take(nil, 4000, false, time.Now()) // f g f g, and f g stay
		word := s.removeFeed(g)
		if interrupted != 1 || word == nil {
			t.Fatalf("got %d interrupts, word %v, want 1 and one to wait for", interrupted, word)
		}
		select {
		case <-word:
			t.Error("the word came while the write was in progress")
		default:
		}
		p := s.wrote(written)
		<-word
		if p.partial != (written%1000 != 0) {
			t.Errorf("%d written: partial is %v", written, p.partial)
		}
		begun := (written + 999) / 1000
		want := []string{}
		for i := written / 1000; i < 6; i++ {
			if i%2 == 0 || i < begun {
				want = append(want, []string{f, g}[i%2])
			}
		}
		if len(s.items) != len(want) {
			t.Errorf("%d written: %d messages are left, want %d", written, len(s.items), len(want))
		}
		for i := range min(len(s.items), len(want)) {
			if s.items[i].feed != want[i] {
				t.Errorf("%d written: message %d is of the other feed", written, i)
			}
		}
		sum(t, s)
		if s.removeFeed(g) != nil {
			t.Errorf("%d written: there is more to wait for", written)
		}
	}
}

// TestTake: whole messages up to the limit, a long one alone, cut if asked.
func TestTake(t *testing.T) {
	tests := []struct {
		name  string
		sizes []int
		cut   bool
		want  []int
	}{
		{"several", []int{300, 300, 300, 300}, false, []int{300, 300, 300}},
		{"exactly", []int{500, 500, 1}, false, []int{500, 500}},
		{"a long one", []int{3000, 1}, false, []int{3000}},
		{"a long one cut", []int{3000, 1}, true, []int{1000}},
		{"a long one waits", []int{300, 3000}, true, []int{300}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newSubscriber(raw, time.Hour, nil)
			for _, n := range tt.sizes {
				s.offer(testMessage("video0", time.Now(), true, n))
			}
			var got []int
			for _, b := range s.take(nil, 1000, tt.cut, time.Now()) {
				got = append(got, len(b))
			}
			if len(got) != len(tt.want) {
				t.Fatalf("got %v, want %v", got, tt.want)
			}
			for i := range got {
				if got[i] != tt.want[i] {
					t.Errorf("got %v, want %v", got, tt.want)
				}
			}
		})
	}
}

// TestForms: the masked form unmasks to the same payload, for every way of
// saying the length. RFC 6455 5.2, 5.3.
func TestForms(t *testing.T) {
	for _, n := range []int{0, 1, 7, 8, 125, 126, 1000, 65535, 65536, 200000} {
		payload := make([]byte, n)
		rand.Read(payload)
		m := newMessage(payload, time.Now(), chunkInfo{})
		for _, f := range []form{raw, bare, masked} {
			b := m.wire(f)
			if len(b) != m.wireSize(f) {
				t.Errorf("%d bytes: form %d has %d, wireSize says %d", n, f, len(b), m.wireSize(f))
			}
			if f == masked {
				key := b[len(b)-n-4 : len(b)-n]
				b = bytes.Clone(b)
				for i := range n {
					b[len(b)-n+i] ^= key[i%4]
				}
				if b[0] != 0x82 || b[1]&0x80 == 0 {
					t.Errorf("%d bytes: header % x", n, b[:2])
				}
			}
			if !bytes.Equal(b[len(b)-n:], payload) {
				t.Errorf("%d bytes: form %d has another payload", n, f)
			}
		}
	}
}

// TestBlindGate holds I5: sound does not wait for a picture that does not come,
// and a picture that comes later passes from its own keyframe.
func TestBlindGate(t *testing.T) {
	start := time.Now()
	sound := chunkInfo{start: true, hasVideo: true, soundOnly: true, hasPAT: true}
	blind := sound
	blind.blind = true
	picture := chunkInfo{start: true, hasVideo: true, hasPAT: true}
	key := picture
	key.key = true
	part := chunkInfo{hasVideo: true, blind: true, hasPAT: true} // not the start of a frame
	for _, tt := range []struct {
		name string
		in   []chunkInfo
		want string // + for each that passes, - for each that does not
	}{
		{"a picture that comes", []chunkInfo{sound, picture, sound, key, picture, sound}, "---+++"},
		{"a picture that does not come", []chunkInfo{sound, sound, blind, sound, blind}, "--+++"},
		{"not inside a frame", []chunkInfo{part, blind, part}, "-++"},
		{"a picture that comes late", []chunkInfo{blind, sound, picture, sound, picture, key, picture}, "++-+-++"},
		{"a picture that goes and comes back", []chunkInfo{key, picture, blind, sound, picture}, "+++++"},
		{"no video at all", []chunkInfo{{start: true}}, "+"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSubscriber(raw, time.Minute, nil)
			got := ""
			for i, info := range tt.in {
				m := newMessage(make([]byte, packetSize), start.Add(time.Duration(i)*100*time.Millisecond), info)
				m.feed = "video0"
				before := s.counters.dropped[dropGate]
				s.offer(m)
				got += map[bool]string{true: "+", false: "-"}[s.counters.dropped[dropGate] == before]
			}
			if got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
	t.Run("without a keyframe for 5 s", func(t *testing.T) {
		s := newSubscriber(raw, time.Minute, nil)
		for i := range 120 {
			info := picture
			if i%2 == 1 {
				info = sound
			}
			m := newMessage(make([]byte, packetSize), start.Add(time.Duration(i)*50*time.Millisecond), info)
			m.feed = "video0"
			passed := s.counters.dropped[dropGate]
			s.offer(m)
			if opened := s.counters.dropped[dropGate] == passed; opened {
				if i != 102 {
					t.Errorf("message %d passes first, want 102: the first with a picture after 5 s", i)
				}
				break
			}
		}
	})
}

// TestOpeningMessage: the reader that begins with a message gets what a decoder
// needs there, also after an overflow; the others get the message as it is.
func TestOpeningMessage(t *testing.T) {
	start := time.Now()
	makeMessage := func(at time.Duration, key bool) *message {
		m := newMessage([]byte("as it is"), start.Add(at), chunkInfo{key: key, start: true, hasVideo: true, hasPAT: true})
		m.feed = "video0"
		if key {
			m.opening = newMessage([]byte("with parameter sets"), m.at, m.info)
			m.opening.feed = m.feed
		}
		return m
	}
	read := func(s *subscriber, at time.Duration) (got []string) {
		n := 0
		for _, b := range s.take(nil, 1<<20, false, start.Add(at)) {
			got = append(got, string(b))
			n += len(b)
		}
		s.wrote(n)
		return got
	}
	early, late := newSubscriber(raw, time.Second, nil), newSubscriber(raw, time.Second, nil)
	offer := func(m *message, to ...*subscriber) {
		for _, s := range to {
			s.offer(m)
		}
		m.release()
	}
	offer(makeMessage(0, true), early)
	offer(makeMessage(100*time.Millisecond, false), early, late)
	offer(makeMessage(200*time.Millisecond, true), early, late)
	if got, want := read(early, 300*time.Millisecond), []string{"with parameter sets", "as it is", "as it is"}; !slices.Equal(got, want) {
		t.Errorf("early: got %q, want %q", got, want)
	}
	if got, want := read(late, 300*time.Millisecond), []string{"with parameter sets"}; !slices.Equal(got, want) {
		t.Errorf("late: got %q, want %q", got, want)
	}
	offer(makeMessage(400*time.Millisecond, false), early)
	offer(makeMessage(500*time.Millisecond, true), early)
	offer(makeMessage(600*time.Millisecond, false), early)
	if got, want := read(early, 1450*time.Millisecond), []string{"with parameter sets", "as it is"}; !slices.Equal(got, want) {
		t.Errorf("after an overflow: got %q, want %q", got, want)
	}
	for name, s := range map[string]*subscriber{"early": early, "late": late} {
		if s.bytes != 0 || len(s.items) != 0 {
			t.Errorf("%s: got %d bytes in %d items left, want none", name, s.bytes, len(s.items))
		}
	}
}

// TestOfferTogether: however many readers there are, and processors that write to them,
// each gets every message once and in order, and no more writes are tried than allowed.
func TestOfferTogether(t *testing.T) {
	at := time.Now()
	for _, n := range []int{1, writeShare, writeShare + 1, 3 * writeShare, maxWrites + 10} {
		var subs []*subscriber
		got := make([][]int, n) // sizes
		for i := range n {
			s := newSubscriber(raw, time.Second, nil)
			s.letWrite(func(items []item, _ time.Time) (size int, done bool) {
				for _, it := range items {
					got[i] = append(got[i], it.size)
					size += it.size
				}
				return size, true
			})
			subs = append(subs, s)
		}
		var want []int
		for i := range 50 {
			size := 188 * (i + 1)
			want = append(want, size)
			m := testMessage("video0", at, true, size)
			left := offer(subs, ownWrites{maxWrites, writeShare}, m).left
			m.release()
			if want := max(0, maxWrites-n); left != want {
				t.Fatalf("%d readers: %d writes are left, want %d", n, left, want)
			}
		}
		queued := 0
		for i, s := range subs {
			if len(s.items) > 0 {
				queued++
				s.end()
			} else if !slices.Equal(got[i], want) {
				t.Errorf("%d readers: one got %v", n, got[i])
			}
		}
		if want := max(0, n-maxWrites); queued != want {
			t.Errorf("%d readers: %d were left to their own goroutines, want %d", n, queued, want)
		}
	}
}

// TestOfferNow holds I4 where publishers write: only while nothing is queued, only while
// they may, and what the connection did not take is left to the reader's goroutine.
func TestOfferNow(t *testing.T) {
	at := time.Now()
	for _, tt := range []struct {
		name    string
		offered int // messages, together
		takes   int // bytes that the connection takes at once; -1: publishers may not write
		queued  bool
		written int // bytes that a publisher wrote
		left    int // bytes that are left to the reader's goroutine
	}{
		{"all of it", 1, 200, false, 188, 0},
		{"a part", 1, 100, false, 100, 88},
		{"nothing", 1, 0, false, 0, 188},
		{"it may not", 1, -1, false, 0, 188},
		{"something is queued", 1, 200, true, 0, 376},
		{"all of two", 2, 400, false, 376, 0},
		{"one and a part", 2, 200, false, 200, 176},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSubscriber(raw, time.Second, nil)
			written := 0
			if tt.queued {
				s.offer(testMessage("video0", at, true, 188))
				<-s.wakeups()
			}
			if tt.takes >= 0 {
				s.letWrite(func(items []item, _ time.Time) (int, bool) {
					size := 0
					for _, it := range items {
						size += it.size
					}
					n := min(tt.takes, size)
					written += n
					return n, true
				})
			}
			var messages []*message
			for range tt.offered {
				messages = append(messages, testMessage("video0", at, true, 188))
			}
			if wrote := s.offerNow(messages...); wrote != (tt.takes >= 0 && !tt.queued) {
				t.Errorf("it was written: %v", wrote)
			}
			s.letWrite(nil)
			if written != tt.written {
				t.Errorf("a publisher wrote %d bytes, want %d", written, tt.written)
			}
			woken := len(s.wakeups()) > 0
			left := 0
			for _, b := range s.take(nil, 1000, false, at) {
				left += len(b)
			}
			if left != tt.left || woken != (left > 0) {
				t.Errorf("%d bytes are left, and the reader is woken: %v; want %d", left, woken, tt.left)
			}
			s.wrote(left)
			if c := sum(t, s); c.dropped != [causes]uint64{} || len(s.items) > 0 {
				t.Errorf("got %+v and %d messages left", c, len(s.items))
			}
		})
	}
}
