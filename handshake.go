// The handshakes of a client: TLS, and the opening of a websocket (RFC 6455 4.1).
//
// A redirect is followed where that is safe, and told where it is not: never from
// wss to ws, never with secrets to another host or port, and never from a public
// address to one of this network.

package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha1"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	handshakeTimeout = 5 * time.Second
	maxHandshake     = 16 << 10 // bytes of an answer's header
	maxRedirects     = 3
	maxStatusText    = 80              // bytes of a status line that are told
	maxText          = 200             // bytes of a refusal's text that are told
	textTimeout      = 2 * time.Second // for that text to come
	maxRetryAfter    = 5 * time.Minute // that a relay can make us wait
)

// errUnanswered is the error of a connection that is closed in place of an answer.
var errUnanswered = errors.New("closed without an answer")

// errLongAnswer is the error of an answer to a handshake without an end.
var errLongAnswer = fmt.Errorf("the answer is longer than %d bytes", maxHandshake)

// statusError is an answer other than the one that was asked for.
type statusError struct {
	status     int
	line       string        // such as "401 Unauthorized"
	text       string        // the begin of its body
	retryAfter time.Duration // 0: it does not say
	location   string        // where it redirects to, and once it is known why not, that without credentials; "": nowhere
	unfollowed string        // why that is not followed
}

func (e statusError) Error() string {
	s := "the relay answered " + quoted(e.line, maxStatusText)
	if e.unfollowed != "" {
		s += fmt.Sprintf(" with a redirect to %s (%s)", e.location, e.unfollowed)
	}
	if e.retryAfter > 0 {
		s += fmt.Sprintf(" and asks to wait for %v", e.retryAfter)
	}
	if e.text != "" {
		s += fmt.Sprintf(": %q", e.text)
	}
	return s
}

// isAway reports whether the status of an answer says that there is no relay
// behind what answers.
func isAway(status int) bool { return 502 <= status && status <= 504 }

// newStatusError reads what an answer says in place of a websocket. The body must
// end, fail or block no longer than its connection's deadline.
func newStatusError(a *http.Response, body []byte) statusError {
	e := statusError{status: a.StatusCode, line: a.Status, text: refusalText(a.Header, body), location: redirection(a)}
	if isAway(e.status) || e.status == http.StatusTooManyRequests {
		e.retryAfter = retryAfter(a.Header)
	}
	return e
}

// unreachableError says that there was no connection to what was dialled.
type unreachableError struct{ error }

func (e unreachableError) Unwrap() error { return e.error }

// notTLSError says that something else than TLS answers.
type notTLSError struct{ tls.RecordHeaderError }

func (e notTLSError) Error() string {
	return "the relay does not speak TLS: try ws:// in place of wss://"
}
func (e notTLSError) Unwrap() error { return e.RecordHeaderError }

// briefError is an error that may quote what the other side sent.
type briefError struct{ error }

func (e briefError) Error() string { return fmt.Sprintf("%.200s", e.error.Error()) }
func (e briefError) Unwrap() error { return e.error }

// secure does the TLS handshake as a client of host; nil roots are the system's. The connection it returns is
// never nil.
func secure(ctx context.Context, conn net.Conn, host string, roots *x509.CertPool) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	host, _, _ = strings.Cut(host, "%") // the zone of an IPv6 address is ours alone
	if _, over := conn.(*tls.Conn); !over {
		conn = &transport{Conn: conn}
	}
	secured := tls.Client(conn, &tls.Config{
		ServerName: host, RootCAs: roots, MinVersion: tls.VersionTLS12,
		NextProtos: []string{"http/1.1"}, DynamicRecordSizingDisabled: true,
	})
	err := secured.HandshakeContext(ctx)
	var record tls.RecordHeaderError
	switch {
	case err == nil:
		return secured, nil
	case ctx.Err() == context.DeadlineExceeded:
		err = fmt.Errorf("%w within %v", errNoAnswer, handshakeTimeout)
	case errors.Is(err, io.EOF):
		err = errUnanswered
	case errors.As(err, &record):
		err = notTLSError{record}
	}
	return secured, fmt.Errorf("TLS handshake: %w", withoutAddresses(err))
}

// aboutCertificate says in a line what the certificate of a server is, good or
// bad; "" if it has shown none.
func aboutCertificate(conn *tls.Conn, err error) string {
	certs := conn.ConnectionState().PeerCertificates
	var bad *tls.CertificateVerificationError
	if errors.As(err, &bad) {
		certs = bad.UnverifiedCertificates
	}
	if len(certs) == 0 {
		return ""
	}
	leaf := certs[0]
	return fmt.Sprintf("certificate of %s by %s, until %s (%d days)", certificateHolders(leaf), cmp.Or(leaf.Issuer.String(), "nobody"),
		leaf.NotAfter.Format(time.DateOnly), int(time.Until(leaf.NotAfter).Hours()/24))
}

// certificateHolders returns whom a certificate is for.
func certificateHolders(c *x509.Certificate) string {
	all := c.DNSNames
	for _, ip := range c.IPAddresses {
		all = append(all, ip.String())
	}
	if len(all) == 0 {
		return "no host"
	}
	return strings.Join(all[:min(len(all), 5)], ", ")
}

// sendRequest sends a request and returns the answer, past interim ones (RFC 9110 15.2);
// the inbox has what came after its header, which may have 16 KiB.
func sendRequest(conn net.Conn, r *http.Request) (*http.Response, *inbox, error) {
	header := &limited{conn, maxHandshake}
	in := newInbox(header, nil, bare, 512)
	if err := r.Write(conn); err != nil {
		return nil, nil, err
	}
	for {
		a, err := http.ReadResponse(in.r, r)
		switch {
		case err != nil && header.n == 0:
			return nil, nil, errLongAnswer
		case err == io.ErrUnexpectedEOF:
			return nil, nil, io.EOF
		case err != nil:
			return nil, nil, err
		case a.StatusCode/100 != 1 || a.StatusCode == http.StatusSwitchingProtocols:
			in.source = conn
			return a, in, nil
		}
	}
}

// limited reads n bytes of r, after which there is errLongAnswer.
type limited struct {
	r io.Reader
	n int
}

func (l *limited) Read(p []byte) (int, error) {
	if l.n == 0 {
		return 0, errLongAnswer
	}
	n, err := l.r.Read(p[:min(len(p), l.n)])
	l.n -= n
	return n, err
}

// upgrade makes a websocket of conn. The inbox that it returns has read the frames
// that came with the answer.
func upgrade(ctx context.Context, conn net.Conn, u *url.URL, header http.Header) (*inbox, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	key := make([]byte, 16)
	rand.Read(key)
	r := newUpgrade(u, header, base64.StdEncoding.EncodeToString(key))
	release := onDone(ctx, func() { conn.SetDeadline(past) })
	a, in, err := sendRequest(conn, r)
	if err == nil && a.StatusCode != http.StatusSwitchingProtocols {
		err = newStatusError(a, readText(conn, a.Body))
	}
	release()
	switch {
	case ctx.Err() == context.DeadlineExceeded && !errors.As(err, new(statusError)):
		return nil, fmt.Errorf("websocket handshake: %w within %v", errNoAnswer, handshakeTimeout)
	case err == io.EOF:
		return nil, fmt.Errorf("websocket handshake: %w", errUnanswered)
	case errors.As(err, new(statusError)):
		return nil, err
	case err != nil: // it may quote the answer
		return nil, fmt.Errorf("websocket handshake: %w", briefError{withoutAddresses(err)})
	}
	if err := checkUpgraded(r, a); err != nil {
		return nil, fmt.Errorf("websocket handshake: %w", err)
	}
	conn.SetDeadline(time.Time{})
	return in, nil
}

// newUpgrade is the request for a websocket.
func newUpgrade(u *url.URL, header http.Header, key string) *http.Request {
	path := *u
	path.User, path.Host = nil, ""
	r := &http.Request{Method: http.MethodGet, URL: &path, Host: hostWithoutZone(u), Header: header.Clone()}
	if r.Header == nil {
		r.Header = make(http.Header)
	}
	origin := url.URL{Scheme: strings.Replace(u.Scheme, "ws", "http", 1), Host: r.Host} // wss: https
	if r.Header.Get("User-Agent") == "" {
		r.Header.Set("User-Agent", "vw")
	}
	if u.User != nil {
		r.Header.Set("Authorization", basicAuth(u.User))
	}
	if p := r.Header["Sec-Websocket-Protocol"]; p != nil {
		delete(r.Header, "Sec-Websocket-Protocol")
		r.Header["Sec-WebSocket-Protocol"] = p
	}
	// Names as the standard writes them, for servers that take case for a difference.
	r.Header["Upgrade"] = []string{"websocket"}
	r.Header["Connection"] = []string{"Upgrade"}
	r.Header["Sec-WebSocket-Key"] = []string{key}
	r.Header["Sec-WebSocket-Version"] = []string{"13"}
	r.Header["Origin"] = []string{origin.String()}
	return r
}

// checkUpgraded returns what is wrong with an answer of status 101. RFC 6455 4.1
func checkUpgraded(r *http.Request, a *http.Response) error {
	//lint:ignore SA1008 the request has the names as the standard writes them
	sum := sha1.Sum([]byte(r.Header["Sec-WebSocket-Key"][0] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	//lint:ignore SA1008 the request has the names as the standard writes them
	offered := listElements(r.Header["Sec-WebSocket-Protocol"])
	switch agreed := a.Header.Get("Sec-WebSocket-Protocol"); {
	case !slices.ContainsFunc(listElements(a.Header["Upgrade"]), func(s string) bool { return strings.EqualFold(s, "websocket") }):
		return errors.New(`the answer's header "Upgrade" is not "websocket"`)
	case !slices.ContainsFunc(listElements(a.Header["Connection"]), func(s string) bool { return strings.EqualFold(s, "upgrade") }):
		return errors.New(`the answer's header "Connection" is not "Upgrade"`)
	case strings.TrimSpace(a.Header.Get("Sec-WebSocket-Accept")) != base64.StdEncoding.EncodeToString(sum[:]):
		return errors.New(`the answer's header "Sec-WebSocket-Accept" does not belong to our key`)
	case a.Header.Get("Sec-WebSocket-Extensions") != "":
		return errors.New("the answer has a websocket extension that nobody asked for")
	case agreed != "" && !slices.Contains(offered, agreed):
		return fmt.Errorf("the answer has the subprotocol %.40q, which nobody asked for", agreed)
	}
	return nil
}

// listElements returns the elements of a header's list. RFC 9110 5.6.1
func listElements(lines []string) (all []string) {
	for s := range strings.SplitSeq(strings.Join(lines, ","), ",") {
		if s = strings.TrimSpace(s); s != "" {
			all = append(all, s)
		}
	}
	return all
}

// readText reads the begin of a body, for a short while.
func readText(conn net.Conn, body io.Reader) []byte {
	t := time.AfterFunc(textTimeout, func() { conn.SetReadDeadline(past) })
	defer t.Stop()
	b, _ := io.ReadAll(io.LimitReader(body, 4*maxText)) // as much as there is
	return b
}

// refusalText returns what a body tells a human: the message in JSON, the text in
// HTML, else the text as it is; its first 200 bytes.
func refusalText(header http.Header, body []byte) string {
	said := string(body)
	var object struct{ Message, Error string }
	if json.Unmarshal(body, &object) == nil {
		said = cmp.Or(object.Message, object.Error, said)
	} else if json.Unmarshal(body, &said) != nil && strings.HasPrefix(header.Get("Content-Type"), "text/html") {
		said = markup.ReplaceAllString(said, " ")
	}
	return printableASCII(strings.Join(strings.Fields(said), " "), maxText)
}

// markup is what is not text in a page.
var markup = regexp.MustCompile(`(?is)<(style|script|head)\b.*?(</(style|script|head)>|$)|<[^>]*(>|$)`)

// retryAfter returns how long an answer asks to wait, in seconds or until a date by
// its own clock; 0 if it does not. RFC 9110 10.2.3
func retryAfter(header http.Header) time.Duration {
	value := strings.TrimSpace(header.Get("Retry-After"))
	if n, err := strconv.ParseUint(value, 10, 31); err == nil {
		return min(time.Duration(n)*time.Second, maxRetryAfter)
	}
	at, err := http.ParseTime(value)
	if err != nil {
		return 0
	}
	now, err := http.ParseTime(header.Get("Date"))
	if err != nil {
		now = time.Now()
	}
	return max(0, min(at.Sub(now), maxRetryAfter))
}

// redirection returns the Location of an answer that is a redirect.
func redirection(a *http.Response) string {
	switch a.StatusCode {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		return a.Header.Get("Location")
	}
	return ""
}

// redirect returns where an answer to a request for u redirects to, or an error
// that tells why that is not followed. hops is how many were.
func redirect(u *url.URL, e statusError, hops int, secret bool) (*url.URL, error) {
	to, err := u.Parse(e.location)
	if err == nil {
		to.Scheme = strings.Replace(to.Scheme, "http", "ws", 1)
		e.location = withoutSecrets(printableASCII(to.String(), maxHandshake))
	} else {
		e.location = fmt.Sprintf("%.40q", withoutSecrets(e.location))
	}
	switch {
	case err != nil || !isWebsocket(to) || to.Hostname() == "" || !validPort(to.Port()) || to.User != nil || !isVisible(to.String()):
		e.unfollowed = "not the URL of a relay"
	case hops >= maxRedirects:
		e.unfollowed = fmt.Sprintf("after %d others", hops)
	case isTLS(u) && !isTLS(to):
		e.unfollowed = "not followed: it leaves TLS"
	case secret && hostPort(u) != hostPort(to):
		e.unfollowed = "not followed: the secrets of the rule are for another host"
	default:
		to.Fragment, to.RawFragment = "", ""
		return to, nil
	}
	return nil, e
}

// isLocal reports whether an address is one of this machine or network, where a
// redirect from outside may not lead.
func isLocal(a netip.Addr) bool {
	a = a.Unmap()
	return a.IsLoopback() || a.IsPrivate() || a.IsLinkLocalUnicast() || a.IsMulticast() || a.IsUnspecified() || sharedSpace.Contains(a)
}

var sharedSpace = netip.MustParsePrefix("100.64.0.0/10") // RFC 6598

// hostPort returns where u is dialled.
func hostPort(u *url.URL) string { return net.JoinHostPort(u.Hostname(), portOf(u)) }

// basicAuth returns credentials as HTTP has them. RFC 7617 2
func basicAuth(user *url.Userinfo) string {
	password, _ := user.Password()
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user.Username()+":"+password))
}

// hostWithoutZone returns the host and port of u without the zone of an IPv6
// address, which means nothing to the other side. RFC 6874 1
func hostWithoutZone(u *url.URL) string {
	before, after, ok := strings.Cut(u.Host, "%")
	if !ok || !strings.HasPrefix(before, "[") {
		return u.Host
	}
	_, after, _ = strings.Cut(after, "]")
	return before + "]" + after
}

// quoted returns the first n bytes of s, quoted and in ASCII.
func quoted(s string, n int) string { return strconv.QuoteToASCII(s[:min(len(s), n)]) }
