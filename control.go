// The control link: a websocket that vw dials, and on which others give it the
// commands that the HTTP API takes. It is listed as a destination, and has
// nothing in common with one: no feed goes out on it, and none comes in.
//
// A command is a JSON object in a text message, and is answered with one text
// message. A relay may put messages together, so there may be several commands
// in one. The next is read when the answer to the last is queued: a thousand
// at once are a thousand answers, and a controller that does not read waits.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"iter"
	"time"
)

const (
	maxMessage = 1 << 20 // bytes of commands in a message; each has at most maxBody
)

// control is the control link.
type control struct {
	*destination // for its open and keepUp
	server       *server
}

// startControl keeps a control link up until s ends. The rule is clean.
func (s *server) startControl(rule destinationRule) {
	r := s.rules
	d := r.newDestination(rule)
	d.log = r.log.With("dest", controlID, "url", d.shown())
	s.control = &control{d, s}
	d.is("connecting")
	r.tasks.Go(func() { s.control.keepUp(s.ctx, s.control.connect) })
}

// connect is one connection, as destination.connect.
func (c *control) connect(ctx context.Context, tell bool) (healthy bool, err error) {
	l, in, err := c.open(ctx)
	if err != nil {
		return false, err
	}
	opened := time.Now()
	defer c.opens(tell)()
	writing, cancel := context.WithCancel(ctx)
	defer cancel()
	err = l.serve(ctx, l.subscribe(masked, 0), func() error { return c.obey(writing, l, in) }, cancel)
	return time.Since(opened) >= healthyAfter, lost{err}
}

// obey reads commands and queues answers until the connection ends, or ctx.
func (c *control) obey(ctx context.Context, l *link, in *inbox) error {
	for {
		opcode, b, err := in.message(maxMessage)
		switch {
		case err == errTooLong:
			err = invalid("message: more than %d bytes", maxMessage)
		case err != nil:
			return err
		case opcode != opText:
			err = invalid("message: it is binary, a command is text")
		}
		for answer := range c.server.answers(b, err) {
			select {
			case l.control <- appendFrame(nil, opText, answer, l.masks):
				l.wake()
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	}
}

// answers carries out the commands in a message, one after the other, and
// ranges over their answers; err is what is wrong with the message. What is no
// JSON object ends it: nobody knows what comes after that.
func (s *server) answers(message []byte, err error) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		d := json.NewDecoder(bytes.NewReader(message))
		for n := 0; err == nil; n++ {
			var command json.RawMessage
			err = d.Decode(&command)
			switch {
			case err == io.EOF && n > 0:
				return
			case err != nil:
				err = invalid("JSON: %.200s", err)
			case command[0] != '{':
				err = invalid("command %.40q: it must be an object", command)
			default:
				if a := s.answer(command); a != nil && !yield(a) {
					return
				}
			}
		}
		yield(encode(map[string]string{"error": err.Error()}))
	}
}

// answer carries out one command, and returns its answer; nil: it was no
// command. Another vw on the same path sees our answers: if both answered what
// is an error, they would never stop.
func (s *server) answer(command []byte) []byte {
	var with struct{ Verb, Ref, Error json.RawMessage }
	json.Unmarshal(command, &with) // as much as there is
	if with.Error != nil && with.Verb == nil {
		return nil
	}
	v, err := s.do(command)
	if err != nil {
		v = map[string]string{"error": err.Error()}
	}
	b := encode(v)
	if with.Ref != nil {
		b = b[:len(b)-1]
		if len(b) > 1 {
			b = append(b, ',')
		}
		b = fmt.Appendf(b, `"ref":%s}`, encode(with.Ref))
	}
	return b
}
