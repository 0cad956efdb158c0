// Check: vw check URL does once, step by step, what a destination does with
// that URL, by the destination's own code, and says in one sentence what is
// wrong. What it sends are null packets, which every player leaves out.

package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"
)

const (
	checkTime    = 5 * time.Second // of sending
	checkRate    = 8e6             // bit/s, at most
	checkEnough  = 1.5e6           // bit/s: the lines of vw devices, and a quarter more
	checkPackets = 50              // in a message
)

// nullPackets are a message's. ISO 13818-1 2.4.1.
var nullPackets = bytes.Repeat(append([]byte{0x47, 0x1f, 0xff, 0x10}, bytes.Repeat([]byte{0xff}, packetSize-4)...), checkPackets)

// checkup is one run of vw check, in one goroutine.
type checkup struct {
	d     *destination // what a rule with the URL would run
	proxy *url.URL     // on the way; nil: none
	out   io.Writer
	begun time.Time // the step that is on

	failed string // the step that failed; "": none has
	err    error  // why
}

// check is vw check: it prints a line for each step and a sentence. It takes
// some 6 s when all is well, and returns the exit status.
func check(ctx context.Context, target string, stdout, stderr io.Writer) int {
	_, u, err := destinationRule{ID: "check", Stream: "check", Destination: target}.clean()
	if err != nil {
		fmt.Fprintln(stderr, "vw:", err)
		return 2
	}
	c := &checkup{d: &destination{url: u, proxy: http.ProxyFromEnvironment}, out: stdout, begun: time.Now()}
	c.d.dial = c.dial
	c.run(ctx)
	fmt.Fprintln(stdout, printable(c.sentence()))
	if c.err != nil {
		return 1
	}
	return 0
}

// run takes the steps until one fails.
func (c *checkup) run(ctx context.Context) {
	c.proxy, _ = c.d.proxyOf(c.d.url) // reach tells the error
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{DNSDone: c.named, TLSHandshakeDone: c.secured})
	conn, err := c.d.reach(ctx, c.d.url)
	if c.err != nil {
		return
	}
	via := "none on this way"
	if c.proxy != nil {
		via = "a tunnel through " + c.proxy.Host
	}
	if !c.did("proxy", err, via) {
		return
	}
	l := newLink(conn, slog.New(slog.DiscardHandler))
	l.pings = 0 // measure does that
	in, err := l.open(ctx, c.d.url, c.d.roots, make(http.Header))
	if err != nil {
		conn.Close()
	}
	var status statusError
	switch {
	case c.err != nil:
		return
	case errors.As(err, &status) && (status.code == 401 || status.code == 403):
		c.did("authorised", err, "")
		return
	}
	if !c.did("upgrade", err, "a websocket") {
		return
	}
	// Here the relay has taken what the URL says: a token that goes another
	// way than user and password is a step of its own, in this place.
	allowed := "nothing was asked for"
	if c.d.url.User != nil {
		allowed = "with the user and password of the URL"
	}
	c.did("authorised", nil, allowed)

	s := l.subscribe(masked, 500*time.Millisecond)
	serving, cancel := context.WithCancelCause(ctx)
	ended := make(chan error, 1)
	var tasks sync.WaitGroup
	tasks.Go(func() { ended <- l.serve(serving, s, func() error { return discard(in) }, func() {}) })
	c.measure(l, s, ended)
	cancel(errRemoved)
	tasks.Wait()
	s.end()
}

// dial is the destination's: it tells of the steps name and tcp.
func (c *checkup) dial(ctx context.Context, network, address string) (net.Conn, error) {
	host, _, _ := net.SplitHostPort(address)
	if _, err := netip.ParseAddr(host); err == nil {
		c.did("name", nil, host+" is an address")
	}
	conn, err := (&net.Dialer{Control: limitUnsent}).DialContext(ctx, network, address)
	switch {
	case c.err != nil: // of the name
	case err != nil:
		c.did("tcp", err, "")
	default:
		c.did("tcp", nil, conn.RemoteAddr().String())
	}
	return conn, err
}

// named tells of the step name.
func (c *checkup) named(i httptrace.DNSDoneInfo) {
	var all []string
	for _, a := range i.Addrs {
		all = append(all, a.String())
	}
	c.did("name", i.Err, strings.Join(all, ", "))
}

// secured tells of the step tls.
func (c *checkup) secured(s tls.ConnectionState, err error) {
	certs := s.PeerCertificates
	var bad *tls.CertificateVerificationError
	if errors.As(err, &bad) {
		certs = bad.UnverifiedCertificates
	}
	if len(certs) == 0 {
		c.did("tls", err, "")
		return
	}
	leaf := certs[0]
	about := fmt.Sprintf("certificate of %s by %s, until %s (%d days)", holders(leaf), cmp.Or(leaf.Issuer.String(), "nobody"),
		leaf.NotAfter.Format(time.DateOnly), int(time.Until(leaf.NotAfter).Hours()/24))
	if err != nil {
		err = fmt.Errorf("%w; %s", err, about)
	}
	c.did("tls", err, about)
}

// holders is whom a certificate is for.
func holders(c *x509.Certificate) string {
	all := c.DNSNames
	for _, ip := range c.IPAddresses {
		all = append(all, ip.String())
	}
	if len(all) == 0 {
		return "no host"
	}
	return strings.Join(all[:min(len(all), 5)], ", ")
}

// measure takes the steps of an open websocket, ping and send. ended tells why
// it was closed.
func (c *checkup) measure(l *link, s *subscriber, ended <-chan error) {
	var least, most time.Duration
	for i := range 3 {
		rtt, err := ping(l, ended)
		if err != nil {
			c.did("ping", err, "")
			return
		}
		most = max(most, rtt)
		if least = min(least, rtt); i == 0 {
			least = rtt
		}
	}
	c.did("ping", nil, fmt.Sprintf("round trips of %.1f to %.1f ms", ms(least), ms(most)))

	const each = time.Duration(checkPackets * packetSize * 8 / checkRate * float64(time.Second))
	start := time.Now()
	for at := time.Duration(0); at < checkTime; at += each {
		select {
		case err := <-ended:
			c.did("send", err, "")
			return
		case <-time.After(time.Until(start.Add(at))):
		}
		m := newMessage(nullPackets, time.Now(), chunkInfo{start: true, lead: true})
		s.offer(m)
		m.release()
	}
	counts, _ := s.count()
	sent := int(counts.bytes) // handed to the kernel, all of it before the next ping
	acked := sent             // or all that is known
	if l.tcp != nil {
		acked -= min(sent, unacked(l.tcp))
	}
	took := time.Since(start)
	mbit := func(n int) float64 { return float64(n) * 8 / took.Seconds() / 1e6 }
	rtt, err := ping(l, ended)
	if err != nil {
		c.did("send", fmt.Errorf("%w, after %.1f Mbit/s that the next machine acknowledged", err, mbit(acked)), "")
		return
	}
	took += rtt - least // until the relay had read all of it
	detail := fmt.Sprintf("%.1f Mbit/s of at most %.0f", mbit(sent), checkRate/1e6)
	if mbit(sent) < checkEnough/1e6 {
		err = errors.New(detail)
	}
	c.did("send", err, detail)
}

// ping waits for the pong to a ping, at most 5 s.
func ping(l *link, ended <-chan error) (time.Duration, error) {
	l.control <- l.newPing(time.Now()) // there is room
	l.wake()
	timeout := time.After(maxStall)
	for l.ping.Load() != nil {
		select {
		case err := <-ended:
			return 0, err
		case <-timeout:
			return 0, fmt.Errorf("no answer to a ping within %v", maxStall)
		case <-time.After(time.Millisecond):
		}
	}
	return time.Duration(l.roundTrip.Load()), nil
}

// did tells of the step that has ended, with err or else the detail, and the
// next begins. It returns whether the step went well.
func (c *checkup) did(step string, err error, detail string) bool {
	now := time.Now()
	state := "ok"
	if err != nil {
		state = "FAILED"
		c.failed, c.err = step, err
		detail = err.Error()
	}
	fmt.Fprintf(c.out, "%-11s %-6s %8.1f ms  %s\n", step, state, ms(now.Sub(c.begun)), printable(detail))
	c.begun = now
	return err == nil
}

func ms(d time.Duration) float64 { return d.Seconds() * 1000 }

// sentence says how it went.
func (c *checkup) sentence() string {
	u := c.d.url
	relay, next, name := hostPort(u), hostPort(u), u.Hostname()
	advice := "; if this network has a proxy, set HTTPS_PROXY (for wss) or HTTP_PROXY (for ws)"
	if c.proxy != nil {
		next, name, advice = "the proxy "+hostPort(c.proxy), c.proxy.Hostname(), ""
	}
	var timeout net.Error
	switch c.failed {
	case "":
		return fmt.Sprintf("All is well: video can go from here to %s.", relay)
	case "name":
		return fmt.Sprintf("The name %s was not found: look at its spelling, and at this machine's DNS%s.", name, advice)
	case "tcp":
		if errors.As(c.err, &timeout) && timeout.Timeout() {
			return fmt.Sprintf("Nothing answers at %s: it is down, or a firewall drops what is sent there%s.", next, advice)
		}
		return fmt.Sprintf("The connection to %s is refused: nothing listens there, or a firewall refuses it%s.", next, advice)
	case "proxy":
		return c.proxySentence()
	case "tls":
		return c.tlsSentence()
	case "upgrade":
		return c.upgradeSentence()
	case "authorised":
		if u.User == nil && u.RawQuery == "" {
			return fmt.Sprintf("The relay at %s does not let everybody in: the URL has no user and password, and no code.", relay)
		}
		return fmt.Sprintf("The relay at %s does not accept the credentials of the URL.", relay)
	}
	switch {
	case errors.Is(c.err, errFrame):
		return fmt.Sprintf("What answers at %s breaks the rules of websockets, or something on the way alters what it sends.", relay)
	case errors.Is(c.err, errPeerClosed), errors.Is(c.err, io.ErrUnexpectedEOF), errors.As(c.err, new(*os.SyscallError)):
		return fmt.Sprintf("The relay at %s opens the websocket and closes it again: it does not want what this URL asks for, and its log may say why.", relay)
	case c.failed == "ping":
		return "The websocket opens, but nothing comes back through it: the relay hangs, or something on the way holds websockets up."
	}
	return fmt.Sprintf("The way to %s is too slow for video: a camera needs %.1f Mbit/s.", relay, checkEnough/1e6)
}

func (c *checkup) proxySentence() string {
	if c.proxy == nil {
		return "The proxy that the environment names is not one for vw: HTTPS_PROXY and HTTP_PROXY must be http:// or https:// URLs."
	}
	var answer refusal
	name := c.proxy.Host
	switch {
	case !errors.As(c.err, &answer):
		return fmt.Sprintf("The proxy %s does not open a tunnel: it may not be an HTTP proxy.", name)
	case (answer.code == 407 || answer.code == 401) && c.proxy.User == nil:
		return fmt.Sprintf("The proxy %s wants a user and password: HTTPS_PROXY and HTTP_PROXY take them as http://user:password@host:port.", name)
	case answer.code == 407 || answer.code == 401:
		return fmt.Sprintf("The proxy %s does not accept its user and password.", name)
	case answer.code/100 == 5:
		return fmt.Sprintf("The proxy %s can't reach %s.", name, hostPort(c.d.url))
	}
	return fmt.Sprintf("The proxy %s forbids connections to %s.", name, hostPort(c.d.url))
}

func (c *checkup) tlsSentence() string {
	host, relay := c.d.url.Hostname(), hostPort(c.d.url)
	var (
		name    x509.HostnameError
		invalid x509.CertificateInvalidError
		unknown x509.UnknownAuthorityError
		record  tls.RecordHeaderError
	)
	switch {
	case errors.As(c.err, &name):
		return fmt.Sprintf("The certificate is for %s, not for %s: the URL has another host than the relay.", holders(name.Certificate), host)
	case errors.As(c.err, &invalid) && invalid.Reason == x509.Expired:
		now := time.Now()
		if now.Before(invalid.Cert.NotBefore) {
			return fmt.Sprintf("The certificate of %s is valid from %s on: this machine's clock may be wrong, it says %s.", host, invalid.Cert.NotBefore.Format(time.DateOnly), now.Format(time.DateOnly))
		}
		return fmt.Sprintf("The certificate of %s expired on %s; this machine's clock says %s.", host, invalid.Cert.NotAfter.Format(time.DateOnly), now.Format(time.DateOnly))
	case errors.As(c.err, &unknown):
		return fmt.Sprintf("The certificate of %s is from an authority that this machine does not know: one of your own belongs into SSL_CERT_FILE, any other may be a firewall that listens in.", host)
	case errors.As(c.err, &record):
		return fmt.Sprintf("What answers at %s does not speak TLS: the URL may have to begin with ws.", relay)
	}
	return fmt.Sprintf("TLS with %s fails: it is no TLS server, or something on the way cuts the connection.", relay)
}

func (c *checkup) upgradeSentence() string {
	path, relay := cmp.Or(c.d.url.EscapedPath(), "/"), hostPort(c.d.url)
	var status statusError
	answered := errors.As(c.err, &status) && status.code > 0
	switch {
	case answered && status.code == 404:
		return fmt.Sprintf("There is nothing at %s on %s: look at the path of the URL.", path, relay)
	case answered && 502 <= status.code && status.code <= 504:
		return fmt.Sprintf("What stands in front of the relay at %s answers, but does not reach it.", relay)
	case answered:
		return fmt.Sprintf("What answers at %s is a web server, but opens no websocket at %s.", relay, path)
	case errors.Is(c.err, errNoAnswer):
		return fmt.Sprintf("What listens at %s accepts the connection and is silent: the relay hangs, or something on the way holds websockets up.", relay)
	case errors.Is(c.err, errUnanswered):
		return fmt.Sprintf("What listens at %s accepts the connection and closes it: it is no relay, or something on the way cuts it.", relay)
	}
	return fmt.Sprintf("What answers at %s is no websocket server, or something on the way is in between.", relay)
}
