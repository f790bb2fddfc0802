"""Many histories, on all cores."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import time
from collections.abc import Iterator

from simulation.history import History
from simulation.plan import Allowed, draw

CHUNK = 50


def quiet() -> None:
    """The protocol's log is about things that happen in every history."""
    logging.getLogger("sglang_star").setLevel(logging.CRITICAL)


def failures(seeds: range, allowed: Allowed) -> list[tuple[int, str]]:
    """(seed, what does not hold) of the histories that fail."""
    quiet()
    gc.disable()
    try:
        results = ((seed, History(draw(seed, allowed)).run()) for seed in seeds)
        return [(seed, failure) for seed, failure in results if failure]
    finally:
        gc.enable()
        gc.collect()


def _chunk(job: tuple[range, Allowed]) -> tuple[int, list[tuple[int, str]]]:
    return len(job[0]), failures(*job)


def many(
    start: int, count: int, allowed: Allowed, *, seconds: float = float("inf")
) -> tuple[int, list[tuple[int, str]]]:
    """Run histories from seed ``start`` on; stop at ``count`` or when ``seconds`` are over.

    Returns:
        How many ran, and (seed, what does not hold) of those that fail.
    """
    until = time.monotonic() + seconds
    total, found = 0, []

    def jobs() -> Iterator[tuple[range, Allowed]]:
        for first in range(start, start + count, CHUNK):
            if time.monotonic() < until:
                yield range(first, min(first + CHUNK, start + count)), allowed

    workers = len(os.sched_getaffinity(0))
    if workers == 1 or count <= CHUNK:
        results: Iterator[tuple[int, list[tuple[int, str]]]] = map(_chunk, jobs())
        for ran, failed in results:
            total, found = total + ran, found + failed
        return total, found
    # Forked workers have all modules already, and no thread runs here.
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        gate = iter(jobs())
        pending = [
            pool.apply_async(_chunk, (job,))
            for _, job in zip(range(2 * workers), gate, strict=False)
        ]
        while pending:
            ran, failed = pending.pop(0).get()
            total, found = total + ran, found + failed
            if (job := next(gate, None)) is not None:
                pending.append(pool.apply_async(_chunk, (job,)))
    return total, found
