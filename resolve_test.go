package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// TestRace: which address wins, and after how long, when others are dead.
func TestRace(t *testing.T) {
	const hole, slow = time.Hour, 5 * time.Second
	for _, tt := range []struct {
		name  string
		takes []time.Duration // until each address answers; < 0: it refuses after that
		want  int             // the one that wins; -1: none
		after time.Duration
		text  string // of the error
	}{
		{"one", []time.Duration{10 * time.Millisecond}, 0, 10 * time.Millisecond, ""},
		{"the first of two is a hole", []time.Duration{hole, 0}, 1, dialStagger, ""},
		{"three of four are", []time.Duration{hole, hole, hole, 0}, 3, 3 * dialStagger, ""},
		{"the first refuses", []time.Duration{-time.Millisecond, 0}, 1, time.Millisecond, ""},
		{"a hole, then one that refuses", []time.Duration{hole, -time.Millisecond, 0}, 2, dialStagger + time.Millisecond, ""},
		{"the first is slow", []time.Duration{time.Second, hole, hole}, 0, time.Second, ""},
		{"the second is faster", []time.Duration{time.Second, 100 * time.Millisecond}, 1, dialStagger + 100*time.Millisecond, ""},
		{"too slow", []time.Duration{slow}, -1, dialTimeout, "no answer within 2s"},
		{"all refuse", []time.Duration{-time.Millisecond, -time.Millisecond}, -1, 2 * time.Millisecond, "connection refused"},
		{"both", []time.Duration{hole, -time.Millisecond}, -1, dialTimeout, "connection refused (192.0.2.1); no answer within 2s (192.0.2.0)"},
		{"twelve holes", slices.Repeat([]time.Duration{hole}, maxAddresses), -1, 4600 * time.Millisecond, "no answer within 2s"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var addrs []netip.Addr
				for i := range tt.takes {
					addrs = append(addrs, netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}))
				}
				var open atomic.Int64
				start := time.Now()
				conn, err := race(t.Context(), addrs, "80", func(ctx context.Context, _, address string) (net.Conn, error) {
					i := int(netip.MustParseAddrPort(address).Addr().As4()[3])
					wait := max(tt.takes[i], -tt.takes[i])
					select {
					case <-time.After(wait):
					case <-ctx.Done():
						return nil, ctx.Err()
					}
					if tt.takes[i] < 0 {
						return nil, &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
					}
					open.Add(1)
					return &counting{&open, i, nil}, nil
				})
				after := time.Since(start)
				winner, text := -1, ""
				if err != nil {
					text = err.Error()
				} else {
					winner = conn.(*counting).addr
				}
				if winner != tt.want || after != tt.after || text != tt.text {
					t.Errorf("got %d after %v, %q; want %d after %v, %q", winner, after, text, tt.want, tt.after, tt.text)
				}
				if n := open.Load(); n > 1 || n != map[bool]int64{true: 1}[winner >= 0] {
					t.Errorf("%d connections are left open", n)
				}
			})
		})
	}
}

// counting is a connection to an address that counts those that are open.
type counting struct {
	open *atomic.Int64
	addr int
	net.Conn
}

func (c *counting) Close() error { c.open.Add(-1); return nil }

func TestAlternate(t *testing.T) {
	parse := func(s string) (all []netip.Addr) {
		for _, a := range strings.Fields(s) {
			all = append(all, netip.MustParseAddr(a))
		}
		return all
	}
	for _, tt := range []struct{ in, want string }{
		{"192.0.2.1", "192.0.2.1"},
		{"2001:db8::1 2001:db8::2 2001:db8::3 192.0.2.1 192.0.2.2", "2001:db8::1 192.0.2.1 2001:db8::2 192.0.2.2 2001:db8::3"},
		{"::ffff:192.0.2.1 ::ffff:192.0.2.2 2001:db8::1", "192.0.2.1 2001:db8::1 192.0.2.2"},
	} {
		if got := alternate(parse(tt.in)); !slices.Equal(got, parse(tt.want)) {
			t.Errorf("%s: got %v, want %s", tt.in, got, tt.want)
		}
	}
	many := make([]netip.Addr, 100)
	for i := range many {
		many[i] = netip.AddrFrom4([4]byte{192, 0, 2, byte(i)})
	}
	if got := alternate(many); len(got) != maxAddresses {
		t.Errorf("got %d addresses, want %d", len(got), maxAddresses)
	}
}

// TestLocalhost: its addresses are known without asking anybody. RFC 6761 6.3
func TestLocalhost(t *testing.T) {
	for _, name := range []string{"localhost", "LocalHost", "localhost.", "vw.localhost"} {
		got, err := newResolver().addresses(t.Context(), name)
		if err != nil || len(got) != 2 || !got[0].IsLoopback() || !got[1].IsLoopback() {
			t.Errorf("%s: got %v, %v", name, got, err)
		}
	}
	if isLocalhost("localhost.example") || isLocalhost("notlocalhost") {
		t.Error("got another name for localhost")
	}
}

// nameserver answers for relay.test and relay.lab.test on an address of loopback,
// or is silent.
type nameserver struct {
	silent atomic.Bool
	mu     sync.Mutex
	addrs  []netip.Addr
}

func (n *nameserver) start(t *testing.T, addr string) {
	t.Helper()
	conn, err := net.ListenPacket("udp", addr+":53")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		b := make([]byte, 1500)
		for {
			size, from, err := conn.ReadFrom(b)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(b[:size]) != nil || n.silent.Load() {
				continue
			}
			answer, err := n.answer(m).Pack()
			if err != nil {
				t.Error(err)
				return
			}
			conn.WriteTo(answer, from)
		}
	})
	t.Cleanup(func() { conn.Close(); serving.Wait() })
}

func (n *nameserver) answer(m dnsmessage.Message) *dnsmessage.Message {
	q := m.Questions[0]
	m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
	if name := q.Name.String(); name != "relay.test." && name != "relay.lab.test." {
		m.RCode = dnsmessage.RCodeNameError
		return &m
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, a := range n.addrs {
		h := dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class}
		switch {
		case a.Is4() && q.Type == dnsmessage.TypeA:
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AResource{A: a.As4()}})
		case a.Is6() && q.Type == dnsmessage.TypeAAAA:
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AAAAResource{AAAA: a.As16()}})
		}
	}
	return &m
}

// TestLookups: a rule whose relay has a name, with nameservers that are silent and
// addresses that are black holes: how soon it is connected, and what is told.
func TestLookups(t *testing.T) {
	t.Parallel()
	if !inNamespace(t) {
		return
	}
	resolv := filepath.Join(t.TempDir(), "resolv.conf")
	write := func(text string) {
		if err := os.WriteFile(resolv, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("nameserver 127.0.0.2\n")
	for _, c := range []string{
		"mount --bind " + resolv + " /etc/resolv.conf",
		"ip link add hole0 type veth peer name hole1 && ip link set hole0 up && ip link set hole1 up",
		"ip addr add 198.51.100.1/24 dev hole0 && ip addr add 2001:db8::1/64 dev hole0 nodad",
		// What is sent there arrives nowhere.
		"for i in 7 8 9; do ip neigh add 198.51.100.$i lladdr 02:00:00:00:00:0$i dev hole0 && ip neigh add 2001:db8::$i lladdr 02:00:00:00:00:0$i dev hole0; done",
	} {
		if out, err := exec.Command("sh", "-c", c).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", c, err, out)
		}
	}
	var servers [3]nameserver
	for i := range servers {
		servers[i].start(t, fmt.Sprintf("127.0.0.%d", i+2))
	}
	l := listenLoopback(t)
	serveEach(t, l, good)
	port := l.Addr().(*net.TCPAddr).Port
	good := netip.MustParseAddr("127.0.0.1")
	hole := func(s string) netip.Addr { return netip.MustParseAddr(s) }
	const three = "nameserver 127.0.0.2\nnameserver 127.0.0.3\nnameserver 127.0.0.4\n"
	for _, tt := range []struct {
		name, conf string
		silent     int // of the nameservers, the first
		addrs      []netip.Addr
		relay      string
		within     time.Duration
	}{
		{"all well", three, 0, []netip.Addr{good}, "relay.test", 500 * time.Millisecond},
		{"first nameserver silent", three, 1, []netip.Addr{good}, "relay.test", 3 * time.Second},
		{"two silent", three, 2, []netip.Addr{good}, "relay.test", 5 * time.Second},
		{"first silent, by search domain", three + "search lab.test\n", 1, []netip.Addr{good}, "relay", 3 * time.Second},
		{"two silent, patient resolv.conf", three + "options timeout:30 attempts:5\n", 2, []netip.Addr{good}, "relay.test", 5 * time.Second},
		{"first address a hole", three, 0, []netip.Addr{hole("198.51.100.9"), good}, "relay.test", 1500 * time.Millisecond},
		{"three of four holes", three, 0, []netip.Addr{hole("198.51.100.9"), hole("198.51.100.8"), hole("198.51.100.7"), good}, "relay.test", 1500 * time.Millisecond},
		{"IPv6 dead", three, 0, []netip.Addr{hole("2001:db8::9"), hole("2001:db8::8"), hole("2001:db8::7"), good}, "relay.test", 1500 * time.Millisecond},
	} {
		t.Run(tt.name, func(t *testing.T) {
			write(tt.conf)
			time.Sleep(5100 * time.Millisecond) // Go looks at resolv.conf every 5 s
			for i := range servers {
				servers[i].silent.Store(i < tt.silent)
				servers[i].mu.Lock()
				servers[i].addrs = tt.addrs
				servers[i].mu.Unlock()
			}
			var log logBuffer
			r, _, _ := realRules(t, &log)
			start := time.Now()
			r.to(t, "0", "video0", fmt.Sprintf("ws://%s:%d", tt.relay, port))
			eventually(t, 15*time.Second, func() error {
				if !strings.Contains(log.String(), "msg=connected") {
					return errors.New(log.String())
				}
				return nil
			})
			if d := time.Since(start); d > tt.within {
				t.Errorf("connected after %v, want %v at most", d, tt.within)
			} else {
				t.Logf("connected after %v", d)
			}
		})
	}
	for _, tt := range []struct{ name, conf, relay string }{
		{"all silent", three, "relay.test"},
		{"all silent, with search domains", three + "search a.test b.test lab.test\n", "relay"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			write(tt.conf)
			time.Sleep(5100 * time.Millisecond)
			for i := range servers {
				servers[i].silent.Store(true)
				servers[i].mu.Lock()
				servers[i].addrs = []netip.Addr{good}
				servers[i].mu.Unlock()
			}
			var log logBuffer
			r, _, _ := realRules(t, &log)
			start := time.Now()
			r.to(t, "0", "video0", fmt.Sprintf("ws://%s:%d", tt.relay, port))
			eventually(t, 10*time.Second, func() error {
				if !strings.Contains(log.String(), "no nameserver answers") {
					return errors.New(log.String())
				}
				return nil
			})
			told := time.Since(start)
			s := r.destinations["0"].stats(time.Now())
			if !strings.HasPrefix(s.Advice, "No nameserver answers, so the address of "+tt.relay+" is not known") {
				t.Errorf("got the advice %q", s.Advice)
			}
			time.Sleep(7 * time.Second)
			for i := range servers {
				servers[i].silent.Store(false)
			}
			start = time.Now()
			eventually(t, 4*time.Second, func() error {
				if !strings.Contains(log.String(), "msg=connected") && r.destinations["0"].stats(time.Now()).State != "open" {
					return errors.New(log.String())
				}
				return nil
			})
			t.Logf("told after %v, open %v after their return", told, time.Since(start))
		})
	}
	t.Run("no such name", func(t *testing.T) {
		var log logBuffer
		r, _, _ := realRules(t, &log)
		r.to(t, "0", "video0", "ws://other.test")
		eventually(t, 4*time.Second, func() error {
			if !strings.Contains(log.String(), `err="lookup other.test: no such host"`) {
				return errors.New(log.String())
			}
			return nil
		})
	})
}
