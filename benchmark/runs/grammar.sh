#!/bin/sh
# How long a target is held while a guest's grammar takes in the output it has had elsewhere.
#
#   benchmark/runs/grammar.sh OUT
#
# OUT receives JSON. Half a minute, one core.
set -eu
[ $# -ge 1 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2; }
out=$1
mkdir -p "$out"
OMP_NUM_THREADS=1 "${PYTHON:-python}" -m sglang_star_bench.grammar --json "$out/grammar.json"
