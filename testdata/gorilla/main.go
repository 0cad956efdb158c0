// Command gorilla is a relay to measure vw against: the body of a POST, read by
// 64 KiB, goes to each of N websockets with gorilla/websocket's WriteMessage.
//
//	gorilla URL N
//
// It prints the address that it listens on, and ends with its standard input.
package main

import (
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"

	"github.com/gorilla/websocket"
)

func main() {
	n, err := strconv.Atoi(os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	var conns []*websocket.Conn
	for range n {
		c, _, err := websocket.DefaultDialer.Dial(os.Args[1], nil)
		if err != nil {
			log.Fatal(err)
		}
		conns = append(conns, c)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(l.Addr())
	go http.Serve(l, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		buf := make([]byte, 64<<10)
		for {
			n, err := r.Body.Read(buf)
			for _, c := range conns {
				if err := c.WriteMessage(websocket.BinaryMessage, buf[:n]); err != nil {
					log.Fatal(err)
				}
			}
			if err != nil {
				return
			}
		}
	}))
	io.Copy(io.Discard, os.Stdin)
}
