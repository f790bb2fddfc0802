"""How moves went: what the client noticed of each, kept for telemetry."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Protocol

from sglang_star.engine.verbs import Request
from sglang_star.protocol import MoveFacts, MoveReport
from sglang_star.star_request import star_of

RECENT_S = 10.0
KEPT = 256


@dataclass(slots=True)
class MoveClock:
    """When a client last got a token, and the moves whose stall its next token ends.

    Attributes:
        last_token_at: monotonic seconds.
        arrivals: (migration id, target, facts) of moves whose first token is still to come; more
            than one if the request was handed on before it decoded.
    """

    last_token_at: float
    arrivals: list[tuple[str, str, MoveFacts]] = field(default_factory=list)


class Stopwatch(Protocol):
    """What stalls are measured with; nothing is decided by it."""

    def now(self) -> float:
        """Seconds of a clock that never jumps."""

    def wall(self) -> float:
        """Seconds since the epoch."""


class MoveLog:
    """Reports of the latest moves.

    Attributes:
        reports: newest last, at most :data:`KEPT`.
        outcomes: counts since start, by outcome.
    """

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch
        self.reports: deque[MoveReport] = deque(maxlen=KEPT)
        self.outcomes: Counter[str] = Counter()

    def clock(self, req: Request) -> MoveClock:
        """The request's clock, started now if it has none."""
        star = star_of(req)
        if star.clock is None:
            star.clock = MoveClock(self._stopwatch.now())
        return star.clock

    def add(self, report: MoveReport) -> None:
        """Keep one report."""
        self.reports.append(report)
        self.outcomes[report.outcome] += 1

    def recent(self) -> tuple[MoveReport, ...]:
        """Reports of the last :data:`RECENT_S` seconds."""
        horizon = self._stopwatch.wall() - RECENT_S
        return tuple(report for report in self.reports if report.finished_at >= horizon)

    def arrived(self, req: Request, migration_id: str, target: str, facts: MoveFacts) -> None:
        """A request of ours decodes at ``target``; reported with its next token, and once only."""
        pending = self.clock(req).arrivals
        if all(migration_id != known for known, _, _ in pending) and all(
            migration_id != report.migration_id for report in self.reports
        ):
            pending.append((migration_id, target, facts))

    def token(self, req: Request, ticking: MoveClock) -> None:
        """A client of ours got new tokens of a request that has this clock."""
        now = self._stopwatch.now()
        gap_s, ticking.last_token_at = now - ticking.last_token_at, now
        arrivals, ticking.arrivals = ticking.arrivals, []
        for migration_id, target, facts in arrivals:
            stall_ms = max(0.0, gap_s * 1e3 - facts.step_ms)
            self.add(
                MoveReport(
                    migration_id=migration_id,
                    rid=req.rid,
                    source=facts.source,
                    target=target,
                    outcome="moved",
                    reason=facts.reason,
                    context_tokens=facts.context_tokens,
                    precopied_tokens=facts.precopied_tokens,
                    output_tokens=len(req.output_ids),
                    stall_ms=stall_ms,
                    stall_steps=stall_ms / facts.step_ms if facts.step_ms else 0.0,
                    step_ms=facts.step_ms,
                    transport_bytes=facts.transport_bytes,
                    transport=facts.transport,
                    transport_reason=facts.transport_reason,
                    started_at=facts.started_at,
                    finished_at=self._stopwatch.wall(),
                )
            )
