"""STAR in one scheduler of an engine that has several ranks.

Rank 0 takes what came before SGLang broadcasts the requests of the next step, so that STAR's part
of it rides along. Nothing is handled between two step boundaries: a token that comes home changes
what every rank knows of its request.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from sglang_star.config import StarConfig
from sglang_star.engine.clock import RealClock
from sglang_star.engine.real import SglangEngine
from sglang_star.errors import SetupError, StarError
from sglang_star.extension import Extension
from sglang_star.faults import Faults
from sglang_star.front import Front, open_links, open_transports
from sglang_star.identity import kind_of
from sglang_star.migration.links import Links
from sglang_star.migration.mailbox import OrderEnvelope
from sglang_star.migration.mover import Mover
from sglang_star.orders import Orders
from sglang_star.platform import device
from sglang_star.protocol import Commit, InstanceStatus, Peer, StatusOrder
from sglang_star.ranks.clock import StepClock
from sglang_star.ranks.group import Group, Ranks
from sglang_star.ranks.ledger import Ledger
from sglang_star.ranks.posts import HeldPost
from sglang_star.ranks.replica import Replica
from sglang_star.ranks.step import StepInput
from sglang_star.ranks.transports import RankTransports
from sglang_star.single import IDLE_S, POLL_S
from sglang_star.status import StepTimer

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)

SEED_BYTES = 16


class _Hello(msgspec.Struct, array_like=True, frozen=True):
    """What ranks tell each other at the start; only rank 0 has a peer."""

    peer: Peer | None = None


class Member(Extension):
    """See :class:`Extension`."""

    def __init__(self, scheduler: Scheduler, config: StarConfig) -> None:
        ranks = Group(scheduler.tp_cpu_group)
        self._clock = StepClock()
        self._steps: list[StepInput] = []
        engine = SglangEngine(scheduler, self._clock, lambda fares: ranks.least(*fares))
        kind = kind_of(scheduler, engine.pages)
        links, peer = _meet(ranks, scheduler, config)
        transports = open_transports(
            engine,
            config,
            f"{peer.instance_id}/{peer.incarnation}/{ranks.rank}",
            made=partial(RankTransports, ranks),
        )
        faults, timer, ledger = Faults(), StepTimer(), Ledger()
        post = HeldPost(peer, ledger, links)
        mover = Mover(engine, post, config, kind.text(), faults, transports, RealClock())
        front = None
        if links is not None:
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
        self._orders = Orders(
            engine,
            mover,
            peer,
            config,
            status=front.report if front else _no_status,
            step_ms=lambda: self._clock.step_ms,
        )
        self._replica = Replica(
            ranks,
            self._clock,
            post,
            ledger,
            mover,
            self._orders,
            faults,
            copies=lambda: engine.tickets.begun,
        )
        super().__init__(scheduler, engine, mover, timer, faults, front)
        logger.info("STAR: rank %d of %d", ranks.rank, ranks.size)

    # ------------------------------------------------------------------ SGLang's broadcast

    def pull(self, requests: list[Any]) -> None:
        """Rank 0 is about to broadcast ``requests``: let what came for STAR ride along."""
        assert self.front is not None, "only rank 0 pulls"
        if self._mover.target.expecting():
            self._await_commit(self.front.links)
        items = tuple(self._taken(self.front))
        if items or self._replica.needs_step:
            requests.append(
                StepInput(
                    items=items,
                    now=time.monotonic(),
                    wall=time.time(),
                    seed=os.urandom(SEED_BYTES),
                    step_ms=self._timer.ema_ms,
                )
            )

    def _taken(self, front: Front) -> Iterator[Any]:
        """What is there, but for questions, which rank 0 answers alone."""
        while (item := front.links.mail.take()) is not None:
            if isinstance(item, OrderEnvelope) and isinstance(item.message, StatusOrder):
                with self._faults.contained("an order"):
                    front.links.reply(item, self._orders.obey(item.message))
            else:
                yield item

    def _await_commit(self, links: Links) -> None:
        """As :meth:`Single._await_commit`; the other ranks wait for the broadcast meanwhile."""
        may_hold = self._may_hold()
        while not links.mail.has(Commit) and may_hold():
            links.mail.is_empty()  # what has come already shall not end the wait
            links.mail.wait(POLL_S)

    def received(self, requests: list[Any]) -> list[Any]:
        """What SGLang shall see of the requests that all ranks have now."""
        steps = [one for one in requests if isinstance(one, StepInput)]
        if not steps:
            return requests
        # What SGLang does with its own requests may ask for the time already.
        self._clock.advance(steps[0])
        self._steps += steps
        return [one for one in requests if not isinstance(one, StepInput)]

    # ------------------------------------------------------------------ the loop

    def tick(self) -> None:
        """See :class:`Extension`."""
        if self.front is not None:
            self.front.beat()
        steps, self._steps = self._steps, []
        for step in steps:
            for order, answer in self._replica.tick(step):
                if self.front is not None:
                    self.front.links.reply(order, answer)
        if self.front is not None:
            self.front.tell()
        self._flight.boundary_s = time.monotonic()

    def await_result(self, result: object) -> None:
        """Wait for a paced device; SGLang itself waits for a real one."""
        device.settle(result)
        self._flight.previous_s = time.monotonic()

    def may_sleep(self) -> bool:
        """See :class:`Extension`: ranks without sockets sleep in the broadcast."""
        return self.front is None or self.front.links.mail.is_empty()

    def wait(self) -> None:
        """See :class:`Extension`."""
        if self.front is not None:
            self.front.links.mail.wait(IDLE_S)


def _meet(ranks: Ranks, scheduler: Scheduler, config: StarConfig) -> tuple[Links | None, Peer]:
    """Open rank 0's sockets, and let all ranks know its name.

    Raises:
        StarError: rank 0 cannot open its sockets; every rank raises one.
    """
    links: Links | None = None
    problem: StarError = SetupError("rank 0 cannot start STAR", hint="see what it says")
    if ranks.rank == 0:
        try:
            links = open_links(scheduler, config)
        except StarError as error:
            problem = error
    hello = _Hello(links.peer if links else None)
    heard = [
        msgspec.msgpack.decode(one, type=_Hello)
        for one in ranks.gather(msgspec.msgpack.encode(hello))
    ]
    peer = heard[0].peer
    if peer is None:
        raise problem
    return links, peer


def _no_status() -> InstanceStatus:
    raise AssertionError("rank 0 answers questions before they are broadcast")
