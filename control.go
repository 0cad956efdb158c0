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
	"errors"
	"fmt"
	"io"
	"iter"
	"reflect"
	"strings"
)

const (
	maxMessage = 1 << 20 // bytes of commands in a message; each has at most maxBody
)

// control is the control link.
type control struct {
	*uplink
	commands *commands
}

// startControl keeps a control link up until s ends. The rule is clean.
func (s *server) startControl(rule destinationRule) {
	r := s.commands.rules
	c := &control{newUplink(rule, r.dialer, r.log.With("dest", controlID)), s.commands}
	s.commands.control = c
	r.tasks.Go(func() { c.keepUp(s.ctx, c.serve) })
}

// serve takes commands from one link until it ends.
func (c *control) serve(ctx context.Context, l *link) error {
	return l.serve(ctx, l.subscribe(0), func(ctx context.Context) error { return c.execute(ctx, l) }, nil)
}

// execute reads commands and queues answers until the connection ends, or ctx.
func (c *control) execute(ctx context.Context, l *link) error {
	for {
		opcode, b, err := l.in.message(maxMessage)
		switch {
		case err == errTooLong:
			err = invalid("message: more than %d bytes", maxMessage)
		case err != nil:
			return err
		case opcode != opText:
			err = invalid("message: it is binary, a command is text")
		}
		for answer := range c.commands.answers(b, err) {
			if err := l.sendText(ctx, answer); err != nil {
				return err
			}
		}
	}
}

// answers carries out the commands in a message, one after the other, and
// ranges over their answers; err is what is wrong with the message. What is no
// JSON object ends it: nobody knows what comes after that.
func (s *commands) answers(message []byte, err error) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		d := json.NewDecoder(bytes.NewReader(message))
		for n := 0; err == nil; n++ {
			var text json.RawMessage
			err = d.Decode(&text)
			switch {
			case err == io.EOF && n > 0:
				return
			case err != nil:
				err = invalidJSON(err, message, reflect.TypeFor[command]())
			case text[0] != '{':
				err = invalid("command %.40q: it must be an object", text)
			default:
				if a := s.answer(text); a != nil && !yield(a) {
					return
				}
			}
		}
		yield(s.signed(encode(map[string]string{"error": err.Error()})))
	}
}

// answer carries out one command, and returns its answer; nil: it was none for
// this vw. Another vw on the same path sees our answers: if both answered what is
// an answer or an error, they would never stop.
func (s *commands) answer(text []byte) []byte {
	var with struct{ Verb, Ref, Error, From, To json.RawMessage }
	json.Unmarshal(text, &with) // as much as there is
	switch {
	case with.From != nil, with.Error != nil && with.Verb == nil:
		return nil
	case with.To != nil && (s.name == "" || string(encode(with.To)) != string(encode(s.name))):
		return nil
	}
	v, err := s.do(text)
	if err == errBeingStored {
		v = beingStored(v)
	} else if err != nil {
		v = map[string]string{"error": err.Error()}
	}
	b := encode(v)
	if with.Ref != nil {
		b = withField(b, "ref", with.Ref)
	}
	return s.signed(b)
}

// signed returns the answer with the name of this vw, if it has one.
func (s *commands) signed(answer []byte) []byte {
	if s.name == "" {
		return answer
	}
	return withField(answer, "from", s.name)
}

// withField returns an object with one more field.
func withField(object []byte, name string, v any) []byte {
	b := object[:len(object)-1]
	if len(b) > 1 {
		b = append(b, ',')
	}
	return fmt.Appendf(b, `%q:%s}`, name, encode(v))
}

// command is one command, as it is given.
type command struct {
	Verb  string          `json:"verb"`
	What  string          `json:"what"`
	Which string          `json:"which"`
	Rule  json.RawMessage `json:"rule"`
	Ref   json.RawMessage `json:"ref"`
	To    json.RawMessage `json:"to"`
}

// do carries out one command. Its answer is an object.
func (s *commands) do(text []byte) (any, error) {
	if len(text) > maxBody {
		return nil, invalid("command: more than %d bytes", maxBody)
	}
	var c command
	if err := decode(text, &c); err != nil {
		return nil, err
	}
	if report := reports[c.Verb]; report != nil {
		v, err := report(s)
		return map[string]any{c.Verb: v}, err
	}
	if c.Rule == nil && (c.Verb == "mute" || c.Verb == "add" && (c.What == "stream" || c.What == "destination")) {
		return nil, invalid(`%s: "rule" is missing`, strings.TrimSpace(c.Verb+" "+c.What))
	}
	if c.Verb == "mute" {
		return s.setMute(c.Rule, handControl)
	}
	switch c.Verb + " " + c.What {
	case "add stream":
		return s.setStream(c.Rule)
	case "add destination":
		return s.setDestination(c.Rule)
	case "list stream":
		v, err := s.listStream(c.Which)
		return listed(c.Which, v, err)
	case "list destination":
		return s.listDestination(c.Which)
	case "list mute":
		return s.listMute(handControl), nil
	case "delete stream":
		return deleted(s.deleteStream(c.Which))
	case "delete destination":
		if c.Which == controlID {
			return nil, invalid("Cannot delete %s", controlID)
		}
		return deleted(s.deleteDestination(c.Which))
	}
	switch c.Verb {
	case "add", "delete":
		return nil, invalid("%s %.40q: it must be stream or destination", c.Verb, c.What)
	case "list":
		return nil, invalid("%s %.40q: it must be stream, destination or mute", c.Verb, c.What)
	}
	return nil, invalid("verb %.40q: it must be add, list, delete, mute, healthcheck, devices or stats", c.Verb)
}

// reports are the commands that are nothing but a verb; the answer is an
// object with the verb as its one key.
var reports = map[string]func(*commands) (any, error){
	"healthcheck": func(*commands) (any, error) { return "ok", nil },
	"devices":     func(s *commands) (any, error) { return listDevices("/", s.port) },
	"stats":       func(s *commands) (any, error) { return s.stats(), nil },
}

// listed is the answer to a list command about streams.
func listed(which string, v any, err error) (any, error) {
	if which == "all" || err != nil && !errors.Is(err, errNotFound) {
		return v, err
	}
	return map[string]any{"feeds": v}, nil
}

// deleted is the answer to a delete command.
func deleted(what any, err error) (any, error) { return map[string]any{"deleted": what}, err }
