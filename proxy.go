// Proxies: the way to a relay, direct or through the HTTP proxy that the
// environment names. Through a proxy it is a tunnel (CONNECT) for ws as for
// wss. The proxy's user and password are sent to it, and are in no error.

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
)

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

// hostPort is where u is dialled.
func hostPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"ws": "80", "http": "80", "wss": "443", "https": "443"}[u.Scheme]
	}
	return net.JoinHostPort(u.Hostname(), port)
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

// refusal is a proxy's answer to CONNECT other than success.
type refusal statusError

func (e refusal) Error() string { return strings.Trim(strconv.QuoteToASCII(e.line), `"`) }
func (e refusal) Unwrap() error { return statusError(e) }

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
