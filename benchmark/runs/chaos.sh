#!/bin/sh
# Puts every fault of the chaos matrix to the router, and to sglang_router where it is installed,
# in front of four fake engines with 200 streams whose every token is checked.
#
#   benchmark/runs/chaos.sh OUT [SGLANG_ROUTER_PYTHON]
#
# OUT receives JSON. SGLANG_ROUTER_PYTHON is an interpreter that has sglang-router installed [ours].
# Takes half a minute per fault and router. Exit status 1: our router missed the bar.
set -eu
[ $# -ge 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
out=$1 python=${PYTHON:-python}
mkdir -p "$out"
"$python" -m sglang_star.cli bench chaos --sglang-router-python "${2:-$python}" \
    --json "$out/chaos.json"
