// Dialects: how a relay wants to be shown a token, before media may flow.
//
// On ws and wss the token is the first text message, and a text message
// answers whether it is good (crossbar). On http and https a POST with the
// token is answered with the URL of a websocket, in which a code is good once
// and for 30 s (practable). Without a token the handshake is all.

package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
)

const maxAccess = 64 << 10 // bytes of answer to the POST

// tokenRefused: the relay does not want the token. It will not change its mind soon.
type tokenRefused struct{ text string }

func (e tokenRefused) Error() string { return e.text }

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

// brief is an error that may quote what the other side sent.
type brief struct{ error }

func (e brief) Error() string { return fmt.Sprintf("%.200s", e.error.Error()) }
func (e brief) Unwrap() error { return e.error }
