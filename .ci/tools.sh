# shellcheck shell=bash
# Sourced by demo.sh, test.sh and .ci/run: finds Go, and installs what is missing.

# Debian keeps nginx and haproxy where only root looks.
PATH=$PATH:/usr/local/go/bin:/usr/sbin

# need PACKAGE=PROGRAM ... installs with apt-get the packages whose program is
# missing. It looks for the program because that is what will be run: npm often
# comes with a Node from elsewhere, whose package conflicts with Debian's npm.
# What is no program is given by its path.
need() {
	local pair tool missing=() root=()
	for pair; do
		present "${pair#*=}" || missing+=("${pair%%=*}")
	done
	((${#missing[@]} > 0)) || return 0
	((EUID == 0)) || root=(sudo)
	for tool in apt-get "${root[@]}"; do
		present "$tool" || fail "please install ${missing[*]}: $tool, which would do it, is missing"
	done
	echo "+ apt-get install ${missing[*]}"
	"${root[@]}" apt-get update -q
	"${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${missing[@]}"
	for pair; do
		present "${pair#*=}" || fail "${pair#*=} is still missing, although ${pair%%=*} was installed"
	done
}

# needGo fails unless there is a Go that can build vw.
needGo() {
	local need have
	need=$(sed -n 's/^go //p' go.mod)
	have=$(go env GOVERSION 2>&1) || have="none was found: $have"
	have=${have#go}
	[[ $have == [0-9]* && $(printf '%s\n' "$need" "$have" | sort -V | head -n 1) == "$need" ]] ||
		fail "Go $need or newer is needed, here is $have. Get it from https://go.dev/doc/install"
}

present() { [[ $1 == */* && -e $1 ]] || command -v "$1" >/dev/null; }

fail() {
	echo "${0##*/}: $*" >&2
	exit 1
}
