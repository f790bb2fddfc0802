"""Many histories, on all cores."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from simulation.history import History
from simulation.plan import Allowed, draw
from simulation.tally import tally

CHUNK = 50


@dataclass(slots=True)
class Ran:
    """What came of some histories.

    Attributes:
        histories: how many; found: (seed, what does not hold) of those that fail; counts: what
            happened in all of them, see :func:`~simulation.tally.tally`.
    """

    histories: int = 0
    found: list[tuple[int, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, other: Ran) -> None:
        self.histories += other.histories
        self.found += other.found
        self.counts.update(other.counts)


def quiet() -> None:
    """The protocol's log is about things that happen in every history."""
    logging.getLogger("sglang_star").setLevel(logging.CRITICAL)


def run(seeds: range, allowed: Allowed) -> Ran:
    """Run these histories here, one after the other."""
    quiet()
    ran = Ran()
    # A history is one knot of references; it is cheaper to untie a chunk of them at once.
    gc.disable()
    try:
        for seed in seeds:
            history = History(draw(seed, allowed))
            failure = history.run()
            ran.histories += 1
            ran.counts.update(tally(history))
            if failure:
                ran.found.append((seed, failure))
        return ran
    finally:
        gc.enable()
        del history
        gc.collect()


def _chunk(job: tuple[range, Allowed]) -> Ran:
    return run(*job)


def many(start: int, count: int, allowed: Allowed, *, seconds: float = float("inf")) -> Ran:
    """Run histories from seed ``start`` on; stop at ``count`` or when ``seconds`` are over."""
    until = time.monotonic() + seconds
    total = Ran()

    def jobs() -> Iterator[tuple[range, Allowed]]:
        for first in range(start, start + count, CHUNK):
            if time.monotonic() < until:
                yield range(first, min(first + CHUNK, start + count)), allowed

    workers = len(os.sched_getaffinity(0))
    if workers == 1 or count <= CHUNK:
        for job in jobs():
            total.add(_chunk(job))
        return total
    # Forked workers have all modules already, and no thread runs here.
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        gate = iter(jobs())
        pending = [
            pool.apply_async(_chunk, (job,))
            for _, job in zip(range(2 * workers), gate, strict=False)
        ]
        while pending:
            total.add(pending.pop(0).get())
            if (job := next(gate, None)) is not None:
                pending.append(pool.apply_async(_chunk, (job,)))
    return total
