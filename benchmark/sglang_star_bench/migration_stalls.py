"""Stalls of moves: from two streams and the engines' reports to a row and a figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from sglang_star.errors import PeerError
from sglang_star_bench.disturbance import Steps, steps, window
from sglang_star_bench.engines import Stream

COMPANION_TOKENS: Final = 32
"""Prompts of the requests that keep moving ones company."""
SHORTEST: Final = 500
"""Output tokens of a stream, so that a slow move fits into it."""
BEFORE: Final = 16
"""Gaps before a move whose median is the client's step time."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One row to measure: what moves, in which company, and over what.

    Attributes:
        context: prompt tokens of each request that moves.
        batch: requests running per engine, where one moves.
        moves: at least so many; gap: tokens between two of them.
        at_once: requests that move at the same time.
        longest: output tokens of one stream at most; there are several streams if need be.
        transport, link: as of ``--star-transport``, and the rate that the link is held to.
    """

    context: int
    batch: int
    moves: int
    gap: int
    overlap: bool
    at_once: int = 1
    longest: int = 4000
    transport: str = "shm"
    link: str = ""

    @property
    def tokens(self) -> int:
        """Output of a moved request: ``gap`` tokens per move and as many for its delays."""
        wanted = self.gap * (2 * -(-self.moves // self.at_once) + 2)
        return min(self.longest, max(SHORTEST, wanted))

    @property
    def companion_tokens(self) -> int:
        """Output of the others: an engine that hosts fewer is faster, or waits for no prefill."""
        return 2 * self.tokens + self.at_once * self.context // 64

    @property
    def room(self) -> int:
        """KV tokens that an engine needs if it hosts all at once."""
        companions = (self.batch - 1) * (COMPANION_TOKENS + self.companion_tokens)
        return self.at_once * (self.context + self.tokens) + companions


@dataclass(slots=True)
class Round:
    """Streams that moved together.

    Attributes:
        moved: the streams; bystanders: those that stayed, for each engine.
        began: wall clock when all of ``moved`` decoded.
        sets: reports of the moves that were ordered together, one for each stream.
    """

    moved: list[Stream]
    bystanders: list[list[Stream]]
    began: float = 0.0
    sets: list[list[dict[str, Any]]] = field(default_factory=list)


@dataclass(slots=True)
class Outcome:
    """What one plan gave.

    Attributes:
        names: instance ids of the engines.
        twins: the streams undisturbed.
        carried: bytes on the network while streams moved; 0 if that is not known.
        faults: defects that the engines met, wrong KV among them.
    """

    names: list[str]
    twins: list[Stream] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    carried: int = 0
    faults: dict[str, int] = field(default_factory=dict)

    @property
    def ordered(self) -> int:
        """Moves so far, however they ended."""
        return sum(len(one) for made in self.rounds for one in made.sets)


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
    reports = [report for made in outcome.rounds for one in made.sets for report in one]
    moved = [report for report in reports if report["outcome"] == "moved"]
    if not moved:
        details = {report["detail"] for report in reports}
        raise PeerError(f"none of {len(reports)} moves succeeded: {details}")
    client = [
        client_stall(stream, report)
        for made in outcome.rounds
        for one in made.sets
        for stream, report in zip(made.moved, one, strict=False)
        if report["outcome"] == "moved"
    ]
    durations_s = [report["finished_at"] - report["started_at"] for report in moved]
    sent = sum(report["transport_bytes"] for report in moved)
    return {
        "transport": plan.transport,
        "link": plan.link,
        "mode": "aggregated",
        "context_tokens": plan.context,
        "batch": plan.batch,
        "at_once": plan.at_once,
        "overlap": plan.overlap,
        "moves": len(moved),
        "failed": len(reports) - len(moved),
        "identical": all(
            stream.token_ids == twin.token_ids
            for made in outcome.rounds
            for stream, twin in zip(made.moved, outcome.twins, strict=True)
        ),
        "faults": outcome.faults,
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
        "bytes_per_move": statistics.median(report["transport_bytes"] for report in moved),
        # Over the whole move, reservation and handshakes included: not the speed of the carrier.
        "bytes_per_s": statistics.median(
            report["transport_bytes"] / duration
            for report, duration in zip(moved, durations_s, strict=True)
        ),
        # Of all moves that were under way together.
        "link_bytes_per_s": statistics.median(
            sum(report["transport_bytes"] for report in one) / (time.ended - time.began)
            for made in outcome.rounds
            for one in made.sets
            for time in (window(one),)
        ),
        "carried_per_byte": outcome.carried / sent,
        **bystanders(outcome),
    }


def bystanders(outcome: Outcome) -> dict[str, Any]:
    """What those noticed that did not move; empty if there were none."""
    found: list[Steps] = []
    disturbed: dict[str, list[int]] = {"source": [], "target": []}
    for made in outcome.rounds:
        windows = [window(one) for one in made.sets]
        for name, streams in zip(outcome.names, made.bystanders, strict=True):
            mine = [steps(stream, windows, made.began) for stream in streams]
            found += mine
            # All of them see the same steps.
            for index, count in mine[0].disturbed if mine else ():
                end = "source" if windows[index].source == name else "target"
                disturbed[end].append(count)
    during = [ratio for one in found for ratio in one.ratios]
    without = [ratio for one in found for ratio in one.ratios_without]
    if not (during and without):
        return {}
    p99, p99_without = np.quantile(during, 0.99), np.quantile(without, 0.99)
    return {
        "bystander_itl_ms": quantiles([ms for one in found for ms in one.ms]),
        "bystander_itl_ms_without": quantiles([ms for one in found for ms in one.ms_without]),
        "bystander_steps": quantiles(during),
        "bystander_steps_without": quantiles(without),
        "bystander_p99_longer": float(p99 / p99_without - 1),
        "disturbed_steps": {end: quantiles(counts) for end, counts in disturbed.items() if counts},
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """P50, P90, P99 and the largest."""
    p50, p90, p99 = np.quantile(values, [0.5, 0.9, 0.99])
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "max": float(max(values))}


def describe(row: dict[str, Any]) -> str:
    """One row as text."""
    engine, client = row["stall_steps"], row["client_stall_steps"]
    text = (
        f"{row['transport']}{' ' * bool(row['link'])}{row['link']} "
        f"context {row['context_tokens']:5} batch {row['batch']:2} at once {row['at_once']} "
        f"overlap {'on' if row['overlap'] else 'off'}: {row['moves']} moves, "
        f"{row['failed']} failed, {'identical' if row['identical'] else 'DIFFERENT'}; "
        f"step {row['step_ms']:.1f} ms; stall "
        f"P50 {row['stall_ms']['p50']:.1f} ms = {engine['p50']:.2f} steps, P99 {engine['p99']:.2f} "
        f"steps; at the client P50 {row['client_stall_ms']['p50']:.1f} ms = {client['p50']:.2f} "
        f"steps, P99 {client['p99']:.2f} steps; {row['bytes_per_move'] / 1e6:.1f} MB in "
        f"{row['move_ms']['p50']:.0f} ms, together {row['link_bytes_per_s'] / 1e6:.0f} MB/s"
    )
    if "bystander_p99_longer" in row:
        p99, without = row["bystander_steps"]["p99"], row["bystander_steps_without"]["p99"]
        ends = (f"{end} {n['p50']:.0f}/{n['p99']:.0f}" for end, n in row["disturbed_steps"].items())
        text += (
            f"; bystanders' P99 step {p99:.2f} of the median during moves, {without:.2f} without; "
            f"disturbed steps P50/P99 {', '.join(ends)}"
        )
    return text + (f"; FAULTS {row['faults']}" if row["faults"] else "")


def _kind(row: dict[str, Any]) -> tuple[str, str, int, int, bool]:
    return row["transport"], row["link"], row["at_once"], row["batch"], row["overlap"]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw stalls in steps against context, as the engines and as the client see them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True, constrained_layout=True)
    for axis, key, title in zip(
        axes, ("stall_steps", "client_stall_steps"), ("engines", "client"), strict=True
    ):
        for kind in sorted({_kind(row) for row in rows}):
            line = [row for row in rows if _kind(row) == kind]
            contexts = [row["context_tokens"] for row in line]
            transport, link, at_once, batch, overlap = kind
            label = f"{transport} {link} {at_once} at once, batch {batch}" + ", no overlap" * (
                not overlap
            )
            (drawn,) = axis.plot(contexts, [row[key]["p50"] for row in line], "o-", label=label)
            tail = [row[key]["p99"] for row in line]
            axis.plot(contexts, tail, "^:", color=drawn.get_color())
        axis.set(title=f"as the {title} see it" if key == "stall_steps" else f"at the {title}")
        axis.set(xscale="log", xlabel="context, tokens", ylabel="stall, steps; P99 dotted")
        axis.legend(fontsize=8)
    figure.savefig(path)
