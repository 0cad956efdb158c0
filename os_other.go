//go:build !linux

package main

import (
	"net"
	"syscall"
)

// limitUnsent does nothing where TCP_NOTSENT_LOWAT is not known to work.
func limitUnsent(_, _ string, _ syscall.RawConn) error { return nil }

// unsent and unacked are not known here.
func unsent(*net.TCPConn) int { return 0 }

func unacked(*net.TCPConn) int { return 0 }
