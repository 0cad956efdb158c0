//go:build !race

package main

// raceEnabled: the race detector watches, and everything takes longer.
const raceEnabled = false
