// Proxies on the way to a relay: a tunnel through an HTTP proxy (CONNECT, RFC 9110
// 9.3.6) for ws as for wss, or a connection through a SOCKS5 one. Its user and
// password are sent to the proxy, and are in no error. A proxy is given the
// relay's name, which it may know where this machine does not.

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"

	"golang.org/x/net/proxy"
)

// proxyVariables are the variables that name a proxy, as net/http reads them.
var proxyVariables = []string{"HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"}

var proxySchemes = []string{"http", "https", "socks5", "socks5h"}

// checkProxies returns what is wrong with a proxy variable in env. net/http would
// ignore such a one, and connect without the proxy.
func checkProxies(env []string) error {
	for _, e := range env {
		name, value, _ := strings.Cut(e, "=")
		if value == "" || !slices.Contains(proxyVariables, name) {
			continue
		}
		if u, err := parseProxy(value); err != nil || !slices.Contains(proxySchemes, u.Scheme) || u.Hostname() == "" || !validPort(u.Port()) {
			return fmt.Errorf("%s=%q: it must be a URL like http://user:password@host:port, where http may be https or socks5, and a %% in the password is written %%25",
				name, withoutSecrets(value))
		}
	}
	return nil
}

// parseProxy parses the value of a proxy variable; host:port alone is an HTTP proxy.
func parseProxy(value string) (*url.URL, error) {
	if !strings.Contains(value, "://") {
		value = "http://" + value
	}
	return url.Parse(value)
}

// refusalError is a proxy's answer other than a connection.
type refusalError struct {
	status int
	text   string
}

func (e refusalError) Error() string { return e.text }

// tunnel asks the proxy at the other end of conn for a connection to address. The
// connection it returns is conn, or TLS over it.
func tunnel(ctx context.Context, conn net.Conn, p *url.URL, address string, roots *x509.CertPool) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	var err error
	switch p.Scheme {
	case "socks5", "socks5h":
		err = socks(ctx, conn, p, address)
	case "https":
		if conn, err = secure(ctx, conn, p.Hostname(), roots); err != nil {
			return nil, err
		}
		fallthrough
	default:
		err = askTunnel(ctx, conn, p, address)
	}
	switch {
	case err == nil:
		return conn, nil
	case ctx.Err() == context.DeadlineExceeded, errors.Is(err, os.ErrDeadlineExceeded):
		return nil, fmt.Errorf("%w within %v", errNoAnswer, handshakeTimeout)
	case errors.Is(err, io.EOF):
		return nil, errUnanswered
	}
	return nil, err
}

// askTunnel asks an HTTP proxy.
func askTunnel(ctx context.Context, conn net.Conn, p *url.URL, address string) error {
	ask := &http.Request{Method: http.MethodConnect, URL: &url.URL{Opaque: address}, Host: address, Header: http.Header{"User-Agent": {"vw"}}}
	if p.User != nil {
		ask.Header.Set("Proxy-Authorization", basicAuth(p.User))
	}
	release := onDone(ctx, func() { conn.SetDeadline(past) })
	defer release()
	if err := ask.Write(conn); err != nil {
		return withoutAddresses(err)
	}
	answer, err := readAnswer(conn, ask)
	switch {
	case err != nil: // it may quote the answer
		return briefError{withoutAddresses(err)}
	case answer.StatusCode/100 == 2:
		return nil
	}
	no := refusalError{answer.StatusCode, strings.Trim(quoted(answer.Status, maxStatusText), `"`)}
	if no.status/100 == 5 { // it could not reach the relay
		return unreachableError{no}
	}
	return no
}

// readAnswer reads the header of the answer, and not a byte more: what comes
// after it belongs to the tunnel.
func readAnswer(r io.Reader, ask *http.Request) (*http.Response, error) {
	head := make([]byte, 0, 512)
	for !bytes.HasSuffix(head, []byte("\n\r\n")) && !bytes.HasSuffix(head, []byte("\n\n")) {
		if len(head) == maxHandshake {
			return nil, errLongAnswer
		}
		head = append(head, 0)
		if _, err := io.ReadFull(r, head[len(head)-1:]); err != nil {
			return nil, err
		}
	}
	return http.ReadResponse(bufio.NewReader(bytes.NewReader(head)), ask)
}

// socks asks a SOCKS5 proxy. RFC 1928, RFC 1929
func socks(ctx context.Context, conn net.Conn, p *url.URL, address string) error {
	var auth *proxy.Auth
	if p.User != nil {
		password, _ := p.User.Password()
		auth = &proxy.Auth{User: p.User.Username(), Password: password}
	}
	d, err := proxy.SOCKS5("tcp", p.Host, auth, connected{conn})
	if err != nil {
		return err
	}
	_, err = d.(proxy.ContextDialer).DialContext(ctx, "tcp", address)
	if err == nil {
		return nil
	}
	var op *net.OpError
	if errors.As(err, &op) {
		err = op.Err // without the addresses
	}
	text := strings.TrimPrefix(err.Error(), "unknown error ")
	switch {
	case strings.Contains(text, "authentication"):
		return refusalError{http.StatusProxyAuthRequired, text}
	case strings.Contains(text, "not allowed"):
		return refusalError{http.StatusForbidden, text}
	case text != err.Error(), strings.Contains(text, "unreachable"), strings.Contains(text, "refused"): // a reply of the proxy
		return unreachableError{refusalError{http.StatusBadGateway, text}}
	}
	return briefError{err}
}

// connected is a proxy.ContextDialer that has connected already.
type connected struct{ net.Conn }

func (c connected) Dial(string, string) (net.Conn, error) { return c.Conn, nil }

func (c connected) DialContext(context.Context, string, string) (net.Conn, error) {
	return c.Conn, nil
}
