#!/bin/sh
# Sends changed copies of real messages to every decoder and handler of engines and router, 150,000
# of them, and lists what that found.
#
#   benchmark/runs/fuzz.sh OUT [SEED]
#
# OUT receives JSON. Half an hour on two cores; no engine is started. Exit status 1: it found something.
set -eu
[ $# -ge 1 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; }
out=$1 here=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$out"
PYTHONPATH=$here/test "${PYTHON:-python}" -m fuzz --seed "${2:-1}" --json "$out/fuzz.json"
