// The clock of a feed: how its timestamps become vw's. Pure: its callers say
// what time it is.

package main

// clock maps the timestamps of one feed onto vw's. Owned by its feed.
//
// The lag of a frame is its arrival minus its DTS; of sound, which arrives
// when it has been recorded, minus the end of its PES. The least lag of a
// while is the feed's true one, the rest is jitter. What comes in the first
// moments of a publisher waits until the least lag is known: to move frames
// together later would make players complain. After that, the offset follows
// what cannot be jitter, which is the drift of the feed's clock.
type clock struct {
	running bool
	newest  ticks // DTS, unwrapped
	seen    ticks // when it was, on vw's clock
	offset  ticks // what is added to the feed's timestamps
	target  ticks // what offset moves towards
	window  ticks // when the window began
	least   ticks // lag in it
	span    ticks // of a PES of sound

	renewed  bool  // a publisher came, and its first timestamp is yet to come
	settling bool  // the window is the first: offset is not known
	first    ticks // DTS in it
	stamps   int   // DTS in it
	given    ticks // the last timestamp that was given out before it
}

const (
	settleFor   = second * 15 / 100
	settleMost  = second / 2 // for sound in long PES, of which two must come
	clockWindow = 10 * second
	clockSlack  = second * 15 / 1000 // what is not followed
	lookAhead   = second * 22 / 1000 // an AAC encoder keeps one frame back
)

// follow looks at a chunk that arrived now. Unless ready, the chunk must wait
// for a later one. offset is for the timestamps of all that waited; jumped
// tells that they begin anew, after a restart or a jump.
func (c *clock) follow(chunk []byte, info chunkInfo, now ticks, restarted bool) (offset ticks, jumped, ready bool) {
	first, newest, span, n := chunkTimes(chunk, info.program)
	p := c.newest + signed33(newest-c.newest)
	media := p - c.newest
	c.renewed = c.renewed || restarted
	switch {
	case n == 0:
		return c.offset, false, !c.settling
	case c.renewed || !c.running || !c.settling && (media < -2*second || media > now-c.seen+10*second):
		given := c.given
		if !c.settling {
			given = c.newest + c.offset
		}
		if !c.running {
			given = -1 << 60
		}
		*c = clock{running: true, settling: true, newest: newest, first: first, given: given, window: now, least: now - newest, span: c.span}
		media = 0
	}
	if n > 1 {
		c.span = span
	} else if media > 0 && media < second {
		c.span = media
	}
	c.seen = now
	c.stamps += n
	if media > 0 {
		c.newest = p
	}
	c.least = min(c.least, now-c.newest)
	if c.settling {
		age := now - c.window
		if age < settleFor || age < settleMost && !info.hasVideo && c.stamps < 2 {
			return 0, false, false
		}
		c.settle(info, now)
		return c.offset, true, true
	}
	most := max(media, 0) / 100
	c.offset += min(max(c.target-c.offset, -most), most)
	if now-c.window >= clockWindow {
		lag := c.least - c.tail(info)
		if lag-c.offset > second/5 {
			c.offset = lag // late for good
		}
		if lag-c.target > clockSlack || c.target-lag > clockSlack {
			c.target = lag
		}
		c.window, c.least = now, now-c.newest
	}
	return c.offset, false, true
}

// settle sets the offset by the least lag so far. Timestamps that were given
// out are not given again, unless they are more than 2 s in the future.
func (c *clock) settle(info chunkInfo, now ticks) {
	c.offset = c.least - c.tail(info)
	c.target = c.offset
	ahead := c.given + 1 - (c.offset + c.newest + signed33(c.first-c.newest))
	if 0 < ahead && ahead <= 2*second {
		c.offset += ahead
	}
	c.settling, c.window, c.least = false, now, now-c.newest
}

// hurry is follow without a chunk, for what can wait no longer.
func (c *clock) hurry(info chunkInfo, now ticks) (offset ticks, jumped bool) {
	if jumped = c.settling; jumped {
		c.settle(info, now)
	}
	c.renewed = false
	return c.offset, jumped
}

// tail is how long what begins at a DTS had been recorded when it arrived.
func (c *clock) tail(info chunkInfo) ticks {
	if info.hasVideo {
		return 0
	}
	if g := info.program; g != nil && len(g.tracks) > 0 && (g.tracks[0].streamType == 0x0f || g.tracks[0].streamType == 0x11) {
		return c.span + lookAhead
	}
	return c.span
}

// chunkTimes finds the first and the newest DTS in a chunk, how far the newest
// is from the one before it, and how many there are. A PTS alone is a DTS too.
// Other programs than g have another clock; a nil g is not known yet.
func chunkTimes(chunk []byte, g *program) (first, newest, span ticks, n int) {
	for ; len(chunk) >= packetSize; chunk = chunk[packetSize:] {
		p := packet(chunk[:packetSize])
		if !p.unitStart() || p.damaged() || p.scrambled() || g != nil && g.find(p.pid()) == nil {
			continue
		}
		b, dts := timestamps(p.payload())
		if b == nil {
			continue
		}
		if dts != nil {
			b = dts
		}
		t := readTime(b)
		if n++; n == 1 {
			first, newest = t, t
		} else if d := signed33(t - newest); d > 0 {
			newest, span = t, d
		}
	}
	return first, newest, span, n
}
