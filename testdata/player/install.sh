#!/usr/bin/env bash
# Installs what package-lock.json names into node_modules, unless it is there.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
installed=node_modules/.installed
cmp -s package-lock.json $installed && exit
npm ci
cp package-lock.json $installed
