package main

import (
	"fmt"
	"os"
	"syscall"
)

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
