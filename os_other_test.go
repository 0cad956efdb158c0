//go:build !linux

// What other systems have in place of os_linux_test.go: the tests compile there.

package main

import (
	"errors"
	"syscall"
	"testing"
)

const signalStop, signalContinue = syscall.Signal(0), syscall.Signal(0)

func limitBacklog(syscall.RawConn) error { return errors.ErrUnsupported }

func limitReceived(syscall.RawConn, int) error { return nil }

func inQueue(uintptr) int { return 0 }

func holdPort(t *testing.T) int {
	t.Helper()
	t.Skip("a port that is held is known to work on Linux only")
	return 0
}
