package main

import (
	"os/exec"
	"strings"
	"testing"
	"time"
	"unsafe"
)

// inQueue is how many bytes the kernel holds that were not read yet.
func inQueue(fd uintptr) int {
	var n int32
	ioctl(int(fd), 0x541b, unsafe.Pointer(&n)) // FIONREAD
	return int(n)
}

// TestPathDown: the link to a relay in a network namespace goes down, and
// comes back. It is the relay's end that goes down: ours keeps its route, so
// that nothing is sent elsewhere. It needs root, so it is one of the long ones.
func TestPathDown(t *testing.T) {
	if !*long {
		return
	}
	sh := func(command string) {
		t.Helper()
		if out, err := exec.Command("sh", "-c", command).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", command, err, out)
		}
	}
	sh("ip netns add vwtest && ip link add vwtest0 type veth peer name vwtest1 netns vwtest")
	t.Cleanup(func() { sh("ip netns del vwtest") })
	sh("ip addr add 198.51.100.1/30 dev vwtest0 && ip link set vwtest0 up")
	sh("ip -n vwtest addr add 198.51.100.2/30 dev vwtest1 && ip -n vwtest link set vwtest1 up")
	relay := start(t, "relay", exec.Command("ip", "netns", "exec", "vwtest", build(t, "relay"), "-listen", "198.51.100.2:8080", "-index", t.TempDir()+"/index"))
	relay.expect(t, 0, 5*time.Second, `198\.51`)

	var log logBuffer
	r, ctx, tasks := realRules(t, &log)
	c := ffmpegClip(t, 1000, 40)
	c.film(ctx, r.mux, "video0", tasks)
	r.to(t, "0", "video0", "ws://198.51.100.2:8080")
	delivered := func() uint64 {
		d, _ := r.destinations["0"].count()
		return d.delivered
	}
	for _, away := range []time.Duration{9 * time.Second, 12 * time.Second} {
		n := delivered()
		waitFor(t, "video", func() bool { return delivered() > n+25 })
		told := len(log.String())
		sh("ip -n vwtest link set vwtest1 down")
		down := time.Now()
		for !strings.Contains(log.String()[told:], "no connection") {
			if time.Since(down) > 7*time.Second {
				t.Fatal("not noticed within 7 s")
			}
			time.Sleep(time.Millisecond)
		}
		noticed := time.Since(down)
		time.Sleep(away - noticed)
		sh("ip -n vwtest link set vwtest1 up")
		up := time.Now()
		n = delivered()
		waitFor(t, "video again", func() bool { return delivered() > n })
		t.Logf("noticed after %v, video %v after the path's return", noticed, time.Since(up))
		if d := time.Since(up); d > 1500*time.Millisecond { // 1 s, and what a dial that met the dead path waits
			t.Errorf("video %v after the path's return", d)
		}
	}
}
