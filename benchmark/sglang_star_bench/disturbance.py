"""What moves do to other requests: the steps of bystanders during moves against those without.

A request that stays where it is shows each step of its engine as a gap between two tokens. Steps
get longer and shorter with the batch as well, so each is compared with the median of its engine's
steps without a move around it: before the move, and at its end, where the batch changes, the longer
of before and after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sglang_star_bench.engines import Stream

DISTURBED: Final = 1.1
"""Ratio from which a step counts as disturbed."""
FEWEST: Final = 4
"""Steps without a move that are enough to compare with."""
HANDOVER: Final = 2.5
"""Steps before the end of a move within which its request may have changed sides."""


@dataclass(frozen=True, slots=True)
class Window:
    """Moves between two engines that were under way at the same time.

    Attributes:
        began, ended: wall clock, seconds.
        source, target: instance ids.
    """

    began: float
    ended: float
    source: str
    target: str


@dataclass(slots=True)
class Steps:
    """Steps of one engine as one of its bystanders saw them.

    Attributes:
        ratios, ms: of the steps during moves; ratios_without, ms_without: of the others.
        disturbed: index of a window, and its steps of :data:`DISTURBED` and more.
    """

    ratios: list[float]
    ms: list[float]
    ratios_without: list[float]
    ms_without: list[float]
    disturbed: list[tuple[int, int]]


def window(reports: Sequence[dict[str, Any]]) -> Window:
    """The time of moves that were ordered together, from their reports."""
    return Window(
        min(report["started_at"] for report in reports),
        max(report["finished_at"] for report in reports),
        reports[0]["source"],
        reports[0]["target"],
    )


def steps(stream: Stream, windows: Sequence[Window], since: float) -> Steps:
    """Sort a bystander's steps from time ``since`` on; ``windows`` are in order, and apart."""
    times = np.array([at for at, _ in stream.arrivals])
    ends, gaps = times[1:], np.diff(times)
    ends, gaps = ends[times[:-1] >= since], gaps[times[:-1] >= since]
    inside = np.full(len(ends), -1)
    for number, one in enumerate(windows):
        inside[(ends > one.began) & (ends - gaps < one.ended)] = number
    stretch = np.searchsorted([one.ended for one in windows], ends - gaps, side="right")
    found = Steps([], [], [], [], [])
    medians = []
    for number in range(len(windows) + 1):
        free = gaps[(inside < 0) & (stretch == number)]
        medians.append(float(np.median(free)) if len(free) >= FEWEST else 0.0)
        if medians[-1]:
            found.ratios_without += (free / medians[-1]).tolist()
            found.ms_without += (free * 1e3).tolist()
    for number, one in enumerate(windows):
        before, after = medians[number : number + 2]
        if before and after:
            mine, until = gaps[inside == number], ends[inside == number]
            late = until >= one.ended - HANDOVER * before
            ratios = mine / np.where(late, max(before, after), before)
            found.ratios += ratios.tolist()
            found.ms += (mine * 1e3).tolist()
            found.disturbed.append((number, int((ratios >= DISTURBED).sum())))
    return found
