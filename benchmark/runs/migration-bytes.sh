#!/bin/sh
# Measures moves of as much KV as a 7B model has (57,344 bytes a token), at paced steps of 30 ms:
# contexts of 1,000 to 30,000 tokens, one and four moves at once, in shared memory and between two
# machines (network namespaces) whose links are held to 1 and 10 Gbit/s.
#
#   benchmark/runs/migration-bytes.sh OUT
#
# OUT receives JSON and figures. MOVES [200] are made per row; QUICK=1 makes 8, and no row of
# 30,000 tokens. TRANSPORTS ["shm nixl"] and LINKS ["1gbit 10gbit"] can be given. About five hours,
# mostly at 1 Gbit/s; quick: 15 minutes. Needs root for the links, and 22 GB of memory (quick: 15).
# Run nothing else beside it.
set -eu
[ $# -ge 1 ] || { sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2; }
out=$1 moves=${MOVES:-200} contexts="1000 3000 10000"
mkdir -p "$out"
[ -z "${QUICK:-}" ] || { moves=8 contexts="1000 10000"; }
measure() {
    name=$1
    shift
    # shellcheck disable=SC2086
    "${PYTHON:-python}" -m sglang_star.cli bench migration --model tiny --paced '24gb-7b*1.4' \
        --kv-bytes 57344 --engine-args '--dtype float32' --gap 32 --moves "$moves" --at-once 1 4 \
        --transport ${TRANSPORTS:-shm nixl} --link ${LINKS:-1gbit 10gbit} \
        --json "$out/$name.json" --plot "$out/$name.png" "$@"
}

# shellcheck disable=SC2086
measure migration-bytes --batch 3 --context $contexts
# Apart, since this fills the memory.
[ -n "${QUICK:-}" ] || measure migration-bytes-30k --batch 2 --tokens 1500 --context 30000
