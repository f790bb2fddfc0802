"""A campaign: very many histories, in parts, each kept in a file so that it can go on later."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from simulation.plan import Allowed
from simulation.run import many

PART = 5_000


class Result(msgspec.Struct):
    """What a campaign has come to.

    Attributes:
        start: its first seed; histories: how many from there on are done.
        seconds: that they took, on all cores; per_second: histories.
        failures: (seed, what does not hold).
        counts: what happened in them.
    """

    start: int
    histories: int = 0
    seconds: float = 0.0
    per_second: float = 0.0
    failures: list[tuple[int, str]] = []
    counts: dict[str, int] = {}


def campaign(path: Path, start: int, count: int, allowed: Allowed, *, stop: bool) -> Result:
    """Run what is left of ``count`` histories and keep the result at ``path``.

    Args:
        path: JSON; if it is there, the campaign goes on from it.
        start: the first seed.
        count: how many in all.
        allowed: kinds of faults.
        stop: end with the part in which the first history fails.

    Raises:
        ValueError: the file is of a campaign from another seed.
    """
    result = Result(start)
    if path.exists():
        result = msgspec.json.decode(path.read_bytes(), type=Result)
    if result.start != start:
        raise ValueError(f"{path} begins at seed {result.start}; give another file or that seed")
    while result.histories < count and not (stop and result.failures):
        began = time.monotonic()
        part = min(PART, count - result.histories)
        ran = many(start + result.histories, part, allowed)
        result.histories += ran.histories
        result.seconds = round(result.seconds + time.monotonic() - began, 1)
        result.per_second = round(result.histories / max(result.seconds, 0.1), 1)
        result.failures += ran.found
        for what, happened in ran.counts.items():
            result.counts[what] = result.counts.get(what, 0) + happened
        result.counts = dict(sorted(result.counts.items()))
        part_file = path.with_suffix(".part")
        part_file.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
        part_file.replace(path)
        print(
            f"{result.histories} of {count} histories, {result.per_second:g} a second, "
            f"{len(result.failures)} fail",
            flush=True,
        )
    return result
