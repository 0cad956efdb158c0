package main

import (
	"net"
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
