// The page: vw in a browser, on GET /. It does everything through the API, so
// it may be left out. Its files are embedded and hold no secret: where
// VW_TOKEN is set they go to everybody, so that the page can ask for it.
//
// The rules: nothing inline, nothing from another origin but the player, and
// that with a hash; what comes from outside is text to the page, never markup.

package main

import (
	"embed"
	"html"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

//go:embed page
var pageFiles embed.FS

// pageTypes are the paths that need no token, and the types of their answers.
var pageTypes = map[string]string{
	"/":          "text/html; charset=utf-8",
	"/page.css":  "text/css; charset=utf-8",
	"/page.js":   "text/javascript; charset=utf-8",
	"/icon.svg":  "image/svg+xml",
	"/player.js": "text/javascript; charset=utf-8",
	"/login":     "application/json",
}

const (
	pageTimeout = 30 * time.Second // of one answer: the player has 125 kB, and phones can be slow
	eventsEvery = time.Second
)

// The player, unless VW_PLAYER names another: JSMpeg, as a package of npm.
// The hash is of the file in it, and keeps a CDN from serving anything else.
const (
	defaultPlayer    = "https://cdn.jsdelivr.net/npm/@cycjimmy/jsmpeg-player@6.1.2/dist/jsmpeg-player.umd.min.js"
	defaultIntegrity = "sha384-ZXLP4mPW4hwqJq+wWAofBuATF82RsfliKzqoOZn3tXLzhlxCiuqeeyU76TcST2gK"
)

// playerStyles are the hashes of the style sheet that the default player adds,
// at first empty and then whole. The page has no use for it, but without them
// each preview reports two violations of the policy.
const playerStyles = "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=' 'sha256-lRyplcblLyRa4o+ZUBNzXETDGwKXzgKgrWbiYOwfTLg='"

// player is where the page gets its player: from a URL, or else a file.
type player struct{ url, integrity, file string }

// newPlayer reads VW_PLAYER. A relative name is a file beside the binary. ok
// tells whether the value may stand in a policy.
func newPlayer(v string) (p player, ok bool) {
	if v == "" {
		return player{url: defaultPlayer, integrity: defaultIntegrity}, true
	}
	u, err := url.Parse(v)
	if err == nil && (u.Scheme == "http" || u.Scheme == "https") {
		return player{url: v}, u.Host != "" && u.User == nil && isVisible(v) && !strings.ContainsAny(v, `;,'"`)
	}
	if strings.Contains(v, "://") {
		return player{}, false
	}
	if self, err := os.Executable(); err == nil && !filepath.IsAbs(v) {
		v = filepath.Join(filepath.Dir(self), v)
	}
	return player{file: v}, true
}

// page serves the files of the page.
type page struct {
	player player // set before it serves
}

// plainHost is a Host that may stand in a policy.
var plainHost = regexp.MustCompile(`^[A-Za-z0-9.-]+(:[0-9]+)?$`)

// setHeader sets what every file of the page is sent with. The websockets of
// the page's own host are named: not every browser takes 'self' for them.
func (p *page) setHeader(w http.ResponseWriter, r *http.Request) {
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(pageTimeout))
	script, _, _ := strings.Cut(p.player.url, "?") // a source of a policy has no query
	connect := ""
	if plainHost.MatchString(r.Host) {
		connect = " ws://" + r.Host + " wss://" + r.Host
	}
	h := w.Header()
	h.Set("Content-Security-Policy", "default-src 'none'; script-src 'self' 'wasm-unsafe-eval' "+script+
		"; style-src 'self' "+playerStyles+"; img-src 'self'; connect-src 'self'"+connect+
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
		src := p.player.url
		if src == "" {
			src = "player.js"
		}
		b = []byte(strings.NewReplacer("{{player}}", html.EscapeString(src), "{{integrity}}", p.player.integrity).Replace(string(b)))
	}
	w.Write(b)
}

// getPlayer answers with the file that VW_PLAYER names.
func (p *page) getPlayer(w http.ResponseWriter, r *http.Request) {
	info, err := os.Stat(p.player.file)
	if err != nil || !info.Mode().IsRegular() {
		refuse(w, r, httpError{http.StatusNotFound, "VW_PLAYER: there is no such file"})
		return
	}
	p.setHeader(w, r)
	http.ServeFile(w, r, p.player.file)
}
