"""Every migration the router ordered or heard of, from the order to its outcome."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from sglang_star.protocol import MoveReport
from sglang_star_router.fleet import Fleet
from sglang_star_router.instance import Instance
from sglang_star_router.policy.snapshot import MoveOrder

HISTORY = 2000
"""Migrations remembered for ``GET /star/migrations``."""


@dataclass(slots=True, eq=False)
class MoveRecord:
    """One migration.

    Attributes:
        state: ``ordered``, ``accepted``, or how it ended: ``moved``, ``refused``, ``failed``,
            ``reclaimed``, ``cancelled``, ``lost`` (no report came in time).
        ordered_by: ``rescheduler``, ``operator`` or ``engine`` (a drain, say).
        expected_gain, explain: the policy's own words at the time of the order.
        kv_share_before, kv_share_after: KV in use on source and target, share of capacity, when
            it was ordered and when it ended: what the move really brought.
        ordered_at, finished_at: wall clock, seconds since the epoch; finished_at 0 while open.
    """

    rid: str
    source: str
    target: str
    reason: str
    ordered_by: str
    ordered_at: float
    expected_gain: float = 0.0
    explain: dict[str, float] = field(default_factory=dict)
    migration_id: str = ""
    state: str = "ordered"
    detail: str = ""
    context_tokens: int = 0
    precopied_tokens: int = 0
    output_tokens: int = 0
    stall_ms: float = 0.0
    stall_steps: float = 0.0
    transport_bytes: int = 0
    finished_at: float = 0.0
    kv_share_before: tuple[float, float] = (0.0, 0.0)
    kv_share_after: tuple[float, float] = (0.0, 0.0)
    ordered_s: float = 0.0

    @property
    def open(self) -> bool:
        """Still under way as far as the router knows."""
        return self.state in ("ordered", "accepted")

    def to_json(self) -> dict[str, Any]:
        """Return the row ``GET /star/migrations`` shows."""
        row = asdict(self)
        del row["ordered_s"]
        return row


class Ledger:
    """Open migrations, history, and which requests must not be ordered to move now.

    Attributes:
        busy: rids with an open migration or in their cool-down.
        outcomes: number of migrations by how they ended.
        stalls_ms: stalls of the latest completed moves.
    """

    def __init__(self, fleet: Fleet, *, cooldown_s: float, report_timeout_s: float) -> None:
        self.busy: dict[str, float] = {}
        self.outcomes: Counter[str] = Counter()
        self.stalls_ms: deque[float] = deque(maxlen=HISTORY)
        self._fleet = fleet
        self._cooldown_s = cooldown_s
        self._report_timeout_s = report_timeout_s
        self._history: deque[MoveRecord] = deque()
        self._open: set[MoveRecord] = set()
        self._by_id: dict[str, MoveRecord] = {}

    def __iter__(self) -> Iterator[MoveRecord]:
        """Latest first."""
        return reversed(self._history)

    @property
    def open_count(self) -> int:
        """Migrations under way."""
        return len(self._open)

    def moves_of(self, instance: Instance) -> tuple[int, int]:
        """Return how many open migrations leave and enter ``instance``."""
        out = sum(one.source == instance.name for one in self._open)
        return out, sum(one.target == instance.name for one in self._open)

    def ordered(self, order: MoveOrder, by: str) -> MoveRecord:
        """Record an order about to be sent."""
        migration = MoveRecord(
            rid=order.rid, source=order.source, target=order.target, reason=order.reason,
            ordered_by=by, ordered_at=time.time(), ordered_s=time.monotonic(),
            expected_gain=float(order.expected_gain),
            explain={name: float(value) for name, value in order.explain.items()},
            kv_share_before=self._shares(order.source, order.target),
        )  # fmt: skip
        self._remember(migration)
        self._open.add(migration)
        self.busy[order.rid] = float("inf")
        return migration

    def accepted(self, migration: MoveRecord, migration_id: str) -> None:
        """Record the engine's consent; its report may have overtaken it."""
        early = self._by_id.get(migration_id)
        migration.migration_id = migration_id
        if migration.open:
            migration.state = "accepted"
        self._by_id[migration_id] = migration
        if early is not None and early is not migration:
            self._history.remove(early)
            self._take_over(migration, early)

    def ended(self, migration: MoveRecord, state: str, detail: str = "") -> None:
        """Close a migration."""
        if not migration.open:
            return
        migration.state, migration.detail = state, detail
        migration.finished_at = migration.finished_at or time.time()
        migration.kv_share_after = self._shares(migration.source, migration.target)
        self._open.discard(migration)
        self.busy[migration.rid] = time.monotonic() + self._cooldown_s
        self.outcomes[state] += 1

    def report(self, instance: Instance, report: MoveReport) -> None:
        """Take in how a move ended; reports are repeated, so most are old news."""
        migration = self._by_id.get(report.migration_id)
        if migration is None:
            migration = MoveRecord(
                rid=report.rid, source=report.source, target=report.target, reason=report.reason,
                ordered_by="engine", ordered_at=report.started_at, ordered_s=time.monotonic(),
                migration_id=report.migration_id,
            )  # fmt: skip
            self._remember(migration)
            self._open.add(migration)
            self._by_id[report.migration_id] = migration
        if not migration.open and migration.state != "lost":
            return
        if migration.state == "lost":
            self.outcomes["lost"] -= 1
            migration.state = "accepted"
        for name in (
            "context_tokens", "precopied_tokens", "output_tokens", "stall_ms", "stall_steps",
            "transport_bytes", "finished_at",
        ):  # fmt: skip
            setattr(migration, name, getattr(report, name))
        self.ended(migration, report.outcome, report.detail)
        if report.outcome == "moved":
            self.stalls_ms.append(report.stall_ms)
            self._fleet.moved(report.rid)

    def expire(self) -> None:
        """Give up on migrations without a report, and end cool-downs."""
        now = time.monotonic()
        for migration in tuple(self._open):
            source = self._fleet.find(migration.source)
            if now - migration.ordered_s > self._report_timeout_s:
                self.ended(migration, "lost", f"no report within {self._report_timeout_s:g} s")
            elif source is None or not source.healthy:
                self.ended(migration, "lost", "the source instance is gone")
        for rid in [rid for rid, until in self.busy.items() if until <= now]:
            del self.busy[rid]

    # ------------------------------------------------------------------ inside

    def _take_over(self, migration: MoveRecord, early: MoveRecord) -> None:
        for name in (
            "state", "detail", "context_tokens", "precopied_tokens", "output_tokens", "stall_ms",
            "stall_steps", "transport_bytes", "finished_at", "kv_share_after",
        ):  # fmt: skip
            setattr(migration, name, getattr(early, name))
        self._open.discard(early)
        if not migration.open:
            self._open.discard(migration)

    def _remember(self, migration: MoveRecord) -> None:
        self._history.append(migration)
        while len(self._history) > HISTORY:
            gone = self._history.popleft()
            self._by_id.pop(gone.migration_id, None)

    def _shares(self, source: str, target: str) -> tuple[float, float]:
        return self._share(source), self._share(target)

    def _share(self, name: str) -> float:
        instance = self._fleet.find(name)
        if instance is None or instance.status is None:
            return 0.0
        status = instance.status
        return status.kv_used_tokens / max(1, status.kv_capacity_tokens)
