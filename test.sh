#!/usr/bin/env bash
# Runs all tests with the race detector on Debian 12 or newer, and then without it
# those of limits in real time. What they need and is missing is installed with
# apt-get; Debian starts some of it (nginx, haproxy, caddy,
# prometheus) as services.
#
#   ./test.sh                     everything
#   ./test.sh -v -run TestRules   arguments go to go test
#
# What needs Go alone takes less than a minute: go test -short ./...

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=.ci/tools.sh
. .ci/tools.sh

needGo
need ca-certificates=/etc/ssl/certs/ca-certificates.crt curl=curl openssl=openssl \
	gcc=gcc libc6-dev=/usr/include/stdio.h python3=python3 npm=npm \
	ffmpeg=ffmpeg ffmpeg=ffprobe chromium=chromium qemu-user-static=qemu-aarch64-static \
	nginx-light=nginx haproxy=haproxy caddy=caddy tinyproxy-bin=tinyproxy microsocks=microsocks prometheus=promtool \
	iproute2=ip systemd=systemd-analyze

timed=$(awk '/^func Test/ { name = $2; sub(/\(.*/, "", name) } /^	notUnderRace\(t\)/ { print name }' ./*_test.go | paste -sd '|')
[[ -n $timed ]] || fail 'no test calls notUnderRace'
set -x
go test -race ./... "$@"
(($# > 0)) || go test -parallel 2 -run "^($timed)\$" .
