"""One of the two runs that are compared, and what it is judged by."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_star.demo.client import Stream
from sglang_star.demo.watch import Load, Sighting


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits of one request, milliseconds."""

    ttft_ms: float
    tpot_ms: float

    def met(self, stream: Stream) -> bool:
        """Whether the stream completed within both; one token alone has no TPOT to miss."""
        ttft, tpot = stream.ttft_ms, stream.tpot_ms or 0.0
        return (
            stream.completed and ttft is not None and ttft <= self.ttft_ms and tpot <= self.tpot_ms
        )


@dataclass(frozen=True, slots=True)
class Side:
    """All that was seen of one run.

    Attributes:
        name: ``without`` or ``with`` rescheduling.
        moves: completed ones, in the order they ended, times on the wall clock.
        clock_offset_s: the wall clock minus the monotonic one.
    """

    name: str
    streams: Sequence[Stream]
    loads: Sequence[Load]
    sightings: Sequence[Sighting]
    moves: Sequence[dict[str, Any]]
    clock_offset_s: float
    slo: Slo

    @property
    def began_s(self) -> float:
        """When the first request was sent, on the monotonic clock."""
        return min(stream.sent_s for stream in self.streams)

    @property
    def wall_s(self) -> float:
        """From the first request sent to the last answer ended."""
        return max(stream.ended_s for stream in self.streams) - self.began_s

    @property
    def instances(self) -> list[str]:
        """Names of the instances that decoded."""
        return sorted({load.instance for load in self.loads})

    def of(self, instance: str) -> list[Load]:
        """Return the loads of one instance, in order."""
        return [load for load in self.loads if load.instance == instance]

    def grown(self, total: str) -> int:
        """Return how much a total of :class:`Load` grew over the run, summed over instances."""
        ends = [(loads[0], loads[-1]) for loads in map(self.of, self.instances)]
        return sum(getattr(last, total) - getattr(first, total) for first, last in ends)

    def retractions(self, instance: str) -> list[tuple[float, int]]:
        """Return when, in seconds of the run, an instance was seen to have retracted how many."""
        loads = self.of(instance)
        return [
            (after.at_s - self.began_s, after.retractions - before.retractions)
            for before, after in itertools.pairwise(loads)
            if after.retractions > before.retractions
        ]

    def move_s(self, move: dict[str, Any]) -> float:
        """Return when a move ended, in seconds of the run."""
        return float(move["finished_at"]) - self.clock_offset_s - self.began_s


def moves_of(
    streams: Iterable[Stream], migrations: Iterable[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the completed moves of these streams' requests, in the order they ended."""
    rids = {stream.rid for stream in streams}
    moved = [row for row in migrations if row["state"] == "moved" and row["rid"] in rids]
    return sorted(moved, key=lambda row: row["finished_at"])


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Return mean and percentiles, None without values."""
    if not values:
        return None
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    numbers = {"mean": np.mean(values), "p50": p50, "p90": p90, "p99": p99}
    return {name: round(float(value), 3) for name, value in numbers.items()}


def counts(streams: Sequence[Stream]) -> dict[str, int]:
    """Return how many streams there were and how they ended."""
    completed = sum(stream.completed for stream in streams)
    return {
        "requests": len(streams),
        "completed": completed,
        "failed": len(streams) - completed,
        "output_tokens": sum(stream.tokens for stream in streams),
    }


def latencies(streams: Sequence[Stream]) -> dict[str, Any]:
    """Return TTFT and TPOT of the completed streams."""
    completed = [stream for stream in streams if stream.completed]
    return {
        "ttft_ms": spread([s.ttft_ms for s in completed if s.ttft_ms is not None]),
        "tpot_ms": spread([s.tpot_ms for s in completed if s.tpot_ms is not None]),
    }


def summary(side: Side) -> dict[str, Any]:
    """Return a side's column of the comparison."""
    met = sum(side.slo.met(stream) for stream in side.streams)
    return {
        **counts(side.streams),
        **latencies(side.streams),
        "longest_gap_ms": round(max(s.longest_gap_ms for s in side.streams), 1),
        "retractions": side.grown("retractions"),
        "slo": {"ttft_ms": side.slo.ttft_ms, "tpot_ms": side.slo.tpot_ms},
        "slo_attainment": round(met / len(side.streams), 4),
        "migrations": len(side.moves),
        "late_forwards": side.grown("late"),
        "wall_s": round(side.wall_s, 1),
    }
