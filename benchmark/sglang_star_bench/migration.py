"""``star bench migration``: the stall of a move, as the engines and as the client see it.

Two aggregated engines; one streamed request goes back and forth between them, others may keep
both busy. The same request is streamed once more without moves: ``identical`` says whether its
tokens are the same. In bfloat16 a token can depend on which others share its batch, with or
without a move; with ``--batch`` above 1, compare with ``--engine-args "--dtype float32"``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp

from sglang_star.cluster_layout import ClusterSpec
from sglang_star.config import PREDICTOR_OFF
from sglang_star.errors import ConfigError, PeerError
from sglang_star.model import default_model, tiny_model
from sglang_star_bench.engines import Stream, greedy, post, running, warm_up
from sglang_star_bench.migration_stalls import Outcome, Plan, describe, plot, summarise

TINY: Final = "tiny"
COMPANION_TOKENS: Final = 32
REPORT_TIMEOUT_S: Final = 60.0
MIN_GAP: Final = 4


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="star bench migration", description=__doc__)
    add = made.add_argument
    add("--model", default="", help="directory, hub name, or 'tiny' [SmolLM2-135M-Instruct]")
    add("--context", type=int, nargs="+", default=[100, 1000, 3000], help="[100 1000 3000]")
    add("--batch", type=int, nargs="+", default=[1], help="running requests per engine [1]")
    add("--overlap", nargs="+", choices=("on", "off"), default=["on"], help="scheduling [on]")
    add("--moves", type=int, default=20, help="per row [%(default)s]")
    add("--gap", type=int, default=12, help="tokens between two moves [%(default)s]")
    add("--paced", default="", metavar="PROFILE", help="pad steps to those of a modelled GPU")
    add("--engine-args", default="", metavar="'...'", help="more flags for both engines")
    add("--json", type=Path, metavar="FILE", help="write results here")
    add("--plot", type=Path, metavar="FILE", help="write a figure here")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0 only if every moved stream equals its twin."""
    args = parser().parse_args(argv)
    if min(*args.context, *args.batch, args.moves) < 1:
        raise ConfigError("--context, --batch and --moves must be positive")
    if args.gap < MIN_GAP:
        raise ConfigError(
            f"--gap must be at least {MIN_GAP}",
            hint="the client's step time is the median of the gaps between two moves",
        )
    rows = []
    for overlap in args.overlap:
        plans = [
            Plan(context, batch, args.moves, args.gap, overlap == "on")
            for batch in args.batch
            for context in args.context
        ]
        with (
            tempfile.TemporaryDirectory() as logs,
            running([pair(args, overlap == "on", plans)], Path(logs)) as engines,
        ):
            urls = [engine.url for engine in engines]
            for plan in plans:
                row = summarise(plan, asyncio.run(measure(urls, plan)))
                print(describe(row), flush=True)
                rows.append(row)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n")
    if args.plot:
        plot(rows, args.plot)
    return 0 if all(row["identical"] for row in rows) else 1


def pair(args: argparse.Namespace, overlap: bool, plans: Sequence[Plan]) -> ClusterSpec:
    """Two engines with room for the largest plan."""
    largest = max(
        plan.context + plan.tokens + plan.batch * (COMPANION_TOKENS + 2 * plan.tokens)
        for plan in plans
    )
    return ClusterSpec(
        model=str(tiny_model()) if args.model == TINY else args.model or str(default_model()),
        aggregated=2,
        predictor=PREDICTOR_OFF,
        paced=args.paced,
        max_total_tokens=max(16384, largest),
        engine_arguments=(
            *(() if overlap else ("--disable-overlap-schedule",)),
            *args.engine_args.split(),
        ),
    )


async def measure(urls: list[str], plan: Plan) -> Outcome:
    """Stream the request in peace, then again while it moves."""
    chance = random.Random(plan.context)
    prompt = [chance.randrange(100, 30000) for _ in range(plan.context)]
    body = {"input_ids": prompt, "sampling_params": greedy(plan.tokens)}
    outcome = Outcome(twin=Stream(), moved=Stream())
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        for url in urls:
            await warm_up(session, url, plan.batch)
        await forget(session, urls)
        async with company(session, urls, plan):
            await outcome.twin.read(session, urls[0], body)
        await forget(session, urls)
        rid = f"bench-migration-{plan.context}-{plan.batch}-"
        async with company(session, urls, plan):
            reading = asyncio.create_task(
                outcome.moved.read(session, urls[0], {**body, "rid": rid})
            )
            try:
                await back_and_forth(session, urls, rid, plan, outcome, reading)
                await reading
            finally:
                reading.cancel()
        await forget(session, urls)
    return outcome


async def back_and_forth(
    session: aiohttp.ClientSession,
    urls: list[str],
    rid: str,
    plan: Plan,
    outcome: Outcome,
    reading: asyncio.Task[None],
) -> None:
    """Order the moves one after the other, ``gap`` tokens apart, while the stream lasts."""
    here, there = urls
    for _ in range(plan.moves):
        begin = outcome.moved.tokens + plan.gap
        while outcome.moved.tokens < begin and not reading.done():
            await asyncio.sleep(0.005)
        # Nobody can move a request that ends before it arrives.
        if reading.done() or plan.tokens - outcome.moved.tokens < plan.gap:
            return
        order = {"rid": rid, "target": there, "reason": "benchmark"}
        accepted = await post(session, here + "/star/migrate", order)
        report = await ending(session, urls, accepted["migration_id"])
        outcome.reports.append(report)
        if report["outcome"] == "moved":
            here, there = there, here


async def ending(
    session: aiohttp.ClientSession, urls: list[str], migration_id: str
) -> dict[str, Any]:
    """Wait for the report of a move; the request's home has it.

    Raises:
        PeerError: no engine reports its end.
    """
    deadline = time.monotonic() + REPORT_TIMEOUT_S
    while time.monotonic() < deadline:
        for url in urls:
            async with session.get(url + "/star/status") as answer:
                for report in (await answer.json())["recent_moves"]:
                    if report["migration_id"] == migration_id:
                        return dict(report)
        await asyncio.sleep(0.02)
    raise PeerError(f"move {migration_id} has no end after {REPORT_TIMEOUT_S:g} s")


@contextlib.asynccontextmanager
async def company(
    session: aiohttp.ClientSession, urls: list[str], plan: Plan
) -> AsyncIterator[None]:
    """Keep ``batch - 1`` other requests running on each engine; aborts them at the end."""
    streams, tasks = [], []
    for number, url in enumerate(urls * (plan.batch - 1)):
        body = {
            "input_ids": [1000 + number] * COMPANION_TOKENS,
            # An engine that hosts fewer is faster, and they must not end before the moves do.
            "sampling_params": greedy(2 * plan.tokens),
        }
        streams.append(Stream())
        tasks.append(asyncio.create_task(streams[-1].read(session, url, body)))
    try:
        while not all(stream.tokens for stream in streams):
            await asyncio.sleep(0.02)
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def forget(session: aiohttp.ClientSession, urls: list[str]) -> None:
    """Empty the prefix caches, as soon as nothing runs any more.

    Raises:
        PeerError: an engine keeps running something.
    """
    deadline = time.monotonic() + REPORT_TIMEOUT_S
    for url in urls:
        while True:
            async with session.post(url + "/flush_cache") as answer:
                if answer.status == 200:
                    break
            if time.monotonic() > deadline:
                raise PeerError(f"{url} does not become idle", hint="see its log")
            await asyncio.sleep(0.1)
