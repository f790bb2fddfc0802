"""Capacity questions: the fewest instances, or the highest rate, that meet an SLO.

Both answers assume that attainment falls as the rate grows and rises with instances, which noise
blurs near the answer; the search keeps every probe, so that one can see how clear it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sglang_star_bench.runs import Run, execute

Probe = Callable[[Run], dict[str, Any]]
_MOST_INSTANCES = 4096


def attainment(run: Run) -> dict[str, Any]:
    """Result row of one run."""
    return execute(run)[0]


def fewest_instances(run: Run, wanted: float, probe: Probe = attainment) -> dict[str, Any]:
    """Smallest fleet whose attainment is at least ``wanted`` at the run's rate.

    Returns:
        ``{"instances": N or None, "probes": {N: attainment}}``.
    """
    probes: dict[int, float] = {}

    def meets(count: int) -> bool:
        probes[count] = probe(replace(run, decode=count))["slo_attainment"]
        return probes[count] >= wanted

    high = 1
    while not meets(high):
        high *= 2
        if high > _MOST_INSTANCES:
            return {"instances": None, "probes": probes}
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return {"instances": high, "probes": probes}


def highest_load(
    run: Run,
    wanted: float,
    probe: Probe = attainment,
    *,
    low: float = 0.1,
    high: float = 3.0,
    resolution: float = 0.02,
) -> dict[str, Any]:
    """Highest load, and the rate it stands for, at which attainment is at least ``wanted``.

    Returns:
        ``{"load": L or None, "rate_rps", "goodput_rps", "probes": {load: attainment}}``.
    """
    probes: dict[float, float] = {}
    best: dict[str, Any] = {"load": None, "rate_rps": 0.0, "goodput_rps": 0.0}

    def meets(load: float) -> bool:
        row = probe(replace(run, load=load))
        probes[round(load, 4)] = row["slo_attainment"]
        good = bool(row["slo_attainment"] >= wanted)
        if good and (best["load"] is None or load > best["load"]):
            window = row["duration_s"] - row["warmup_s"]
            best.update(
                load=round(load, 4),
                rate_rps=round(row["requests"] / window, 4),
                goodput_rps=row["goodput_rps"],
            )
        return good

    if meets(low):
        while high - low > resolution:
            middle = (low + high) / 2
            low, high = (middle, high) if meets(middle) else (low, middle)
    return best | {"probes": probes}
