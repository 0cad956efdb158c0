// The state file: the rules, so that they survive a restart and a power cut.
//
// One JSON value a line: first {"vw":1,"streams":M,"destinations":N}, then M
// stream rules and N destination rules. It is replaced whole, by rename, so
// that a crash at any moment leaves the old or the new one.

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
)

const maxState = 64 << 20 // bytes of a state file

// ruleSet is all rules, by the name of the stream and the id of the destination.
type ruleSet struct {
	streams      map[string][]string
	destinations map[string]destinationRule
}

// stateHead is the first line of a state file.
type stateHead struct {
	Version      int `json:"vw"`
	Streams      int `json:"streams"`
	Destinations int `json:"destinations"`
}

// encode returns the set as the text of a state file.
func (s ruleSet) encode() []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	line := func(v any) {
		if err := e.Encode(v); err != nil {
			panic(err) // a rule can be encoded: it was decoded
		}
	}
	line(stateHead{1, len(s.streams), len(s.destinations)})
	for _, name := range slices.Sorted(maps.Keys(s.streams)) {
		line(streamRule{name, s.streams[name]})
	}
	for _, name := range slices.Sorted(maps.Keys(s.destinations)) {
		line(s.destinations[name])
	}
	return b.Bytes()
}

// decodeState is the inverse of encode. An error names the line.
func decodeState(b []byte) (ruleSet, error) {
	set := ruleSet{make(map[string][]string), make(map[string]destinationRule)}
	var head stateHead
	n := 0
	for line := range bytes.Lines(b) {
		n++
		err := func() error {
			switch {
			case line[len(line)-1] != '\n':
				return invalid("it ends before its newline")
			case n == 1:
				if err := decode(line, &head); err != nil {
					return err
				}
				if head.Version != 1 {
					return invalid(`"vw" is %d, it must be 1`, head.Version)
				}
			case n <= 1+head.Streams:
				return set.addStream(line)
			case n <= 1+head.Streams+head.Destinations:
				return set.addDestination(line)
			default:
				return invalid("there should be %d streams and %d destinations, and no more", head.Streams, head.Destinations)
			}
			return nil
		}()
		if err != nil {
			return ruleSet{}, fmt.Errorf("line %d: %w", n, err)
		}
	}
	if n == 0 || len(set.streams) != head.Streams || len(set.destinations) != head.Destinations {
		return ruleSet{}, invalid("line %d: it is missing", n+1)
	}
	return set, nil
}

func (s ruleSet) addStream(line []byte) error {
	var rule streamRule
	if err := decode(line, &rule); err != nil {
		return err
	}
	rule, err := rule.clean()
	if err != nil {
		return err
	}
	if _, ok := s.streams[rule.Stream]; ok {
		return invalid("stream %q is there twice", rule.Stream)
	}
	s.streams[rule.Stream] = rule.Feeds
	return nil
}

func (s ruleSet) addDestination(line []byte) error {
	var rule destinationRule
	if err := decode(line, &rule); err != nil {
		return err
	}
	rule, _, err := rule.clean()
	if err != nil {
		return err
	}
	if _, ok := s.destinations[string(rule.ID)]; ok {
		return invalid("destination %q is there twice", rule.ID)
	}
	s.destinations[string(rule.ID)] = rule
	return nil
}

// readState reads the state file called name. One that is not there yet is
// made, with no rules, to learn at once whether that can be done.
func readState(name string) (ruleSet, error) {
	info, err := os.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		var none ruleSet
		return none, writeState(name, none.encode())
	}
	if err != nil {
		return ruleSet{}, err
	}
	if !info.Mode().IsRegular() {
		return ruleSet{}, fmt.Errorf("%s is not a regular file", name)
	}
	f, err := os.Open(name)
	if err != nil {
		return ruleSet{}, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxState+1))
	if err != nil {
		return ruleSet{}, err
	}
	if len(b) > maxState {
		return ruleSet{}, fmt.Errorf("%s has more than %d bytes", name, maxState)
	}
	return decodeState(b)
}

// writeState replaces the file called name. When it returns nil, b is on the
// disk; else the old content may be, or b. It blocks as long as the disk does.
func writeState(name string, b []byte) (err error) {
	if target, err := filepath.EvalSymlinks(name); err == nil {
		name = target // the link stays
	}
	if info, err := os.Stat(name); err == nil && info.Mode().Perm()&0o200 == 0 {
		return &fs.PathError{Op: "write", Path: name, Err: errors.New("the file is read-only")}
	}
	next := name + ".new"
	os.Remove(next) // one that is there may be of a crash, or somebody's
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(next, name)
	}
	if err != nil {
		os.Remove(next)
		return err
	}
	return syncFolder(filepath.Dir(name))
}

// syncFolder makes a rename in a folder last.
func syncFolder(name string) error {
	if runtime.GOOS == "windows" {
		return nil // a folder cannot be opened for it there
	}
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
