"""``star bench start``: how long a local cluster takes to its first token, and what it burns idle.

Starts one prefill and some decode engines with the default model and a router, asks for a few
tokens, and then leaves everything alone for a while. ``--spawn`` starts every process by itself,
as one does by hand, instead of forking engines from one that has SGLang imported.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import psutil  # type: ignore[import-untyped]

from sglang_star.cluster import Cluster
from sglang_star.cluster_layout import ClusterSpec
from sglang_star.errors import SetupError
from sglang_star.model import default_model
from sglang_star_bench import arguments
from sglang_star_bench.engines import cpu_s, greedy, post

TOKENS: Final = 4
SETTLE_S: Final = 3.0
"""After the first answer, before idle time counts: the engines' own warm-up is over by then."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="star bench start", description=__doc__)
    add = made.add_argument
    add("--repeat", type=int, default=3, metavar="N", help="starts [%(default)s]")
    add("--decode", type=int, default=2, metavar="M", help="decode engines [%(default)s]")
    add("--spawn", action="store_true", help="no fork server")
    add("--idle", type=float, default=20.0, metavar="S", help="seconds watched idle [%(default)s]")
    add("--json", type=Path, metavar="FILE", help="write results here")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Raises:
        SetupError: a cluster does not come up.
    """
    args = parser().parse_args(argv)
    model = str(default_model())
    rows = []
    for number in range(args.repeat):
        with tempfile.TemporaryDirectory() as logs:
            row = measure(args, model, Path(logs))
        rows.append(row)
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["phases_s"].items())
        print(f"start {number + 1}: seconds until {phases}", flush=True)
        for name, share in row["idle"].items():
            print(f"  idle {name:28} {share:7.2%} of a core", flush=True)
    totals = [row["phases_s"]["first token"] for row in rows]
    print(f"first token after {statistics.median(totals):.1f} s (median of {len(totals)})")
    arguments.write_json(args.json, rows)
    return 0


def measure(args: argparse.Namespace, model: str, logs: Path) -> dict[str, Any]:
    """One start: seconds until each phase was over, and shares of a core used idle."""
    phases: dict[str, float] = {}
    began = time.monotonic()

    def note(line: str) -> None:
        if "imported" in line:
            phases["SGLang is imported"] = time.monotonic() - began
        elif " is ready" in line:
            phases[line.split()[0]] = time.monotonic() - began

    spec = ClusterSpec(model=model, prefill=1, decode=args.decode)
    with Cluster(spec, logs, report=note, fork=not args.spawn) as cluster:
        asyncio.run(_ask(cluster.url))
        phases["first token"] = time.monotonic() - began
        time.sleep(SETTLE_S)
        idle = idle_shares(cluster, args.idle) if args.idle > 0 else {}
    return {
        "spawn": args.spawn,
        "phases_s": {name: round(seconds, 2) for name, seconds in phases.items()},
        "idle": {name: round(share, 5) for name, share in idle.items()},
    }


async def _ask(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        await post(session, f"{url}/generate", {"text": "Hello", "sampling_params": greedy(TOKENS)})


def idle_shares(cluster: Cluster, seconds: float) -> dict[str, float]:
    """Share of a core that each process of ``cluster`` uses while nobody asks it anything."""
    watched = members(cluster)
    before = {name: cpu_s([process]) for name, process in watched.items()}
    began = time.monotonic()
    time.sleep(seconds)
    after = {name: cpu_s([process]) for name, process in watched.items()}
    took = time.monotonic() - began
    return {name: (after[name] - before[name]) / took for name in watched}


def members(cluster: Cluster) -> dict[str, psutil.Process]:
    """Every process of ``cluster``, by engine and part; found by who listens where."""
    found = {"router": listener(cluster.url)}
    for engine in cluster.engines:
        server = listener(engine.url)
        found[f"{engine.name} server"] = server
        for child in server.children(recursive=True):
            part = child.name().removeprefix("sglang::")
            found[f"{engine.name} {part}"] = child
    return found


def listener(url: str) -> psutil.Process:
    """The process that serves ``url``.

    Raises:
        SetupError: nobody does.
    """
    port = urlsplit(url).port
    for process in psutil.process_iter():
        try:
            connections = process.net_connections("tcp")
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
        if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections):
            return process
    raise SetupError(f"nothing listens on {url}")
