"""Variants on the same windows: means, and paired differences with 95 % intervals."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

T_975: Final = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t at 97.5 % for 1, 2, ... degrees of freedom; 2.1 stands for more."""

METRICS: Final = {
    "in SLO, %": ("slo_attainment", None, 100.0),
    "goodput": ("goodput_rps", None, 1.0),
    "tok/s": ("decoded_tok_s", None, 1.0),
    "TPOT P99": ("tpot_served_ms", "p99", 1.0),
}
"""Heading -> field of a row, inner field, factor."""


def value(row: dict[str, Any], metric: str) -> float:
    """A row's number; infinite where more requests than the percentile leaves were not served."""
    name, inner, factor = METRICS[metric]
    found = row[name] if inner is None else row[name][inner]
    return math.inf if found is None else factor * float(found)


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Mean of the paired differences and half the width of its interval; NaN from one pair."""
    gap = np.asarray(ours) - np.asarray(theirs)
    if gap.size < 2 or not np.isfinite(gap).all():
        return float(gap.mean()) if np.isfinite(gap).all() else math.nan, math.nan
    t = T_975[gap.size - 2] if gap.size - 2 < len(T_975) else 2.1
    return float(gap.mean()), float(t * gap.std(ddof=1) / math.sqrt(gap.size))


def report(rows: Sequence[dict[str, Any]], reference: str) -> Iterator[str]:
    """Lines of a table, over the windows that every variant has."""
    found: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        found[row["variant"]][row["window"]] = row
    shared = sorted(set.intersection(*(set(windows) for windows in found.values())))
    yield f"{len(shared)} windows; less {reference!r} in brackets, 95 % of the paired differences"
    head = "".join(f"{name:>26}" for name in METRICS)
    yield f"{'':32}{head}{'not served':>11}{'TTFT P99 inf':>13}{'retract':>8}{'moves':>7}"
    for name, windows in found.items():
        cells = []
        for metric in METRICS:
            ours, theirs = (
                [value(found[who][w], metric) for w in shared] for who in (name, reference)
            )
            mean, half = difference(ours, theirs)
            cell = f"{np.mean(ours):.4g}" if ours else "-"
            if name != reference and ours:
                cell += f" ({mean:+.3g} ± {half:.2g})"
            cells.append(f"{cell:>26}")
        chosen = [windows[w] for w in shared]
        lost = sum(row["failed"] for row in chosen) / max(sum(r["requests"] for r in chosen), 1)
        infinite = sum(row["ttft_ms"]["p99"] is None for row in chosen)
        retractions, moves = (
            float(np.mean([row[key] for row in chosen])) if chosen else math.nan
            for key in ("retractions", "migrations")
        )
        yield (
            f"{name:32}{''.join(cells)}{lost:11.1%}{infinite:9} of {len(shared):<2}"
            f"{retractions:7.1f}{moves:7.1f}"
        )
