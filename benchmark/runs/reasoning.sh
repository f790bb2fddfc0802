#!/bin/sh
# Rebuilds the small reasoning model and measures it: training from scratch, loss and accuracy by
# family, prompts, and the samples for a predictor head. Every part continues where it stopped.
#
#   benchmark/runs/reasoning.sh OUT [PART...]
#
# OUT receives the model, prompts, samples, logs and JSON. Parts: train check prompts collect
# (default all). MODEL is the folder to check and collect from, by default the one trained in OUT.
set -eu
[ $# -ge 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }
out=$1
shift
mkdir -p "$out"
model=${MODEL:-$out/model}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python=${PYTHON:-python}
reasoning() { "$python" -m sglang_star.cli bench reasoning "$@"; }

train() { reasoning train --out "$out/model" | tee -a "$out/train.log"; }
check() { reasoning check --model "$model" --json "$out/check.json"; }
prompts() { reasoning prompts --count 3000 --seed 1 --out "$out/prompts.jsonl.gz"; }
collect() {
    "$python" -m sglang_star.cli predictor collect --model "$model" \
        --prompts "$out/prompts.jsonl.gz" --out "$out/samples" \
        --max-new-tokens 4096 --temperature 0.6 --top-p 0.95 --concurrency 32
}

[ $# -gt 0 ] || set -- train check prompts collect
for part; do
    case $part in
        train | check | prompts | collect) "$part" ;;
        *) echo "no part $part: train check prompts collect" >&2; exit 2 ;;
    esac
done
