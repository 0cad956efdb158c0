// What vw tells a service manager, when the environment says that one asks:
// sd_notify(3), the watchdog, and levels that the journal understands.

package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
)

// getenv returns the last value of a variable in env, or "".
func getenv(env []string, name string) (value string) {
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, name+"="); ok {
			value = v
		}
	}
	return value
}

// notifier tells the service manager how vw is doing. One that nobody asked
// for does nothing.
type notifier struct {
	log    *slog.Logger
	socket string
	every  time.Duration // how often the watchdog is fed; 0: nobody asked
}

// newNotifier reads NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID.
// sd_watchdog_enabled(3)
func newNotifier(env []string, log *slog.Logger) *notifier {
	n := &notifier{log: log, socket: getenv(env, "NOTIFY_SOCKET")}
	if pid := getenv(env, "WATCHDOG_PID"); pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return n
	}
	value := getenv(env, "WATCHDOG_USEC")
	usec, err := strconv.ParseInt(value, 10, 64)
	if value != "" && (err != nil || usec < 1 || usec > 1e12) {
		log.Warn(fmt.Sprintf("WATCHDOG_USEC=%.40q: the watchdog is not fed: it must be from 1 to 1000000000000", value))
		return n
	}
	n.every = time.Duration(usec) * time.Microsecond / 2
	return n
}

// tell sends a state, such as READY=1. It blocks for at most a second.
func (n *notifier) tell(state string) {
	if n.socket == "" {
		return
	}
	if err := n.send(state); err != nil {
		n.log.Warn("the service manager does not hear", "err", err)
	}
}

func (n *notifier) send(state string) error {
	if n.socket[0] != '/' && n.socket[0] != '@' {
		return fmt.Errorf("NOTIFY_SOCKET=%.120q: it must begin with / or @", n.socket)
	}
	conn, err := net.Dial("unixgram", n.socket) // net knows what @ means
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Second))
	_, err = conn.Write([]byte(state))
	return err
}

// watch feeds the watchdog until ctx is done: twice in its time, each time
// after works has returned. Where works is stuck, the watchdog bites.
func (n *notifier) watch(ctx context.Context, works func()) {
	if n.socket == "" || n.every == 0 {
		return
	}
	t := time.NewTicker(n.every)
	defer t.Stop()
	for {
		works()
		n.tell("WATCHDOG=1")
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}
