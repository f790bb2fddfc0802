"""STAR in the scheduler of an engine that has one rank."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sglang_star.config import StarConfig
from sglang_star.engine.real import SglangEngine
from sglang_star.extension import Extension
from sglang_star.faults import Faults
from sglang_star.front import Front, open_links, open_transports
from sglang_star.identity import kind_of
from sglang_star.migration.mailbox import OrderEnvelope
from sglang_star.migration.mover import Mover
from sglang_star.migration.post import PeerLost
from sglang_star.orders import Orders
from sglang_star.platform import device
from sglang_star.protocol import PeerMessage
from sglang_star.status import StepTimer

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

POLL_S = 0.0005
"""How often the device is asked whether it is done, where it cannot wake a poll itself."""
IDLE_S = 0.005
"""Between two looks at the mail of a scheduler that has nothing else to do."""


class Single(Extension):
    """See :class:`Extension`: what happens at every step boundary, in order."""

    def __init__(self, scheduler: Scheduler, config: StarConfig) -> None:
        engine = SglangEngine(scheduler)
        kind = kind_of(scheduler, engine.pages)
        links = open_links(scheduler, config)
        timer = StepTimer()
        faults = Faults()
        self._mail = links.mail
        agent = f"{links.peer.instance_id}/{links.peer.incarnation}"
        transports = open_transports(engine, config, agent)
        mover = Mover(engine, links, config, kind.text(), faults, transports)
        front = Front(
            scheduler,
            config,
            links,
            engine,
            mover,
            timer,
            faults,
            kind.fingerprint(),
            transports,
        )
        self._front = front
        self._orders = Orders(
            engine,
            mover,
            links.peer,
            config,
            status=front.report,
            step_ms=lambda: timer.ema_ms,
        )
        super().__init__(scheduler, engine, mover, timer, faults, front)

    def tick(self) -> None:
        """See :class:`Extension`."""
        self._front.beat()
        self._mover.poll()
        self._receive()
        if self._mover.target.moves:
            self._await_commit()
        self._mover.step()
        with self._faults.contained("orders"):
            self._orders.step()
        self._mover.flush()
        self._front.tell()
        self._flight.boundary_s = time.monotonic()

    def _receive(self, *, urgent_only: bool = False) -> None:
        while (item := self._mail.take(urgent_only=urgent_only)) is not None:
            if isinstance(item, OrderEnvelope):
                with self._faults.contained("an order"):
                    self._front.links.reply(item, self._orders.obey(item.message))
            elif isinstance(item, PeerMessage | PeerLost):
                self._mover.handle(item)

    def _await_commit(self) -> None:
        """Let a guest that is about to arrive catch the step that would be queued now.

        Under overlap the device is still busy with the step before, so that nothing is lost by
        queueing the next one a little later, and the guest gains a whole step. What was left of
        that step is less by all that this boundary has taken already.
        """
        may_hold = self._may_hold()
        while self._mover.target.expecting() and may_hold():
            if self._mail.is_empty():
                self._mail.wait(POLL_S)
            self._receive()
            self._mover.arrive()
            self._mover.flush()

    def await_result(self, result: object) -> None:
        """Pass tokens on to our clients while the device works on ``result``.

        So does one that a guest is on its way to, to see when the device begins the next step.
        """
        running = device.pending(result)
        while (self._mover.under_way or self._mover.target.moves) and running():
            if self._mail.is_empty() or not self._mail.is_urgent():
                self._mail.wait(POLL_S)
            self._receive(urgent_only=True)
            self._mover.flush()
        device.settle(result)
        self._flight.previous_s = time.monotonic()

    def may_sleep(self) -> bool:
        """See :class:`Extension`."""
        return self._mail.is_empty()

    def wait(self) -> None:
        """See :class:`Extension`."""
        self._mail.wait(IDLE_S)
