"""STAR's part of one scheduler: what happens at every step boundary, in order."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import zmq

from sglang_star import __version__, hooks
from sglang_star.config import StarConfig
from sglang_star.engine.real import SglangEngine
from sglang_star.engine.verbs import Request
from sglang_star.faults import Faults
from sglang_star.identity import fingerprint_of, host_token
from sglang_star.migration.links import Links
from sglang_star.migration.mailbox import OrderEnvelope
from sglang_star.migration.mover import Mover
from sglang_star.migration.post import PeerLost
from sglang_star.migration.transport.build import build, names
from sglang_star.orders import Orders
from sglang_star.platform import ballast, device
from sglang_star.protocol import PROTOCOL_VERSION, Advertisement, Peer, PeerMessage
from sglang_star.status import ROLES, StatusReporter, StepTimer

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)

POLL_S = 0.0005
"""How often the device is asked whether it is done, where it cannot wake a poll itself."""
HOLD_SHARE = 0.9
"""Of a decode step that queueing the next one may be put off; the rest prepares its launch."""


class Extension:
    """Everything STAR keeps per scheduler.

    Attributes:
        advertisement: what ``/server_info`` shows under ``star``.
    """

    def __init__(self, scheduler: Scheduler, config: StarConfig) -> None:
        args = scheduler.server_args
        self._scheduler = scheduler
        self._config = config
        role = ROLES[scheduler.disaggregation_mode]
        engine = SglangEngine(scheduler)
        fingerprint = fingerprint_of(scheduler, engine.pages)
        self._links = Links(
            config.instance_id or f"{role}@{args.host}:{args.port}",
            time.time_ns(),
            host=config.host,
            advertise_host=config.advertise_host or config.host,
            migration_port=config.migration_port,
            status_port=config.status_port,
            heartbeat_s=config.heartbeat_s,
            timeout_s=config.peer_timeout_s,
            stuck_s=config.stuck_timeout_s,
        )
        peer = self._links.peer
        self._transports = build(
            config,
            agent=f"{peer.instance_id}/{peer.incarnation}",
            device=str(engine.pages.device),
            page_bytes=engine.page_size * engine.token_bytes,
            pool_bytes=engine.pages.capacity * engine.token_bytes,
            moves=engine.serves_decode and not engine.unsupported,
        )
        self._mail = self._links.mail
        self._faults = Faults()
        self._timer = StepTimer()
        self._mover = Mover(
            engine, self._links, config, fingerprint, self._faults, self._transports
        )
        self._status = StatusReporter(
            scheduler,
            engine,
            self._links.peer,
            self._mover,
            self._timer,
            self._faults,
            self._links.dropped,
            self._transports,
        )
        self._inspector = ballast.inspector(scheduler)
        self._next_status = 0.0
        self._watched: frozenset[tuple[Peer, str]] = frozenset()
        self._orders = Orders(
            engine,
            self._mover,
            self._links.peer,
            config,
            status=lambda: self._status.report(all_reports=True),
            step_ms=lambda: self._timer.ema_ms,
        )
        self.advertisement = Advertisement(
            protocol_version=PROTOCOL_VERSION,
            star_version=__version__,
            instance_id=self._links.peer.instance_id,
            incarnation=self._links.peer.incarnation,
            role=role,
            status_address=self._links.status_address,
            migration_address="" if role == "prefill" else self._links.peer.address,
            fingerprint=fingerprint,
            host_token=host_token(),
            predictor=config.predictor,
            transports=names(config, str(engine.pages.device)),
        )
        self.order_address = self._links.order_address
        if scheduler.idle_sleeper is not None:
            scheduler.idle_sleeper.poller.register(self._mail.wake.fd, zmq.POLLIN)
        logger.info(
            "STAR %s in SGLang %s: instance %s, status %s, migration %s",
            __version__,
            hooks.release(),
            self._links.peer.instance_id,
            self._links.status_address,
            self._links.peer.address,
        )

    # ------------------------------------------------------------------ the step boundary

    def tick(self) -> None:
        """Handle what arrived, advance moves, publish; SGLang is between two steps."""
        self._links.pulse.beat(time.monotonic())
        self._mover.poll()
        self._receive()
        if self._mover.target.moves:
            self._await_commit()
        self._mover.step()
        with self._faults.contained("orders"):
            self._orders.step()
        self._mover.flush()
        with self._faults.contained("heartbeats"):
            self._watch()
        if time.monotonic() >= self._next_status:
            self._next_status = time.monotonic() + self._config.status_interval_ms / 1e3
            with self._faults.contained("the status"):
                self._links.publish(self._status.report())

    def _receive(self, *, urgent_only: bool = False) -> None:
        while (item := self._mail.take(urgent_only=urgent_only)) is not None:
            if isinstance(item, OrderEnvelope):
                with self._faults.contained("an order"):
                    self._links.reply(item, self._orders.obey(item.message))
            elif isinstance(item, PeerMessage | PeerLost):
                self._mover.handle(item)

    def _await_commit(self) -> None:
        """Let a guest that is about to arrive catch the step that would be queued now.

        Under overlap the device is still busy with the step before, so that nothing is lost by
        queueing the next one a little later, and the guest gains a whole step.
        """
        queue = getattr(self._scheduler, "result_queue", None)
        if not queue or self._timer.ema_ms <= 0.0:
            return
        running = device.pending(queue[-1][1])
        until = time.monotonic() + HOLD_SHARE * self._timer.ema_ms / 1e3
        while self._mover.target.expecting() and time.monotonic() < until and running():
            if self._mail.is_empty():
                self._mail.wait(POLL_S)
            self._receive()
            self._mover.arrive()
            self._mover.flush()

    def await_result(self, result: object) -> None:
        """Pass tokens on to our clients while the device works on ``result``."""
        running = device.pending(result)
        while self._mover.under_way and running():
            if self._mail.is_empty() or not self._mail.is_urgent():
                self._mail.wait(POLL_S)
            self._receive(urgent_only=True)
            self._mover.flush()
        device.settle(result)

    def _watch(self) -> None:
        """Tell the links thread whom to exchange heartbeats with, when that changed."""
        pairs = self._mover.watched()
        if pairs == self._watched:
            return
        self._watched = pairs
        peers: dict[str, tuple[Peer, frozenset[str]]] = {}
        for peer, stream in pairs:
            known = peers.get(peer.address, (peer, frozenset()))[1]
            peers[peer.address] = (peer, known | {stream})
        self._links.watch(peers)

    # ------------------------------------------------------------------ what the hooks ask

    @property
    def holds_kv_off_batch(self) -> bool:
        """Whether KV is held that SGLang's accounting does not see."""
        return self._mover.holds_kv_off_batch

    def may_sleep(self) -> bool:
        """Whether nothing waits for the next tick; call before anything that polls for work."""
        return self._mail.is_empty()

    def wait(self) -> None:
        """Sleep until a message arrives or a short moment has passed."""
        self._mail.wait(0.005)

    def queued(self, req: Req, *, is_retracted: bool) -> bool:
        """SGLang is about to queue ``req``; True if it is ours to keep."""
        if is_retracted:
            self._status.retractions += 1
            return False
        return self._mover.rebuilt(req)

    def emit(self, reqs: list[Req]) -> list[Req]:
        """Divert guests' output; return the requests whose clients are ours."""
        return list(self._mover.emit(reqs))

    def aborted(self, rid: str, reason: dict[str, Any] | None) -> bool:
        """SGLang ends a request outside the output stream; True if it was a guest."""
        return self._mover.aborted(rid, reason)

    def abort(self, wanted: Callable[[Request], bool], reason: dict[str, Any]) -> None:
        """An abort of SGLang's, for requests that it does not find in its batch."""
        self._mover.abort(wanted, reason)

    def recomputing(self, recompute: Callable[[], None]) -> None:
        """A pause of SGLang's that gives all KV back, carried out by ``recompute``."""
        self._mover.recomputing(recompute)

    def overdue(self, started_before: float) -> list[str]:
        """Rids of shadows whose forward started before that ``time.perf_counter()``."""
        return [
            shadow.req.rid
            for shadow in self._mover.home.shadows.values()
            if 0 < shadow.req.time_stats.forward_entry_time < started_before  # type: ignore[attr-defined]
        ]

    def decoded(self, *, steady: bool) -> None:
        """A batch result was processed; ``steady`` if it was a decode step."""
        if steady and self._inspector is not None:
            with self._faults.contained("KV"):
                self._inspector.step(self._scheduler.running_batch.reqs)
        if steady:
            self._timer.decoded()
        else:
            self._timer.interrupted()
