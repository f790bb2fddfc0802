"""Play a trace against a running router and judge it exactly as the simulator is judged."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from typing import Any, Final

import aiohttp

from sglang_star.errors import PeerError
from sglang_star_bench.engines import Stream, ending
from sglang_star_bench.simulator.recorder import Recorder
from sglang_star_bench.simulator.request import Request, State
from sglang_star_bench.traces import Trace

LOOK_EVERY_S: Final = 0.5
COUNTERS: Final = ("retractions", "paced_late")
TOKEN_IDS: Final = range(100, 30_000)
STOP: Final = 50
"""Ends outputs; no prompt has it."""


async def replay(
    url: str, trace: Trace, recorder: Recorder, seed: int, limit: int
) -> tuple[float, int]:
    """Send every request of ``trace`` at its time and wait for all of them.

    Prompts are random token ids, so that no prefix is shared; outputs are exactly as long as the
    trace says, which nobody is told who decides anything (:func:`body`).

    Args:
        url: of the router; trace, recorder: what to play and who judges; seed: of the prompts.
        limit: ``max_new_tokens`` of every request.

    Returns:
        Wall time until the last one ended, seconds; forwards that took longer than the engines are
        paced to.
    """
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        before = await _totals(session)
        watcher = asyncio.create_task(_watch(session, recorder))
        started = time.time()
        try:
            async with asyncio.TaskGroup() as group:
                for row in range(trace.arrival_s.size):
                    group.create_task(_one(session, trace, row, seed, started, recorder, limit))
        finally:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
        wall_s = time.time() - started
        after = await _totals(session)
        recorder.retractions, late = (b - a for a, b in zip(before, after, strict=True))
        for move in (await _get(session, "/star/migrations?limit=100000"))["migrations"]:
            if move["state"] == "moved" and move["ordered_at"] >= started:
                recorder.migrations += 1
                recorder.migrated_tokens += move["context_tokens"] or 0
                recorder.stall.add(move["stall_ms"] or 0.0)
    return wall_s, late


async def _one(
    session: aiohttp.ClientSession,
    trace: Trace,
    row: int,
    seed: int,
    started: float,
    recorder: Recorder,
    limit: int,
) -> None:
    arrival = float(trace.arrival_s[row])
    await asyncio.sleep(started + arrival - time.time())
    prompt, length = int(trace.input_len[row]), int(trace.output_len[row])
    rid = f"replay-{seed}-{row}-{started:.0f}-"
    request = Request(rid, row, arrival, prompt, length, limit)
    recorder.arrived(request)
    stream = Stream()
    sent = time.time()
    try:
        asked = body(rid, prompt, length, limit, seed * 1_000_003 + row)
        await stream.read(session, "", asked)
        request.state = State.FINISHED if stream.tokens == length else State.FAILED
    except (PeerError, aiohttp.ClientError):
        request.state = State.FAILED
    if stream.arrivals:
        # The client's own lateness in sending is not the cluster's.
        request.first_token_s = stream.arrivals[0][0] - sent + arrival
        request.last_token_s = stream.arrivals[-1][0] - sent + arrival
    for (earlier, had), (later, has) in zip(stream.arrivals, stream.arrivals[1:], strict=False):
        recorder.itl.add((later - earlier) * 1e3 / (has - had), has - had)
    recorder.done(request)


def body(rid: str, prompt: int, length: int, limit: int, seed: int) -> dict[str, Any]:
    """A request of so many prompt tokens that ends after ``length`` of at most ``limit`` tokens.

    Two that differ in nothing but ``length`` are the same to the router, to SGLang's scheduler and
    to the predictor.
    """
    return {
        "input_ids": random.Random(seed).choices(TOKEN_IDS, k=prompt),
        "sampling_params": ending(length, limit, STOP),
        "rid": rid,
    }


async def _watch(session: aiohttp.ClientSession, recorder: Recorder) -> None:
    """Sample how unevenly KV is used."""
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        statuses = await _decoding(session)
        shares = [status["kv_used_tokens"] / status["kv_capacity_tokens"] for status in statuses]
        if sum(shares) > 0:
            recorder.load_cv_sum += statistics.pstdev(shares) / statistics.fmean(shares)
            recorder.load_cv_count += 1


async def _totals(session: aiohttp.ClientSession) -> list[int]:
    statuses = await _decoding(session)
    return [sum(status[name] for status in statuses) for name in COUNTERS]


async def _decoding(session: aiohttp.ClientSession) -> list[dict[str, Any]]:
    """Statuses of the instances that decode."""
    cluster = await _get(session, "/star/cluster?requests=0")
    return [i["status"] for i in cluster["instances"] if i["role"] != "prefill" and i["status"]]


async def _get(session: aiohttp.ClientSession, path: str) -> Any:
    async with session.get(path) as answer:
        answer.raise_for_status()
        return await answer.json()
