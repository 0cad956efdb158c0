package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestE2EProxiedFeed: ffmpeg posts with VW_TOKEN through a proxy with TLS, as
// the README says; without the token, or a wrong one, it is refused.
func TestE2EProxiedFeed(t *testing.T) {
	t.Parallel()
	v := startVW(t, "VW_TOKEN=secret")
	certs := newCerts(t)
	l := listenLoopback(t)
	proxy := l.Addr().String()
	dir := t.TempDir()
	conf := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, `
user root;
daemon off;
worker_processes 1;
pid %[1]s/pid;
error_log stderr;
events { worker_connections 64; }
http {
	access_log off;
	client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/fastcgi;
	uwsgi_temp_path %[1]s/uwsgi; scgi_temp_path %[1]s/scgi;
	server {
		listen %[2]s ssl;
		ssl_certificate %[3]s;
		ssl_certificate_key %[4]s;
		location / {
			proxy_pass http://%[5]s;
			proxy_http_version 1.1;
			proxy_set_header X-Forwarded-For $remote_addr;
			proxy_request_buffering off;
			proxy_buffering off;
			client_max_body_size 0;
			lingering_close off;
		}
	}
}
`, dir, proxy, certs.cert, certs.key, v.addr), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(tool(t, "nginx"), "-p", dir, "-e", "stderr", "-c", conf)
	cmd.Env = []string{"NGINX=3;"} // how one nginx leaves its sockets to the next
	startWith(t, l, "nginx", cmd)
	trust := []string{"-tls_verify", "1", "-ca_file", certs.ca}

	for i, args := range [][]string{
		slices.Concat(trust, []string{"-auth_type", "basic", "https://any:secret@" + proxy + "/ts/video0"}),
		slices.Concat(trust, []string{"-headers", "Authorization: Bearer secret\r\n", "https://" + proxy + "/ts/video0"}),
	} {
		seen := v.out.len()
		f := startFFmpeg(t, realTime, videoInput, threeSecs, videoCodec, args)
		f.endsItself(t, 2*startupTime)
		v.expect(t, seen, startupTime, `msg="publisher left" feed=video0 .* err=<nil>`)
		if n := strings.Count(v.out.String(), `"publisher arrived"`); n != i+1 {
			t.Errorf("got %d publishers, want %d", n, i+1)
		}
	}
	for _, user := range []string{"", "any:wrong@"} {
		f := startFFmpeg(t, realTime, videoInput, eightSecs, videoCodec, trust, []string{"https://" + user + proxy + "/ts/video0"})
		<-f.done
		if f.err == nil || strings.Count(v.out.String(), `"publisher arrived"`) != 2 {
			t.Errorf("with %q: ffmpeg ended with %v, want it to be refused", user, f.err)
		}
	}
}
