// Check: vw check URL does once, step by step, what a destination does with that
// URL, by the same code, and says in one sentence what is wrong. What it sends are
// null packets, which every player leaves out.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"sync"
	"time"
)

const (
	checkTime    = 5 * time.Second // of sending
	checkRate    = 8e6             // bit/s, at most
	checkPackets = 50              // in a message
)

// nullPackets are a message's. ISO 13818-1 2.4.1.
var nullPackets = bytes.Repeat(append([]byte{0x47, 0x1f, 0xff, 0x10}, bytes.Repeat([]byte{0xff}, packetSize-4)...), checkPackets)

// checkup is one run of vw check, in one goroutine.
type checkup struct {
	url   *url.URL
	out   io.Writer
	begun time.Time // the step that is under way
}

// check is vw check: it prints a line for each step and a sentence. It takes
// some 6 s when all is well, and returns the exit status.
func check(ctx context.Context, rule destinationRule, stdout, stderr io.Writer) int {
	rule, u, err := rule.clean()
	if err != nil {
		fmt.Fprintln(stderr, "vw:", err)
		return 2
	}
	c := &checkup{url: u, out: stdout, begun: time.Now()}
	d := newDialer()
	d.proxy, d.trace = http.ProxyFromEnvironment, c.did
	up := newUplink(rule, d, slog.New(slog.DiscardHandler))
	if err := c.run(ctx, up); err != nil {
		fmt.Fprintln(stdout, printable(advise(err, u)))
		return 1
	}
	fmt.Fprintf(stdout, "All is well: video can go from here to %s.\n", hostPort(u))
	return 0
}

// run takes the steps until one fails.
func (c *checkup) run(ctx context.Context, up *uplink) error {
	l, err := up.open(ctx)
	if err != nil {
		return err
	}
	l.pingOnRequest()
	s := l.subscribe(500 * time.Millisecond)
	serving, cancel := context.WithCancelCause(ctx)
	ended := make(chan error, 1)
	var tasks sync.WaitGroup
	tasks.Go(func() { ended <- l.serve(serving, s, l.discard, nil) })
	err = c.measure(l, s, ended)
	cancel(errRemoved)
	tasks.Wait()
	s.end()
	return err
}

// measure takes the steps of an open websocket, ping and send. ended yields why
// it was closed.
func (c *checkup) measure(l *link, s *subscriber, ended <-chan error) error {
	var least, most time.Duration
	for i := range 3 {
		rtt, err := l.measureRoundTrip(ended)
		if err != nil {
			return c.finish(stepPing, err, "")
		}
		most = max(most, rtt)
		if least = min(least, rtt); i == 0 {
			least = rtt
		}
	}
	c.finish(stepPing, nil, fmt.Sprintf("round trips of %.1f to %.1f ms", ms(least), ms(most)))

	const each = time.Duration(checkPackets * packetSize * 8 / checkRate * float64(time.Second))
	start := time.Now()
	for at := time.Duration(0); at < checkTime; at += each {
		select {
		case err := <-ended:
			return c.finish(stepSend, err, "")
		case <-time.After(time.Until(start.Add(at))):
		}
		m := newMessage(nullPackets, time.Now(), chunkInfo{start: true, hasPAT: true})
		s.offer(m)
		m.release()
	}
	counts, _ := s.count()
	sent := int(counts.bytes)                   // handed to the kernel, all of it before the next ping
	acked := sent - min(sent, l.wire.unacked()) // or all that is known
	took := time.Since(start)
	mbit := func(n int) float64 { return float64(n) * 8 / took.Seconds() / 1e6 }
	rtt, err := l.measureRoundTrip(ended)
	if err != nil {
		return c.finish(stepSend, fmt.Errorf("%w, after %.1f Mbit/s that the next machine acknowledged", err, mbit(acked)), "")
	}
	took += rtt - least // until the relay had read all of it
	detail := fmt.Sprintf("%.1f Mbit/s of at most %.0f", mbit(sent), checkRate/1e6)
	if mbit(sent) < checkEnough/1e6 {
		return c.finish(stepSend, errors.New(detail), "")
	}
	return c.finish(stepSend, nil, detail)
}

// finish ends a step of an open websocket.
func (c *checkup) finish(s step, err error, detail string) error {
	if err != nil {
		err = stepError{step: s, at: c.url, error: err}
	}
	c.did(s, err, detail)
	return err
}

// did tells of the step that has ended, with an error or else the detail, and the
// next begins.
func (c *checkup) did(s step, err error, detail string) {
	now := time.Now()
	state := "ok"
	if err != nil {
		state = "FAILED"
		if detail != "" {
			detail = "; " + detail
		}
		detail = err.Error() + detail
	}
	fmt.Fprintf(c.out, "%-11s %-6s %8.1f ms  %s\n", s, state, ms(now.Sub(c.begun)), printable(detail))
	c.begun = now
}

func ms(d time.Duration) float64 { return d.Seconds() * 1000 }
