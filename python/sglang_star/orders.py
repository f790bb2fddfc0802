"""Orders to this instance: report, migrate, drain, undrain."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import orjson
from msgspec import structs
from sglang.srt.disaggregation.utils import DisaggregationMode

from sglang_star.config import StarConfig
from sglang_star.errors import OrderRefused, StarError, UnknownRequest
from sglang_star.migration.guests import Guests
from sglang_star.migration.move import Move
from sglang_star.migration.relay import Relay
from sglang_star.migration.source import Source
from sglang_star.protocol import (
    DRAIN,
    DrainOrder,
    MigrateOrder,
    OrderReply,
    Peer,
    StatusOrder,
    UndrainOrder,
)
from sglang_star.status import StatusReporter, StepTimer

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)

DRAIN_RETRY_S = 0.2


class Orders:
    """Carries out what the HTTP process asks for."""

    def __init__(
        self,
        scheduler: Scheduler,
        source: Source,
        guests: Guests,
        relay: Relay,
        status: StatusReporter,
        timer: StepTimer,
        config: StarConfig,
    ) -> None:
        self._scheduler = scheduler
        self._source = source
        self._guests = guests
        self._relay = relay
        self._status = status
        self._timer = timer
        self._config = config
        self._drain_targets: list[Peer] = []
        self._drain_next = 0.0

    def obey(self, message: Any) -> OrderReply:
        """Carry an order out, or say why not."""
        try:
            payload = self._carry_out(message)
        except StarError as error:
            return OrderReply(
                order_id=getattr(message, "order_id", 0),
                error_type=type(error).__name__,
                message=error.message,
                hint=error.hint,
            )
        return OrderReply(order_id=message.order_id, payload=payload)

    def _carry_out(self, message: object) -> bytes:
        match message:
            case StatusOrder():
                return orjson.dumps(structs.asdict(self._status.snapshot()), default=structs.asdict)
            case MigrateOrder():
                move = self.migrate(message.rid, message.target, message.reason)
                return orjson.dumps(
                    {"migration_id": move.migration_id, "stream_id": move.stream_id}
                )
            case DrainOrder():
                self._guests.draining = True
                self._drain_targets = list(message.targets)
                return orjson.dumps({"draining": True, "requests": len(self._decoding())})
            case UndrainOrder():
                self._guests.draining = False
                self._drain_targets = []
                return orjson.dumps({"draining": False})
        raise OrderRefused(f"unknown order {type(message).__name__}")

    def migrate(self, rid: str, target: Peer, reason: str) -> Move:
        """Start moving the request that its client knows as ``rid``.

        Raises:
            UnknownRequest: nothing of that name decodes here.
            OrderRefused: it cannot move now.
        """
        if self._scheduler.disaggregation_mode == DisaggregationMode.PREFILL:
            raise OrderRefused("a prefill instance has no decoding requests to move")
        for guest in self._guests.by_stream.values():
            if guest.reserve.client_rid == rid and guest.req is not None and not guest.arriving:
                return self._source.start(
                    guest.req,
                    rid,
                    target,
                    reason,
                    step_ms=self._timer.ema_ms,
                    guest_of=(guest.reserve.stream_id, guest.reserve.home),
                )
        for req in self._scheduler.running_batch.reqs:
            if req.rid == rid and not req.finished():
                return self._source.start(req, rid, target, reason, step_ms=self._timer.ema_ms)
        for shadow in self._relay.shadows.values():
            if shadow.req.rid == rid:
                raise OrderRefused(
                    f"{rid} decodes on {shadow.host.instance_id} now",
                    hint="send the order to that instance",
                )
        raise UnknownRequest(
            f"no request {rid!r} is decoding here", hint="see GET /star/status for those that are"
        )

    def _decoding(self) -> list[str]:
        """What their clients call the requests that decode here."""
        names = {g.rid: g.reserve.client_rid for g in self._guests.by_stream.values()}
        return [
            names.get(req.rid, req.rid)
            for req in self._scheduler.running_batch.reqs
            if not req.finished()
        ]

    def step(self) -> None:
        """While draining, start as many moves as are allowed, round-robin over the targets."""
        if not self._drain_targets or time.monotonic() < self._drain_next:
            return
        self._drain_next = time.monotonic() + DRAIN_RETRY_S
        for rid in self._decoding():
            if len(self._source.moves) >= self._config.max_moves:
                return
            target = self._drain_targets.pop(0)
            self._drain_targets.append(target)
            try:
                self.migrate(rid, target, DRAIN)
            except StarError as error:
                logger.debug("STAR cannot drain %s yet: %s", rid, error)
