package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// listenManager is a service manager's socket; told returns what it hears
// next, and fails the test after 5 s.
func listenManager(t *testing.T, name string) (told func() string) {
	t.Helper()
	c, err := net.ListenPacket("unixgram", name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return func() string {
		t.Helper()
		b := make([]byte, 4096)
		c.SetReadDeadline(time.Now().Add(settleTime))
		n, _, err := c.ReadFrom(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
}

func TestNotify(t *testing.T) {
	for _, tt := range []struct{ name, socket string }{
		{"path", filepath.Join(t.TempDir(), "notify")},
		{"abstract", fmt.Sprintf("@vw-test-%d", os.Getpid())},
	} {
		t.Run(tt.name, func(t *testing.T) {
			told := listenManager(t, tt.socket)
			addr, _, stop := runVW(t, "NOTIFY_SOCKET="+tt.socket, "WATCHDOG_USEC=20000", fmt.Sprint("WATCHDOG_PID=", os.Getpid()))
			if got := told(); got != "READY=1" {
				t.Fatalf("got %q, want READY=1", got)
			}
			if c, err := net.Dial("tcp", addr); err != nil {
				t.Errorf("when it is ready: %v", err)
			} else {
				c.Close()
			}
			for range 3 {
				if got := told(); got != "WATCHDOG=1" {
					t.Fatalf("got %q, want WATCHDOG=1", got)
				}
			}
			if got := stop(); got != 0 {
				t.Errorf("got status %d, want 0", got)
			}
			for {
				got := told()
				if got == "STOPPING=1" {
					break
				}
				if got != "WATCHDOG=1" {
					t.Fatalf("got %q, want STOPPING=1", got)
				}
			}
		})
	}
}

// TestNotifyDeaf: vw runs as ever where the manager cannot be told.
func TestNotifyDeaf(t *testing.T) {
	for _, tt := range []struct{ name, socket, want string }{
		{"no such socket", "/no/such/socket", "/no/such/socket"},
		{"not a socket", "vsock:2:1", `it must begin with / or @`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, log, stop := runVW(t, "NOTIFY_SOCKET="+tt.socket)
			waitFor(t, "a warning", func() bool { return strings.Contains(log.String(), "level=WARN") })
			if got := log.String(); !strings.Contains(got, tt.want) {
				t.Errorf("got %q, want %q in it", got, tt.want)
			}
			if got := stop(); got != 0 {
				t.Errorf("got status %d, want 0", got)
			}
		})
	}
}

func TestNewNotifier(t *testing.T) {
	for _, tt := range []struct {
		name string
		env  []string
		want time.Duration
	}{
		{"nobody asks", nil, 0},
		{"asked", []string{"WATCHDOG_USEC=30000000"}, 15 * time.Second},
		{"asked by pid", []string{"WATCHDOG_USEC=30000000", fmt.Sprint("WATCHDOG_PID=", os.Getpid())}, 15 * time.Second},
		{"another process", []string{"WATCHDOG_USEC=30000000", "WATCHDOG_PID=1"}, 0},
		{"zero", []string{"WATCHDOG_USEC=0"}, 0},
		{"negative", []string{"WATCHDOG_USEC=-1"}, 0},
		{"no number", []string{"WATCHDOG_USEC=10s"}, 0},
		{"overflows", []string{"WATCHDOG_USEC=9223372036854775807"}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := newNotifier(tt.env, discardLog).every; got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

// TestWatchdogBites: while a lock of the data path is stuck, whichever, the
// watchdog is not fed; afterwards it is.
func TestWatchdogBites(t *testing.T) {
	x := newMux()
	pub := &publisher{interrupt: func() {}}
	f := x.attach("video0", pub)
	defer x.detach(f, pub)
	onFeed, onStream := newSubscriber(bare, time.Second, nil), newSubscriber(bare, time.Second, nil)
	x.join("video0", onFeed)
	x.join("stream/a", onStream)
	for _, tt := range []struct {
		name string
		lock *sync.Mutex
	}{
		{"mux", &x.mu},
		{"feed", &f.mu},
		{"stream", &x.streams["stream/a"].mu},
		{"reader of a feed", &onFeed.mu},
		{"reader of a stream", &onStream.mu},
	} {
		t.Run(tt.name, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "notify")
			told := listenManager(t, socket)
			n := newNotifier([]string{"NOTIFY_SOCKET=" + socket, "WATCHDOG_USEC=1000"}, discardLog)
			ctx, cancel := context.WithCancel(t.Context())
			tried := make(chan struct{}, 1)
			var tasks sync.WaitGroup
			tt.lock.Lock()
			tasks.Go(func() {
				n.watch(ctx, func() {
					select {
					case tried <- struct{}{}:
					default:
					}
					x.tryLocks()
					n.tell("passed")
				})
			})
			select {
			case <-tried:
			case <-time.After(settleTime):
				t.Error("the watchdog is fed without a look")
			}
			time.Sleep(20 * time.Millisecond) // a watchdog that does not wait is fed by now
			n.tell("stuck")
			tt.lock.Unlock()
			for _, want := range []string{"stuck", "passed", "WATCHDOG=1"} {
				if got := told(); got != want {
					t.Errorf("got %q, want %q", got, want)
				}
			}
			cancel()
			tasks.Wait()
		})
	}
}
