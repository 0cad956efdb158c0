// Advice: what an error on the way to a relay means and what to do about it, in
// one sentence. vw check ends with it, and the stats of a destination have it.

package main

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"syscall"
	"time"
)

// checkEnough is the rate in bit/s that a camera and a microphone need with the
// lines of vw devices, and a quarter more.
const checkEnough = 1.5e6

// advise returns what is to be said of err, which a way to the relay has ended with.
func advise(err error, to *url.URL) string {
	at, s := to, stepPing // an open connection that was lost
	var via *url.URL
	var e stepError
	if errors.As(err, &e) {
		s, at, via = e.step, e.at, e.proxy
	}
	w := way{to: to, at: at, via: via, relay: hostPort(at)}
	switch s {
	case stepName:
		return w.adviseName(err)
	case stepTCP:
		return w.adviseTCP(err)
	case stepProxy:
		return w.adviseProxy(err)
	case stepTLS:
		return w.adviseTLS(err)
	case stepUpgrade:
		return w.adviseUpgrade(err)
	case stepToken:
		return w.adviseToken(err)
	}
	return w.adviseOpen(err, s)
}

// way is where an error was met.
type way struct {
	to    *url.URL // what was asked for
	at    *url.URL // where that led
	via   *url.URL // the proxy on the way; nil: none
	relay string   // host and port of at
}

// next returns what is connected to first, and what else may help there.
func (w way) next() (address, host, hint string) {
	if w.via != nil {
		return "the proxy " + hostPort(w.via), w.via.Hostname(), ""
	}
	return w.relay, w.at.Hostname(), "; if this network has a proxy, set HTTPS_PROXY (for wss) or HTTP_PROXY (for ws)"
}

func (w way) adviseName(err error) string {
	_, host, hint := w.next()
	var lookup lookupError
	switch {
	case strings.HasSuffix(strings.ToLower(strings.TrimSuffix(host, ".")), ".local"):
		return fmt.Sprintf("The name %s was not found: names in .local are found by multicast DNS, which systemd-resolved does for vw where it is turned on (MulticastDNS=yes); or put the relay's address into the URL.", host)
	case errors.As(err, &lookup) && lookup.timeout:
		return fmt.Sprintf("No nameserver answers, so the address of %s is not known: look at this machine's network and DNS%s.", host, hint)
	}
	return fmt.Sprintf("The name %s was not found: look at its spelling, and at this machine's DNS%s.", host, hint)
}

func (w way) adviseTCP(err error) string {
	address, _, hint := w.next()
	var failed connectError
	switch {
	case errors.Is(err, errInside):
		return w.adviseRedirect()
	case errors.As(err, &failed) && failed.timeout():
		return fmt.Sprintf("Nothing answers at %s: it is down, or a firewall drops what is sent there%s.", address, hint)
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH):
		return fmt.Sprintf("There is no way from here to %s: look at this machine's network%s.", address, hint)
	}
	return fmt.Sprintf("The connection to %s is refused: nothing listens there, or a firewall refuses it%s.", address, hint)
}

func (w way) adviseProxy(err error) string {
	if errors.Is(err, errInside) {
		return w.adviseRedirect()
	}
	if w.via == nil {
		return "The proxy that the environment names is not one for vw: HTTPS_PROXY and HTTP_PROXY must be URLs of http, https or socks5."
	}
	var answer refusalError
	name := w.via.Host
	switch {
	case !errors.As(err, &answer):
		return fmt.Sprintf("The proxy %s does not open a tunnel: it may not be a proxy of the kind that its URL names (%s).", name, w.via.Scheme)
	case (answer.status == http.StatusProxyAuthRequired || answer.status == http.StatusUnauthorized) && w.via.User == nil:
		return fmt.Sprintf("The proxy %s wants a user and password: HTTPS_PROXY and HTTP_PROXY take them as %s://user:password@host:port.", name, w.via.Scheme)
	case answer.status == http.StatusProxyAuthRequired || answer.status == http.StatusUnauthorized:
		return fmt.Sprintf("The proxy %s does not accept its user and password.", name)
	case answer.status/100 == 5:
		return fmt.Sprintf("The proxy %s can't reach %s.", name, w.relay)
	}
	return fmt.Sprintf("The proxy %s forbids connections to %s.", name, w.relay)
}

func (w way) adviseTLS(err error) string {
	host := w.at.Hostname()
	var (
		name    x509.HostnameError
		invalid x509.CertificateInvalidError
		unknown x509.UnknownAuthorityError
		record  tls.RecordHeaderError
	)
	switch now := time.Now(); {
	case errors.As(err, &name):
		return fmt.Sprintf("The certificate is for %s, not for %s: the URL has another host than the relay, or something on the way answers in its place.", certificateHolders(name.Certificate), host)
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired && now.Before(invalid.Cert.NotBefore):
		return fmt.Sprintf("The certificate of %s is valid from %s on: this machine's clock may be wrong, it says %s.", host, invalid.Cert.NotBefore.Format(time.DateOnly), now.Format(time.DateOnly))
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return fmt.Sprintf("The certificate of %s expired on %s; this machine's clock says %s.", host, invalid.Cert.NotAfter.Format(time.DateOnly), now.Format(time.DateOnly))
	case errors.As(err, &unknown):
		return fmt.Sprintf("The certificate of %s is from an authority that this machine does not know: one of your own belongs into SSL_CERT_FILE, any other may be a firewall that listens in.", host)
	case errors.As(err, &record):
		return fmt.Sprintf("What answers at %s does not speak TLS: the URL may have to begin with ws.", w.relay)
	}
	return fmt.Sprintf("TLS with %s fails: it is no TLS server, or something on the way cuts the connection.", w.relay)
}

func (w way) adviseUpgrade(err error) string {
	path := cmp.Or(w.at.EscapedPath(), "/")
	var status statusError
	switch answered := errors.As(err, &status); {
	case answered && (status.status == http.StatusNetworkAuthenticationRequired || w.isPortal(status)):
		return fmt.Sprintf("This network has a captive portal, or the relay has moved: %s is answered by %s. Log in to the network with a browser, or put the new address into the URL.", hostPort(w.to), cmp.Or(status.location, w.relay))
	case answered && status.location != "":
		return fmt.Sprintf("The relay at %s redirects to %s: if that is the relay, put it into the URL.", w.relay, status.location)
	case answered && status.status == http.StatusNotFound:
		return fmt.Sprintf("There is nothing at %s on %s: look at the path of the URL.", path, w.relay)
	case answered && status.status == http.StatusTooManyRequests:
		return fmt.Sprintf("The relay at %s has had too many connections from here: it will let vw in later.", w.relay)
	case answered && isAway(status.status):
		return fmt.Sprintf("What stands in front of the relay at %s answers, but does not reach it.", w.relay)
	case answered:
		return fmt.Sprintf("What answers at %s is a web server, but opens no websocket at %s.", w.relay, path)
	case errors.Is(err, errNoAnswer):
		return fmt.Sprintf("What listens at %s accepts the connection and is silent: the relay hangs, or something on the way holds websockets up.", w.relay)
	case errors.Is(err, errUnanswered):
		return fmt.Sprintf("What listens at %s accepts the connection and closes it: it is no relay, or something on the way cuts it.", w.relay)
	}
	return fmt.Sprintf("What answers at %s is no websocket server, or something on the way is in between.", w.relay)
}

// isPortal reports whether an answer in the clear came from, or leads to, another
// host than the one that was asked for.
func (w way) isPortal(status statusError) bool {
	if w.to.Scheme != "ws" {
		return false
	}
	if u, err := url.Parse(status.location); status.location != "" && err == nil {
		return u.Hostname() != "" && u.Hostname() != w.to.Hostname()
	}
	return w.at.Hostname() != w.to.Hostname() && !isAway(status.status)
}

// adviseRedirect is for a relay outside that sends us to an address of this network.
func (w way) adviseRedirect() string {
	if isAccess(w.to) {
		return fmt.Sprintf("The access point at %s sends vw to %s, which is inside this network: its answer must have an address that is reached from everywhere, or this network has a captive portal.", hostPort(w.to), w.relay)
	}
	return fmt.Sprintf("This network has a captive portal, or the relay has moved: %s is redirected to %s, which is inside this network. Log in to the network with a browser, or put that address into the URL.", hostPort(w.to), w.relay)
}

func (w way) adviseToken(err error) string {
	access := isAccess(w.to)
	var status statusError
	switch answered := errors.As(err, &status); {
	case answered && access && status.status == http.StatusMethodNotAllowed:
		return fmt.Sprintf("The address %s takes no tokens: it may be one for websockets, and have to begin with ws or wss.", w.relay)
	case errors.As(err, new(tokenRefusedError)):
		return fmt.Sprintf("The relay at %s does not accept the token: it may have expired, or be for another path.", w.relay)
	case errors.Is(err, errNoAnswer) && access:
		return fmt.Sprintf("The relay at %s opens the websocket and leaves it alone: the code of the access point may not be good there.", w.relay)
	case errors.Is(err, errNoAnswer), errors.Is(err, errUnanswered), !answered && !errors.As(err, new(closeError)):
		return fmt.Sprintf("The relay at %s does not answer to the token as a relay that knows tokens: it may want none, or another kind.", w.relay)
	case !answered:
		return w.adviseOpen(err, stepToken)
	case w.at.User == nil && w.at.RawQuery == "":
		return fmt.Sprintf("The relay at %s does not let everybody in: the URL has no user and password, and no code.", w.relay)
	}
	return fmt.Sprintf("The relay at %s does not accept the credentials of the URL.", w.relay)
}

// adviseOpen is for a websocket that was open.
func (w way) adviseOpen(err error, s step) string {
	var closed closeError
	errors.As(err, &closed)
	switch closed.status {
	case 1002:
		return fmt.Sprintf("The relay at %s says that vw breaks the rules of websockets: something on the way may alter what is sent.", w.relay)
	case 1008:
		return fmt.Sprintf("The relay at %s closes the websocket by its policy: another publisher has taken this address over (a second destination or a second vw with this URL?), it takes no video there (an address to watch, such as /out/…, takes none), or none from this client.", w.relay)
	case 1009:
		return fmt.Sprintf("The relay at %s does not take messages of this size: it must allow 1 MiB (1048576 bytes), or the camera's keyframes must be smaller.", w.relay)
	case 1012, 1013:
		return fmt.Sprintf("The relay at %s is busy or starts again: it will let vw in later.", w.relay)
	}
	switch {
	case errors.Is(err, errProtocol):
		return fmt.Sprintf("What answers at %s breaks the rules of websockets, or something on the way alters what it sends.", w.relay)
	case errors.As(err, new(closeError)), errors.Is(err, io.ErrUnexpectedEOF), errors.As(err, new(*os.SyscallError)):
		return fmt.Sprintf("The relay at %s opens the websocket and closes it again: it does not want what this URL asks for, and its log may say why.", w.relay)
	case s == stepSend:
		return fmt.Sprintf("The way to %s is too slow for video: a camera needs %.1f Mbit/s.", w.relay, checkEnough/1e6)
	}
	return "The websocket opens, but nothing comes back through it: the relay hangs, or something on the way holds websockets up."
}
