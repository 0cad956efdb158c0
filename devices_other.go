//go:build !linux

package main

// queryCamera and mayOpen are not reached here: listDevices ends before.

func queryCamera(string) (string, []format, error) { return "", nil, errNotLinux }

func mayOpen(string) error { return errNotLinux }
