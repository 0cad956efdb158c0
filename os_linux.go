// What only Linux has: socket options, file identity, ioctl.

package main

import (
	"encoding/binary"
	"fmt"
	"math"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"
	"unsafe"
)

const (
	tcpNotsentLowat = 25     // linux/tcp.h
	sioOutq         = 0x5411 // linux/sockios.h
	sioOutqNsd      = 0x894b
	notsentLowat    = 16 << 10
)

// limitUnsent makes a TCP socket writable only while fewer than 16 KiB of it
// are unsent, so that the kernel does not hoard seconds of video for a reader
// that has stalled. It does not limit what is in flight. Accepted sockets do
// not inherit it.
func limitUnsent(_, _ string, c syscall.RawConn) error {
	// A kernel that does not know it works as well, only less fresh.
	return c.Control(func(fd uintptr) {
		syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpNotsentLowat, notsentLowat)
	})
}

// unsent returns how many bytes the kernel holds that it was not yet able to send.
func unsent(c syscall.RawConn) int { return queued(c, sioOutqNsd) }

// unacked returns how many bytes the kernel holds that the other side has not
// acknowledged: the unsent ones too.
func unacked(c syscall.RawConn) int { return queued(c, sioOutq) }

func queued(c syscall.RawConn, what uintptr) int {
	q := questions.Get().(*question)
	defer questions.Put(q)
	q.what, q.queued = what, 0
	c.Control(q.ask)
	return int(q.queued)
}

// question is one to a socket. It is used again, answer and all, since to ask for
// each message must allocate nothing.
type question struct {
	what   uintptr // an ioctl; 0: TCP_INFO
	queued int32   // the answer to the ioctl
	info   [168]byte
	ok     bool // info is the answer
	ask    func(fd uintptr)
}

var questions = sync.Pool{New: func() any {
	q := new(question)
	q.ask = func(fd uintptr) {
		if q.what != 0 {
			syscall.RawSyscall(syscall.SYS_IOCTL, fd, q.what, uintptr(unsafe.Pointer(&q.queued)))
			return
		}
		size := uint32(len(q.info))
		_, _, e := syscall.RawSyscall6(sysGetsockopt, fd, syscall.IPPROTO_TCP, syscall.TCP_INFO, uintptr(unsafe.Pointer(&q.info)), uintptr(unsafe.Pointer(&size)), 0)
		q.ok = e == 0 && int(size) == len(q.info) // of Linux 4.9
	}
	return q
}}

const canSendNow = true

// sendNow writes what a socket that does not block takes of the first parts, and
// returns how many bytes that is. It is a raw system call, as are those that ask a
// socket: the scheduler need not be ready for them to block.
func sendNow(fd int, parts [][]byte) int {
	var vec [4]syscall.Iovec
	parts = parts[:min(len(parts), len(vec))]
	for i, b := range parts {
		vec[i].Base = unsafe.SliceData(b)
		vec[i].SetLen(len(b))
	}
	n, _, e := syscall.RawSyscall(syscall.SYS_WRITEV, uintptr(fd), uintptr(unsafe.Pointer(&vec)), uintptr(len(parts)))
	if e != 0 {
		return 0
	}
	return int(n)
}

// tcpInfo returns what the kernel knows of a connection: how many bytes of it are
// acknowledged, its least round trip lately, how many bytes a second went while there
// were enough of them, and the bytes in a segment. ok is false if it does not tell.
// linux/tcp.h
func tcpInfo(c syscall.RawConn) (acked uint64, minRTT time.Duration, rate uint64, mss int, ok bool) {
	q := questions.Get().(*question)
	defer questions.Put(q)
	q.what, q.ok = 0, false
	c.Control(q.ask)
	acked = binary.NativeEndian.Uint64(q.info[120:])
	minRTT = time.Duration(binary.NativeEndian.Uint32(q.info[148:])) * time.Microsecond
	mss = int(binary.NativeEndian.Uint32(q.info[16:]))
	return acked, minRTT, binary.NativeEndian.Uint64(q.info[160:]), mss, q.ok
}

// sysGetsockopt is the number of the system call, which package syscall does not
// have everywhere; 0 is none that knows these arguments.
var sysGetsockopt = map[string]uintptr{"386": 365, "amd64": 55, "arm": 295, "arm64": 209, "riscv64": 209}[runtime.GOARCH]

// fileID returns device and inode of f as JOURNAL_STREAM has them, or "".
func fileID(f *os.File) string {
	info, err := f.Stat()
	if err != nil {
		return ""
	}
	s, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return ""
	}
	return fmt.Sprintf("%d:%d", s.Dev, s.Ino)
}

// descriptorLimit returns how many descriptors this process may have. Package syscall
// has raised the soft limit to the hard one.
func descriptorLimit() int {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return math.MaxInt
	}
	return int(min(limit.Cur, math.MaxInt))
}

func ioctl(fd int, request uintptr, arg unsafe.Pointer) error {
	if _, _, e := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), request, uintptr(arg)); e != 0 {
		return e
	}
	return nil
}

// mayOpen tells what keeps this user from reading and writing path, which it
// does not open.
func mayOpen(path string) error {
	const readWrite = 4 | 2 // unistd.h
	return syscall.Access(path, readWrite)
}

// lockFile locks f for this process alone, until f is closed. taken: another
// process has it.
func lockFile(f *os.File) (taken bool, err error) {
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if err == syscall.EWOULDBLOCK {
		return true, nil
	}
	return false, err
}
