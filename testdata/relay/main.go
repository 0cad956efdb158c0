// Command relay is a websocket server that records what it gets. The tests
// send to it because it is not ours: its library checks framing, masking and
// the Origin on its own.
//
// It prints the address that it listens on, "open CONN" when a handshake is
// done, and "close CONN CODE" when a connection ends; CODE is the peer's, 1006
// when it sent none. RFC 6455 7.4.1.
package main

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"flag"
	"fmt"
	"hash"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/coder/websocket"
)

var (
	listen = flag.String("listen", "127.0.0.1:0", "`address` to listen on")
	record = flag.String("record", "", "`file` for the payloads of all messages in order; %d in it is the connection's number")
	index  = flag.String("index", "", "`file` for a line per message: connection, offset in the record, length, unix nanoseconds, type")
	sum    = flag.Bool("sum", false, "print \"sum CONN BYTES SHA256\" before a connection's close")
	cert   = flag.String("cert", "", "`file` of the certificate; with -key for TLS")
	key    = flag.String("key", "", "`file` of its key")
)

const readLimit = 16 << 20 // bytes in a message

func main() {
	flag.Parse()
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "relay:", err)
		os.Exit(1)
	}
}

func run() error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	rec := &recorder{files: make(map[string]*file)}
	if *index != "" {
		f, err := os.Create(*index)
		if err != nil {
			return err
		}
		defer f.Close()
		rec.index = f
	}
	l, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	fmt.Println(l.Addr())
	s := &http.Server{
		Handler:     rec,
		BaseContext: func(net.Listener) context.Context { return ctx },
		// Without it HTTP/2 would be offered, which has no upgrade.
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){},
	}
	ended := make(chan error, 1)
	go func() {
		if *cert != "" {
			ended <- s.ServeTLS(l, *cert, *key)
		} else {
			ended <- s.Serve(l)
		}
	}()
	select {
	case <-ctx.Done():
		s.Close()
		rec.conns.Wait() // ctx ends their reads
		return nil
	case err := <-ended:
		return err
	}
}

// file is a record and how much is in it.
type file struct {
	*os.File
	size int64
}

// recorder serves websockets and writes down what they bring.
type recorder struct {
	conns sync.WaitGroup

	mu    sync.Mutex
	last  int // connection's number
	index *os.File
	files map[string]*file
}

func (r *recorder) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	r.conns.Add(1)
	defer r.conns.Done()
	// Before the answer: connections made one after the other are numbered so.
	r.mu.Lock()
	r.last++
	conn := r.last
	r.mu.Unlock()
	c, err := websocket.Accept(w, req, nil)
	if err != nil {
		fmt.Fprintln(os.Stderr, "relay:", err)
		return
	}
	defer c.CloseNow()
	c.SetReadLimit(readLimit)
	fmt.Println("open", conn)

	var h hash.Hash
	if *sum {
		h = sha256.New()
	}
	var total int64
	for {
		kind, b, err := c.Read(req.Context())
		if err != nil {
			code := websocket.CloseStatus(err)
			if code == -1 {
				code = websocket.StatusAbnormalClosure
				fmt.Fprintln(os.Stderr, "relay:", err)
			}
			if h != nil {
				fmt.Printf("sum %d %d %x\n", conn, total, h.Sum(nil))
			}
			fmt.Println("close", conn, int(code))
			return
		}
		total += int64(len(b))
		if h != nil {
			h.Write(b)
		}
		if err := r.write(conn, total-int64(len(b)), kind, b); err != nil {
			fmt.Fprintln(os.Stderr, "relay:", err)
			os.Exit(1)
		}
	}
}

// write appends a message to its record, then its line to the index: whoever
// has read the index finds all that it names. Without a record, the offset is
// the one in the connection.
func (r *recorder) write(conn int, offset int64, kind websocket.MessageType, b []byte) error {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	if *record != "" {
		f, err := r.file(strings.ReplaceAll(*record, "%d", fmt.Sprint(conn)))
		if err != nil {
			return err
		}
		if _, err := f.Write(b); err != nil {
			return err
		}
		offset = f.size
		f.size += int64(len(b))
	}
	if r.index == nil {
		return nil
	}
	name := map[websocket.MessageType]string{websocket.MessageText: "text", websocket.MessageBinary: "binary"}[kind]
	_, err := fmt.Fprintln(r.index, conn, offset, len(b), now.UnixNano(), name)
	return err
}

// file returns the record of that name, made if need be; mu is held.
func (r *recorder) file(name string) (*file, error) {
	if f := r.files[name]; f != nil {
		return f, nil
	}
	f, err := os.Create(name)
	if err != nil {
		return nil, err
	}
	r.files[name] = &file{File: f}
	return r.files[name], nil
}
