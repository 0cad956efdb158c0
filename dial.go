// The way to a relay, in the steps that vw check prints: name, TCP, proxy, TLS,
// upgrade, token.
//
// Through a proxy it is a tunnel (CONNECT) for ws as for wss. The proxy's user
// and password are sent to it, and are in no error.
//
// On ws and wss a token is the first text message, and a text message answers
// whether it is good (crossbar). On http and https a POST with the token is
// answered with the URL of a websocket, in which a code is good once and for
// 30 s (practable). Without a token the handshake is all.

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/websocket"
)

const (
	dialTimeout      = 2 * time.Second
	handshakeTimeout = 5 * time.Second
	maxHandshake     = 16 << 10 // bytes of answer
	maxAccess        = 64 << 10 // bytes of answer to the POST
)

// Why a handshake fails, other than by an answer.
var (
	errNoAnswer   = errors.New("no answer")
	errUnanswered = errors.New("closed without an answer")
)

// tokenRefused: the relay does not want the token. It will not change its mind soon.
type tokenRefused struct{ text string }

func (e tokenRefused) Error() string { return e.text }

// unreachable is an error of a dial.
type unreachable struct{ error }

func (e unreachable) Unwrap() error { return e.error }

// statusError is a relay's answer other than 101.
type statusError struct {
	code int
	line string // such as "401 Unauthorized"
}

func (e statusError) Error() string { return "the relay answered " + e.line }

// refusal is a proxy's answer to CONNECT other than success.
type refusal statusError

func (e refusal) Error() string { return strings.Trim(strconv.QuoteToASCII(e.line), `"`) }

func (e refusal) Unwrap() error { return statusError(e) }

// brief is an error that may quote what the other side sent.
type brief struct{ error }

func (e brief) Error() string { return fmt.Sprintf("%.200s", e.error.Error()) }

func (e brief) Unwrap() error { return e.error }

// open connects to the relay, and returns when media may flow. It blocks for
// 24 s at most, and ends with ctx. An error does not show a secret.
func (d *destination) open(ctx context.Context) (l *link, in *inbox, err error) {
	secrets := append(d.rule.secrets(), inQuery(d.url)...)
	defer func() { err = hide(err, secrets) }()
	u, header := d.url, d.rule.Headers.http()
	access := u.Scheme == "http" || u.Scheme == "https"
	if access {
		if u, err = d.access(ctx, header); err != nil {
			return nil, nil, err
		}
		secrets = append(secrets, inQuery(u)...)
	}
	conn, err := d.reach(ctx, u)
	if err != nil {
		return nil, nil, err
	}
	l = newLink(conn, d.log)
	l.silence = maxSilence
	in, err = l.open(ctx, u, d.roots, header)
	switch {
	case err != nil:
	case access:
		err = l.prove(ctx, in)
	case d.rule.Token != "":
		err = l.present(ctx, in, d.rule.Token)
	}
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	return l, in, nil
}

// access shows the token to an access point, and returns the websocket that
// it allows, once, within 30 s.
func (d *destination) access(ctx context.Context, header http.Header) (*url.URL, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout+handshakeTimeout)
	defer cancel()
	client := http.Client{
		Transport: &http.Transport{
			// A transport goes on to dial when its request has ended: this ends with ctx.
			DialContext: func(context.Context, string, string) (net.Conn, error) { return d.reach(ctx, d.url) },
			DialTLSContext: func(context.Context, string, string) (net.Conn, error) {
				conn, err := d.reach(ctx, d.url)
				if err != nil {
					return nil, err
				}
				secure := tls.Client(conn, tlsConfig(d.url.Hostname(), d.roots))
				if err := secure.HandshakeContext(ctx); err != nil {
					conn.Close()
					return nil, err
				}
				return secure, nil
			},
			DisableKeepAlives:      true,
			MaxResponseHeaderBytes: maxHandshake,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, d.url.String(), nil)
	if err != nil {
		return nil, err
	}
	r.Header = header.Clone()
	r.Header.Set("Authorization", d.rule.Token)
	a, err := client.Do(r)
	var b []byte
	if err == nil {
		defer a.Body.Close()
		b, err = io.ReadAll(io.LimitReader(a.Body, maxAccess+1))
	}
	var quoting *url.Error // it quotes the URL
	if errors.As(err, &quoting) {
		err = quoting.Err
	}
	switch {
	case ctx.Err() == context.DeadlineExceeded:
		return nil, fmt.Errorf("access: %w within %v", errNoAnswer, dialTimeout+handshakeTimeout)
	case errors.As(err, new(unreachable)):
		return nil, err
	case err != nil:
		return nil, fmt.Errorf("access: %w", brief{plain(err)})
	case len(b) > maxAccess:
		return nil, fmt.Errorf("access: the answer is longer than %d bytes", maxAccess)
	}
	switch a.StatusCode {
	case http.StatusOK:
		return d.allowed(b)
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return nil, statusError{a.StatusCode, fmt.Sprintf("%.80q", a.Status)}
	}
	said := string(b)
	var answer struct{ Message string }
	if json.Unmarshal(b, &answer) == nil {
		said = answer.Message
	} else {
		json.Unmarshal(b, &said) // some come as a string; else said is as it was
	}
	return nil, tokenRefused{fmt.Sprintf("access: the relay answered %.80q: %.200q", a.Status, said)}
}

// allowed reads the answer of an access point: {"uri":"wss://…?code=…"}. A
// code that was asked for over TLS is not sent in the clear.
func (d *destination) allowed(b []byte) (*url.URL, error) {
	var answer struct{ URI string }
	if err := json.Unmarshal(b, &answer); err != nil {
		return nil, errors.New(`access: the answer is not {"uri":"wss://…"}`)
	}
	u, err := cleanURL(answer.URI)
	switch {
	case err != nil || u.User != nil || u.Scheme != "ws" && u.Scheme != "wss":
		return nil, errors.New(`access: "uri" in the answer is not the URL of a websocket`)
	case d.url.Scheme == "https" && u.Scheme != "wss":
		return nil, errors.New(`access: "uri" in the answer is not wss, though access is https`)
	}
	return u, nil
}

// reach opens a connection to the host of u, or a tunnel to it. That takes at
// most 2 s, and 5 s more through a proxy.
func (d *destination) reach(ctx context.Context, u *url.URL) (net.Conn, error) {
	proxy, err := d.proxyOf(u)
	if err != nil {
		return nil, err
	}
	next := u
	if proxy != nil {
		next = proxy
	}
	dialing, cancel := context.WithTimeout(ctx, dialTimeout)
	conn, err := d.dial(dialing, "tcp", hostPort(next))
	cancel()
	switch {
	case err == nil && proxy != nil:
		tunnel, err := d.tunnel(ctx, conn, proxy, hostPort(u))
		if err != nil {
			conn.Close()
			return nil, fmt.Errorf("proxy %s: %w", proxy.Host, err)
		}
		return tunnel, nil
	case err != nil && proxy != nil:
		err = fmt.Errorf("proxy %s: %w", proxy.Host, err)
	}
	if err != nil {
		return nil, unreachable{err}
	}
	return conn, nil
}

// proxyOf returns the proxy on the way to u; nil: there is none.
func (d *destination) proxyOf(u *url.URL) (*url.URL, error) {
	if d.proxy == nil {
		return nil, nil
	}
	asked := *u
	asked.Scheme = strings.Replace(u.Scheme, "ws", "http", 1) // wss: https
	proxy, err := d.proxy(&http.Request{URL: &asked})
	if err != nil || proxy == nil {
		return nil, err
	}
	if proxy.Scheme != "http" && proxy.Scheme != "https" {
		return nil, fmt.Errorf("proxy %s: the scheme is %q, it must be http or https", proxy.Host, proxy.Scheme)
	}
	return proxy, nil
}

// tunnel asks the proxy at the other end of conn for a connection to address.
// What it returns is conn, or TLS over it. RFC 9110 9.3.6.
func (d *destination) tunnel(ctx context.Context, conn net.Conn, proxy *url.URL, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	if proxy.Scheme == "https" {
		secure := tls.Client(conn, tlsConfig(proxy.Hostname(), d.roots))
		if err := secure.HandshakeContext(ctx); err != nil {
			return nil, fmt.Errorf("TLS handshake: %w", plain(err))
		}
		conn = secure
	}
	ask := &http.Request{Method: http.MethodConnect, URL: &url.URL{Opaque: address}, Host: address, Header: http.Header{"User-Agent": {"vw"}}}
	if proxy.User != nil {
		password, _ := proxy.User.Password()
		ask.Header.Set("Proxy-Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(proxy.User.Username()+":"+password)))
	}
	release := onDone(ctx, func() { conn.SetDeadline(past) })
	err := ask.Write(conn)
	var answer *http.Response
	if err == nil {
		answer, err = readAnswer(conn, ask)
	}
	release()
	switch {
	case ctx.Err() == context.DeadlineExceeded:
		return nil, fmt.Errorf("%w within %v", errNoAnswer, handshakeTimeout)
	case err == io.EOF:
		return nil, errUnanswered
	case err != nil: // it may quote the answer
		return nil, fmt.Errorf("%.200s", plain(err).Error())
	case answer.StatusCode/100 == 2:
		return conn, nil
	}
	no := refusal{answer.StatusCode, answer.Status[:min(len(answer.Status), 80)]}
	if no.code/100 == 5 { // it could not reach the relay
		return nil, unreachable{no}
	}
	return nil, no
}

// readAnswer reads the header of the answer, and not a byte more: what comes
// after it is the tunnel's.
func readAnswer(r io.Reader, ask *http.Request) (*http.Response, error) {
	head := make([]byte, 0, 512)
	for !bytes.HasSuffix(head, []byte("\n\r\n")) && !bytes.HasSuffix(head, []byte("\n\n")) {
		if len(head) == maxHandshake {
			return nil, fmt.Errorf("the answer is longer than %d bytes", maxHandshake)
		}
		head = append(head, 0)
		if _, err := io.ReadFull(r, head[len(head)-1:]); err != nil {
			return nil, err
		}
	}
	return http.ReadResponse(bufio.NewReader(bytes.NewReader(head)), ask)
}

// hostPort is where u is dialled.
func hostPort(u *url.URL) string { return net.JoinHostPort(u.Hostname(), portOf(u)) }

// tlsConfig is that of a client of host; nil roots are the system's.
func tlsConfig(host string, roots *x509.CertPool) *tls.Config {
	return &tls.Config{
		ServerName: host, RootCAs: roots, MinVersion: tls.VersionTLS12,
		NextProtos: []string{"http/1.1"}, DynamicRecordSizingDisabled: true,
	}
}

// open does the TLS and the websocket handshake as a client. It takes header.
func (l *link) open(ctx context.Context, u *url.URL, roots *x509.CertPool, header http.Header) (*inbox, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	origin := url.URL{Scheme: "http", Host: u.Host}
	if u.Scheme == "wss" {
		origin.Scheme = "https"
		conn := tls.Client(l.Conn, tlsConfig(u.Hostname(), roots))
		l.cannotResume()
		l.Conn = conn
		err := conn.HandshakeContext(ctx)
		if trace := httptrace.ContextClientTrace(ctx); trace != nil && trace.TLSHandshakeDone != nil {
			trace.TLSHandshakeDone(conn.ConnectionState(), err)
		}
		if err != nil {
			return nil, fmt.Errorf("TLS handshake: %w", plain(err))
		}
	}
	release := onDone(ctx, func() { l.SetDeadline(past) })
	config := &websocket.Config{
		Location: u, Origin: &origin, Version: websocket.ProtocolVersionHybi13, Header: header,
	}
	if u.User != nil {
		password, _ := u.User.Password()
		config.Header.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(u.User.Username()+":"+password)))
	}
	l.opening, l.budget, l.masks = true, maxHandshake, true
	_, err := websocket.NewClient(config, l)
	l.opening = false
	release()
	switch {
	case ctx.Err() == context.DeadlineExceeded:
		return nil, fmt.Errorf("websocket handshake: %w within %v", errNoAnswer, handshakeTimeout)
	case err == websocket.ErrBadStatus:
		return nil, l.status()
	case err == io.EOF, err == io.ErrUnexpectedEOF:
		return nil, fmt.Errorf("websocket handshake: %w", errUnanswered)
	case err != nil: // it may quote the answer
		return nil, fmt.Errorf("websocket handshake: %.200s", plain(err).Error())
	}
	l.SetDeadline(time.Time{})
	return newInbox(l, l.early(), 512), nil
}

// status reads the first line of the answer. RFC 9112 4.
func (l *link) status() statusError {
	line, _, _ := strings.Cut(string(l.answer[:min(len(l.answer), 80)]), "\r\n")
	_, line, _ = strings.Cut(line, " ")
	code, _ := strconv.Atoi(line[:min(len(line), 3)])
	return statusError{code, strconv.QuoteToASCII(line)}
}

// early returns what came after the header of the relay's answer: x/net may
// have read that too.
func (l *link) early() []byte {
	end := len(l.answer)
	for _, blank := range []string{"\n\r\n", "\n\n"} {
		if i := bytes.Index(l.answer, []byte(blank)); i >= 0 {
			end = min(end, i+len(blank))
		}
	}
	early := l.answer[end:]
	l.answer = nil
	return early
}

// present shows the token, and waits for the relay to say that it is good.
func (l *link) present(ctx context.Context, in *inbox, token string) error {
	return l.exchange(ctx, "token", appendFrame(nil, opText, []byte(token), l.masks), func() error {
		for {
			opcode, b, err := in.message(maxHandshake)
			if err == errTooLong || err == nil && opcode != opText {
				continue
			}
			if err != nil {
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
				return tokenRefused{fmt.Sprintf("the relay refuses the token: %.200q", answer.Reason)}
			}
			return nil
		}
	})
}

// prove waits for an answer to a ping: a relay may accept the handshake, and
// then leave a connection alone whose code was not good.
func (l *link) prove(ctx context.Context, in *inbox) error {
	return l.exchange(ctx, "access: ping", appendFrame(nil, opPing, nil, l.masks), func() error {
		for {
			if opcode, err := in.next(); err != nil || opcode == opPong {
				return err
			}
		}
	})
}

// exchange writes frame, and then waits for answer, which reads at most 16 KiB
// within 5 s. It is called before serve, while nobody else reads or writes.
func (l *link) exchange(ctx context.Context, what string, frame []byte, answer func() error) error {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	release := onDone(ctx, func() { l.SetDeadline(past) })
	l.opening, l.budget = true, maxHandshake
	_, err := l.Conn.Write(frame)
	if err == nil {
		err = answer()
	}
	l.opening, l.answer = false, nil
	release()
	switch {
	case err == nil:
		l.SetDeadline(time.Time{})
		return nil
	case errors.As(err, new(tokenRefused)):
		return err
	case ctx.Err() == context.DeadlineExceeded:
		return fmt.Errorf("%s: %w within %v", what, errNoAnswer, handshakeTimeout)
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err == io.EOF, err == io.ErrUnexpectedEOF:
		return fmt.Errorf("%s: %w", what, errUnanswered)
	}
	return fmt.Errorf("%s: %w", what, plain(err))
}
