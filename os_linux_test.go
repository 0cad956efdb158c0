// What the tests need of Linux: sockets as only it lets them be, and signals.

package main

import (
	"errors"
	"syscall"
	"testing"
	"unsafe"
)

// The signals that stop a process and let it go on.
const (
	signalStop     = syscall.SIGSTOP
	signalContinue = syscall.SIGCONT
)

// limitBacklog makes the kernel hold one connection that a listener has not accepted.
func limitBacklog(c syscall.RawConn) (err error) {
	c.Control(func(fd uintptr) { err = syscall.Listen(int(fd), 0) })
	return err
}

// limitReceived makes the kernel hold so many bytes that were not read yet. What is
// accepted inherits it.
func limitReceived(c syscall.RawConn, bytes int) error {
	return c.Control(func(fd uintptr) { syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, bytes) })
}

// inQueue is how many bytes the kernel holds that were not read yet.
func inQueue(fd uintptr) int {
	var n int32
	ioctl(int(fd), 0x541b, unsafe.Pointer(&n)) // FIONREAD
	return int(n)
}

// holdPort returns a port of 127.0.0.1 that nobody listens on until the test
// ends, but who shares it.
func holdPort(t *testing.T) int {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	const reusePort = 15 // asm-generic/socket.h
	addr := &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}
	if err := errors.Join(syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, reusePort, 1), syscall.Bind(fd, addr)); err != nil {
		t.Fatal(err)
	}
	name, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return name.(*syscall.SockaddrInet4).Port
}
