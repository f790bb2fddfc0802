#!/bin/sh
# The tables of policies behind the same queue. Each is one file of rows, which the same command
# continues; a file made by other code or with other parameters is refused.
#
#   benchmark/runs/policy-tables.sh TRACES OUT TABLE...
#
# TABLE is one of: effects (each unfairness of the simulator put back), tune (every policy's own
# numbers, on the trace for tuning), judge (as tuned, on traces not tuned on), reserve (SGLang's
# reserve against one set by forecast). WINDOWS [10] disjoint windows; REPORT=--report prints only.
set -eu
[ $# -ge 3 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
traces=$1 out=$2
shift 2
mkdir -p "$out"
export OMP_NUM_THREADS=1
table() { # NAME TRACE LOAD
    "${PYTHON:-python}" -m sglang_star_bench.tables "$1" --traces "$traces" --trace "$2" \
        --load "$3" --windows "${WINDOWS:-10}" --out "$out/$1-$2.json" ${REPORT:-}
}
effects() { table effects long3h 1.3; }
tune() { table tune long3h 1.3; }
judge() {
    table judge peak1h 2.1
    table judge mooncake 1.3
    table judge chat 1.3
}
reserve() { table reserve peak1h 2.1; }

for one; do
    case $one in
        effects | tune | judge | reserve) "$one" ;;
        *) echo "no table $one: effects tune judge reserve" >&2; exit 2 ;;
    esac
done
