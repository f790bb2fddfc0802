"""The same bursty requests twice on the same engines: rescheduling off, then on."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from sglang_star.cluster import Cluster
from sglang_star.cluster_layout import ClusterSpec
from sglang_star.demo.client import served_model
from sglang_star.demo.prompts import Prompt
from sglang_star.demo.replay import replay
from sglang_star.demo.screen import Screen
from sglang_star.demo.side import Side, Slo, moves_of
from sglang_star.demo.watch import Watcher
from sglang_star.demo.workload import Workload
from sglang_star.errors import SetupError
from sglang_star.model import reasoning_model

CARD: Final = "24gb-7b"
SLOWED: Final = 2.0
"""How much slower than the card the engines are paced, so that two cores keep up with two cards."""

SHRUNK: Final = 16
"""The model's answers are this much shorter than a 7B reasoning model's; so is what holds them."""

POOL_TOKENS: Final = 3400
SLO: Final = Slo(ttft_ms=2000.0, tpot_ms=60.0)

FULL: Final = Workload(bursts=3, size=30, gap_s=10.0, max_tokens=640)
QUICK: Final = Workload(bursts=2, size=33, gap_s=5.0, max_tokens=320)

ROUTING: Final = ("--policy", "least-tokens")
RESCHEDULING: Final = (
    *("--rescheduler-interval", "0.25"),
    *("--rescheduler-param", f"tpot_slo_ms={SLO.tpot_ms}"),
    # The defaults are for answers of thousands of tokens; these last a sixteenth of that.
    *("--rescheduler-param", "horizon_steps=256"),
    *("--rescheduler-param", "cooldown_s=2"),
    # Two instances are few, and chance weighs more than in a large fleet.
    *("--rescheduler-param", "moves_per_instance=2"),
    *("--rescheduler-param", "risk_sigma=1.5"),
)

_WARM_UP: Final = 16
LAST_REPORTS_S: Final = 1.0
"""A move is reported with the status after the one that ended it, and then polled."""


def spec(predictor: str) -> ClusterSpec:
    """Return the cluster both runs share: one prefill and two decode engines, paced."""
    return ClusterSpec(
        model=str(reasoning_model()),
        prefill=1,
        decode=2,
        rescheduler="off",
        predictor=predictor,
        paced=f"{CARD}*{SLOWED:g}",
        engine_arguments=(
            # In float32 a token does not depend on which others share its batch.
            *("--dtype", "float32"),
            # What makes SGLang honour a request's seed.
            "--enable-deterministic-inference",
            *("--max-running-requests", "96"),
        ),
        decode_arguments=(
            *("--max-total-tokens", str(POOL_TOKENS)),
            # SGLang's default of 512 per running request, shrunk like the answers.
            *("--num-reserved-decode-tokens", str(512 // SHRUNK)),
        ),
        router_arguments=ROUTING,
    )


def warm_up(cluster: Cluster, workload: Workload) -> None:
    """Let every engine prefill and decode once, so that neither run has the first step."""
    prompts = [
        replace(prompt, name=f"warm-{prompt.name}", max_tokens=16, at_s=0.0)
        for prompt in workload.prompts()[:_WARM_UP]
    ]
    asyncio.run(_warm_up(cluster.url, prompts))


async def _warm_up(url: str, prompts: Sequence[Prompt]) -> None:
    await replay(url, await served_model(url), prompts, tag="demo", observe=lambda _: None)


def run(cluster: Cluster, name: str, workload: Workload) -> Side:
    """Play the workload once, from empty caches, and return what was seen."""
    flush(cluster)
    side = asyncio.run(_run(cluster.url, name, workload.prompts()))
    cluster.check()
    return side


async def _run(url: str, name: str, prompts: Sequence[Prompt]) -> Side:
    watcher = Watcher(url)
    screen = Screen(watcher, len(prompts))
    async with watcher.watching():
        streams = await replay(url, await served_model(url), prompts, tag=name, observe=screen.show)
        await asyncio.sleep(LAST_REPORTS_S)
    screen.end(streams)
    return Side(
        name,
        streams,
        watcher.loads,
        watcher.sightings,
        moves_of(streams, watcher.moves),
        watcher.clock_offset_s,
        SLO,
    )


def reschedule(cluster: Cluster) -> None:
    """Put a router with the rescheduler on in front of the same engines."""
    cluster.replace_router(rescheduler="star", router_arguments=(*ROUTING, *RESCHEDULING))


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
