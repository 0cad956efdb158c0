package main

import (
	"syscall"
	"unsafe"
)

// inQueue is how many bytes the kernel holds that were not read yet.
func inQueue(fd uintptr) int {
	var n int32
	syscall.Syscall(syscall.SYS_IOCTL, fd, 0x541b, uintptr(unsafe.Pointer(&n))) // FIONREAD
	return int(n)
}
