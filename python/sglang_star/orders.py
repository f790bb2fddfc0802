"""Orders to this instance: report, migrate, disarm, drain, undrain."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import orjson
from msgspec import structs

from sglang_star.config import StarConfig
from sglang_star.engine.verbs import Engine, Request
from sglang_star.errors import NotMovable, OrderRefused, StarError, UnknownRequest
from sglang_star.migration.armed import MAX_WAIT_S, ArmedOrder
from sglang_star.migration.host import Guest
from sglang_star.migration.mover import Mover
from sglang_star.migration.outgoing import Outgoing
from sglang_star.protocol import (
    DRAIN,
    DisarmOrder,
    DrainOrder,
    InstanceStatus,
    MigrateOrder,
    OrderReply,
    Peer,
    StatusOrder,
    UndrainOrder,
)
from sglang_star.star_request import star_of

logger = logging.getLogger(__name__)

DRAIN_RETRY_S = 0.2


class Orders:
    """Carries out what the HTTP process asks for."""

    def __init__(
        self,
        engine: Engine,
        mover: Mover,
        here: Peer,
        config: StarConfig,
        *,
        status: Callable[[], InstanceStatus],
        step_ms: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._sender = mover.sender
        self._target = mover.target
        self._host = mover.host
        self._home = mover.home
        self._log = mover.log
        self._armed = mover.armed
        self._here = here
        self._config = config
        self._status = status
        self._step_ms = step_ms
        self._drain_targets: list[Peer] = []
        self._drain_next = 0.0

    @property
    def pending(self) -> bool:
        """Whether :meth:`step` may have something to do."""
        return bool(self._armed or self._drain_targets)

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
                return orjson.dumps(structs.asdict(self._status()), default=structs.asdict)
            case MigrateOrder() if message.at_tokens > 0:
                order = self.arm(message)
                return orjson.dumps({"migration_id": order.migration_id, "armed": True})
            case MigrateOrder():
                move = self.migrate(
                    message.rid, message.target, message.reason, hold_after=_hold(message)
                )
                return orjson.dumps(
                    {"migration_id": move.migration_id, "stream_id": move.stream_id}
                )
            case DisarmOrder():
                gone = self._armed.disarm(message.rid)
                for order in gone:
                    self._unstarted(order, "disarmed", "POST /star/disarm")
                return orjson.dumps({"disarmed": [order.migration_id for order in gone]})
            case DrainOrder():
                self._target.draining = True
                self._drain_targets = list(message.targets)
                return orjson.dumps({"draining": True, "requests": len(self._decoding())})
            case UndrainOrder():
                self._target.draining = False
                self._drain_targets = []
                return orjson.dumps({"draining": False})
        raise OrderRefused(f"unknown order {type(message).__name__}")

    def arm(self, message: MigrateOrder) -> ArmedOrder:
        """Keep an order until its request, which need not exist yet, comes to its token.

        Raises:
            OrderRefused: it could never start, or too many are armed.
        """
        self._check_role()
        if message.target.instance_id == self._here.instance_id:
            raise OrderRefused("an instance is no target of its own", hint="name another instance")
        if not 0 < message.expire_s <= MAX_WAIT_S:
            raise OrderRefused(
                f"an armed order cannot wait for {message.expire_s:g} s",
                hint=f"give expire_s between 0 and {MAX_WAIT_S:.0f}",
            )
        order = ArmedOrder(
            migration_id=self._engine.new_id(),
            rid=message.rid,
            target=message.target,
            reason=message.reason,
            at_tokens=message.at_tokens,
            hold_after=_hold(message),
            armed_at=self._engine.wall(),
            expires_at=self._engine.now() + message.expire_s,
        )
        self._armed.add(order)
        return order

    def migrate(
        self,
        rid: str,
        target: Peer,
        reason: str,
        *,
        hold_after: int | None = None,
        migration_id: str = "",
    ) -> Outgoing:
        """Start moving the request that its client knows as ``rid``.

        Raises:
            UnknownRequest: nothing of that name decodes here.
            OrderRefused: it cannot move now.
        """
        self._check_role()
        for name, req, guest in self._movable():
            if name == rid:
                return self._sender.start(
                    req,
                    rid,
                    target,
                    reason,
                    step_ms=self._step_ms(),
                    guest_of=(guest.stream_id, guest.home) if guest else None,
                    hold_after=hold_after,
                    migration_id=migration_id,
                )
        for shadow in self._home.shadows.values():
            if shadow.req.rid == rid:
                raise OrderRefused(
                    f"{rid} decodes on {shadow.host.instance_id} now",
                    hint="send the order to that instance",
                )
        raise UnknownRequest(
            f"no request {rid!r} is decoding here", hint="see GET /star/status for those that are"
        )

    def _check_role(self) -> None:
        if not self._engine.serves_decode:
            raise OrderRefused("a prefill instance has no decoding requests to move")

    def _movable(self) -> Iterator[tuple[str, Request, Guest | None]]:
        """What decodes here: guests by the name their client knows, then our own requests."""
        for guest in self._host.by_stream.values():
            yield guest.client_rid, guest.req, guest
        for req in self._engine.running():
            if req.rid not in self._host.by_rid and not req.finished():
                yield req.rid, req, None

    def _decoding(self) -> list[str]:
        """What their clients call the requests that decode here."""
        names = {guest.rid: guest.client_rid for guest in self._host.by_stream.values()}
        return [names.get(req.rid, req.rid) for req in self._engine.running() if not req.finished()]

    def step(self) -> None:
        """Start the armed orders that are due, and what a drain still has to move."""
        if self._armed:
            self._fire()
        if self._drain_targets and self._engine.now() >= self._drain_next:
            self._drain()

    def _fire(self) -> None:
        moving = {id(move.req) for move in self._sender.moves.values()}
        running = [
            (name, len(req.output_ids) - star_of(req).arrived)
            for name, req, _ in self._movable()
            if id(req) not in moving
        ]
        for order, rid in self._armed.due(running):
            try:
                self.migrate(
                    rid,
                    order.target,
                    order.reason,
                    hold_after=order.hold_after,
                    migration_id=order.migration_id,
                )
            except NotMovable as error:
                self._unstarted(order, "refused", error.message)
            except StarError as error:
                # Too many moves, or not steady yet: the next step boundary may see it start.
                order.obstacle = error.message
                continue
            self._armed.remove(order)
        for order in self._armed.expire(self._engine.now()):
            detail = order.obstacle or f"no {order.rid} came to {order.at_tokens} tokens here"
            self._unstarted(order, "expired", detail)

    def _unstarted(self, order: ArmedOrder, outcome: str, detail: str) -> None:
        report = order.unstarted(self._here.instance_id, outcome, detail, self._engine.wall())
        self._log.add(report)
        logger.info("STAR: armed move of %s %s: %s", order.rid, outcome, detail)

    def _drain(self) -> None:
        """Start as many moves as are allowed, round-robin over the targets."""
        self._drain_next = self._engine.now() + DRAIN_RETRY_S
        for rid in self._decoding():
            if len(self._sender.moves) >= self._config.max_moves:
                return
            target = self._drain_targets.pop(0)
            self._drain_targets.append(target)
            try:
                self.migrate(rid, target, DRAIN)
            except StarError as error:
                logger.debug("STAR cannot drain %s yet: %s", rid, error)


def _hold(message: MigrateOrder) -> int | None:
    return message.hold_after if message.hold_after >= 0 else None
