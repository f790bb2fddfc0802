"""The loop: snapshot, decide, order. Whatever goes wrong in one round, the next one comes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from typing import Any

from sglang_star.errors import OrderRefused, PeerError, StarError, UnknownRequest
from sglang_star_router.engine import EngineClient
from sglang_star_router.fleet import Fleet
from sglang_star_router.instance import Instance
from sglang_star_router.ledger import Ledger, MoveRecord
from sglang_star_router.metrics import Metrics
from sglang_star_router.policy.base import ReschedulePolicy
from sglang_star_router.policy.snapshot import MoveOrder
from sglang_star_router.snapshot import Snapshots

logger = logging.getLogger(__name__)


class OrderSender:
    """Sends migration orders to their sources and records what they say."""

    def __init__(self, fleet: Fleet, engine: EngineClient, ledger: Ledger) -> None:
        self._fleet = fleet
        self._engine = engine
        self._ledger = ledger

    async def move(self, order: MoveOrder, by: str) -> MoveRecord:
        """Order one migration and wait for the engine's consent.

        Raises:
            OrderRefused: unknown source or target, or the engine said no.
            PeerError: the source does not answer.
        """
        source, target = self.endpoints(order)
        migration = self._ledger.ordered(order, by)
        await self.send(migration, source, target)
        return migration

    async def send(self, migration: MoveRecord, source: Instance, target: Instance) -> None:
        """Send a recorded order; the engine answers at once and reports the outcome later.

        Raises:
            OrderRefused: the engine said no.
            PeerError: the source does not answer.
        """
        try:
            status, answer = await self._engine.json(
                source,
                "POST",
                "/star/migrate",
                {
                    "rid": migration.rid,
                    "target": target.endpoint.url,
                    "peer": peer_json(target),
                    "reason": migration.reason,
                },
            )
            if status != 202 or not isinstance(answer, dict) or "migration_id" not in answer:
                raise _refusal(status, answer, source)
        except OrderRefused as error:
            self._ledger.ended(migration, "refused", error.message)
            raise
        except BaseException as error:
            self._ledger.ended(migration, "failed", str(error) or type(error).__name__)
            raise
        self._ledger.accepted(migration, str(answer["migration_id"]))

    def endpoints(self, order: MoveOrder) -> tuple[Instance, Instance]:
        """Resolve source and target.

        Raises:
            OrderRefused: either is not in the fleet, or the target cannot take requests.
        """
        source, target = self._fleet.find(order.source), self._fleet.find(order.target)
        if source is None or target is None:
            missing = order.source if source is None else order.target
            raise OrderRefused(
                f"no instance {missing!r} in the fleet", hint="GET /star/cluster lists them"
            )
        if source is target:
            raise OrderRefused(f"{order.rid} is on {target.name} already")
        if target.role == "prefill":
            raise OrderRefused(f"{target.name} is a prefill instance", hint="name one that decodes")
        if not target.healthy or target.draining:
            state = "draining" if target.draining else "not healthy"
            raise OrderRefused(f"{target.name} is {state}", hint="choose another target")
        why = self._fleet.obstacles.between(source.name, target.name)
        if why is not None:
            raise OrderRefused(
                f"no request can move between {source.name} and {target.name}: {why.text}",
                hint="GET /star/cluster lists them under no_moves_with; choose another target",
            )
        return source, target


class Rescheduler:
    """Runs a policy every ``interval_s`` and sends what it orders, within limits.

    Attributes:
        errors: rounds in which the policy or the snapshot failed.
        rounds: decisions taken.
        skipped: orders not sent, by reason.
    """

    def __init__(
        self,
        policy: ReschedulePolicy,
        snapshots: Snapshots,
        sender: OrderSender,
        ledger: Ledger,
        metrics: Metrics,
        *,
        interval_s: float,
        max_moves: int,
        max_moves_per_second: float,
        stale_s: float = float("inf"),
    ) -> None:
        self.errors = 0
        self.rounds = 0
        self.skipped: Counter[str] = Counter()
        self._policy = policy
        self._snapshots = snapshots
        self._sender = sender
        self._ledger = ledger
        self._metrics = metrics
        self._interval_s = interval_s
        self._max_moves = max_moves
        self._rate = max_moves_per_second
        self._stale_s = stale_s
        self._allowance = max(1.0, max_moves_per_second)
        self._refilled_s = time.monotonic()
        self._sending: set[asyncio.Task[None]] = set()
        self._last_error = ""

    async def run(self) -> None:
        """Decide until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            self.round()

    def round(self) -> None:
        """Take one decision and start what it orders."""
        started = time.perf_counter()
        try:
            self._ledger.expire()
            orders = self._policy.orders(self._snapshots.decide_moves())
            for order in orders:
                if self._may(order):
                    self._start(order)
        except Exception as error:
            self.errors += 1
            self._metrics.rescheduler_errors.inc()
            # The same defect would fill the log twice a second.
            if repr(error) != self._last_error:
                self._last_error = repr(error)
                logger.exception("the rescheduler's round failed; it goes on")
        self.rounds += 1
        self._metrics.decision.observe(time.perf_counter() - started)

    async def close(self) -> None:
        """Drop orders being sent."""
        for task in self._sending:
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)

    # ------------------------------------------------------------------ inside

    def _may(self, order: MoveOrder) -> bool:
        now = time.monotonic()
        burst = max(1.0, self._rate)
        self._allowance = min(burst, self._allowance + (now - self._refilled_s) * self._rate)
        self._refilled_s = now
        reason = ""
        if order.mode != "copy":
            reason = "mode"
        elif order.rid in self._ledger.busy:
            reason = "busy"
        elif self._ledger.open_count >= self._max_moves:
            reason = "concurrency"
        elif self._allowance < 1.0:
            reason = "rate"
        if reason:
            self.skipped[reason] += 1
            return False
        self._allowance -= 1.0
        return True

    def _start(self, order: MoveOrder) -> None:
        """Record the order now, so that the next one is checked against it, and send it."""
        try:
            source, target = self._sender.endpoints(order)
        except OrderRefused as error:
            self.skipped["endpoints"] += 1
            logger.info("%s stays on %s: %s", order.rid, order.source, error)
            return
        # A source that says nothing could not tell how the move went either.
        if not source.alive(time.monotonic(), self._stale_s):
            self.skipped["source"] += 1
            return
        migration = self._ledger.ordered(order, "rescheduler")
        task = asyncio.create_task(self._send(migration, source, target))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _send(self, migration: MoveRecord, source: Instance, target: Instance) -> None:
        try:
            await self._sender.send(migration, source, target)
        except (OrderRefused, PeerError) as error:
            logger.info("%s stays on %s: %s", migration.rid, source.name, error)
        except Exception:
            logger.exception("ordering %s to move failed", migration.rid)
        else:
            logger.info(
                "%s moves %s -> %s (%s, gain %.3g) as %s",
                migration.rid, source.name, target.name, migration.reason,
                migration.expected_gain, migration.migration_id,
            )  # fmt: skip


def peer_json(target: Instance) -> dict[str, Any] | None:
    """Where the target receives moves, so that the source need not ask it; None if unknown."""
    known = target.advertisement
    if known is None or not known.migration_address:
        return None
    return {
        "instance_id": known.instance_id,
        "incarnation": known.incarnation,
        "address": known.migration_address,
    }


def _refusal(status: int, answer: object, source: Instance) -> StarError:
    """Turn an engine's error JSON back into an error."""
    detail = answer.get("error") if isinstance(answer, dict) else None
    detail = detail if isinstance(detail, dict) else {}
    message = str(detail.get("message") or f"{source.name} answered {status}")
    hint = str(detail.get("hint") or "")
    if status == 404 and detail:
        return UnknownRequest(message, hint=hint)
    if status == 404:
        return OrderRefused(
            f"{source.name} has no /star/migrate", hint="start the instance with --star"
        )
    if 400 <= status < 500:
        return OrderRefused(message, hint=hint)
    return PeerError(message, hint=hint)
