//go:build !linux

// What other systems have in place of os_linux.go.

package main

import (
	"errors"
	"net"
	"os"
	"syscall"
)

// limitUnsent does nothing where TCP_NOTSENT_LOWAT is not known to work.
func limitUnsent(_, _ string, _ syscall.RawConn) error { return nil }

// unsent and unacked are not known here.
func unsent(*net.TCPConn) int { return 0 }

func unacked(*net.TCPConn) int { return 0 }

// fileID is not known where there is no journal.
func fileID(*os.File) string { return "" }

// queryCamera and mayOpen are not reached here: listDevices ends before.

func queryCamera(string) (string, []format, error) { return "", nil, errNotLinux }

func mayOpen(string) error { return errNotLinux }

// lockFile is known to work on Linux only.
func lockFile(*os.File) (taken bool, err error) { return false, errors.ErrUnsupported }
