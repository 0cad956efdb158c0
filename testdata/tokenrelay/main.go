// Command tokenrelay is a websocket relay that wants tokens. It stands in for
// crossbar and for practable's relay, and does on the wire what they were seen
// to do; its library is not ours.
//
// What one connection sends goes to all others on its path. Under /session/ a
// connection needs ?code=, which POST /session/… with a token in Authorization
// gives out, once and for 30 s; one with a bad code is accepted, and nothing
// answers it. Elsewhere the first text message is a token, and gets
// {"topic":…,"token":…,"authorised":…,"reason":…}; after a refusal the
// connection ends. Messages that a receiver is too slow for arrive as one.
//
// A token is a JWT (HS256); its "aud" is the path. It prints the address that
// it listens on, and "open PATH" and "refuse PATH" as things happen.
package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/coder/websocket"
)

var (
	listen = flag.String("listen", "127.0.0.1:0", "`address` to listen on")
	secret = flag.String("secret", "", "`key` of the tokens; without one nobody looks at tokens")
)

func main() {
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	l, err := net.Listen("tcp", *listen)
	if err != nil {
		fmt.Fprintln(os.Stderr, "tokenrelay:", err)
		os.Exit(1)
	}
	fmt.Println(l.Addr())
	r := &relay{addr: l.Addr().String(), codes: make(map[string]time.Time), members: make(map[string][]*member)}
	s := &http.Server{Handler: r, BaseContext: func(net.Listener) context.Context { return ctx }}
	go s.Serve(l)
	<-ctx.Done()
	s.Close()
	r.conns.Wait()
}

// check says what is wrong with a token for a path.
func check(token, path string) error {
	part := strings.Split(token, ".")
	if len(part) != 3 {
		return errors.New("it does not have three parts")
	}
	h := hmac.New(sha256.New, []byte(*secret))
	h.Write([]byte(part[0] + "." + part[1]))
	if part[2] != base64.RawURLEncoding.EncodeToString(h.Sum(nil)) {
		return errors.New("its signature is wrong")
	}
	b, _ := base64.RawURLEncoding.DecodeString(part[1])
	var claims struct {
		Aud string
		Exp int64
	}
	switch err := json.Unmarshal(b, &claims); {
	case err != nil:
		return err
	case claims.Exp < time.Now().Unix():
		return errors.New("it has expired")
	case claims.Aud != path:
		return fmt.Errorf("it is for %s, not %s", claims.Aud, path)
	}
	return nil
}

// relay serves both dialects.
type relay struct {
	addr  string
	conns sync.WaitGroup

	mu      sync.Mutex
	codes   map[string]time.Time // until when
	members map[string][]*member // by path
}

func (r *relay) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	session := strings.HasPrefix(req.URL.Path, "/session/")
	if session && req.Method == http.MethodPost {
		r.access(w, req)
		return
	}
	r.conns.Add(1)
	defer r.conns.Done()
	good := r.redeem(req.URL.Query().Get("code"))
	c, err := websocket.Accept(w, req, &websocket.AcceptOptions{InsecureSkipVerify: true})
	if err != nil {
		return
	}
	defer c.CloseNow()
	c.SetReadLimit(4 << 20)
	ctx := req.Context()
	switch {
	case session && !good:
		fmt.Println("refuse", req.URL.Path)
		<-ctx.Done()
		return
	case !session && *secret != "" && !authorise(ctx, c, req.URL.Path):
		fmt.Println("refuse", req.URL.Path)
		return
	}
	m := &member{conn: c, more: make(chan struct{}, 1)}
	r.join(req.URL.Path, m)
	defer r.leave(req.URL.Path, m)
	fmt.Println("open", req.URL.Path)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r.conns.Go(func() { m.write(ctx) })
	for {
		kind, b, err := c.Read(ctx)
		if err != nil {
			return
		}
		r.share(req.URL.Path, m, kind, b)
	}
}

// authorise waits for a token and answers it.
func authorise(ctx context.Context, c *websocket.Conn, path string) bool {
	for {
		kind, b, err := c.Read(ctx)
		if err != nil {
			return false
		}
		if kind != websocket.MessageText {
			continue
		}
		err = check(string(b), path)
		reason := "ok"
		if err != nil {
			reason = err.Error()
		}
		answer, _ := json.Marshal(map[string]any{"topic": path, "token": string(b), "authorised": err == nil, "reason": reason})
		return c.Write(ctx, websocket.MessageText, answer) == nil && err == nil
	}
}

// access gives out a code.
func (r *relay) access(w http.ResponseWriter, req *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	if err := check(req.Header.Get("Authorization"), req.URL.Path); err != nil {
		w.WriteHeader(http.StatusInternalServerError) // practable's answer to a bad token
		json.NewEncoder(w).Encode(map[string]any{"code": 500, "message": err.Error()})
		return
	}
	code := rand.Text()
	r.mu.Lock()
	r.codes[code] = time.Now().Add(30 * time.Second)
	r.mu.Unlock()
	json.NewEncoder(w).Encode(map[string]string{"uri": "ws://" + r.addr + req.URL.Path + "?code=" + code})
}

func (r *relay) redeem(code string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	until := r.codes[code]
	delete(r.codes, code)
	return time.Now().Before(until)
}

// member is one connection. What is queued for it is bounded by nothing: this
// relay loses no message.
type member struct {
	conn *websocket.Conn
	more chan struct{}

	mu     sync.Mutex
	queued bytes.Buffer
	kind   websocket.MessageType
}

func (r *relay) join(path string, m *member) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.members[path] = append(r.members[path], m)
}

func (r *relay) leave(path string, m *member) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.members[path] = slices.DeleteFunc(r.members[path], func(o *member) bool { return o == m })
}

func (r *relay) share(path string, from *member, kind websocket.MessageType, b []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, m := range r.members[path] {
		if m == from {
			continue
		}
		m.mu.Lock()
		m.queued.Write(b)
		m.kind = kind
		m.mu.Unlock()
		select {
		case m.more <- struct{}{}:
		default:
		}
	}
}

// write sends what is queued as one message, in fragments of at most 4 KiB.
func (m *member) write(ctx context.Context) {
	for {
		select {
		case <-m.more:
		case <-ctx.Done():
			return
		}
		m.mu.Lock()
		b, kind := bytes.Clone(m.queued.Bytes()), m.kind
		m.queued.Reset()
		m.mu.Unlock()
		if len(b) == 0 {
			continue
		}
		w, err := m.conn.Writer(ctx, kind)
		for ; err == nil && len(b) > 0; b = b[min(len(b), 4096):] {
			_, err = w.Write(b[:min(len(b), 4096)])
		}
		if err == nil {
			err = w.Close()
		}
		if err != nil {
			m.conn.CloseNow()
			return
		}
	}
}
