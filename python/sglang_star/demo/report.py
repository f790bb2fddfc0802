"""``star-demo/report.json``: the figures of one demo, and the same for the terminal."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Final

from sglang_star import __version__
from sglang_star.demo import estimates
from sglang_star.demo.client import Stream
from sglang_star.demo.conversation import Conversation
from sglang_star.demo.estimates import Estimate
from sglang_star.demo.side import Side, counts, latencies, summary
from sglang_star.demo.twins import Twin, twins_of

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
class Findings:
    """All that a demo saw.

    Attributes:
        phases: (name, seconds) in the order they ran.
    """

    without: Side
    rescheduled: Side
    conversation: Conversation = field(default_factory=Conversation)
    phases: Sequence[tuple[str, float]] = ()
    wall_s: float = 0.0

    @property
    def streams(self) -> list[Stream]:
        """Every stream a client opened."""
        talk = self.conversation
        return [*self.without.streams, *self.rescheduled.streams, *talk.streams, *talk.stills]

    @property
    def moves(self) -> list[dict[str, Any]]:
        """Every completed move."""
        return [*self.rescheduled.moves, *self.conversation.moves]

    @property
    def twins(self) -> list[Twin]:
        """Every stream that moved, with its still twin; the first run is the second's."""
        side = self.rescheduled
        pairs = twins_of(side.streams, self.without.streams, side.moves)
        return [*pairs, *self.conversation.twins]

    @property
    def scored(self) -> list[Estimate]:
        """The estimates of both runs of the comparison."""
        sides = (self.without, self.rescheduled)
        return [one for side in sides for one in estimates.pair(side.streams, side.sightings)]


def build(found: Findings) -> dict[str, Any]:
    """Return the content of ``report.json``.

    Counts are over all streams; latencies are those of the run with rescheduling.
    """
    twins = found.twins
    return {
        **counts(found.streams),
        **latencies(found.rescheduled.streams),
        "predictor": estimates.score(found.scored),
        "migrations": [{name: move[name] for name in _MOVE_FIELDS} for move in found.moves],
        "identity": {
            "checked": len(twins),
            "mismatched": sum(not twin.identical for twin in twins),
        },
        "without": summary(found.without),
        "with": summary(found.rescheduled),
        "phases": {name: round(seconds, 1) for name, seconds in found.phases},
        "wall_s": round(found.wall_s, 1),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions that this run's figures depend on."""
    found = {"sglang_star": __version__, "python": platform.python_version()}
    for package in ("sglang", "torch", "transformers", "nixl"):
        found[package] = metadata.version(package)
    return found


def rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the comparison as (what, without, with)."""
    sides = (report["without"], report["with"])

    def points(name: str, digits: int = 0) -> list[str]:
        return [
            "no values" if one[name] is None
            else f"{one[name]['p50']:.{digits}f} / {one[name]['p99']:.{digits}f}"
            for one in sides
        ]  # fmt: skip

    slo = sides[0]["slo"]
    table = [
        ("TPOT P50 / P99, ms", *points("tpot_ms")),
        ("longest gap in a stream, s", *(f"{one['longest_gap_ms'] / 1e3:.1f}" for one in sides)),
        ("retractions", *(str(one["retractions"]) for one in sides)),
        (
            f"in SLO (TTFT {slo['ttft_ms'] / 1e3:g} s, TPOT {slo['tpot_ms']:g} ms)",
            *(f"{one['slo_attainment']:.0%}" for one in sides),
        ),
        ("TTFT P50 / P99, ms", *points("ttft_ms")),
        ("moves", *(str(one["migrations"]) for one in sides)),
        ("answers complete", *(f"{one['completed']} of {one['requests']}" for one in sides)),
        ("output tokens", *(f"{one['output_tokens']:,}" for one in sides)),
        ("first request to last answer, s", *(f"{one['wall_s']:.0f}" for one in sides)),
        ("steps slower than the modelled card's", *(str(one["late_forwards"]) for one in sides)),
    ]
    return [(what, before, after) for what, before, after in table]


def as_text(report: dict[str, Any], twins: Sequence[Twin]) -> str:
    """Return the summary for the terminal, at most 79 columns wide."""
    lines = ["", f"{'':40}{'without':>18}{'with':>18}"]
    lines += [f"{what:40}{before:>18}{after:>18}" for what, before, after in rows(report)]
    identity, predictor = report["identity"], report["predictor"]
    lines += ["", _predictor_line(predictor)]
    lines.append(
        f"identity   {identity['checked']} streams moved; repeated without moving, "
        f"{identity['mismatched']} differ"
    )
    lines += [
        f"  {twin.moved.rid} differs from its twin at token {twin.first_difference}"
        for twin in twins
        if not twin.identical
    ]
    lines.append(
        f"in all     {report['requests']} streams, {report['completed']} complete, "
        f"{report['output_tokens']:,} tokens, {report['wall_s']:.0f} s"
    )
    return "\n".join(lines)


def _predictor_line(predictor: dict[str, Any]) -> str:
    if not predictor["n"]:
        return "predictor  no estimates"
    return (
        f"predictor  {predictor['n']} estimates, off by {predictor['mae']:.0f} tokens in the mean; "
        f"P10-P90 held {predictor['coverage']:.0%}"
    )


def verdict(found: Findings) -> list[str]:
    """Return what went wrong, empty if nothing did.

    It asks whether everything arrived and nothing was changed by moving, not who was faster.
    """
    wrong = [
        f"{stream.rid}: {stream.error or 'the stream ended without its last chunk'}"
        for stream in found.streams
        if not stream.completed
    ]
    twins = found.twins
    differing = [twin for twin in twins if not twin.identical]
    if differing:
        wrong.append(f"{len(differing)} migrated streams differ from their twins")
    if not twins:
        wrong.append(
            f"no stream with a twin moved ({len(found.moves)} moves), so nothing was shown"
        )
    return wrong
