// What only Linux has: socket options, file identity, ioctl.

package main

import (
	"fmt"
	"net"
	"os"
	"syscall"
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

// unsent is how many bytes the kernel holds that it was not yet able to send.
func unsent(conn *net.TCPConn) int { return queued(conn, sioOutqNsd) }

// unacked is how many bytes the kernel holds that have not arrived, as far as
// it knows: the unsent ones too.
func unacked(conn *net.TCPConn) int { return queued(conn, sioOutq) }

func queued(conn *net.TCPConn, what uintptr) int {
	c, err := conn.SyscallConn()
	if err != nil {
		return 0
	}
	var n int32
	c.Control(func(fd uintptr) {
		ioctl(int(fd), what, unsafe.Pointer(&n))
	})
	return int(n)
}

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
