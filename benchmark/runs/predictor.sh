#!/bin/sh
# Reproduces the predictor's results from prompts to figures: samples, floor, head, table against the
# baselines, whole sources held out, the router's correction of them, ablations, time per step. Every
# part resumes or is kept.
#
#   benchmark/runs/predictor.sh MODEL PROMPTS OUT [PART...]
#
# MODEL is a path as for SGLang; OUT receives samples, heads, JSON and figures. Parts: collect floor
# train table held calibration ablations step curve (default all). The environment sets SAMPLING
# (flags of `star predictor collect`) [--temperature 0.2 --top-p 0.9 --top-k 64], LIMIT [1800]
# prompts, POINTS [100] prefixes of 16 outputs for the floor, TRAIN flags of `star predictor train`,
# HOLD [gsm8k_train ifeval] sources, MINUTES [inf: until they have converged] of processor time for
# each auxiliary model; the report says whether that was enough. On one core of a CPU the default
# model takes hours, and the auxiliary models a day. Ablations are judged on validation requests.
set -eu
[ $# -ge 3 ] || { sed -n '2,16s/^# \{0,1\}//p' "$0"; exit 2; }
model=$1 prompts=$2 out=$3
shift 3
mkdir -p "$out"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
sampling=${SAMPLING:---temperature 0.2 --top-p 0.9 --top-k 64}
hold=${HOLD:-gsm8k_train ifeval}
star() { "${PYTHON:-python}" -m sglang_star.cli "$@"; }
made() { [ -s "$1" ] && echo "kept: $1"; } # FILE: is it there already?

collect() {
    star predictor collect --model "$model" --prompts "$prompts" --out "$out/samples" \
        --limit "${LIMIT:-1800}" --concurrency 64 $sampling
}
floor() {
    star predictor collect --model "$model" --resample "$out/samples" --out "$out/floor" \
        --limit "${POINTS:-100}" --concurrency 64
}
train() {
    made "$out/head.safetensors" || star predictor train --samples "$out/samples" \
        --sources "$prompts" --out "$out/head.safetensors" --plot "$out/loss.png" ${TRAIN:-}
}
table() {
    made "$out/table.json" || star predictor eval --samples "$out/samples" --model "$model" \
        --sources "$prompts" --head "$out/head.safetensors" --floor "$out/floor" \
        --auxiliary-minutes "${MINUTES:-inf}" --json "$out/table.json" --plot "$out/table.png"
}
held() { # heads and baselines that never saw a prompt of these sources
    made "$out/held.safetensors" || star predictor train --samples "$out/samples" \
        --sources "$prompts" --hold-out-source $hold --out "$out/held.safetensors" ${TRAIN:-}
    made "$out/held.json" || star predictor eval --samples "$out/samples" --model "$model" \
        --sources "$prompts" --hold-out-source $hold --head "$out/held.safetensors" \
        --auxiliary-minutes "${MINUTES:-inf}" --json "$out/held.json" --plot "$out/held.png"
}
ablations() {
    made "$out/ablations.json" || star bench predictor --ablations "$out/samples" \
        --model "$model" --json "$out/ablations.json" --plot "$out/ablations.png"
}
step() {
    made "$out/step.json" || star bench predictor --head "$out/head.safetensors" --model "$model" \
        --batch 1 8 32 --json "$out/step.json" --plot "$out/step.png"
}
calibration() { # what the router's correction makes of the held-out sources' estimates
    made "$out/calibration.json" || star bench calibration --samples "$out/samples" \
        --sources "$prompts" --hold-out-source $hold --head "$out/held.safetensors" \
        --json "$out/calibration.json"
}
curve() {
    made "$out/error_curve.json" || star predictor eval --samples "$out/samples" \
        --head "$out/head.safetensors" --only by_age --error-curve "$out/error_curve.json"
}

[ $# -gt 0 ] || set -- collect floor train table held calibration ablations step curve
for part in "$@"; do
    echo "== $part"
    "$part"
done
