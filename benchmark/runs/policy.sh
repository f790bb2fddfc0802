#!/bin/sh
# Reproduces the policy results of benchmark/LOG.md: three regimes, two cards, fleets of several
# sizes, seeds; sustainable rates; ablations and sensitivity. Every part resumes where it stopped.
#
#   benchmark/runs/policy.sh TRACES OUT [PART...]
#
# TRACES holds servegen_r1_long3h.parquet and azure2023_conv.parquet under the names below; OUT
# receives JSON and figures. Parts: small queued scenarios reserve sensitivity bias timing sustain
# chat fleets cards (default all).
set -eu
[ $# -ge 2 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }
traces=$1 out=$2
shift 2
mkdir -p "$out"
long=$traces/trace_servegen_r1_long3h.parquet
chatter=$traces/trace_azure2023_conv.parquet
export OMP_NUM_THREADS=1
python=${PYTHON:-python}
bench() { "$python" -c 'import sys; from sglang_star_bench.policy_bench import main; sys.exit(main(sys.argv[1:]))' "$@"; }
grid() { # NAME FLAGS...: one resumable grid with its figure
    name=$1; shift
    echo "== $name"
    bench --resume --json "$out/$name.json" --plot "$out/$name.png" "$@"
}
slow="--duration 900 --warmup 240"

small() { grid small-24gb --trace "$long" --decode 8 --loads 0.6,0.9,1.3 --seeds 3 $slow; }
fleets() {
    for n in 4 32 64 256; do
        grid "fleet-24gb-$n" --trace "$long" --decode "$n" --loads 0.6,0.9,1.3 --seeds 3 $slow
    done
}
cards() {
    for n in 4 8 32 64 256; do
        grid "fleet-80gb-$n" --trace "$long" --decode "$n" --profile 80gb-7b \
            --loads 0.6,0.9,1.3 --seeds 3 $slow
    done
}
chat() { # short requests: SGLang's reserve takes 29 % of the memory instead of 11 %
    grid chat-24gb --trace "$chatter" --decode 8 --loads 0.45,0.7,1.0 --seeds 3 \
        --duration 300 --warmup 80 --policy round-robin,least-tokens,reactive,star-point,star,oracle
}
sustain() {
    bench --sustainable 0.99,0.9 --trace "$long" --decode 8 --seeds 3 $slow \
        --json "$out/sustain-24gb.json"
}
sensitivity() {
    star="--policy star,star+off,least-tokens+star --trace $long --decode 8 --loads 0.9,1.3 --seeds 3 $slow"
    for scale in 0 2 inf; do grid "error-$scale" $star --error-scale "$scale"; done
    for delay in 0.5 2; do grid "delay-$delay" $star --status-delay "$delay"; done
    for every in 0.25 4; do grid "interval-$every" $star --decision-interval "$every"; done
    for gbps in 10 1; do grid "link-$gbps" $star --link-gbps "$gbps"; done
    grid half-speed --trace "$long" --decode 8 --profile "24gb-7b,24gb-7b,24gb-7b,24gb-7b*2" \
        --loads 0.6,0.9,1.3 --seeds 3 $slow
}
bias() { # a head trained on other traffic, with and without the router's correction
    for wrong in "1 1" "0.25 1" "4 1" "1 0.2" "0.25 0.2" "4 0.2"; do
        set -- $wrong
        for correct in true false; do
            grid "bias-$1-band-$2-$correct" --trace "$long" --decode 8 --loads 0.9,1.3 --seeds 3 \
                $slow --policy star --set "config.estimate_bias=$1" \
                --set "config.estimate_band=$2" --set "config.calibrate=$correct"
        done
    done
}
scenarios() { # what could break it
    for name in all-short all-max adversarial dominant-client flash-crowd; do
        grid "scenario-$name" --scenario "$name" --trace "$long" --decode 8 \
            --loads 0.6,0.9,1.3 --seeds 3 $slow
    done
}
queued() { # every policy behind star's queue at the router
    grid queued --trace "$long" --decode 8 --loads 0.6,0.9,1.3 --seeds 3 $slow --policy \
        queued-round-robin+off,queued-least-requests+off,queued-least-tokens+off,queued-least-tokens+reactive,queued-least-tokens+star,star+off,star
}
reserve() { # SGLang's --num-reserved-decode-tokens, and how much of the memory star plans with
    for tokens in 512 64 0; do
        kept="--set config.reserved_tokens=$tokens"
        grid "reserve-$tokens" --trace "$long" --decode 8 --loads 0.9,1.1,1.3,1.6 --seeds 3 $slow \
            $kept --policy round-robin,least-tokens,reactive,star
        for pressure in 0.95 1.0; do
            grid "reserve-$tokens-pressure-$pressure" --trace "$long" --decode 8 \
                --loads 0.9,1.1,1.3,1.6 --seeds 3 $slow $kept --policy star \
                --set "star.admit_pressure=$pressure"
        done
    done
}
timing() { bench --decision-time 4,8,32,64,128,256 --json "$out/decision.json" --plot "$out/decision.png"; }

[ $# -gt 0 ] || set -- small queued scenarios reserve sensitivity bias timing sustain chat fleets cards
for part in "$@"; do "$part"; done
