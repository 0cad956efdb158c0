// The way to a relay, in the steps that vw check prints: name, TCP, proxy, TLS,
// upgrade, token. Each step has a budget of its own.
//
// On ws and wss a token is the first text message, and a text message answers
// whether it is good (crossbar). On http and https a POST with the token is
// answered with the URL of a websocket, in which a code is good once and for
// 30 s (practable). Without a token the handshake is all.

package main

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"
)

const (
	accessTimeout = 7 * time.Second // of the answer to the POST
	maxAccess     = 64 << 10        // bytes of answer to the POST
)

// dialer is what all ways to relays have in common. It may be copied, and used by
// several goroutines at once.
type dialer struct {
	lookup func(ctx context.Context, host string) ([]netip.Addr, error)
	dial   dialFunc
	proxy  func(*http.Request) (*url.URL, error) // on the way to a relay; nil: none
	roots  *x509.CertPool                        // that vouch for relays; nil: the system's

	trace func(s step, err error, detail string) // is told of each step that ends; may be nil
}

func newDialer() dialer {
	d := &net.Dialer{Control: limitUnsent}
	return dialer{lookup: newResolver().addresses, dial: d.DialContext}
}

// target is a relay, and what it is to be shown.
type target struct {
	url    *url.URL
	token  string
	header http.Header
	secret []string // what no text may show
}

// step is a part of the way to a relay, as vw check prints it.
type step string

const (
	stepName    step = "name"
	stepTCP     step = "tcp"
	stepProxy   step = "proxy"
	stepTLS     step = "tls"
	stepUpgrade step = "upgrade"
	stepToken   step = "authorised"
	stepPing    step = "ping"
	stepSend    step = "send"
)

// stepError is the error of a step on the way to a relay.
type stepError struct {
	step  step
	at    *url.URL // where that step led: the relay, or where it has sent us
	proxy *url.URL // on the way there; nil: none
	error
}

func (e stepError) Unwrap() error { return e.error }

// tokenRefusedError says that the relay does not want the token, and will not
// change its mind soon.
type tokenRefusedError struct{ error }

func (e tokenRefusedError) Unwrap() error { return e.error }

// noPostError says that what answers is no access point.
type noPostError struct{ statusError }

func (e noPostError) Error() string {
	return fmt.Sprintf("access: the relay takes no POST here (%d): is this an address for tokens, or should it be ws:// or wss://?", e.status)
}

func (e noPostError) Unwrap() error { return e.statusError }

// errInside is why a relay that is not on this machine or network can't send us to one
// that is, by a redirect or the answer of an access point.
var errInside = errors.New("the relay sends us to an address of this network, which is not followed")

// open connects to a relay, and returns when media may flow: the connection, and
// the inbox that has read so far. It ends with ctx, and each of its steps within
// a time of its own. An error shows no secret, and neither will one of the inbox.
func (d dialer) open(ctx context.Context, to target) (net.Conn, *inbox, error) {
	a := &attempt{dialer: d, at: to.url, secret: append(to.secret, inQuery(to.url)...)}
	conn, in, err := a.open(ctx, to)
	if err != nil {
		return nil, nil, hide(err, a.secret)
	}
	in.secret = a.secret
	return conn, in, nil
}

// attempt is one try to open a connection to a relay. Owned by one goroutine.
type attempt struct {
	dialer
	at     *url.URL // where the step leads that is under way
	via    *url.URL // the proxy on the way there; nil: none
	secret []string

	begun   bool // something was connected to: what comes now was not asked for by the rule
	outside bool // that was not on this machine or network, and nothing from now on may be
}

// finish ends a step: it tells the trace, and returns err as a stepError.
func (a *attempt) finish(s step, err error, detail string) error {
	if err != nil {
		err = stepError{s, a.at, a.via, err}
	}
	if a.trace != nil {
		a.trace(s, hide(err, a.secret), detail)
	}
	return err
}

func (a *attempt) open(ctx context.Context, to target) (net.Conn, *inbox, error) {
	u := to.url
	access := isAccess(u)
	if access {
		var err error
		if u, err = a.access(ctx, to); err != nil {
			return nil, nil, err
		}
		a.secret = append(a.secret, inQuery(u)...)
		to.token = ""
	}
	conn, in, err := a.websocket(ctx, u, to)
	if err != nil {
		return nil, nil, err
	}
	detail := "nothing was asked for"
	switch {
	case access:
		detail = "with the code of the access point"
		err = awaitPong(ctx, conn, in)
	case to.token != "":
		detail = "with the token"
		err = showToken(ctx, conn, in, to.token)
	case u.User != nil:
		detail = "with the user and password of the URL"
	}
	if err = a.finish(stepToken, err, detail); err != nil {
		conn.Close()
		return nil, nil, err
	}
	return conn, in, nil
}

// access shows the token to an access point, and returns the websocket that
// it allows, once, within 30 s.
func (a *attempt) access(ctx context.Context, to target) (*url.URL, error) {
	u := to.url
	for hops := 0; ; hops++ {
		conn, err := a.reach(ctx, u)
		if err != nil {
			return nil, err
		}
		allowed, err := a.post(ctx, conn, u, to)
		conn.Close()
		if err == nil {
			a.finish(stepToken, nil, "a code for "+withoutSecrets(allowed.String()))
			return allowed, nil
		}
		var status statusError
		if errors.As(err, &status) && status.location != "" && keepsMethod(status.status) {
			var next *url.URL
			if next, err = redirect(u, status, hops, true); err == nil {
				u, a.at = next, next
				continue
			}
		}
		return nil, a.finish(stepToken, err, "")
	}
}

// post asks the access point at the other end of conn.
func (a *attempt) post(ctx context.Context, conn net.Conn, u *url.URL, to target) (*url.URL, error) {
	ctx, cancel := context.WithTimeout(ctx, accessTimeout)
	defer cancel()
	defer onDone(ctx, func() { conn.SetDeadline(past) })()
	r := &http.Request{Method: http.MethodPost, URL: u, Host: hostWithoutZone(u), Header: to.header.Clone(), Close: true}
	r.Header.Set("Authorization", to.token)
	answer, in, err := sendRequest(conn, r)
	var b []byte
	if err == nil {
		in.source = conn
		b, err = io.ReadAll(io.LimitReader(answer.Body, maxAccess+1))
	}
	switch {
	case ctx.Err() == context.DeadlineExceeded:
		return nil, fmt.Errorf("access: %w within %v", errNoAnswer, accessTimeout)
	case err == io.EOF:
		return nil, fmt.Errorf("access: %w", errUnanswered)
	case err != nil:
		return nil, fmt.Errorf("access: %w", briefError{withoutAddresses(err)})
	case len(b) > maxAccess:
		return nil, fmt.Errorf("access: the answer is longer than %d bytes", maxAccess)
	case answer.StatusCode == http.StatusOK:
		return allowedURL(u, b)
	}
	refused := newStatusError(answer, b)
	if refused.location != "" && !keepsMethod(refused.status) {
		refused.location, refused.unfollowed = withoutSecrets(printableASCII(refused.location, maxHandshake)), "not followed: it asks for a GET"
	}
	err = fmt.Errorf("access: %w", refused)
	switch {
	case isAway(refused.status), refused.status == http.StatusTooManyRequests:
		return nil, err
	case refused.status == http.StatusMethodNotAllowed:
		err = noPostError{refused}
	}
	return nil, tokenRefusedError{err}
}

// keepsMethod reports whether a redirect asks for the same method again.
// RFC 9110 15.4
func keepsMethod(status int) bool {
	return status == http.StatusTemporaryRedirect || status == http.StatusPermanentRedirect
}

// allowedURL reads the answer of the access point u: {"uri":"wss://…?code=…"}. A
// code that was asked for over TLS is not sent in the clear.
func allowedURL(u *url.URL, b []byte) (*url.URL, error) {
	var answer struct{ URI string }
	if err := json.Unmarshal(b, &answer); err != nil {
		return nil, errors.New(`access: the answer is not {"uri":"wss://…"}`)
	}
	to, err := cleanURL(answer.URI)
	switch {
	case err != nil || to.User != nil || !isWebsocket(to):
		return nil, errors.New(`access: "uri" in the answer is not the URL of a websocket`)
	case isTLS(u) && !isTLS(to):
		return nil, errors.New(`access: "uri" in the answer is not wss, though access is https`)
	}
	return to, nil
}

// websocket opens a websocket at u, or where that redirects to.
func (a *attempt) websocket(ctx context.Context, u *url.URL, to target) (net.Conn, *inbox, error) {
	secret := to.token != "" || len(to.header) > 0 || u.User != nil
	for hops := 0; ; hops++ {
		conn, err := a.reach(ctx, u)
		if err != nil {
			return nil, nil, err
		}
		in, err := upgrade(ctx, conn, u, to.header)
		if err == nil {
			a.finish(stepUpgrade, nil, "a websocket")
			return conn, in, nil
		}
		conn.Close()
		var status statusError
		if errors.As(err, &status) && status.location != "" {
			var next *url.URL
			if next, err = redirect(u, status, hops, secret); err == nil {
				a.finish(stepUpgrade, nil, "a redirect to "+withoutSecrets(next.String()))
				u = next
				continue
			}
		}
		s := stepUpgrade
		if status.status == http.StatusUnauthorized || status.status == http.StatusForbidden {
			s = stepToken
		}
		return nil, nil, a.finish(s, err, "")
	}
}

// reach takes the steps name, TCP, proxy and TLS to the host of u.
func (a *attempt) reach(ctx context.Context, u *url.URL) (net.Conn, error) {
	a.at, a.via = u, nil
	via, err := a.proxyTo(u)
	if err != nil {
		return nil, a.finish(stepProxy, err, "")
	}
	a.via = via
	if a.outside && via != nil && a.isLocal(nil) {
		return nil, a.finish(stepProxy, errInside, "")
	}
	next := u
	if via != nil {
		next = via
	}
	conn, err := a.connect(ctx, next)
	if err != nil {
		return nil, err
	}
	if via == nil {
		a.finish(stepProxy, nil, "none on this way")
	} else {
		tunnel, err := tunnel(ctx, conn, via, hostPort(u), a.roots)
		if err != nil {
			conn.Close()
			return nil, a.finish(stepProxy, fmt.Errorf("proxy %s: %w", via.Host, err), "")
		}
		a.finish(stepProxy, nil, "a tunnel through "+via.Host)
		conn = tunnel
	}
	if !isTLS(u) {
		return conn, nil
	}
	secured, err := secure(ctx, conn, u.Hostname(), a.roots)
	if err := a.finish(stepTLS, err, aboutCertificate(secured, err)); err != nil {
		conn.Close()
		return nil, err
	}
	return secured, nil
}

// proxyTo returns the proxy on the way to u, or nil.
func (d dialer) proxyTo(u *url.URL) (*url.URL, error) {
	if d.proxy == nil {
		return nil, nil
	}
	asked := *u
	asked.Scheme = strings.Replace(u.Scheme, "ws", "http", 1) // wss: https
	p, err := d.proxy(&http.Request{URL: &asked})
	if err != nil || p == nil {
		return nil, err
	}
	if !slices.Contains(proxySchemes, p.Scheme) {
		return nil, fmt.Errorf("proxy %s: the scheme is %q, it must be http, https or socks5", p.Host, p.Scheme)
	}
	return p, nil
}

// isLocal reports whether the relay at the other end of conn is on this machine or
// network. Of one behind a proxy only its name is known.
func (a *attempt) isLocal(conn net.Conn) bool {
	if a.via != nil {
		addr, err := netip.ParseAddr(a.at.Hostname())
		return err == nil && isLocal(addr) || isLocalhost(a.at.Hostname())
	}
	tcp, ok := conn.RemoteAddr().(*net.TCPAddr)
	return ok && isLocal(tcp.AddrPort().Addr())
}

// connect takes the steps name and TCP to the host of u: the relay or its proxy.
func (a *attempt) connect(ctx context.Context, u *url.URL) (net.Conn, error) {
	what := "connect to " + hostPort(u)
	if a.via != nil {
		what = "proxy " + a.via.Host
	}
	host, port, _ := net.SplitHostPort(hostPort(u))
	addrs, detail, err := a.resolve(ctx, host)
	if err != nil {
		if a.via != nil {
			err = fmt.Errorf("%s: %w", what, err)
		}
		return nil, a.finish(stepName, unreachableError{err}, "")
	}
	a.finish(stepName, nil, detail)
	if a.outside && a.via == nil {
		if addrs = slices.DeleteFunc(addrs, isLocal); len(addrs) == 0 {
			return nil, a.finish(stepTCP, errInside, "")
		}
	}
	conn, err := race(ctx, addrs, port, a.dial)
	var failed connectError
	switch {
	case errors.As(err, &failed) && failed.refused() && a.via == nil:
		err = fmt.Errorf("nothing listens at %s (%w)", hostPort(u), err)
	case err != nil:
		err = fmt.Errorf("%s: %w", what, err)
	}
	if err != nil {
		return nil, a.finish(stepTCP, unreachableError{err}, "")
	}
	if !a.begun {
		a.begun, a.outside = true, !a.isLocal(conn)
	}
	a.finish(stepTCP, nil, conn.RemoteAddr().String())
	return conn, nil
}

// resolve returns the addresses of host, and what vw check says of them.
func (a *attempt) resolve(ctx context.Context, host string) (addrs []netip.Addr, detail string, err error) {
	if addr, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{addr}, host + " is an address", nil
	}
	addrs, err = a.lookup(ctx, host)
	var all []string
	for _, addr := range addrs {
		all = append(all, addr.String())
	}
	return addrs, strings.Join(all, ", "), err
}

// showToken sends the token, and waits until the relay has said that it is good.
// Video that others send on the same path meanwhile is discarded.
func showToken(ctx context.Context, conn net.Conn, in *inbox, token string) error {
	return exchange(ctx, "token", conn, in, appendFrame(nil, opText, []byte(token), masked), func() error {
		for {
			opcode, b, err := in.message(maxHandshake)
			switch {
			case opcode == opBinary && (err == nil || err == errTooLong):
				continue
			case err == errTooLong:
				return errLongAnswer
			case err != nil:
				return err
			}
			var answer struct {
				Authorised *bool
				Reason     string
			}
			if err := json.Unmarshal(b, &answer); err != nil || answer.Authorised == nil {
				return errors.New(`the relay's first text message is not {"authorised":…}`)
			}
			if !*answer.Authorised {
				return tokenRefusedError{fmt.Errorf("the relay refuses the token: %s", quoted(answer.Reason, maxText))}
			}
			return nil
		}
	})
}

// awaitPong waits for an answer to a ping: a relay may accept the handshake, and
// then leave a connection alone whose code was not good. Video is discarded.
func awaitPong(ctx context.Context, conn net.Conn, in *inbox) error {
	return exchange(ctx, "access: ping", conn, in, appendFrame(nil, opPing, nil, masked), func() error {
		for {
			if opcode, err := in.next(); err != nil || opcode == opPong {
				return err
			}
		}
	})
}

// exchange writes frame, and then waits for answer within 5 s. Nobody else reads
// or writes meanwhile.
func exchange(ctx context.Context, what string, conn net.Conn, in *inbox, frame []byte, answer func() error) error {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	release := onDone(ctx, func() { conn.SetDeadline(past) })
	in.ping = func(payload []byte) { conn.Write(appendFrame(nil, opPong, payload, masked)) }
	_, err := conn.Write(frame)
	if err == nil {
		err = answer()
	}
	release()
	switch {
	case err == nil:
		conn.SetDeadline(time.Time{})
		return nil
	case errors.As(err, new(tokenRefusedError)):
		return err
	case ctx.Err() == context.DeadlineExceeded:
		return fmt.Errorf("%s: %w within %v", what, errNoAnswer, handshakeTimeout)
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err == io.EOF, err == io.ErrUnexpectedEOF:
		return fmt.Errorf("%s: %w", what, errUnanswered)
	}
	return fmt.Errorf("%s: %w", what, withoutAddresses(err))
}
