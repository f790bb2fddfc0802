#!/bin/sh
# Runs very many simulated histories of moves on all cores, and keeps what they come to: seeds done,
# those that fail, histories a second, and how often each thing happened. Continues where it stopped.
#
#   benchmark/runs/histories.sh OUT [HISTORIES [START]]
#
# OUT receives histories-START.json. HISTORIES is 1,000,000, the first seed START is 0. STOP=1 ends
# it where one fails; WITHOUT=killed,cut leaves kinds of faults out. About an hour on two cores.
set -eu
[ $# -ge 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }
out=$1 histories=${2:-1000000} start=${3:-0}
mkdir -p "$out"
PYTHONPATH="$(dirname "$0")/../../test${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH

exec "${PYTHON:-python}" -m simulation --histories "$histories" --start "$start" \
    --campaign "$out/histories-$start.json" --without "${WITHOUT:-}" ${STOP:+--stop}
