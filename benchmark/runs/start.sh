#!/bin/sh
# How long a local cluster takes to its first token, and what its processes burn while idle.
#
#   benchmark/runs/start.sh OUT
#
# OUT receives JSON. About five minutes; run nothing else beside it, and look at `top -H` first.
set -eu
[ $# -ge 1 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2; }
out=$1
mkdir -p "$out"
star() { "${PYTHON:-python}" -m sglang_star.cli "$@"; }

# Engines forked from one process that has SGLang imported; then every process by itself, as when
# started by hand.
star bench start --repeat 3 --json "$out/forked.json"
star bench start --repeat 3 --idle 0 --spawn --json "$out/spawned.json"
