package main

import (
	"fmt"
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
	proxy := startNginxWith(t, "ssl", fmt.Sprintf(`ssl_certificate %s;
		ssl_certificate_key %s;
		location / {
			proxy_pass http://%s;
			proxy_http_version 1.1;
			proxy_set_header X-Forwarded-For $remote_addr;
			proxy_request_buffering off;
			proxy_buffering off;
			client_max_body_size 0;
			lingering_close off;
		}`, certs.cert, certs.key, v.addr))
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
