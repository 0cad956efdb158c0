// Names and addresses: the first two steps of the way to a relay.
//
// A dead nameserver and a dead address cost time, never the way: each nameserver
// is asked, and each address of a name is tried, within a budget of its own.

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	nameTimeout    = 6 * time.Second         // of a lookup, whatever resolv.conf says
	askTimeout     = 1500 * time.Millisecond // of one nameserver
	slowAskTimeout = 3 * time.Second         // the same, when none answered in that time
	dialTimeout    = 2 * time.Second         // of one address
	dialStagger    = 300 * time.Millisecond  // until the next address is tried beside it. RFC 8305 5
	maxAddresses   = 12                      // of a name, that are tried
)

// errNoAnswer is the error of who was silent for as long as he had.
var errNoAnswer = errors.New("no answer")

// resolver looks up names. Go's own resolver waits 5 s for each nameserver, twice,
// and again for each search domain. Safe for concurrent use.
type resolver struct {
	net.Resolver
	slow atomic.Bool // nobody answered the last time: wait longer now
}

func newResolver() *resolver {
	r := &resolver{}
	r.PreferGo = runtime.GOOS == "linux" // elsewhere the system knows better
	r.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		wait := askTimeout
		if r.slow.Load() {
			wait = slowAskTimeout
		}
		ctx, cancel := context.WithTimeout(ctx, wait)
		defer cancel()
		conn, err := new(net.Dialer).DialContext(ctx, network, address)
		if udp, ok := conn.(*net.UDPConn); ok {
			return askUDP{udp, time.Now().Add(wait)}, nil
		}
		if err != nil {
			return nil, err
		}
		return askTCP{conn, time.Now().Add(wait)}, nil
	}
	return r
}

// askUDP is a connection to a nameserver whose deadline is latest or before. It
// stays a net.PacketConn, by which Go's resolver tells UDP from TCP.
type askUDP struct {
	*net.UDPConn
	latest time.Time
}

func (c askUDP) SetDeadline(t time.Time) error { return c.UDPConn.SetDeadline(earlier(t, c.latest)) }

// askTCP is the same for TCP, over which long answers come.
type askTCP struct {
	net.Conn
	latest time.Time
}

func (c askTCP) SetDeadline(t time.Time) error { return c.Conn.SetDeadline(earlier(t, c.latest)) }

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// addresses returns the addresses of host, IPv6 and IPv4 in turns (RFC 8305 4),
// or a lookupError.
func (r *resolver) addresses(ctx context.Context, host string) ([]netip.Addr, error) {
	if isLocalhost(host) {
		return []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, nameTimeout)
	defer cancel()
	all, err := r.LookupNetIP(ctx, "ip", host)
	if err != nil {
		e := lookupError{name: host, cause: "no such host"}
		var dns *net.DNSError
		switch known := errors.As(err, &dns); {
		case ctx.Err() != nil || known && dns.IsTimeout:
			e.timeout, e.cause = true, "no nameserver answers"
			r.slow.Store(!r.slow.Load())
		case known && !dns.IsNotFound:
			e.cause = fmt.Sprintf("%.100s", dns.Err)
		case !known:
			e.cause = fmt.Sprintf("%.100s", err)
		}
		return nil, e
	}
	return alternate(all), nil
}

// isLocalhost reports whether a name is this machine's by definition. RFC 6761 6.3
func isLocalhost(name string) bool {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	return name == "localhost" || strings.HasSuffix(name, ".localhost")
}

// alternate takes addresses of both families in turns, the first one's family
// first. RFC 8305 4
func alternate(all []netip.Addr) []netip.Addr {
	var first, second []netip.Addr
	for _, a := range all {
		if a = a.Unmap(); a.Is4() == all[0].Unmap().Is4() {
			first = append(first, a)
		} else {
			second = append(second, a)
		}
	}
	var turns []netip.Addr
	for i := range max(len(first), len(second)) {
		turns = append(turns, first[min(i, len(first)):min(i+1, len(first))]...)
		turns = append(turns, second[min(i, len(second)):min(i+1, len(second))]...)
	}
	return turns[:min(len(turns), maxAddresses)]
}

// lookupError is the error of a name without an address.
type lookupError struct {
	name    string
	cause   string
	timeout bool // whether the name exists is not known
}

func (e lookupError) Error() string { return "lookup " + e.name + ": " + e.cause }

// dialFunc connects to one address, as net.Dialer.DialContext.
type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// race connects to the first of addrs that answers. Each has 2 s, and the next
// one is tried beside it after 0.3 s, or at once when it fails. RFC 8305 5
func race(ctx context.Context, addrs []netip.Addr, port string, dial dialFunc) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	tried := make(chan try, len(addrs))
	var tries sync.WaitGroup
	defer func() {
		cancel()
		tries.Wait()
		close(tried)
		for t := range tried { // they come too late
			if t.err == nil {
				t.conn.Close()
			}
		}
	}()
	var failed connectError
	started := 0
	startNext := func() {
		if started == len(addrs) {
			return
		}
		addr := addrs[started]
		started++
		tries.Go(func() { tried <- tryOne(ctx, addr, port, dial) })
	}
	stagger := time.NewTicker(dialStagger)
	defer stagger.Stop()
	startNext()
	for len(failed) < len(addrs) {
		select {
		case t := <-tried:
			if t.err == nil {
				return t.conn, nil
			}
			failed = append(failed, t)
			stagger.Reset(dialStagger)
		case <-stagger.C:
		}
		startNext()
	}
	return nil, failed
}

// tryOne connects to one address.
func tryOne(ctx context.Context, addr netip.Addr, port string, dial dialFunc) try {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	conn, err := dial(ctx, "tcp", net.JoinHostPort(addr.String(), port))
	if err != nil && (ctx.Err() == context.DeadlineExceeded || errors.Is(err, os.ErrDeadlineExceeded)) {
		err = fmt.Errorf("%w within %v", errNoAnswer, dialTimeout)
	}
	return try{addr, conn, err}
}

// try is an attempt at one address.
type try struct {
	addr netip.Addr
	conn net.Conn
	err  error
}

// connectError is the error of a host none of whose addresses could be connected
// to: what became of each.
type connectError []try

func (e connectError) Error() string {
	causes := make(map[string][]string) // addresses by what became of them
	for _, t := range e {
		err := withoutAddresses(t.err)
		var errno syscall.Errno
		if errors.As(err, &errno) {
			err = errno
		}
		causes[err.Error()] = append(causes[err.Error()], t.addr.String())
	}
	var all []string
	for cause, addrs := range causes {
		if len(causes) > 1 {
			cause += " (" + strings.Join(slices.Sorted(slices.Values(addrs)), ", ") + ")"
		}
		all = append(all, cause)
	}
	slices.Sort(all) // the order in which they failed is no other error
	return strings.Join(all, "; ")
}

// refused reports whether every address refused the connection.
func (e connectError) refused() bool {
	return !slices.ContainsFunc(e, func(t try) bool { return !errors.Is(t.err, syscall.ECONNREFUSED) })
}

// timeout reports whether some address did not answer, and none refused.
func (e connectError) timeout() bool {
	silent := false
	for _, t := range e {
		if errors.Is(t.err, syscall.ECONNREFUSED) {
			return false
		}
		silent = silent || errors.Is(t.err, errNoAnswer)
	}
	return silent
}
