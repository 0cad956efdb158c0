//go:build !linux

// What other systems have in place of os_linux.go.

package main

import (
	"errors"
	"math"
	"os"
	"syscall"
	"time"
)

// limitUnsent does nothing where TCP_NOTSENT_LOWAT is not known to work.
func limitUnsent(_, _ string, _ syscall.RawConn) error { return nil }

// unsent, unacked and tcpInfo are not known here.

func unsent(syscall.RawConn) int { return 0 }

func unacked(syscall.RawConn) int { return 0 }

func tcpInfo(syscall.RawConn) (acked uint64, minRTT time.Duration, rate uint64, mss int, ok bool) {
	return 0, 0, 0, 0, false
}

// sendNow is not tried here: a link writes in its own goroutine.

const canSendNow = false

func sendNow(int, [][]byte) int { return 0 }

// fileID is not known where there is no journal.
func fileID(*os.File) string { return "" }

// queryCamera and mayOpen are not reached here: listDevices ends before.

func queryCamera(string) (string, []format, error) { return "", nil, errNotLinux }

func mayOpen(string) error { return errNotLinux }

// descriptorLimit is not known here.
func descriptorLimit() int { return math.MaxInt }

// lockFile is known to work on Linux only.
func lockFile(*os.File) (taken bool, err error) { return false, errors.ErrUnsupported }
