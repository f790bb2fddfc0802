"""``star-demo/report.json``: the figures of one demo, and the same as a table for the terminal."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final

import numpy as np

from sglang_star import __version__
from sglang_star.demo.client import Sighting, Stream

ESTIMATE_EVERY: Final = 20
"""A request's estimate is scored once per so many output tokens, not once per poll."""

_MOVE_FIELDS: Final = (
    "rid",
    "source",
    "target",
    "reason",
    "context_tokens",
    "precopied_tokens",
    "stall_ms",
    "stall_steps",
)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A prediction of remaining tokens beside what really remained."""

    rid: str
    low: float
    median: float
    high: float
    actual: int


@dataclass(frozen=True, slots=True)
class Twin:
    """A migrated stream and its repetition that stayed where it was."""

    moved: Stream
    still: Stream

    @property
    def identical(self) -> bool:
        """Whether both completed with the same token ids for the same reason."""
        return (
            self.moved.completed
            and self.still.completed
            and self.moved.token_ids == self.still.token_ids
            and self.moved.finish_reason == self.still.finish_reason
        )

    @property
    def first_difference(self) -> int | None:
        """Position of the first token that differs, None if there is none."""
        pairs = zip(self.moved.token_ids, self.still.token_ids, strict=False)
        for position, (ours, theirs) in enumerate(pairs):
            if ours != theirs:
                return position
        lengths = len(self.moved.token_ids), len(self.still.token_ids)
        return None if lengths[0] == lengths[1] else min(lengths)


def moves_of(
    streams: Iterable[Stream], migrations: Iterable[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the completed moves of these streams' requests, in the order they happened."""
    rids = {stream.rid for stream in streams}
    moved = [row for row in migrations if row["state"] == "moved" and row["rid"] in rids]
    return sorted(moved, key=lambda row: row["finished_at"])


def estimates(streams: Iterable[Stream], sightings: Iterable[Sighting]) -> list[Estimate]:
    """Pair estimates with what came.

    An answer cut by its token limit counts with that length, as in ``star predictor eval``: the
    engine limits its estimates likewise, and leaving such answers out would keep the short ones.
    """
    length = {s.rid: s.tokens for s in streams if s.completed}
    found: dict[tuple[str, int], Estimate] = {}
    for seen in sightings:
        key = (seen.rid, seen.output_tokens // ESTIMATE_EVERY)
        if seen.rid not in length or len(seen.remaining) != 5 or key in found:
            continue
        actual = length[seen.rid] - seen.output_tokens
        low, median, high = (seen.remaining[level] for level in (0, 2, 4))
        found[key] = Estimate(seen.rid, low, median, high, actual)
    return list(found.values())


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Return mean and percentiles, None without values."""
    if not values:
        return None
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    numbers = {"mean": np.mean(values), "p50": p50, "p90": p90, "p99": p99}
    return {name: round(float(value), 3) for name, value in numbers.items()}


def build(
    streams: Sequence[Stream],
    moves: Sequence[dict[str, Any]],
    scored: Sequence[Estimate],
    twins: Sequence[Twin],
    wall_s: float,
) -> dict[str, Any]:
    """Return the content of ``report.json``."""
    completed = [stream for stream in streams if stream.completed]
    return {
        "requests": len(streams),
        "completed": len(completed),
        "failed": len(streams) - len(completed),
        "output_tokens": sum(stream.tokens for stream in streams),
        "ttft_ms": spread([s.ttft_ms for s in completed if s.ttft_ms is not None]),
        "tpot_ms": spread([s.tpot_ms for s in completed if s.tpot_ms is not None]),
        "predictor": _score(scored),
        "migrations": [{name: move[name] for name in _MOVE_FIELDS} for move in moves],
        "identity": {
            "checked": len(twins),
            "mismatched": sum(not twin.identical for twin in twins),
        },
        "wall_s": round(wall_s, 1),
        "versions": versions(),
    }


def _score(scored: Sequence[Estimate]) -> dict[str, Any]:
    if not scored:
        return {"n": 0, "mae": None, "coverage": None}
    errors = [abs(one.median - one.actual) for one in scored]
    inside = [one.low <= one.actual <= one.high for one in scored]
    return {
        "n": len(scored),
        "mae": round(float(np.mean(errors)), 2),
        "coverage": round(float(np.mean(inside)), 3),
    }


def versions() -> dict[str, str]:
    """Return the versions that this run's figures depend on."""
    found = {"sglang_star": __version__, "python": platform.python_version()}
    for package in ("sglang", "torch", "transformers", "nixl"):
        found[package] = metadata.version(package)
    return found


def as_text(report: dict[str, Any], twins: Sequence[Twin]) -> str:
    """Return the summary for the terminal."""
    lines = [
        "",
        f"requests   {report['requests']} sent, {report['completed']} completed, "
        f"{report['failed']} failed, {report['output_tokens']} tokens, {report['wall_s']:.0f} s",
        _spread_line("TTFT", report["ttft_ms"]),
        _spread_line("TPOT", report["tpot_ms"]),
        _predictor_line(report["predictor"]),
        "",
        f"moves      {len(report['migrations'])}",
    ]
    if report["migrations"]:
        lines.append(
            f"  {'request':28}{'from':>12}{'to':>12}  {'reason':12}"
            f"{'tokens':>7}{'pre-copied':>12}{'stall ms':>10}{'steps':>7}"
        )
    lines += [
        f"  {move['rid']:28}{move['source']:>12}{move['target']:>12}  {move['reason']:12}"
        f"{move['context_tokens']:>7}{move['precopied_tokens']:>12}"
        f"{move['stall_ms']:>10.1f}{move['stall_steps']:>7.2f}"
        for move in report["migrations"]
    ]
    identity = report["identity"]
    lines += [
        "",
        f"identity   {identity['checked']} migrated greedy streams repeated without moving, "
        f"{identity['mismatched']} differ",
    ]
    lines += [
        f"  {twin.moved.rid} differs from its twin at token {twin.first_difference}"
        for twin in twins
        if not twin.identical
    ]
    return "\n".join(lines)


def _spread_line(name: str, values: dict[str, float] | None) -> str:
    if values is None:
        return f"{name:11}no values"
    return f"{name:11}P50 {values['p50']:.0f} ms, P90 {values['p90']:.0f}, P99 {values['p99']:.0f}"


def _predictor_line(predictor: dict[str, Any]) -> str:
    if not predictor["n"]:
        return "predictor  no estimates"
    return (
        f"predictor  {predictor['n']} estimates, mean error {predictor['mae']:.0f} tokens, "
        f"P10-P90 band holds {predictor['coverage']:.0%} of actual lengths"
    )
