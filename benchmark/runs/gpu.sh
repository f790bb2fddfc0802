#!/bin/sh
# All that only a GPU can tell. So far it has been rehearsed on a CPU and has never run on a GPU.
#
#   benchmark/runs/gpu.sh OUT [PART...]
#
# OUT receives logs, JSON and figures. Parts (default: those that this machine can do):
#   kernels   torch and nvcc: correctness, with and without compute-sanitizer; GB/s against a
#             device-to-device copy; slowdown of a decode step beside a copy. Ten minutes.
#   engines   SGLang: two engines on one GPU: moves under load, stalls, and identity with
#             deterministic inference. Half an hour; MODEL [the default one] is served.
# PYTHON names the interpreter. REHEARSE=1 goes through the kernels part on a CPU, small.
set -eu
[ $# -ge 1 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; }
out=$1
shift
mkdir -p "$out"
root=$(cd -- "$(dirname -- "$0")/../.." && pwd -P)
python=${PYTHON:-python}
# From the checkout, so that nothing has to be installed for the first part.
PYTHONPATH=$root/python:$root/benchmark:$root/sgl-kernel-ext:$root/test${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH
failed=

run() { # NAME COMMAND...: its output goes to a log and to the terminal; a failure is remembered
    name=$1
    shift
    echo "== $name: $*"
    if { "$@" 2>&1 && : >"$out/$name.ok"; } | tee "$out/$name.log" && [ -e "$out/$name.ok" ]; then
        rm -f -- "$out/$name.ok"
    else
        failed="$failed $name"
    fi
}
has() { "$python" -c "import importlib.util, sys; sys.exit(not importlib.util.find_spec('$1'))"; }
bench() { "$python" -c 'import sys; from sglang_star_bench.kv_copy import main; sys.exit(main(sys.argv[1:]))' "$@"; }
gpus() { "$python" -c 'import torch; print(torch.cuda.device_count())'; }

kernels() {
    if [ -n "${REHEARSE-}" ]; then
        export STAR_TEST_DEVICE=cpu
        run correct "$python" -m pytest -q -p no:cacheprovider "$root/test/gpu"
        run speed bench --device cpu --model 7b --tokens 64 --page-size 1 16 --rounds 3 \
            --json "$out/kv-copy.json" --plot "$out/kv-copy.png"
        run beside "$python" -m sglang_star_bench.kv_copy_beside --device cpu --scale 64 \
            --steps 3 --layers 1 --json "$out/beside.json"
        return
    fi
    run machine nvidia-smi
    run build "$python" -m sgl_kernel_ext
    run correct "$python" -m pytest -q -rs -p no:cacheprovider "$root/test/gpu"
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck; do
            run "sanitizer-$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
                --target-processes all "$python" -m pytest -q -p no:cacheprovider \
                "$root/test/gpu/test_copies.py" -k "layout or pages"
        done
    else
        echo "== no compute-sanitizer: the memory checks are left out" | tee "$out/sanitizer.log"
    fi
    run speed bench --device cuda --tokens 64 1024 8192 --page-size 1 16 64 \
        --slots scattered run --workers 4 8 16 32 132 --rounds 25 \
        --json "$out/kv-copy.json" --plot "$out/kv-copy.png"
    run beside "$python" -m sglang_star_bench.kv_copy_beside --json "$out/beside.json"
}

migration() { # NAME ENVIRONMENT FLAGS...
    name=$1 visible=$2
    shift 2
    run "$name" env CUDA_VISIBLE_DEVICES="$visible" "$python" -m sglang_star.cli bench migration \
        --json "$out/$name.json" --plot "$out/$name.png" ${MODEL:+--model "$MODEL"} "$@"
}

engines() {
    same="--mem-fraction-static 0.35"
    migration stalls-one-gpu 0 --context 1000 10000 --batch 1 16 --moves 40 --engine-args "$same"
    migration identity-one-gpu 0 --context 1000 --batch 1 16 --moves 40 \
        --engine-args "$same --enable-deterministic-inference"
    if [ "$(gpus)" -ge 2 ]; then
        echo "== two GPUs are here, and this script cannot yet give each engine one of its own:" \
            "nothing was measured between them" | tee "$out/two-gpus.log"
    fi
}

if [ $# -eq 0 ]; then
    set -- kernels
    if [ -z "${REHEARSE-}" ] && has sglang; then set -- kernels engines; fi
fi
for part in "$@"; do "$part"; done
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
