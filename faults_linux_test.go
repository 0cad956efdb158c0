// All at once: a log that nobody reads, a disk that hangs, a relay and a reader that
// are stuck. Nothing that mutes or deletes waits for them (I6), and vw ends in time.

package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// faults are what a vw is besieged by.
type faults int

const (
	stalledLog faults = 1 << iota
	hungDisk
	stuckRelay
	stuckReader

	allFaults = stalledLog | hungDisk | stuckRelay | stuckReader
)

func (f faults) String() string {
	var names []string
	for i, name := range []string{"log", "disk", "relay", "reader"} {
		if f&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	return strings.Join(append(names, "faults"), " ")
}

// faulty is a vw with faults, a camera and a state file.
type faulty struct {
	vwProcess
	disk *disk
}

// startFaulty starts a vw whose log and disk are well until hang.
func startFaulty(t *testing.T, f faults) *faulty {
	t.Helper()
	v := &faulty{}
	v.process = &process{name: "vw", done: make(chan struct{})}
	dir := t.TempDir()
	t.Cleanup(func() {
		if v.cmd != nil {
			<-v.done // after the disk, which may keep it
		}
	})
	if f&hungDisk != 0 {
		v.disk = mountDisk(t, dir)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	cmd := exec.Command(build(t, "linux/amd64"), "stream")
	cmd.Env = []string{"VW_PORT=0", "VW_HOST=127.0.0.1", "VW_LOGLEVEL=debug", "VW_STATE=" + filepath.Join(dir, "state")}
	cmd.Stderr = w
	err = cmd.Start()
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	v.cmd = cmd
	go func() {
		v.err = cmd.Wait()
		close(v.done)
	}()
	t.Cleanup(func() { cmd.Process.Kill() })
	log := bufio.NewReader(r)
	for v.addr == "" {
		line, err := log.ReadString('\n')
		if err != nil {
			t.Fatalf("the log: %v", err)
		}
		if found := regexp.MustCompile(`msg="listening; .* addr=(\S+)\n`).FindStringSubmatch(line); found != nil {
			v.addr, v.url = found[1], "http://"+found[1]
		}
	}
	if f&stalledLog == 0 {
		go io.Copy(&v.out, log)
	}
	return v
}

// besiege makes the relay and the reader stuck, if f has them, and waits until the
// log is.
func (v *faulty) besiege(t *testing.T, f faults) {
	t.Helper()
	v.call(t, http.StatusOK, "POST", "/api/streams", `{"stream":"stream/front","feeds":["video0"]}`)
	v.film(t)
	if f&stuckRelay != 0 {
		v.call(t, http.StatusOK, "POST", "/api/destinations", fmt.Sprintf(`{"id":"stuck","stream":"stream/front","destination":"ws://%s"}`, startStuckRelay(t)))
	}
	if f&stuckReader != 0 {
		conn, err := net.Dial("tcp", v.addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		raw, _ := conn.(*net.TCPConn).SyscallConn()
		limitReceived(raw, 4<<10)
		io.WriteString(conn, "GET /ts/stream/front HTTP/1.1\r\nHost: localhost\r\n\r\n")
	}
	if f&stalledLog != 0 {
		for i := range 600 { // more than a pipe holds
			httpCall(t, "POST", v.url+"/api/streams", fmt.Sprintf(`{"stream":"stream/front","feeds":["video0","a%d%s"]}`, i, strings.Repeat("x", 200)))
		}
	}
	if f&stuckRelay != 0 {
		eventually(t, startupTime, func() error {
			stats := v.call(t, http.StatusOK, "GET", "/api/stats", "")
			if found := regexp.MustCompile(`"stuck":.*"lag":(\d+)`).FindStringSubmatch(stats); found == nil || found[1] == "0" {
				return fmt.Errorf("the relay is not stuck yet: %s", stats)
			}
			return nil
		})
	}
}

// film posts a feed until vw ends.
func (v *faulty) film(t *testing.T) {
	t.Helper()
	p := startPost(t, v.addr, "video0")
	var posting sync.WaitGroup
	posting.Go(func() {
		frames := time.NewTicker(40 * time.Millisecond)
		defer frames.Stop()
		for c := newCamera(); ; <-frames.C {
			if _, err := p.chunks.Write(c.next()); err != nil {
				return
			}
		}
	})
	t.Cleanup(func() {
		p.conn.Close()
		posting.Wait()
	})
}

// startStuckRelay returns the address of a relay that opens links, and reads nothing.
func startStuckRelay(t *testing.T) string {
	t.Helper()
	l := listenLoopback(t).(*net.TCPListener)
	raw, err := l.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	limitReceived(raw, 4<<10)
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			accept(conn)
		}
	})
	t.Cleanup(func() {
		l.Close()
		serving.Wait()
	})
	return l.Addr().String()
}

// TestFaults: with all faults at once, a mute or a delete is in force when its call
// returns, and that is soon.
func TestFaults(t *testing.T) {
	notUnderRace(t)
	notShort(t, "a file system of our own")
	v := startFaulty(t, allFaults)
	const streams, destinations = 250, 250
	relay := startStuckRelay(t)
	for i := range streams {
		v.call(t, http.StatusOK, "POST", "/api/streams", fmt.Sprintf(`{"stream":"stream/%d","feeds":["video0","audio0"]}`, i))
	}
	for i := range destinations {
		v.call(t, http.StatusOK, "POST", "/api/destinations", fmt.Sprintf(`{"id":"%d","stream":"stream/%d","destination":"ws://%s"}`, i, i, relay))
	}
	v.besiege(t, allFaults)
	v.disk.hang(t)

	var took []time.Duration
	do := func(method, path, body, look, want string) {
		t.Helper()
		start := time.Now()
		r, err := http.NewRequest(method, v.url+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		a, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(a.Body)
		a.Body.Close()
		took = append(took, time.Since(start))
		if err != nil || a.StatusCode != http.StatusAccepted && !strings.Contains(string(b), "in force, not stored") {
			t.Fatalf("%s %s %s: got %s %s, %v", method, path, body, a.Status, b, err)
		}
		if got := httpCall(t, "GET", v.url+look, ""); !strings.Contains(got, want) {
			t.Fatalf("after %s %s %s: got %s, want %s", method, path, body, got, want)
		}
	}
	for i := range streams {
		name := fmt.Sprint("stream/", i)
		do("POST", "/api/streams", fmt.Sprintf(`{"stream":%q,"without":["audio0"]}`, name), "/api/streams/"+name, `["video0"]`)
		do("POST", "/api/streams", fmt.Sprintf(`{"stream":%q,"feeds":[]}`, name), "/api/streams/"+name, `[]`)
		do("DELETE", "/api/destinations/"+fmt.Sprint(i), "", "/api/destinations/"+fmt.Sprint(i), "does not exist")
		do("DELETE", "/api/streams/"+name, "", "/api/streams/"+name, "does not exist")
	}
	slices.Sort(took)
	at := func(percent float64) time.Duration { return took[int(percent/100*float64(len(took)-1))] }
	t.Logf("%d calls: median %v, 90 %% %v, 99 %% %v, 99.9 %% %v, slowest %v", len(took), at(50), at(90), at(99), at(99.9), at(100))
	if at(99) > 100*time.Millisecond || at(100) > 250*time.Millisecond {
		t.Errorf("99 %% of the calls took up to %v and the slowest %v, want 100 and 250 ms at most", at(99), at(100))
	}
	v.endsInTime(t)
}

// endsInTime sends SIGTERM.
func (v *faulty) endsInTime(t *testing.T) {
	t.Helper()
	start := time.Now()
	v.signal(t, syscall.SIGTERM)
	select {
	case <-v.done:
		t.Logf("ended after %v", time.Since(start))
		if d := time.Since(start); d > 5*time.Second || v.err != nil {
			t.Errorf("ended with %v after %v, want status 0 within 5 s; SIGTERM was at %v; the log:\n%s", v.err, d, start, v.out.String())
		}
	case <-time.After(startupTime):
		t.Fatalf("still runs %v after SIGTERM", startupTime)
	}
}

// TestFaultsAtTheEnd: with any of the faults, vw ends within 5 s of SIGTERM.
func TestFaultsAtTheEnd(t *testing.T) {
	t.Parallel()
	notShort(t, "a file system of our own")
	all := []faults{stalledLog | stuckRelay, hungDisk | stuckReader, stuckRelay | stuckReader, allFaults}
	if *long {
		all = nil
		for f := range allFaults + 1 {
			all = append(all, f)
		}
	}
	for _, f := range all {
		t.Run(f.String(), func(t *testing.T) {
			t.Parallel()
			v := startFaulty(t, f)
			v.besiege(t, f)
			if f&hungDisk != 0 {
				v.disk.hang(t)
			}
			muted := httpCall(t, "PUT", v.url+"/api/mute", `{"audio":true}`)
			if inForce := strings.Contains(muted, `"audio":true`) || strings.Contains(muted, "in force, not stored"); !inForce || f&hungDisk != 0 && muted == `{"audio":true,"video":false}` {
				t.Errorf("the mute: got %s", muted)
			}
			v.endsInTime(t)
		})
	}
}

// disk is a file system of one folder in memory, below which all can hang. linux/fuse.h
type disk struct {
	dir     string
	fuse    int
	hung    atomic.Bool
	serving sync.WaitGroup
	files   map[string]*diskFile // owned by serve
	next    uint64
}

type diskFile struct {
	node uint64
	mode uint32
	data []byte
}

// mountDisk mounts a disk on dir until the test ends.
func mountDisk(t *testing.T, dir string) *disk {
	t.Helper()
	fuse, err := syscall.Open("/dev/fuse", syscall.O_RDWR|syscall.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("no disk that hangs: /dev/fuse: %v", err)
	}
	if err := syscall.Mount("vwtest", dir, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fuse)); err != nil {
		syscall.Close(fuse)
		t.Skipf("no disk that hangs: mount: %v", err)
	}
	d := &disk{dir: dir, fuse: fuse, files: make(map[string]*diskFile), next: diskRoot + 1}
	d.serving.Go(d.serve)
	t.Cleanup(func() {
		if d.hung.Load() {
			syscall.Close(fuse) // what waits gets an error
		}
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
		d.serving.Wait()
		if !d.hung.Load() {
			syscall.Close(fuse)
		}
	})
	return d
}

// hang makes everything on the disk hang from now on.
func (d *disk) hang(t *testing.T) {
	t.Helper()
	d.hung.Store(true)
	go os.Stat(filepath.Join(d.dir, "last")) // serve waits for that, or something else comes first
	d.serving.Wait()
}

const (
	diskRoot = 1
	noEntry  = -int32(syscall.ENOENT)
)

// serve answers what the kernel asks until the disk hangs or is gone.
func (d *disk) serve() {
	b := make([]byte, 1<<18)
	for !d.hung.Load() {
		n, err := syscall.Read(d.fuse, b)
		switch {
		case err == syscall.EINTR || err == syscall.ENOENT || err == syscall.EAGAIN:
			continue
		case err != nil:
			return
		}
		le := binary.NativeEndian
		opcode, id := le.Uint32(b[4:]), le.Uint64(b[8:])
		body, status, answers := d.answer(opcode, le.Uint64(b[16:]), b[40:n])
		if answers {
			out := le.AppendUint32(nil, uint32(16+len(body)))
			out = le.AppendUint64(le.AppendUint32(out, uint32(status)), id)
			syscall.Write(d.fuse, append(out, body...))
		}
	}
}

// answer does one operation on a node.
func (d *disk) answer(opcode uint32, node uint64, in []byte) (out []byte, status int32, answers bool) {
	le := binary.NativeEndian
	name := func(b []byte) string { return string(bytes.TrimRight(b, "\x00")) }
	f := d.file(node)
	switch opcode {
	case 26: // init
		out = make([]byte, 64)
		le.PutUint32(out, 7)
		le.PutUint32(out[4:], min(31, le.Uint32(in[4:])))
		le.PutUint32(out[20:], 1<<17) // max_write
		return out, 0, true
	case 1: // lookup
		if f := d.files[name(in)]; f != nil {
			return f.entry(), 0, true
		}
		return nil, noEntry, true
	case 35: // create
		f := &diskFile{node: d.next, mode: le.Uint32(in[4:])}
		d.next++
		d.files[name(in[16:])] = f
		return append(f.entry(), make([]byte, 16)...), 0, true
	case 14, 27: // open, opendir
		return make([]byte, 16), 0, true
	case 10: // unlink
		delete(d.files, name(in))
	case 12, 45: // rename, rename2
		in = in[8:]
		if opcode == 45 {
			in = in[8:]
		}
		from, to, _ := bytes.Cut(in, []byte{0})
		d.files[name(to)] = d.files[string(from)]
		delete(d.files, string(from))
	case 15: // read
		from := min(int(le.Uint64(in[8:])), len(f.data))
		return f.data[from:min(from+int(le.Uint32(in[16:])), len(f.data))], 0, true
	case 16: // write
		at, data := int(le.Uint64(in[8:])), in[40:]
		f.data = append(f.data[:min(at, len(f.data))], data...)
		return le.AppendUint64(nil, uint64(len(data))), 0, true
	case 4: // setattr
		if valid := le.Uint32(in); valid&1 != 0 {
			f.mode = le.Uint32(in[68:])
		}
		return append(make([]byte, 16), f.attr()...), 0, true
	case 3: // getattr
		return append(make([]byte, 16), f.attr()...), 0, true
	case 2, 36, 42: // forget, interrupt, batch_forget
		return nil, 0, false
	case 18, 20, 29, 30, 38: // release, fsync, releasedir, fsyncdir, destroy
	default: // a flush, too: Linux would let no process end before that is answered
		return nil, -int32(syscall.ENOSYS), true
	}
	return nil, 0, true
}

// file returns the file of a node; the folder for any that is gone.
func (d *disk) file(node uint64) *diskFile {
	for _, f := range d.files {
		if f.node == node {
			return f
		}
	}
	return &diskFile{node: diskRoot, mode: syscall.S_IFDIR | 0o700}
}

// attr is a fuse_attr.
func (f *diskFile) attr() []byte {
	le := binary.NativeEndian
	b := make([]byte, 88)
	le.PutUint64(b, f.node)
	le.PutUint64(b[8:], uint64(len(f.data)))
	le.PutUint32(b[60:], f.mode)
	le.PutUint32(b[64:], 1) // links
	le.PutUint32(b[80:], 4096)
	return b
}

// entry is a fuse_entry_out, which the kernel does not keep.
func (f *diskFile) entry() []byte {
	b := make([]byte, 40, 128)
	binary.NativeEndian.PutUint64(b, f.node)
	return append(b, f.attr()...)
}
