#!/usr/bin/env bash
# Shows on one machine what vw does: a test picture and a tone, posted by two
# ffmpeg processes, go through vw to a relay (vw itself) and to a viewer there.
#
#   ./demo.sh       runs until Ctrl-C
#   ./demo.sh 10    ends after 10 s, with status 0 only if picture and tone
#                   arrived and decode without an error
#
# VW_PORT is the port to use, 8888 by default. Needs Go; installs ffmpeg and
# curl with apt-get where they are missing.

set -euo pipefail
export LC_ALL=C # EPOCHREALTIME with a point

# A signal is obeyed where it is safe to end: bash 5.2 goes wrong when a trap
# exits, and without traps it forgets a Ctrl-C that a command has survived.
ending=0
trap 'ending=129' HUP
trap 'ending=130' INT
trap 'ending=143' TERM
obey() { ((ending == 0)) || exit $ending; }

die() {
	obey
	printf 'demo.sh: %s\n' "$*" >&2
	exit 1
}

seconds=${1:-0}
if (($# > 1)) || [[ $# == 1 && ! $seconds =~ ^[1-9][0-9]{0,2}$ ]]; then
	echo 'usage: ./demo.sh [seconds, 1 to 999]' >&2
	exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")"

tmp=$(mktemp -d)
declare -A names=() # of the processes that were started, by process id

# finish ends what was started, and removes what was written. The jobs of this
# shell are what it began, and nothing else.
finish() {
	trap '' INT TERM HUP PIPE
	exec 2>/dev/null # bash tells of jobs that were killed
	local pids
	pids=$(jobs -pr)
	for signal in TERM KILL; do
		# shellcheck disable=SC2086 # one word each
		! running $pids || kill -s $signal $pids || true
		for ((i = 0; i < 60; i++)); do
			# shellcheck disable=SC2086
			running $pids || break 2
			sleep 0.1
		done
	done
	rm -rf "$tmp"
}

# running tells whether one of these children is neither gone nor a zombie.
running() {
	local pid stat
	for pid; do
		stat=$(cat "/proc/$pid/stat") && [[ ${stat##*) } != Z* ]] && return 0 # else it is the status from before the trap
	done
	return 1
}
trap finish EXIT

# start runs a command in the background, its output and errors in $tmp/NAME.out and $tmp/NAME.log.
start() {
	touch "$tmp/$1.out" "$tmp/$1.log"
	"${@:2}" >>"$tmp/$1.out" 2>>"$tmp/$1.log" &
	names[$!]=$1
}

# alive ends the demo when something that was started has ended by itself.
alive() {
	obey
	for pid in "${!names[@]}"; do
		if ! kill -0 "$pid" 2>/dev/null; then
			tail -n 5 "$tmp/${names[$pid]}.log" >&2
			die "${names[$pid]} has ended; its last words are above"
		fi
	done
}

# install gets packages with apt-get.
install() {
	command -v apt-get >/dev/null || die "please install $*: there is no apt-get here to do it"
	local root=()
	if ((EUID != 0)); then
		command -v sudo >/dev/null || die "please install $* as root: there is no sudo here"
		root=(sudo)
	fi
	echo "Installing $*."
	"${root[@]}" apt-get update -q
	"${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "$@"
}

# build makes ./vw.
build() {
	local need have
	need=$(sed -n 's/^go //p' go.mod)
	command -v go >/dev/null || PATH=$PATH:/usr/local/go/bin
	command -v go >/dev/null || die "Go is missing: install Go $need or newer, see https://go.dev/doc/install"
	have=$(go env GOVERSION 2>&1) || die "Go $need or newer is needed, see https://go.dev/doc/install ($have)"
	if [[ $have == go[0-9]* && $(printf '%s\n' "$need" "${have#go}" | sort -V | head -n 1) != "$need" ]]; then
		die "Go ${have#go} is too old: install Go $need or newer, see https://go.dev/doc/install"
	fi
	echo "Building vw with $have."
	GOTMPDIR=$tmp go build || die 'vw does not build'
}

# call sets a rule: call PATH JSON.
call() {
	echo "  curl -d '$2' $here$1"
	curl -sS -d "$2" -o "$tmp/answer" -w '%{http_code}' "$here$1" >"$tmp/status" ||
		die "vw does not answer"
	[[ $(<"$tmp/status") == 200 ]] || die "vw refused the rule: $(<"$tmp/answer")"
}

# pause waits so many milliseconds; unlike a sleep in the foreground, a signal
# ends it at once.
pause() {
	local time
	printf -v time '%d.%03d' $(($1 / 1000)) $(($1 % 1000))
	sleep "$time" &
	wait $! || true
	obey
}

# flows waits until a feed comes: its first byte is the G (0x47) of a packet.
flows() {
	for ((i = 0; i < 10; i++)); do
		[[ $(curl -sN -m 2 "$here/ts/$1" | head -c 1) != G ]] || return 0
		alive
	done
	die "nothing arrived on the feed $1 within 20 s"
}

# check decodes the recording of $1 milliseconds.
check() {
	local tracks errors
	echo "Decoding what was recorded in $(($1 / 1000)).$(($1 % 1000 / 100)) s ($(stat -c %s "$tmp/recorder.out") bytes):"
	tracks=$(ffprobe -v error -count_frames -show_entries stream=codec_name,nb_read_frames -of flat "$tmp/recorder.out" 2>&1 |
		awk -F '"' '/^streams.*codec_name/ { codec = $2 }
			/^streams.*nb_read_frames/ { print codec, $2 + 0 }' | sort | paste -sd ' ')
	[[ $tracks =~ ^'mp2 '([0-9]+)' mpeg1video '([0-9]+)$ ]] ||
		die "the recording should have one track of mpeg1video and one of mp2, it has: ${tracks:-none}"
	plausible 'frames of tone (mp2)' "${BASH_REMATCH[1]}" $(($1 * 48000 / 1152 / 1000)) 42
	plausible 'pictures (mpeg1video)' "${BASH_REMATCH[2]}" $(($1 * 25 / 1000)) 25
	# In ticks of 90 kHz: in 1/25 s, ffmpeg rounds two pictures to one time when the stream's clock is being set.
	errors=$(ffmpeg -nostdin -v error -i "$tmp/recorder.out" -map 0 -enc_time_base:v 1:90000 -f null - 2>&1) ||
		die "ffmpeg can't decode it: $errors"
	errors=${errors#'Warning: using insecure memory!'} # libgcrypt, where memory can't be locked
	[[ -z $errors ]] || die "ffmpeg found errors in it, the first of them:
$(head -n 5 <<<"$errors")"
	echo 'Picture and tone arrived, and decode without an error.'
}

# plausible ends the demo unless the number $2 of what $1 says is about $3, at
# $4 a second: give or take a fifth, and the wait for a keyframe.
plausible() {
	local slack=$(($3 / 5 + $4 * 6 / 10))
	echo "  $2 $1"
	(($3 - slack <= $2 && $2 <= $3 + slack)) || die "about $3 were expected"
}

missing=()
command -v ffmpeg >/dev/null && command -v ffprobe >/dev/null || missing+=(ffmpeg)
command -v curl >/dev/null || missing+=(curl ca-certificates)
((${#missing[@]} == 0)) || install "${missing[@]}"
obey
build
obey

# From here on everything stays on this machine, whatever the environment says.
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
port=${VW_PORT:-8888}
unset "${!VW_@}"
VW_PORT=$port start vw ./vw stream
for ((i = 0; i < 100; i++)); do
	! grep -q msg=listening "$tmp/vw.log" || break
	if grep -q 'address already in use' "$tmp/vw.log"; then
		die "port $port is in use: end the program that has it, or choose another: VW_PORT=8889 ./demo.sh"
	fi
	alive
	pause 100
done
port=$(sed -n 's/.*msg=listening addr=.*:\([0-9]*\)$/\1/p' "$tmp/vw.log" | head -n 1) # VW_PORT=0: any
[[ -n $port ]] || die 'vw does not listen after 10 s'
here=http://localhost:$port
echo "vw runs, on port $port."

quiet=(ffmpeg -nostdin -hide_banner -v warning)
start video "${quiet[@]}" -re -f lavfi -i testsrc2=size=640x480:rate=25 \
	-f mpegts -codec:v mpeg1video -b:v 1000k -bf 0 -g 12 "$here/ts/video0"
start audio "${quiet[@]}" -re -f lavfi -i sine=frequency=440:sample_rate=48000 \
	-f mpegts -codec:a mp2 -b:a 128k -muxdelay 0.001 "$here/ts/audio0"
echo 'One ffmpeg posts a moving test picture to it, as the feed video0.'
echo 'Another ffmpeg posts a tone, as the feed audio0.'
echo 'These rules combine both into a stream, and send it to a relay, here vw itself:'
call /api/streams '{"stream":"stream/demo","feeds":["video0","audio0"]}'
call /api/destinations "{\"id\":\"0\",\"stream\":\"stream/demo\",\"destination\":\"ws://localhost:$port/in/relay0\"}"
echo "Watch it at the relay: ffplay -fflags nobuffer -analyzeduration 1000000 $here/ts/relay0"
echo "A JSMpeg player finds it on ws://localhost:$port/out/relay0 (README.md: Watching)"

flows video0
flows audio0
# One viewer lists the packets of the picture (0, …) and of the tone (1, …), the
# other one records.
start viewer ffmpeg -nostdin -v error -fflags nobuffer -analyzeduration 1000000 -i "$here/ts/relay0" -map 0:v:0 -map 0:a:0 \
	-c copy -max_interleave_delta 100000 -flush_packets 1 -f framecrc pipe:1
for ((i = 0; i < 200; i++)); do
	! grep -q '^0,' "$tmp/viewer.out" || ! grep -q '^1,' "$tmp/viewer.out" || break
	alive
	pause 100
done
((i < 200)) || die 'picture and tone did not both arrive at the relay within 20 s'
start recorder curl -sSN "$here/ts/relay0"
began=${EPOCHREALTIME/./}

if ((seconds > 0)); then
	echo "What a viewer at the relay gets, for $seconds s:"
else
	echo 'What a viewer at the relay gets (Ctrl-C ends it all):'
fi
exec 3<"$tmp/viewer.out" # each reader goes on where the one before it ended
cat <&3 >/dev/null
was=0
for ((second = 1; seconds == 0 || second <= seconds; second++)); do
	left=$((second * 1000 - (${EPOCHREALTIME/./} - began) / 1000))
	((left < 0)) || pause $left
	alive
	size=$(stat -c %s "$tmp/recorder.out")
	counts=$(awk '/^0,/ { p++ } /^1,/ { t++ } END { printf "%4d pictures %4d frames of tone", p, t }' <&3)
	printf '%5d s %8d bytes %5d kbit/s %s\n' $second $((size - was)) $(((size - was) * 8 / 1000)) "$counts"
	was=$size
	if ((seconds == 0 && size > 8 << 20)); then # nobody will decode it
		: >"$tmp/recorder.out"
		: >"$tmp/viewer.out"
		exec 3<"$tmp/viewer.out"
		was=0
	fi
done

# Without its rule the stream ends with a whole frame.
curl -sS -X DELETE "$here/api/destinations/0" >/dev/null || die 'vw does not answer'
took=$(((${EPOCHREALTIME/./} - began) / 1000))
pause 500
alive
check "$took"
