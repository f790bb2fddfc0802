#!/bin/sh
# Rebuilds the small reasoning model and measures a predictor on it: training from scratch, loss and
# accuracy by family, prompts, samples, floor, head, table, two families held out. Every part
# continues where it stopped.
#
#   benchmark/runs/reasoning.sh OUT [PART...]
#
# OUT receives the model, prompts, samples, logs and JSON. Parts: train check prompts collect predict
# (default all). MODEL is the folder to check and collect from, by default the one trained in OUT.
set -eu
[ $# -ge 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
out=$1
shift
mkdir -p "$out"
model=${MODEL:-$out/model}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python=${PYTHON:-python}
reasoning() { "$python" -m sglang_star.cli bench reasoning "$@"; }

train() { reasoning train --out "$out/model" | tee -a "$out/train.log"; }
check() { reasoning check --model "$model" --json "$out/check.json"; }
prompts() { reasoning prompts --count 16000 --seed 1 --out "$out/prompts.jsonl.gz"; }
collect() {
    "$python" -m sglang_star.cli predictor collect --model "$model" \
        --prompts "$out/prompts.jsonl.gz" --out "$out/samples" \
        --max-new-tokens 4096 --temperature 0.6 --top-p 0.95 --concurrency 32
}
predict() {
    LIMIT=16000 POINTS=120 HOLD="${HOLD:-collatz tree}" \
        TRAIN="--repeats 1 --epochs 30 --name star-reasoning-1.6m" \
        "$(dirname "$0")/predictor.sh" "$model" "$out/prompts.jsonl.gz" "$out" \
        floor train table held calibration curve
}

[ $# -gt 0 ] || set -- train check prompts collect predict
for part; do
    case $part in
        train | check | prompts | collect | predict) "$part" ;;
        *) echo "no part $part: train check prompts collect predict" >&2; exit 2 ;;
    esac
done
