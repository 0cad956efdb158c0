#!/usr/bin/env bash
# Shows on one machine what vw does: a test picture and a tone, posted by two
# ffmpeg processes, go through vw to a relay (vw itself) and to a viewer there,
# a third ffmpeg, which decodes them.
#
#   ./demo.sh       runs until Ctrl-C
#   ./demo.sh 10    ends after 10 s, with status 0 only if picture and tone
#                   arrived and decode without an error
#
# VW_PORT is the port to use, 8888 by default; VW_PLAYER is the page's player.
# Needs Go; installs ffmpeg and curl with apt-get where they are missing.

set -euo pipefail
export LC_ALL=C # EPOCHREALTIME with a point

# A signal is obeyed where it is safe to end: bash 5.2 goes wrong when a trap
# exits, and without traps it forgets a Ctrl-C that a command has survived.
ending=0
trap 'ending=129' HUP
trap 'ending=130' INT
trap 'ending=143' TERM
obey() { ((ending == 0)) || exit $ending; }

seconds=${1:-0}
if (($# > 1)) || [[ $# == 1 && ! $seconds =~ ^[1-9][0-9]{0,2}$ ]]; then
	echo 'usage: ./demo.sh [seconds, 1 to 999]' >&2
	exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=.ci/tools.sh
. .ci/tools.sh

needGo
need ffmpeg=ffmpeg curl=curl ca-certificates=/etc/ssl/certs/ca-certificates.crt
obey
echo 'Building vw.'
go build
obey

tmp=$(mktemp -d)
declare -A names=() # of the processes that were started, by process id

# start runs a command in the background: start NAME COMMAND ...
start() {
	"${@:2}" >>"$tmp/$1.out" 2>>"$tmp/$1.log" &
	names[$!]=$1
}

# alive ends the demo when something that was started has ended by itself.
alive() {
	obey
	for pid in "${!names[@]}"; do
		if ! kill -0 "$pid" 2>/dev/null; then
			obey
			tail -n 5 "$tmp/${names[$pid]}.log" >&2
			fail "${names[$pid]} has ended; its last words are above"
		fi
	done
}

# finish ends what was started, and removes what was written.
finish() {
	local pids
	trap '' HUP INT TERM PIPE
	exec 2>/dev/null # bash tells of jobs that were killed
	for signal in TERM KILL; do
		for ((i = 0; i < 60; i++)); do # vw ends within 5 s
			pids=$(jobs -pr)
			[[ -n $pids ]] || break 2
			# shellcheck disable=SC2086 # one word each
			((i > 0)) || kill -s $signal $pids || true
			sleep 0.1
		done
	done
	rm -rf "$tmp"
}
trap finish EXIT

# await calls a function until it succeeds: await WHAT FUNCTION ARGUMENT ...
await() {
	local until=$((SECONDS + 20))
	until "${@:2}"; do
		alive
		((SECONDS < until)) || fail "not within 20 s: $1"
		sleep 0.1
	done
}

# call sets a rule: call PATH JSON
call() {
	echo "  curl -d '$2' $here$1"
	curl -sS --fail-with-body -d "$2" -o "$tmp/answer" "$here$1" || fail "vw refused the rule: $(<"$tmp/answer")"
}

# From here on everything stays on this machine, whatever the environment says.
port=${VW_PORT:-8888} player=${VW_PLAYER:-}
unset "${!VW_@}" http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
VW_PORT=$port VW_PLAYER=$player start vw ./vw stream
listening() {
	! grep -q 'address already in use' "$tmp/vw.log" ||
		fail "port $port is in use: end the program that has it, or choose another: VW_PORT=8889 ./demo.sh"
	grep -q listening "$tmp/vw.log"
}
await 'vw listens' listening
port=$(sed -n 's/.*listening.* addr=.*:\([0-9]*\)$/\1/p' "$tmp/vw.log" | head -n 1) # VW_PORT=0: any
here=http://localhost:$port

quiet=(ffmpeg -nostdin -hide_banner -v error)
start video "${quiet[@]}" -re -f lavfi -i testsrc2=size=640x480:rate=25 \
	-f mpegts -codec:v mpeg1video -b:v 1000k -bf 0 -g 12 "$here/ts/video0"
start audio "${quiet[@]}" -re -f lavfi -i sine=frequency=440:sample_rate=48000 \
	-f mpegts -codec:a mp2 -b:a 128k -muxdelay 0.001 "$here/ts/audio0"
echo 'One ffmpeg posts a moving test picture, as the feed video0.'
echo 'Another ffmpeg posts a tone, as the feed audio0.'
echo 'These rules combine both into a stream, and send it to a relay, here vw itself:'
call /api/streams '{"stream":"stream/demo","feeds":["video0","audio0"]}'
call /api/destinations '{"id":"0","stream":"stream/demo","destination":"ws://localhost:'"$port"'/in/relay0"}'

flows() { [[ $(curl -sN -m 2 "$here/ts/$1" | head -c 1) == G ]]; } # 0x47, with which a packet begins
for feed in video0 audio0 relay0; do
	await "$feed flows" flows $feed
done

# The viewer prints a line for each picture (0, …) and each frame of tone (1, …)
# that it has decoded, with times in ticks of 90 kHz: in 1/25 s, ffmpeg would
# round two pictures to one time while the stream's clock is being set.
mkfifo "$tmp/viewer.out"
exec 3<>"$tmp/viewer.out"
start viewer "${quiet[@]}" -fflags nobuffer -analyzeduration 1000000 -threads 1 -i "$here/ts/relay0" \
	-map 0:v:0 -map 0:a:0 -max_interleave_delta 100000 -enc_time_base:v 1:90000 -flush_packets 1 -f framecrc pipe:1
pictures=0 tones=0

# watch counts what the viewer decodes until the time $1, in µs.
watch() {
	local line
	while ((${EPOCHREALTIME/./} < $1)); do
		obey
		line=
		read -r -t 0.1 -u 3 line || true
		case $line in
		0,*) ((++pictures)) ;;
		1,*) ((++tones)) ;;
		esac
	done
	alive
}
arrived() {
	watch $((${EPOCHREALTIME/./} + 100000))
	((pictures > 0 && tones > 0))
}
await 'picture and tone arrive at the relay' arrived

echo "
Open $here/

That is the page: mute there, look at a preview, add a relay. Or watch at the relay, with sound:
  ffplay -fflags nobuffer -analyzeduration 1000000 $here/ts/relay0
Ctrl-C ends it all. A viewer at the relay has decoded:"
newline='\n'
if [[ $seconds == 0 && -t 1 ]]; then
	newline='\r' # the address stays in view
fi
pictures=0 tones=0 began=${EPOCHREALTIME/./}
for ((second = 1; seconds == 0 || second <= seconds; second++)); do
	watch $((began + second * 1000000))
	printf "%5d s %7d pictures %7d frames of tone$newline" $second $pictures $tones
done

# near ends the demo unless the number $1 of what $2 says is about $3: give or
# take a fifth, and half a second.
near() {
	(($1 * 5 > $3 * 4 - $4 * 3 && $1 * 5 < $3 * 6 + $4 * 3)) || fail "$1 $2 were decoded, about $3 were expected"
}
near $pictures pictures $((seconds * 25)) 25
near $tones 'frames of tone' $((seconds * 125 / 3)) 42
errors=$(grep -v 'Warning: using insecure memory!' "$tmp/viewer.log" || true) # libgcrypt, where memory can't be locked
[[ -z $errors ]] || fail "the viewer found errors, the first of them: $(head -n 5 <<<"$errors")"
echo 'Picture and tone arrived, and decode without an error.'
