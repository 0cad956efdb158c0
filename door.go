// The door: how many connections vw has at once.
//
// To open a connection, and to say little on it, costs a caller nothing. So a
// caller too many is not refused: the one that was served or has come longest
// ago makes room, and who asks now is heard. Who publishes or reads stays, and
// has limits of his own.

package main

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
)

const (
	maxCallers    = 512 // connections that neither publish nor read
	maxPublishers = 256 // feeds that are published; each holds up to 2 MiB
	maxReaders    = 1024
)

// errFull: vw has as many as it can have. Wrapped, it says of what.
var errFull = errors.New("no more are allowed")

// door knows the connections. Its zero value is ready; its methods may be
// called from several goroutines and do not block.
type door struct {
	readers atomic.Int64

	mu      sync.Mutex
	callers list.List // of net.Conn; the next to make room is in front
	at      map[net.Conn]*list.Element
}

type connKey struct{}

// withConn lets the handlers of a connection know it.
func withConn(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, c)
}

// track is the ConnState of http.Server.
func (d *door) track(c net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew, http.StateIdle:
		d.mu.Lock()
		d.drop(c)
		if d.at == nil {
			d.at = make(map[net.Conn]*list.Element)
		}
		d.at[c] = d.callers.PushBack(c)
		full := d.callers.Len() > maxCallers
		d.mu.Unlock()
		if full {
			d.makeRoom()
		}
	case http.StateClosed:
		d.mu.Lock()
		d.drop(c)
		d.mu.Unlock()
	}
}

// drop is called with mu held.
func (d *door) drop(c net.Conn) {
	if e := d.at[c]; e != nil {
		d.callers.Remove(e)
		delete(d.at, c)
	}
}

// makeRoom closes the connection of the caller in front.
func (d *door) makeRoom() {
	d.mu.Lock()
	e := d.callers.Front()
	if e == nil {
		d.mu.Unlock()
		return
	}
	c := e.Value.(net.Conn)
	d.drop(c)
	d.mu.Unlock()
	c.Close()
}

// settle makes the connection of r one that stays: no caller, until it is
// idle again.
func (d *door) settle(r *http.Request) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c, _ := r.Context().Value(connKey{}).(net.Conn)
	d.drop(c)
}

// reader settles r as a reader, until leave.
func (d *door) reader(r *http.Request) (leave func(), err error) {
	if d.readers.Add(1) > maxReaders {
		d.readers.Add(-1)
		return nil, fmt.Errorf("there are %d readers: %w", maxReaders, errFull)
	}
	d.settle(r)
	return func() { d.readers.Add(-1) }, nil
}

// doorListener makes room when the process is out of descriptors.
type doorListener struct {
	net.Listener
	door *door
}

func (l doorListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if errors.Is(err, syscall.EMFILE) {
		l.door.makeRoom() // http.Server soon tries again
	}
	return c, err
}
