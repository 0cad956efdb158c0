// The state file: the rules, so that they survive a restart and a power cut.
//
// One JSON value a line: first {"vw":1,"streams":M,"destinations":N}, then M
// stream rules and N destination rules. Where something is muted the first line
// has "mutes":K, too, so that a vw that does not know mutes refuses the file,
// and K lines follow that say what a hand has muted. The file is replaced whole, by rename, so
// that a crash at any moment leaves the old or the new one. It is for its owner
// alone, and for one vw: that holds a lock on a file beside it, which is never
// removed nor renamed.
//
// One goroutine writes it, as long as the disk takes. A write that hangs for
// good is left behind when vw ends: the exception to I3 that the log has, too.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"
)

const maxState = 64 << 20 // bytes of a state file

// ruleSet is all rules, by the name of the stream and the id of the destination.
type ruleSet struct {
	streams      map[string][]string
	destinations map[string]destinationRule
	mutes        muteSet
}

// stateHead is the first line of a state file.
type stateHead struct {
	Version      int `json:"vw"`
	Streams      int `json:"streams"`
	Destinations int `json:"destinations"`
	Mutes        int `json:"mutes,omitempty"` // hands that have muted something
}

// handMutes is the line of what a hand has muted.
type handMutes struct {
	Hand  string `json:"mutedBy"`
	Audio bool   `json:"audio"`
	Video bool   `json:"video"`
}

// byHand returns the lines of what is muted.
func (m muteSet) byHand() (all []handMutes) {
	for h, name := range handNames {
		line := handMutes{name, m&muteOf(hand(h), 0) != 0, m&muteOf(hand(h), 1) != 0}
		if line.Audio || line.Video {
			all = append(all, line)
		}
	}
	return all
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
	mutes := s.mutes.byHand()
	line(stateHead{1, len(s.streams), len(s.destinations), len(mutes)})
	for _, name := range slices.Sorted(maps.Keys(s.streams)) {
		line(streamRule{name, s.streams[name]})
	}
	for _, name := range slices.Sorted(maps.Keys(s.destinations)) {
		line(s.destinations[name])
	}
	for _, m := range mutes {
		line(m)
	}
	return b.Bytes()
}

// decodeState is the inverse of encode. An error names the line.
func decodeState(b []byte) (ruleSet, error) {
	set := ruleSet{make(map[string][]string), make(map[string]destinationRule), 0}
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
			case n <= 1+head.Streams+head.Destinations+head.Mutes:
				return set.addMutes(line)
			default:
				return invalid("there should be %d streams and %d destinations, and no more", head.Streams, head.Destinations)
			}
			return nil
		}()
		if err != nil {
			return ruleSet{}, fmt.Errorf("line %d: %w", n, err)
		}
	}
	if n == 0 || len(set.streams) != head.Streams || len(set.destinations) != head.Destinations || len(set.mutes.byHand()) != head.Mutes {
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

func (s *ruleSet) addMutes(line []byte) error {
	var m handMutes
	if err := decode(line, &m); err != nil {
		return err
	}
	h := slices.Index(handNames, m.Hand)
	if h < 0 {
		return invalid("mutedBy is %.40q, it must be here or control", m.Hand)
	}
	bits := s.mutes
	if m.Audio {
		bits |= muteOf(hand(h), 0)
	}
	if m.Video {
		bits |= muteOf(hand(h), 1)
	}
	if bits == s.mutes || s.mutes&(muteOf(hand(h), 0)|muteOf(hand(h), 1)) != 0 {
		return invalid("%s has muted nothing, or is there twice", m.Hand)
	}
	s.mutes = bits
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

// stateFile is the state file of a set of rules, and its only writer. Its
// methods do not block but for wait.
type stateFile struct {
	// static after construction
	name string // no link
	lock *os.File
	save func(name string, b []byte) error // writeState, but in tests
	log  *slog.Logger
	due  chan struct{} // holds a token when there is something to write
	done chan struct{} // closed when nothing will be written any more

	mu     sync.Mutex
	begun  time.Time     // when the write in progress began; zero: there is none
	usual  time.Duration // the longest that a write has taken of late
	stale  bool          // the file has not all that the rules are
	failed bool          // and the log was told
}

const (
	retryWrite = 10 * time.Second
	slowFactor = 10 // by how much a write may take longer than others before it
)

// openState reads the state file called name, and returns what is in it. One
// that does not exist yet is made, with no rules, to learn at once whether that
// can be done.
func openState(name string, log *slog.Logger) (*stateFile, ruleSet, error) {
	name, err := followLinks(name)
	if err != nil {
		return nil, ruleSet{}, err
	}
	if err := checkState(name); err != nil {
		return nil, ruleSet{}, err
	}
	lock, taken, unlocked := lockState(name)
	var set ruleSet
	if taken {
		err = errors.New("another vw uses this file")
	} else {
		set, err = readState(name, log)
	}
	if err != nil {
		lock.Close()
		return nil, ruleSet{}, err
	}
	if unlocked != nil {
		log.Warn("VW_STATE: nothing keeps another vw from using the same file", "err", unlocked)
	}
	return &stateFile{
		name: name, lock: lock, save: writeState, log: log, due: make(chan struct{}, 1), done: make(chan struct{}),
	}, set, nil
}

// start writes what snapshot returns whenever that is asked for, and tells
// stored how it went, until ctx is done. It tries again when that has failed.
func (f *stateFile) start(ctx context.Context, snapshot func() (ruleSet, []*change), stored func([]*change, error)) {
	var writer sync.WaitGroup // wait waits for it, for a while
	writer.Go(func() {
		defer close(f.done)
		defer f.lock.Close()
		again := time.NewTicker(retryWrite)
		defer again.Stop()
		for ctx.Err() == nil {
			select {
			case <-f.due:
			case <-again.C:
			case <-ctx.Done():
			}
			if f.begin() {
				set, changes := snapshot()
				late := time.AfterFunc(longWait, f.tellHang)
				err := f.save(f.name, set.encode())
				late.Stop()
				f.end(err)
				stored(changes, err)
			}
		}
	})
}

// request asks for the rules to be written as they are now.
func (f *stateFile) request() {
	f.mu.Lock()
	f.stale = true
	f.mu.Unlock()
	select {
	case f.due <- struct{}{}:
	default:
	}
}

// begin reports whether there is something to write, and that it is being
// written from now on.
func (f *stateFile) begin() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stale {
		f.begun, f.stale = time.Now(), false
		return true
	}
	return false
}

// end is the end of the write in progress.
func (f *stateFile) end(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.usual = max(time.Since(f.begun), f.usual*3/4)
	f.begun = time.Time{}
	f.stale = f.stale || err != nil
	switch was := f.failed; {
	case err != nil:
		f.tellFailure(err)
	case was:
		f.failed = false
		f.log.Info("the rules are stored again")
	}
}

// tellFailure tells the log, once, that the rules are not stored; mu is held.
func (f *stateFile) tellFailure(err error) {
	if !f.failed {
		f.failed = true
		f.log.Error("the rules are not stored", "err", err)
	}
}

// errDiskHangs: it is not known yet whether the state file could be written.
var errDiskHangs = errors.New("the disk does not answer")

// tellHang tells the log that the write in progress takes too long.
func (f *stateFile) tellHang() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.begun.IsZero() {
		f.tellFailure(errDiskHangs)
	}
}

// isSlow reports whether the disk was seen to need longer than shortWait, and may
// still answer. One that was fast before and is not now hangs.
func (f *stateFile) isSlow() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	most := min(slowFactor*f.usual, longWait)
	return most > shortWait && (f.begun.IsZero() || time.Since(f.begun) < most)
}

// hangs reports whether the write in progress has taken that long.
func (f *stateFile) hangs(after time.Duration) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return !f.begun.IsZero() && time.Since(f.begun) >= after
}

// isCurrent reports whether the file has the rules as they are.
func (f *stateFile) isCurrent() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return !f.stale && f.begun.IsZero()
}

// wait waits for the last write, for a while. The context of start must be done.
func (f *stateFile) wait(most time.Duration) {
	late := time.NewTimer(most)
	defer late.Stop()
	select {
	case <-f.done:
	case <-late.C:
	}
}

// followLinks returns the name of the file that name leads to, whether that
// exists or not.
func followLinks(name string) (string, error) {
	for range 40 {
		target, err := os.Readlink(name)
		if err != nil {
			return name, nil
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(name), target)
		}
		name = target
	}
	return "", fmt.Errorf("%s: too many links", name)
}

// lockState locks the state file called name for this vw. taken: another vw has
// it. The lock is held until the file that it returns is closed.
func lockState(name string) (lock *os.File, taken bool, err error) {
	lock, err = os.OpenFile(name+".lock", os.O_RDWR|os.O_CREATE, 0o600)
	if err == nil {
		taken, err = lockFile(lock)
	}
	return lock, taken, err
}

// checkState refuses a name that can be no state file, before a lock is left beside
// it.
func checkState(name string) error {
	if _, err := os.Stat(name + ".lock"); err == nil {
		return nil
	}
	_, _, err := loadState(name)
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	folder := filepath.Dir(name)
	if info, err := os.Stat(folder); errors.Is(err, fs.ErrNotExist) || err == nil && !info.IsDir() {
		return fmt.Errorf("the folder %s does not exist", folder)
	}
	return nil
}

// readState reads the state file called name, makes it private, and makes one where
// there is none.
func readState(name string, log *slog.Logger) (ruleSet, error) {
	set, mode, err := loadState(name)
	if errors.Is(err, fs.ErrNotExist) {
		return set, writeState(name, set.encode())
	}
	if err == nil && mode&0o077 != 0 && runtime.GOOS != "windows" {
		if err := os.Chmod(name, mode&0o700); err != nil {
			log.Warn("VW_STATE: others can read the file, which may hold secrets", "mode", mode, "err", err)
		} else {
			log.Warn("VW_STATE: others could read the file, which may hold secrets; now its owner alone can", "mode", mode)
		}
	}
	return set, err
}

// loadState returns what the state file called name has, and its mode.
func loadState(name string) (set ruleSet, mode fs.FileMode, err error) {
	info, err := os.Stat(name)
	if err != nil {
		return set, 0, err
	}
	if !info.Mode().IsRegular() {
		return set, 0, fmt.Errorf("%s is not a regular file", name)
	}
	f, err := os.Open(name)
	if err != nil {
		return set, 0, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxState+1))
	if err == nil && len(b) > maxState {
		err = fmt.Errorf("%s has more than %d bytes", name, maxState)
	}
	if err == nil {
		set, err = decodeState(b)
	}
	return set, info.Mode().Perm(), err
}

// unsyncedError: a file has its new content, but a power cut may undo that.
type unsyncedError struct{ error }

func (e unsyncedError) Unwrap() error { return e.error }

// writeState replaces the file called name, which is no link. When it returns
// nil, b is on the disk; an unsyncedError, b is in the file; else the old
// content is. It blocks as long as the disk does.
func writeState(name string, b []byte) (err error) {
	if info, err := os.Stat(name); err == nil && info.Mode().Perm()&0o200 == 0 {
		return &fs.PathError{Op: "write", Path: name, Err: errors.New("the file is read-only")}
	}
	next := name + ".new"
	os.Remove(next) // a leftover of a crash; never write through a file put there by someone else
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
	if err := syncFolder(filepath.Dir(name)); err != nil {
		return unsyncedError{err}
	}
	return nil
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
