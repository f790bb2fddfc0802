"""``star bench migration``: the stall of a move, as the engines and as the client see it.

Two aggregated engines; streamed requests go back and forth between them, others may keep both
busy. The same requests are streamed once more without moves: ``identical`` says whether their
tokens are the same. In bfloat16 a token can depend on which others share its batch, with or
without a move; with ``--batch`` or ``--at-once`` above 1, compare with
``--engine-args "--dtype float32"``. With ``--kv-bytes``, what moves is as large as a real model's,
and each row of it says whose it is; with ``--link``, it moves between two machines.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from sglang_star.cluster_layout import ClusterSpec, Place
from sglang_star.config import PREDICTOR_OFF
from sglang_star.errors import ConfigError
from sglang_star.machine import require_memory
from sglang_star.model import default_model, tiny_model
from sglang_star_bench.engines import running
from sglang_star_bench.machines import Network
from sglang_star_bench.migration_run import measure
from sglang_star_bench.migration_stalls import Plan, describe, plot, summarise

TINY: Final = "tiny"
LONGEST_TINY: Final = 32768
CHUNK: Final = 4096
MIN_GAP: Final = 4
LOCAL: Final = ("shm", "cuda_ipc")
"""Carriers between processes of one machine."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="star bench migration", description=__doc__)
    add = made.add_argument
    add("--model", default="", help="directory, hub name, or 'tiny' [SmolLM2-135M-Instruct]")
    add("--context", type=int, nargs="+", default=[100, 1000, 3000], help="[100 1000 3000]")
    add("--batch", type=int, nargs="+", default=[1], help="running requests per engine [1]")
    add("--overlap", nargs="+", choices=("on", "off"), default=["on"], help="scheduling [on]")
    add("--at-once", type=int, nargs="+", default=[1], help="requests that move together [1]")
    add("--moves", type=int, default=20, help="per row [%(default)s]")
    add("--gap", type=int, default=12, help="tokens between two moves [%(default)s]")
    add("--tokens", type=int, default=4000, help="of one stream at most [%(default)s]")
    add("--transport", nargs="+", default=["shm"], help="carriers of KV [shm]")
    add("--link", nargs="+", default=[], metavar="RATE",
        help="put each engine on a machine of its own (a network namespace; needs root), with "
        "links held to 1gbit, 10gbit, ...; not for carriers that share memory")  # fmt: skip
    add("--kv-bytes", type=int, default=0, metavar="N",
        help="KV per token, as the modelled GPU's model has it: 57344; needs --paced")  # fmt: skip
    add("--paced", default="", metavar="PROFILE", help="pad steps to those of a modelled GPU")
    add("--engine-args", default="", metavar="'...'", help="more flags for both engines")
    add("--json", type=Path, metavar="FILE", help="write results here")
    add("--plot", type=Path, metavar="FILE", help="write a figure here")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0 only if every moved stream equals its twin."""
    args = parser().parse_args(argv)
    if min(*args.context, *args.batch, *args.at_once, args.moves) < 1:
        raise ConfigError("--context, --batch, --at-once and --moves must be positive")
    if args.gap < MIN_GAP:
        raise ConfigError(
            f"--gap must be at least {MIN_GAP}",
            hint="the client's step time is the median of the gaps between two moves",
        )
    rows = []
    for transport in args.transport:
        for overlap in args.overlap:
            plans = [
                Plan(
                    context=context,
                    batch=batch,
                    moves=args.moves,
                    gap=args.gap,
                    overlap=overlap == "on",
                    at_once=at_once,
                    longest=args.tokens,
                    transport=transport,
                    link=link,
                )
                for link in (args.link if transport not in LOCAL else []) or [""]
                for at_once in args.at_once
                for batch in args.batch
                for context in args.context
            ]
            for row in measured(args, transport, plans):
                print(describe(row), flush=True)
                rows.append(row)
                if args.json:
                    args.json.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n")
    if args.plot:
        plot(rows, args.plot)
    return 0 if all(row["identical"] and not row["faults"] for row in rows) else 1


def measured(
    args: argparse.Namespace, transport: str, plans: Sequence[Plan]
) -> Iterator[dict[str, Any]]:
    """Start two engines, on machines of their own if a link is asked for, and measure all plans."""
    with contextlib.ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        network = None
        if any(plan.link for plan in plans):
            network = stack.enter_context(Network(2, keep=[logs]))
        spec = pair(args, transport, plans, network)
        require_memory(2, spec.model, 2 * spec.max_total_tokens * args.kv_bytes)
        engines = stack.enter_context(running([spec], logs, fork=True))
        for plan in plans:
            carried: Callable[[], int] = int
            if network is not None:
                network.hold(plan.link)
                carried = partial(_sent, network)
            outcome = asyncio.run(measure([engine.url for engine in engines], plan, carried))
            yield summarise(plan, outcome)


def pair(
    args: argparse.Namespace, transport: str, plans: Sequence[Plan], network: Network | None
) -> ClusterSpec:
    """Two engines with room for the largest plan."""
    longest = max(plan.context + plan.tokens for plan in plans)
    at_once = max(plan.at_once for plan in plans)
    arguments = ["--star-transport", transport, "--incremental-streaming-output"]
    # A slow link takes its time.
    arguments += ["--star-max-moves", str(max(4, at_once)), "--star-move-deadline-s", "600"]
    if not plans[0].overlap:
        arguments.append("--disable-overlap-schedule")
    if args.kv_bytes:
        arguments += ["--star-paced-kv-bytes", str(args.kv_bytes)]
        # Nothing is to be found at the other end: every move sends everything.
        arguments.append("--disable-radix-cache")
    if longest > LONGEST_TINY and args.model == TINY:
        more = {"max_position_embeddings": 2 * longest}
        arguments += ["--json-model-override-args", json.dumps(more)]
    if longest > CHUNK:
        # Over plain torch each chunk costs as much attention as the whole prompt.
        arguments += ["--chunked-prefill-size", "-1", "--mem-fraction-static", "0.5"]
    places = (*(machine.place for machine in network.machines), Place()) if network else ()
    # Nobody else is on a network of our own, and what is measured is not to be encrypted.
    open_to = ("--star-insecure",) if network else ()
    return ClusterSpec(
        model=str(tiny_model()) if args.model == TINY else args.model or str(default_model()),
        aggregated=2,
        predictor=PREDICTOR_OFF,
        paced=args.paced,
        max_total_tokens=max(0 if args.kv_bytes else 16384, *(plan.room for plan in plans)),
        engine_arguments=(*arguments, *open_to, *args.engine_args.split()),
        router_arguments=open_to,
        places=places,
    )


def _sent(network: Network) -> int:
    return sum(network.carried(machine)[0] for machine in network.machines)
