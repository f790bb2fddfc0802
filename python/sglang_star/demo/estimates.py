"""Predictions of remaining length beside what really remained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sglang_star.demo.client import Stream
from sglang_star.demo.watch import Sighting

EVERY: Final = 20
"""A request's estimate is scored once per so many output tokens, not once per poll."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A prediction of remaining tokens beside what really remained."""

    rid: str
    low: float
    median: float
    high: float
    actual: int


def pair(streams: Iterable[Stream], sightings: Iterable[Sighting]) -> list[Estimate]:
    """Pair estimates with what came.

    An answer cut by its token limit counts with that length, as in ``star predictor eval``: the
    engine limits its estimates likewise, and leaving such answers out would keep the short ones.
    """
    length = {s.rid: s.tokens for s in streams if s.completed}
    found: dict[tuple[str, int], Estimate] = {}
    for seen in sightings:
        key = (seen.rid, seen.output_tokens // EVERY)
        if seen.rid not in length or len(seen.remaining) != 5 or key in found:
            continue
        actual = length[seen.rid] - seen.output_tokens
        low, median, high = (seen.remaining[level] for level in (0, 2, 4))
        found[key] = Estimate(seen.rid, low, median, high, actual)
    return list(found.values())


def score(scored: Sequence[Estimate]) -> dict[str, Any]:
    """Return how many there were, their mean error and how often the P10-P90 band held."""
    if not scored:
        return {"n": 0, "mae": None, "coverage": None}
    errors = [abs(one.median - one.actual) for one in scored]
    inside = [one.low <= one.actual <= one.high for one in scored]
    return {
        "n": len(scored),
        "mae": round(float(np.mean(errors)), 2),
        "coverage": round(float(np.mean(inside)), 3),
    }
