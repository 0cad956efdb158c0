// The page: vw in a browser, on GET /. It does everything through the API, so
// it may be left out. Its files are embedded and hold no secret: where
// VW_TOKEN is set they go to everybody, so that the page can ask for it.
//
// The rules: nothing inline, nothing from another origin but the players, and
// those with a hash; what comes from outside is text to the page, never markup.

package main

import (
	"bytes"
	"cmp"
	"embed"
	"errors"
	"html"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

//go:embed page
var pageFiles embed.FS

// pageTypes are the paths that need no token, and the types of their answers.
var pageTypes = map[string]string{
	"/":           "text/html; charset=utf-8",
	"/page.css":   "text/css; charset=utf-8",
	"/page.js":    "text/javascript; charset=utf-8",
	"/preview.js": "text/javascript; charset=utf-8",
	"/icon.svg":   "image/svg+xml",
	"/player.js":  "text/javascript; charset=utf-8",
	"/mpegts.js":  "text/javascript; charset=utf-8",
	"/login":      "application/json",
}

const (
	pageTimeout = 30 * time.Second // of one answer: a player has up to 275 kB, and phones can be slow
	eventsEvery = time.Second
)

// The players, unless VW_PLAYER names others: packages of npm. The hashes are
// of the files in them, and keep a CDN from serving anything else.
var defaultPlayers = players{
	jsmpeg: player{
		url:       "https://cdn.jsdelivr.net/npm/@cycjimmy/jsmpeg-player@6.1.2/dist/jsmpeg-player.umd.min.js",
		integrity: "sha384-ZXLP4mPW4hwqJq+wWAofBuATF82RsfliKzqoOZn3tXLzhlxCiuqeeyU76TcST2gK",
	},
	mpegts: player{
		url:       "https://cdn.jsdelivr.net/npm/mpegts.js@1.8.2/dist/mpegts.js",
		integrity: "sha384-sQp+4cJv0jChNCYvgy6W0RSfQZB/w6d3ZTDoIBlY4Uorfw4PLS56T2yM2z47bSkl",
	},
}

// The files of the players in a folder.
const (
	jsmpegFile = "jsmpeg-player.umd.min.js"
	mpegtsFile = "mpegts.js"
)

// playerStyles are the hashes of the style sheet that the default player adds,
// at first empty and then whole. The page has no use for it, but without them
// each preview reports two violations of the policy.
const playerStyles = "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=' 'sha256-lRyplcblLyRa4o+ZUBNzXETDGwKXzgKgrWbiYOwfTLg='"

// player is where the page gets a player: from a URL, or else a file.
type player struct{ url, integrity, file string }

// players are JSMpeg, for mpeg1video and mp2, and mpegts.js, for what browsers
// decode themselves.
type players struct{ jsmpeg, mpegts player }

// newPlayers reads VW_PLAYER, which names a folder that has both players, or
// the file of one; the other is looked for beside it. A relative name is below
// the folder of the binary; a URL of a folder ends in a slash. ok reports
// whether the value may stand in a policy.
func newPlayers(v string) (p players, ok bool) {
	if v == "" {
		return defaultPlayers, true
	}
	u, err := url.Parse(v)
	if err == nil && (u.Scheme == "http" || u.Scheme == "https") {
		jsmpeg, mpegts := pairOf(path.Base(u.Path), strings.HasSuffix(u.Path, "/") || u.Path == "")
		p.jsmpeg.url, p.mpegts.url = besideURL(u, jsmpeg), besideURL(u, mpegts)
		return p, u.Host != "" && u.User == nil && isVisible(v) && !strings.ContainsAny(v, `;,'"`)
	}
	if strings.Contains(v, "://") {
		return players{}, false
	}
	if self, err := os.Executable(); err == nil && !filepath.IsAbs(v) {
		v = filepath.Join(filepath.Dir(self), v)
	}
	folder := v
	info, err := os.Stat(v)
	isFolder := err == nil && info.IsDir()
	if !isFolder {
		folder = filepath.Dir(v)
	}
	jsmpeg, mpegts := pairOf(filepath.Base(v), isFolder)
	p.jsmpeg.file, p.mpegts.file = filepath.Join(folder, jsmpeg), filepath.Join(folder, mpegts)
	return p, true
}

// pairOf returns the names of both players, one of which may have been given.
func pairOf(given string, isFolder bool) (jsmpeg, mpegts string) {
	switch {
	case isFolder:
		return jsmpegFile, mpegtsFile
	case strings.HasPrefix(given, "mpegts"):
		return jsmpegFile, given
	}
	return given, mpegtsFile
}

// besideURL returns u, or what has the name in its folder.
func besideURL(u *url.URL, name string) string {
	if path.Base(u.Path) == name {
		return u.String()
	}
	return u.ResolveReference(&url.URL{Path: name}).String()
}

// page serves the files of the page.
type page struct {
	players players // set before it serves
}

// plainHost is a Host that may stand in a policy.
var plainHost = regexp.MustCompile(`^[A-Za-z0-9.-]+(:[0-9]+)?$`)

// setHeader sets what every file of the page is sent with. The websockets of
// the page's own host are named: not every browser takes 'self' for them.
func (p *page) setHeader(w http.ResponseWriter, r *http.Request) {
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(pageTimeout))
	scripts := ""
	for _, from := range []player{p.players.jsmpeg, p.players.mpegts} {
		if source, _, _ := strings.Cut(from.url, "?"); source != "" { // a source of a policy has no query
			scripts += " " + source
		}
	}
	connect := ""
	if plainHost.MatchString(r.Host) {
		connect = " ws://" + r.Host + " wss://" + r.Host
	}
	h := w.Header()
	h.Set("Content-Security-Policy", "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'"+scripts+
		"; style-src 'self' "+playerStyles+"; img-src 'self'; media-src blob:; connect-src 'self'"+connect+
		"; form-action 'none'; base-uri 'none'; frame-ancestors 'none'")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
	h.Set("Cache-Control", "no-cache")
	h.Set("Content-Type", pageTypes[r.URL.Path])
}

// getPage answers with a file of the page.
func (p *page) getPage(w http.ResponseWriter, r *http.Request) {
	name := strings.TrimPrefix(r.URL.Path, "/")
	if name == "" {
		name = "index.html"
	}
	b, err := pageFiles.ReadFile("page/" + name)
	if err != nil {
		panic(err) // its route is of a file that is embedded
	}
	p.setHeader(w, r)
	if name == "index.html" {
		b = p.players.name(b)
	}
	w.Write(withoutComments(b))
}

// refuse tells in a browser, which would show the JSON of an error as it is, why
// the page does not open. Every other caller gets the error.
func (p *page) refuse(w http.ResponseWriter, r *http.Request, err error) {
	var known httpError
	if !errors.As(err, &known) || r.URL.Path != "/" || !strings.Contains(r.Header.Get("Accept"), "text/html") {
		refuse(w, r, err)
		return
	}
	b, _ := pageFiles.ReadFile("page/refused.html")
	p.setHeader(w, r)
	w.WriteHeader(known.status)
	w.Write(bytes.ReplaceAll(b, []byte("{{error}}"), []byte(html.EscapeString(err.Error()))))
}

// name writes into the page where its players are.
func (p players) name(page []byte) []byte {
	return []byte(strings.NewReplacer(
		"{{jsmpeg}}", html.EscapeString(cmp.Or(p.jsmpeg.url, "player.js")), "{{jsmpegHash}}", p.jsmpeg.integrity,
		"{{mpegts}}", html.EscapeString(cmp.Or(p.mpegts.url, "mpegts.js")), "{{mpegtsHash}}", p.mpegts.integrity,
	).Replace(string(page)))
}

// withoutComments leaves out what is for who reads the source: indentation,
// and lines that are a comment.
func withoutComments(source []byte) (b []byte) {
	for line := range bytes.Lines(source) {
		if line = bytes.TrimLeft(line, " \n"); !bytes.HasPrefix(line, []byte("//")) {
			b = append(b, line...)
		}
	}
	return b
}

// getPlayer answers with a file that VW_PLAYER names.
func (p *page) getPlayer(w http.ResponseWriter, r *http.Request) {
	name := p.players.jsmpeg.file
	if r.URL.Path == "/mpegts.js" {
		name = p.players.mpegts.file
	}
	info, err := os.Stat(name)
	if err != nil || !info.Mode().IsRegular() {
		refuse(w, r, httpError{http.StatusNotFound, "VW_PLAYER: the file does not exist"})
		return
	}
	p.setHeader(w, r)
	http.ServeFile(w, r, name)
}
