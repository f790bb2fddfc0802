"""``star demo``: boot, replay, repeat what moved, report."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp

from sglang_star.cluster import Cluster
from sglang_star.cluster_layout import ClusterSpec
from sglang_star.demo import page, report
from sglang_star.demo.client import Stream, Watcher, replay, served_model
from sglang_star.demo.progress import Progress
from sglang_star.demo.prompts import PROMPTS, Prompt
from sglang_star.demo.report import Twin
from sglang_star.errors import SetupError
from sglang_star.model import default_model

GAP_S: Final = 0.4
"""Between two requests: fast enough that long answers overlap."""

# A large cluster's problem in small: the long answers together outgrow one instance's pool, and
# just fit into two.
DECODE_POOL_TOKENS: Final = 2560

DECODE_ARGUMENTS: Final = (
    "--max-total-tokens",
    str(DECODE_POOL_TOKENS),
    # SGLang sets this many tokens aside per running request before it admits another.
    "--num-reserved-decode-tokens",
    "64",
)

# In float32 a token does not depend on which others share its batch; in bfloat16 it can, with or
# without STAR, and the comparison with the twins would prove nothing.
ENGINE_ARGUMENTS: Final = ("--dtype", "float32")

ROUTER_ARGUMENTS: Final = ("--policy", "round-robin")
RESCHEDULER_ARGUMENTS: Final = (
    "--rescheduler-interval",
    "0.5",
    # The defaults are a GPU's; a CPU's steps are slower without being overloaded.
    "--rescheduler-param",
    "tpot_slo_ms=2000",
    # Counted from its start too. Ten seconds are hundreds of a GPU's steps, and fifteen of these.
    "--rescheduler-param",
    "cooldown_s=45",
    "--rescheduler-param",
    "horizon_steps=240",
    # Eighteen requests are few, and chance weighs more than in a large fleet.
    "--rescheduler-param",
    "risk_sigma=2.0",
    "--rescheduler-param",
    "moves_per_instance=2",
)


def main(argv: Sequence[str]) -> int:
    """Run the demo; return 0 only if all went well, see :func:`verdict`."""
    arguments = parser().parse_args(argv)
    out: Path = arguments.out
    began = time.monotonic()
    spec = ClusterSpec(
        model=str(default_model()),
        prefill=1,
        decode=2,
        predictor=arguments.predictor,
        engine_arguments=ENGINE_ARGUMENTS,
        decode_arguments=DECODE_ARGUMENTS,
        router_arguments=(*ROUTER_ARGUMENTS, *RESCHEDULER_ARGUMENTS),
    )
    prompts = PROMPTS[: arguments.requests]
    with Cluster(spec, logs=out / "logs") as cluster:
        streams, watcher = asyncio.run(serve(cluster, prompts))
        moves = report.moves_of(streams, watcher.migrations)
        twins = asyncio.run(repeat(cluster, streams, moves))
    scored = report.estimates(streams, watcher.sightings)
    result = report.build(streams, moves, scored, twins, time.monotonic() - began)
    (out / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    (out / "report.html").write_text(
        page.render(result, streams, watcher.sightings, moves, scored, twins)
    )
    print(report.as_text(result, twins))
    print(f"\n{out / 'report.html'}\n{out / 'report.json'}")
    return verdict(streams, moves, twins)


async def serve(cluster: Cluster, prompts: Sequence[Prompt]) -> tuple[list[Stream], Watcher]:
    """Replay the prompts while the rescheduler moves what it wants to."""
    flush(cluster)
    watcher = Watcher(cluster.url)
    progress = Progress(len(prompts), watcher)
    print(f"replaying {len(prompts)} prompts through {cluster.url}/v1/chat/completions")
    model = await served_model(cluster.url)
    async with contextlib.AsyncExitStack() as stack:
        watching = asyncio.create_task(watcher.watch())
        stack.callback(watching.cancel)
        streams = await replay(
            cluster.url, model, prompts, gap_s=GAP_S, tag="demo", observe=progress.show
        )
    cluster.check()
    # The last moves are reported with the status after the one that ended them.
    await asyncio.sleep(1.0)
    async with aiohttp.ClientSession(cluster.url) as session:
        await watcher.poll(session)
    progress.end(streams)
    return streams, watcher


async def repeat(
    cluster: Cluster, streams: Sequence[Stream], moves: Sequence[dict[str, Any]]
) -> list[Twin]:
    """Run every migrated greedy stream once more with the rescheduler off and caches empty."""
    moved = {move["rid"] for move in moves}
    originals = [s for s in streams if s.rid in moved and s.prompt.greedy]
    if not originals:
        return []
    print(f"repeating {len(originals)} migrated greedy streams without moving them")
    cluster.replace_router(rescheduler="off", router_arguments=ROUTER_ARGUMENTS)
    flush(cluster)
    progress = Progress(len(originals))
    stills = await replay(
        cluster.url,
        await served_model(cluster.url),
        [stream.prompt for stream in originals],
        gap_s=0.0,
        tag="twin",
        observe=progress.show,
    )
    progress.end(stills)
    return [Twin(moved, still) for moved, still in zip(originals, stills, strict=True)]


def flush(cluster: Cluster) -> None:
    """Empty every engine's prefix cache, so that runs to be compared start alike.

    Raises:
        SetupError: an engine refused.
    """
    for engine in cluster.engines:
        request = urllib.request.Request(f"{engine.url}/flush_cache?timeout=30", method="POST")
        try:
            urllib.request.urlopen(request, timeout=60).close()
        except OSError as error:
            raise SetupError(f"{engine.name} did not flush its cache: {error}") from error


def verdict(
    streams: Sequence[Stream], moves: Sequence[dict[str, Any]], twins: Sequence[Twin]
) -> int:
    """Return 0 if all streams completed, some greedy one moved, and none differs from its twin."""
    broken = [stream for stream in streams if not stream.completed]
    for stream in broken:
        print(f"FAILED: {stream.rid}: {stream.error or 'the stream ended without its last chunk'}")
    differing = sum(not twin.identical for twin in twins)
    if differing:
        print(f"FAILED: {differing} migrated streams differ from their twins")
    if not twins:
        print(f"FAILED: no greedy stream moved ({len(moves)} moves in all), so nothing was shown")
    return 1 if broken or differing or not twins else 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``star demo``."""
    made = argparse.ArgumentParser(
        description="Boot 1 prefill + 2 decode engines and a router on this machine, replay "
        "prompts through the OpenAI API while running requests move, and compare every moved "
        "greedy stream with its unmoved twin."
    )
    add = made.add_argument
    add("--out", type=Path, default=Path("star-demo"), help="folder of the report [%(default)s]")
    add("--requests", type=int, default=len(PROMPTS), help="how many prompts [%(default)s]")
    add("--predictor", default="builtin", help="builtin, off or a head's path [%(default)s]")
    return made
