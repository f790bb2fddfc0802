"""Stalls of moves: from two streams and the engines' reports to a row and a figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from sglang_star.errors import PeerError
from sglang_star_bench.engines import Stream

BEFORE: Final = 16
"""Gaps before a move whose median is the client's step time."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One row to measure: where the request's length and the company it keeps are given."""

    context: int
    batch: int
    moves: int
    gap: int
    overlap: bool

    @property
    def tokens(self) -> int:
        """Output of the moved request: ``gap`` tokens per move and as many for its delays."""
        return self.gap * (2 * self.moves + 2)


@dataclass(slots=True)
class Outcome:
    """What one plan gave: the engines' reports, in order, and the two streams."""

    twin: Stream
    moved: Stream
    reports: list[dict[str, Any]] = field(default_factory=list)


def client_stall(stream: Stream, report: dict[str, Any]) -> tuple[float, float]:
    """Stall of a move at the client, and its step time before the move, milliseconds.

    The stall is the gap before the first token from the new host, minus the median of the
    :data:`BEFORE` gaps before the move began.
    """
    times = np.array([at for at, _ in stream.arrivals])
    counts = np.array([tokens for _, tokens in stream.arrivals])
    first = int(np.searchsorted(counts, report["output_tokens"]))
    before = int(np.searchsorted(times, report["started_at"]))
    step_s = float(np.median(np.diff(times[max(0, before - BEFORE - 1) : before])))
    return max(0.0, times[first] - times[first - 1] - step_s) * 1e3, step_s * 1e3


def summarise(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """One row of the result.

    Raises:
        PeerError: not a single move succeeded.
    """
    moved = [report for report in outcome.reports if report["outcome"] == "moved"]
    if not moved:
        details = {report["detail"] for report in outcome.reports}
        raise PeerError(f"none of {len(outcome.reports)} moves succeeded: {details}")
    client = [client_stall(outcome.moved, report) for report in moved]
    durations_s = [report["finished_at"] - report["started_at"] for report in moved]
    return {
        "transport": "shm",
        "mode": "aggregated",
        "context_tokens": plan.context,
        "batch": plan.batch,
        "overlap": plan.overlap,
        "moves": len(moved),
        "failed": len(outcome.reports) - len(moved),
        "identical": outcome.moved.token_ids == outcome.twin.token_ids,
        "stall_ms": quantiles([report["stall_ms"] for report in moved]),
        "stall_steps": quantiles([report["stall_steps"] for report in moved]),
        "client_stall_ms": quantiles([stall for stall, _ in client]),
        "client_stall_steps": quantiles([stall / step for stall, step in client]),
        "step_ms": statistics.median(report["step_ms"] for report in moved),
        "client_step_ms": statistics.median(step for _, step in client),
        "move_ms": quantiles([1e3 * duration for duration in durations_s]),
        "precopied": statistics.median(
            report["precopied_tokens"] / report["context_tokens"] for report in moved
        ),
        # Over the whole move, reservation and handshakes included: not the speed of the carrier.
        "bytes_per_s": statistics.median(
            report["transport_bytes"] / duration
            for report, duration in zip(moved, durations_s, strict=True)
        ),
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """P50, P90, P99 and the largest."""
    p50, p90, p99 = np.quantile(values, [0.5, 0.9, 0.99])
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "max": float(max(values))}


def describe(row: dict[str, Any]) -> str:
    """One row as text."""
    engine, client = row["stall_steps"], row["client_stall_steps"]
    return (
        f"context {row['context_tokens']:5} batch {row['batch']:2} "
        f"overlap {'on' if row['overlap'] else 'off'}: {row['moves']} moves, "
        f"{'identical' if row['identical'] else 'DIFFERENT'}; step {row['step_ms']:.1f} ms; stall "
        f"P50 {row['stall_ms']['p50']:.1f} ms = {engine['p50']:.2f} steps, P99 {engine['p99']:.2f} "
        f"steps; at the client P50 {row['client_stall_ms']['p50']:.1f} ms = {client['p50']:.2f} "
        f"steps, P99 {client['p99']:.2f} steps"
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw stalls in steps against context, as the engines and as the client see them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True, constrained_layout=True)
    for axis, key, title in zip(
        axes, ("stall_steps", "client_stall_steps"), ("engines", "client"), strict=True
    ):
        for batch, overlap in sorted({(row["batch"], row["overlap"]) for row in rows}):
            line = [row for row in rows if (row["batch"], row["overlap"]) == (batch, overlap)]
            contexts = [row["context_tokens"] for row in line]
            label = f"batch {batch}, overlap {'on' if overlap else 'off'}"
            (drawn,) = axis.plot(contexts, [row[key]["p50"] for row in line], "o-", label=label)
            tail = [row[key]["p99"] for row in line]
            axis.plot(contexts, tail, "^:", color=drawn.get_color())
        axis.set(title=f"as the {title} see it" if key == "stall_steps" else f"at the {title}")
        axis.set(xscale="log", xlabel="context, tokens", ylabel="stall, steps; P99 dotted")
        axis.legend(fontsize=8)
    figure.savefig(path)
