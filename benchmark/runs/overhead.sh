#!/bin/sh
# Measures what STAR costs while it does nothing, with three engines side by side, and then the
# stall of a move, with two engines between which a request goes back and forth.
#
#   benchmark/runs/overhead.sh OUT [HEAD]
#
# OUT receives JSON and figures. HEAD is a predictor head for the default model [builtin].
# MINUTES [20] is how long the overhead is measured. Needs 12 GB of memory. Run nothing else beside
# it: of its figures only the ratios of processor time bear company.
set -eu
[ $# -ge 1 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }
out=$1 head=${2:-builtin}
mkdir -p "$out"
export OMP_NUM_THREADS=1
star() { "${PYTHON:-python}" -m sglang_star.cli "$@"; }

star bench overhead --head "$head" --batch 1 16 --minutes "${MINUTES:-20}" \
    --json "$out/overhead.json" --plot "$out/overhead.png"
# Steps of about 30 ms: the tiny model must be able to keep up, or the processor is measured.
star bench migration --model tiny --paced '24gb-7b*1.4' --context 3000 --batch 1 8 \
    --overlap on off --moves 40 \
    --json "$out/migration-paced.json" --plot "$out/migration-paced.png"
star bench migration \
    --json "$out/migration.json" --plot "$out/migration.png"
