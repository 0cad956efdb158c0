// Command vw sends video over websockets: ffmpeg posts MPEG-TS to it, and it
// sends that on to remote relays, by rules that change while it runs.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

const usage = `vw sends video over websockets, for remote laboratories.

	vw stream     run: take feeds on /ts, rules on /api, send to relays
	vw check URL  from here to that relay: what works, and what is wrong
	vw devices    list cameras and microphones, each with its ffmpeg line; as JSON with -json
	vw units DIR  write the services of systemd for vw and those devices; print them without DIR
	vw healthcheck
	              ask the vw that runs here, by VW_HOST and VW_PORT: status 0 if it lives, else 1
	vw version    print the version
	vw help       print this

Settings come from the environment:

`

var commandNames = []string{"stream", "check", "devices", "units", "healthcheck", "version", "help"}

func main() {
	os.Exit(run(context.Background(), os.Args[1:], os.Environ(), os.Stdout, os.Stderr))
}

// run is the program; it returns its exit status. It may be called from tests.
func run(ctx context.Context, args, env []string, stdout, stderr io.Writer) int {
	switch {
	case len(args) == 0:
		fmt.Fprint(stderr, usage, settingsHelp())
		return 2
	case len(args) == 1 && args[0] == "stream":
	case len(args) == 2 && args[0] == "check" && args[1] != "" && !strings.HasPrefix(args[1], "-"):
	case args[0] == "check":
		fmt.Fprintln(stderr, "vw: check takes one URL, that of the relay: vw check wss://relay.example.org/in/video0")
		return 2
	case len(args) == 1 && args[0] == "devices", slices.Equal(args, []string{"devices", "-json"}):
	case (len(args) == 1 || len(args) == 2) && args[0] == "units":
	case len(args) == 1 && args[0] == "healthcheck":
	case len(args) == 1 && (args[0] == "version" || args[0] == "--version" || args[0] == "-version"):
		fmt.Fprintln(stdout, "vw", version())
		return 0
	case len(args) == 1 && (args[0] == "help" || args[0] == "-h" || args[0] == "--help"):
		fmt.Fprint(stdout, usage, settingsHelp())
		return 0
	default:
		hint := ""
		if meant := nearest(args[0], commandNames); meant != args[0] && edits(args[0], meant) <= 2 {
			hint = "; did you mean " + meant + "?"
		}
		fmt.Fprintf(stderr, "vw: %q: the command must be stream, check URL, devices (or devices -json), units (or units DIR), healthcheck, version or help%s\n", strings.Join(args, " "), hint)
		return 2
	}
	set, warnings, err := readSettings(env)
	if err != nil {
		fmt.Fprintln(stderr, "vw:", err)
		return 2
	}
	switch args[0] {
	case "check":
		return check(ctx, set.check(args[1]), stdout, stderr)
	case "devices":
		return printDevices(len(args) == 2, set.port, stdout, stderr)
	case "units":
		return printUnits(strings.Join(args[1:], ""), set.port, stdout, stderr)
	}
	if args[0] == "healthcheck" {
		return healthcheck(ctx, set, stdout, stderr)
	}
	return runStream(ctx, set, warnings, env, stderr)
}

// healthcheck asks the vw that runs here whether it lives, for containers that
// have no other program to ask with.
func healthcheck(ctx context.Context, set settings, stdout, stderr io.Writer) int {
	host := set.host
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "localhost"
	}
	ctx, cancel := context.WithTimeout(ctx, healthTimeout)
	defer cancel()
	page := url.URL{Scheme: "http", Host: net.JoinHostPort(host, strconv.Itoa(set.port)), Path: "/healthcheck"}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, page.String(), nil)
	if err == nil {
		var a *http.Response
		client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}} // and no proxy
		if a, err = client.Do(r); err == nil {
			a.Body.Close()
			if a.StatusCode == http.StatusOK {
				fmt.Fprintln(stdout, "ok")
				return 0
			}
			err = fmt.Errorf("%s answered %s", page.Host, a.Status)
		}
	}
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		err = fmt.Errorf("nothing listens at %s (connection refused): vw does not run, or with another VW_PORT or VW_HOST", page.Host)
	case errors.Is(err, context.DeadlineExceeded):
		err = fmt.Errorf("%s has not answered within %v", page.Host, healthTimeout)
	}
	fmt.Fprintln(stderr, "vw:", err)
	return 1
}

const healthTimeout = 5 * time.Second

// runStream runs vw until a signal, or until ctx is done, and returns the exit status.
func runStream(ctx context.Context, set settings, warnings, env []string, stderr io.Writer) int {
	defer ignoreBrokenPipes()()
	log, lines := newLog(env, stderr, set.logLevel)
	defer lines.close()
	for _, w := range warnings {
		log.Warn(w)
	}
	if set.cpuProfile != "" {
		stop, err := profile(set.cpuProfile)
		if err != nil {
			fmt.Fprintln(lines, "vw: VW_CPUPROFILE:", err)
			return 2
		}
		defer stop()
	}
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	defer context.AfterFunc(ctx, stop)() // a second signal ends the program at once
	err := serve(ctx, set, newNotifier(env, log), log)
	switch bad := (settingError{}); {
	case errors.As(err, &bad):
		fmt.Fprintln(lines, "vw:", err)
		return 2
	case err != nil:
		log.Error("vw ends", "err", err)
		return 1
	}
	return 0
}

// ignoreBrokenPipes lets vw live on when the reader of its log has gone, until
// the function that it returns is called.
func ignoreBrokenPipes() (stop func()) {
	ignored := make(chan os.Signal, 1) // Go ends a program that writes to a broken stderr, unless it asks for the signal
	signal.Notify(ignored, syscall.SIGPIPE)
	return func() { signal.Stop(ignored) }
}

// serve runs vw until ctx is done; then it ends within 5 s, whatever relays,
// publishers and callers do.
func serve(ctx context.Context, set settings, manager *notifier, log *slog.Logger) error {
	listeners, err := listen(set.host, set.port)
	if err != nil {
		return listenError(set, err)
	}
	work, end := context.WithCancelCause(context.WithoutCancel(ctx))
	defer end(nil)
	s, err := newProgram(work, set, listeners[0].Addr().(*net.TCPAddr).Port, log)
	if err != nil {
		for _, l := range listeners {
			l.Close()
		}
		return err
	}
	h := newHTTPServer(s)
	g, ctx := errgroup.WithContext(ctx)
	for _, l := range listeners {
		announce(l.Addr().(*net.TCPAddr), set.token != "", log)
		g.Go(func() error {
			if err := h.Serve(doorListener{l, s.door}); err != http.ErrServerClosed {
				return err
			}
			return nil
		})
	}
	manager.tell("READY=1")
	g.Go(func() error {
		manager.watch(ctx, s.commands.rules.tryLocks)
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		end(errShutdown)
		manager.tell("STOPPING=1")
		shutDown(s, h)
		return nil
	})
	return g.Wait()
}

// listenError says what is wrong with the address or the port.
func listenError(set settings, err error) error {
	switch unknown := (&net.DNSError{}); {
	case errors.As(err, &unknown):
		return settingError{"VW_HOST", set.host, fmt.Errorf("this name has no address: %w", unknown)}
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return settingError{"VW_HOST", set.host, errors.New("this machine does not have that address")}
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("port %d is in use, by another vw or another program; VW_PORT sets another port: %w", set.port, err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("port %d needs more rights than vw has; VW_PORT sets another port: %w", set.port, err)
	}
	return err
}

// newProgram wires up what set asks for, with the rules in force that are
// stored. It ends with ctx, and is reached on port.
func newProgram(ctx context.Context, set settings, port int, log *slog.Logger) (*server, error) {
	r := newRules(ctx, newMux(), set.maxLag, log)
	r.dialer.proxy = http.ProxyFromEnvironment
	r.mute(set.mute)
	if set.state != "" {
		if err := r.keep(set.state); err != nil {
			return nil, settingError{"VW_STATE", set.state, err}
		}
	}
	s := newServer(ctx, r, set.token, log)
	s.page.players = set.players
	for _, name := range []string{set.players.jsmpeg.file, set.players.mpegts.file} {
		if _, err := os.Stat(name); name != "" && err != nil {
			log.Warn("VW_PLAYER: the preview lacks a player", "err", err)
		}
	}
	s.commands.port, s.commands.name = port, set.name
	if set.api != "" {
		s.startControl(set.control())
	}
	return s, nil
}

// newHTTPServer lets s be asked. It has no timeout for bodies, which are endless.
func newHTTPServer(s *server) *http.Server {
	return &http.Server{
		Handler:           s,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    maxHeaders,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if conn, err := c.(*net.TCPConn).SyscallConn(); err == nil {
				limitUnsent("", "", conn)
			}
			return withConn(ctx, c)
		},
		ConnState:                    s.door.track,
		DisableGeneralOptionsHandler: true,
	}
}

// announce tells the log where vw listens, and where a browser on this machine
// finds the page.
func announce(addr *net.TCPAddr, token bool, log *slog.Logger) {
	host := "localhost"
	if !addr.IP.IsLoopback() && !addr.IP.IsUnspecified() {
		host = addr.IP.String()
	}
	page := url.URL{Scheme: "http", Host: net.JoinHostPort(host, strconv.Itoa(addr.Port)), Path: "/"}
	log.Info("listening; page: "+page.String(), "addr", addr.String())
	if !addr.IP.IsLoopback() && !token {
		log.Warn("requests from other machines are refused: VW_TOKEN is not set")
	}
}

// shutDown waits until nothing of s runs; its context is done.
func shutDown(s *server, h *http.Server) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := h.Shutdown(ctx); err != nil {
		h.Close()
	}
	s.tasks.Wait()
	s.commands.rules.wait()
}

// listen opens the port on an address; "" means both loopback addresses, or
// the one that this machine has.
func listen(host string, port int) (all []net.Listener, err error) {
	hosts, anyPort := []string{host}, port == 0
	if host == "" {
		hosts = []string{"127.0.0.1", "::1"}
	}
	for _, h := range hosts {
		l, e := net.Listen("tcp", net.JoinHostPort(h, strconv.Itoa(port)))
		if e != nil {
			if h == "::1" && len(all) > 0 && (anyPort || !errors.Is(e, syscall.EADDRINUSE)) {
				continue // no IPv6 here, or the port that was free on 127.0.0.1 is taken there
			}
			for _, l := range all {
				l.Close()
			}
			return nil, e
		}
		port = l.Addr().(*net.TCPAddr).Port
		all = append(all, l)
	}
	return all, nil
}

// settings are what the environment says.
type settings struct {
	host       string // "": both loopback addresses
	port       int    // 0: any that is free
	logLevel   slog.Level
	token      string
	name       string // of this vw on the control link
	api        string // URL that commands come from; "": none
	apiToken   string
	state      string // file; "": none
	mute       muteSet
	maxLag     time.Duration
	players    players
	cpuProfile string

	checkToken   string // that vw check shows
	checkHeaders headers
}

// control returns the rule of the control link.
func (s settings) control() destinationRule {
	return destinationRule{ID: controlID, Stream: "api", Destination: s.api, Token: s.apiToken}
}

// variable is one setting: its names, its help, and how it is read.
type variable struct {
	name, also, unset, help string
	read                    func(s *settings, value string) (allowed string, ok bool)
}

var variables = []variable{
	{"VW_PORT", "", "8888", "port to listen on; 0: any that is free", func(s *settings, v string) (string, bool) {
		n, err := strconv.ParseUint(v, 10, 16)
		s.port = int(n)
		return "a port from 0 to 65535", err == nil
	}},
	{"VW_HOST", "", "loopback", "address to listen on", func(s *settings, v string) (string, bool) {
		s.host = v
		if inner, ok := strings.CutPrefix(v, "["); ok && strings.HasSuffix(inner, "]") { // as in a URL
			s.host = strings.TrimSuffix(inner, "]")
		}
		_, err := netip.ParseAddr(s.host)
		return "an address or a host name, without a port, which is VW_PORT", isVisible(v) && !strings.Contains(v, "/") && (err == nil || !strings.Contains(v, ":"))
	}},
	{"VW_LOGLEVEL", "VW_LOG_LEVEL", "info", "error, warn, info or debug", func(s *settings, v string) (string, bool) {
		level, ok := map[string]slog.Level{
			"panic": slog.LevelError, "fatal": slog.LevelError, "error": slog.LevelError,
			"warn": slog.LevelWarn, "warning": slog.LevelWarn, "info": slog.LevelInfo,
			"debug": slog.LevelDebug, "trace": slog.LevelDebug,
		}[strings.ToLower(v)]
		s.logLevel = level
		return "one of panic, fatal, error, warn, info, debug, trace", ok
	}},
	{"VW_TOKEN", "", "none", "what peers that are not loopback must present", func(s *settings, v string) (string, bool) {
		s.token = v
		return "", true
	}},
	{"VW_API", "", "none", "websocket to dial for commands", func(s *settings, v string) (string, bool) {
		s.api = v
		return "", true // checked below, with the token
	}},
	{"VW_API_TOKEN", "", "none", "token for it", func(s *settings, v string) (string, bool) {
		s.apiToken = v
		return "", true
	}},
	{"VW_NAME", "", "none", "what this vw calls itself on a control link that several share", func(s *settings, v string) (string, bool) {
		s.name = v
		_, err := cleanName("VW_NAME", v)
		return "a name of A-Z a-z 0-9 . _ - and /", err == nil && v[0] != '/'
	}},
	{"VW_STATE", "", "none", "file in which the rules survive a restart", func(s *settings, v string) (string, bool) {
		s.state = v
		return "", true
	}},
	{"VW_MUTE", "", "none", "audio, video or both: muted from the start", func(s *settings, v string) (string, bool) {
		for kind := range strings.FieldsFuncSeq(v, func(r rune) bool { return r == ',' || r == ' ' }) {
			i := slices.Index(mediaKinds, strings.ToLower(kind))
			if i < 0 {
				return `audio, video, or both: "audio,video"`, false
			}
			s.mute |= muteOf(handHere, i)
		}
		return "", true
	}},
	{"VW_MAXLAG", "", "500ms", "age at which queued video is dropped", func(s *settings, v string) (string, bool) {
		d, err := time.ParseDuration(v)
		s.maxLag = d
		return "a duration from 10ms to 1m, such as 500ms", err == nil && 10*time.Millisecond <= d && d <= time.Minute
	}},
	{"VW_PLAYER", "", "from a CDN", "the page's players: a folder or file beside vw, or a URL", func(s *settings, v string) (string, bool) {
		var ok bool
		s.players, ok = newPlayers(v)
		return "a folder, a file, or a URL of http or https", ok
	}},
	{"VW_CHECK_TOKEN", "", "none", "token that vw check shows to the relay", func(s *settings, v string) (string, bool) {
		s.checkToken = v
		return "", true // checked with the URL
	}},
	{"VW_CHECK_HEADERS", "", "none", `headers that vw check sends, as in a rule: {"X-Key":"k"}`, func(s *settings, v string) (string, bool) {
		return `an object such as {"X-Key":"k"}`, s.checkHeaders.UnmarshalJSON([]byte(v)) == nil
	}},
	{"VW_CPUPROFILE", "", "none", "file for a CPU profile of 30 s", func(s *settings, v string) (string, bool) {
		s.cpuProfile = v
		return "", true
	}},
}

func settingsHelp() string {
	var b strings.Builder
	for _, v := range variables {
		fmt.Fprintf(&b, "\t%-16s %s (default: %s)\n", v.name, v.help, v.unset)
	}
	return b.String()
}

// readSettings reads the environment: "NAME=value" each; an empty value is as
// good as none. An error names the variable, the value and what is allowed.
func readSettings(env []string) (settings, []string, error) {
	s := settings{port: 8888, maxLag: 500 * time.Millisecond}
	s.players, _ = newPlayers("")
	var warnings []string
	for _, e := range env {
		name, value, _ := strings.Cut(e, "=")
		if !strings.HasPrefix(name, "VW_") || value == "" {
			continue
		}
		i := slices.IndexFunc(variables, func(v variable) bool { return name == v.name || name == v.also })
		if i < 0 {
			warnings = append(warnings, fmt.Sprintf("%s is not a setting; did you mean %s?", strconv.QuoteToASCII(name), nearest(name, variableNames())))
			continue
		}
		if allowed, ok := variables[i].read(&s, value); !ok {
			if name == "VW_CHECK_HEADERS" {
				value = hidden // it may be a secret
			}
			return s, nil, fmt.Errorf("%s=%q: it must be %s", name, value, allowed)
		}
	}
	if err := checkProxies(env); err != nil {
		return s, nil, err
	}
	if s.api != "" { // no value in the error: it may be a secret
		if err := s.control().cleanControl(); err != nil {
			return s, nil, fmt.Errorf("VW_API, VW_API_TOKEN: %w", err)
		}
	}
	return s, warnings, nil
}

// variableNames returns the names of all settings.
func variableNames() (names []string) {
	for _, v := range variables {
		names = append(names, v.name)
		if v.also != "" {
			names = append(names, v.also)
		}
	}
	return names
}

// settingError: a setting can be read, but not done.
type settingError struct {
	name, value string
	error
}

func (e settingError) Error() string { return fmt.Sprintf("%s=%q: %v", e.name, e.value, e.error) }

// check returns the rule that vw check tries with a URL.
func (s settings) check(url string) destinationRule {
	return destinationRule{ID: "check", Stream: "check", Destination: url, Token: s.checkToken, Headers: s.checkHeaders}
}
