"""STAR's part of one scheduler: what happens at every step boundary, in order."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import zmq
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from sglang_star import __version__
from sglang_star.config import StarConfig
from sglang_star.errors import IllegalTransition, OrderRefused, StarError
from sglang_star.faults import Faults
from sglang_star.identity import fingerprint_of, host_token
from sglang_star.migration.armed import ArmedOrders
from sglang_star.migration.arrival import Arrivals
from sglang_star.migration.guests import Guests
from sglang_star.migration.links import Links, Order, PeerLost
from sglang_star.migration.outflow import Outflow
from sglang_star.migration.pages import KvPages
from sglang_star.migration.relay import Relay
from sglang_star.migration.report import CLOCK, MoveLog
from sglang_star.migration.source import Source
from sglang_star.orders import Orders
from sglang_star.platform import device
from sglang_star.protocol import (
    PROTOCOL_VERSION,
    Advertisement,
    Commit,
    Heartbeat,
    Inserted,
    MigrationMessage,
    PagesReady,
    PagesTaken,
    Parked,
    Peer,
    Refused,
    Release,
    Reserve,
    Reserved,
    TokenChunk,
)
from sglang_star.status import ROLES, StatusReporter, StepTimer

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)

POLL_S = 0.0005
"""How often the device is asked whether it is done, where it cannot wake a poll itself."""
HOLD_SHARE = 0.9
"""Of a decode step that queueing the next one may be put off; the rest prepares its launch."""


class Instance:
    """Everything STAR keeps per scheduler.

    Attributes:
        advertisement: what ``/server_info`` shows under ``star``.
    """

    def __init__(self, scheduler: Scheduler, config: StarConfig) -> None:
        args = scheduler.server_args
        self._scheduler = scheduler
        self._config = config
        role = ROLES[scheduler.disaggregation_mode]
        pages = KvPages(scheduler)
        fingerprint = fingerprint_of(scheduler, pages)
        self._links = Links(
            config.instance_id or f"{role}@{args.host}:{args.port}",
            time.time_ns(),
            host=config.host,
            advertise_host=config.advertise_host or config.host,
            migration_port=config.migration_port,
            status_port=config.status_port,
            heartbeat_s=config.heartbeat_s,
            timeout_s=config.peer_timeout_s,
        )
        self._faults = Faults()
        log = MoveLog()
        self._log = log
        self._timer = StepTimer()
        self._relay = Relay(scheduler, self._links, timeout_s=config.peer_timeout_s, log=log)
        self._guests = Guests(scheduler, pages, self._links, config)
        self._outflow = Outflow(self._links, self._guests)
        self._arrivals = Arrivals(
            scheduler, pages, self._links, self._relay, self._guests, config, fingerprint
        )
        self._source = Source(
            scheduler,
            pages,
            self._links,
            self._relay,
            log,
            config,
            fingerprint,
            self._guests.handed_over,
        )
        armed = ArmedOrders()
        self._status = StatusReporter(
            scheduler,
            self._links.peer,
            pages,
            self._source,
            self._guests,
            log,
            armed,
            self._timer,
        )
        self._status.faults = self._faults.counts
        self._next_status = 0.0
        self._watched: frozenset[tuple[str, str]] = frozenset()
        self._orders = Orders(
            scheduler,
            self._source,
            self._guests,
            self._relay,
            self._status,
            self._timer,
            log,
            armed,
            self._links.peer,
            config,
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
        )
        self.order_address = self._links.order_address
        if scheduler.idle_sleeper is not None:
            scheduler.idle_sleeper.poller.register(self._links.wake.fd, zmq.POLLIN)
        logger.info(
            "STAR %s: instance %s, status %s, migration %s",
            __version__,
            self._links.peer.instance_id,
            self._links.status_address,
            self._links.peer.address,
        )

    # ------------------------------------------------------------------ the step boundary

    def tick(self) -> None:
        """Handle what arrived, advance moves, publish; SGLang is between two steps."""
        self._receive()
        if self._guests.by_stream:
            self._await_commit()
        if self._source.moves:
            self._source.step(self._faults)
        if self._guests.by_stream:
            self._arrivals.step(self._faults)
            self._guests.step(self._faults)
        with self._faults.contained("orders"):
            self._orders.step()
        self._flush()
        with self._faults.contained("heartbeats"):
            self._watch()
        if time.monotonic() >= self._next_status:
            self._next_status = time.monotonic() + self._config.status_interval_ms / 1e3
            with self._faults.contained("the status"):
                self._links.publish(self._status.snapshot())

    def _receive(self, *, urgent_only: bool = False) -> None:
        while (item := self._links.take(urgent_only=urgent_only)) is not None:
            self._handle(item)

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
        while self._guests.expecting() and time.monotonic() < until and running():
            if self._links.idle():
                self._links.wait(POLL_S)
            self._receive()
            self._flush()

    def await_result(self, result: object) -> None:
        """Pass tokens on to our clients while the device works on ``result``."""
        running = device.pending(result)
        while (self._relay.shadows or self._source.moves) and running():
            if self._links.idle() or not self._links.urgent:
                self._links.wait(POLL_S)
            self._receive(urgent_only=True)
            self._flush()
        device.settle(result)

    def _flush(self) -> None:
        # What does not get out now goes with the request's next tokens: SGLang keeps count.
        with self._faults.contained("relayed tokens"):
            self._relay.flush()

    def _handle(self, item: object) -> None:
        with self._faults.contained(type(item).__name__, lambda: self._abandon(item)):
            try:
                self._dispatch(item)
            except IllegalTransition:
                raise  # a defect of ours, not an answer to anybody
            except StarError as error:
                logger.warning("STAR ignores %s: %s", type(item).__name__, error)

    def _abandon(self, item: object) -> None:
        """Handling ``item`` failed: end what it is about, on this side and the other."""
        if not isinstance(item, MigrationMessage):
            return
        why = f"a defect while handling {type(item).__name__}"
        if (move := self._source.moves.get(item.migration_id)) is not None:
            self._source.abandon(move, why)
        guest = self._guests.by_stream.get(item.stream_id)
        if guest is not None and guest.reserve.migration_id == item.migration_id:
            self._guests.abandon(guest, why)
        elif isinstance(item, Reserve):
            self._guests.refuse(item, OrderRefused(f"the target had {why}"))
        shadow = self._relay.shadows.get(item.stream_id)
        if shadow is not None and isinstance(item, TokenChunk):
            self._relay.reclaim(shadow, why)

    def _dispatch(self, item: object) -> None:
        """Give a message to whom it concerns.

        Raises:
            StarError: it asks for what cannot be done; anything else is a defect.
        """
        if self._source.moves and isinstance(item, MigrationMessage):
            self._source.proven(item)
        match item:
            case TokenChunk():
                self._relay.on_chunk(item)
            case PagesReady():
                self._arrivals.on_pages(item)
            case Parked():
                self._arrivals.on_parked(item)
            case PagesTaken():
                self._source.on_taken(item)
            case Heartbeat():
                live = frozenset(item.live)
                self._relay.on_live(item.sender, live)
                self._guests.on_live(item.sender, live)
            case Reserve():
                self._arrivals.on_reserve(item)
            case Reserved():
                self._source.on_reserved(item)
            case Refused():
                self._source.on_refused(item)
            case Commit():
                self._arrivals.on_commit(item)
            case Inserted():
                self._on_inserted(item)
            case Release():
                self._guests.on_release(item)
            case PeerLost():
                logger.warning("STAR lost %s: %s", item.peer.instance_id, item.why)
                self._source.on_lost(item.peer, item.why)
                self._guests.on_lost(item.peer, item.why)
                self._relay.on_lost(item.peer, item.why)
            case Order():
                self._links.reply(item, self._orders.obey(item.message))

    def _on_inserted(self, message: Inserted) -> None:
        if message.migration_id in self._source.moves:
            self._source.on_inserted(message)
        else:
            self._relay.on_inserted(message)

    def _watch(self) -> None:
        """Tell the links thread whom to exchange heartbeats with, when that changed."""
        pairs = {(s.host, s.stream_id) for s in self._relay.shadows.values()}
        pairs |= {(m.target, m.stream_id) for m in self._source.moves.values()}
        for guest in self._guests.by_stream.values():
            if guest.reserve.home != self._links.peer:
                pairs.add((guest.reserve.home, guest.reserve.stream_id))
            if guest.arriving:
                pairs.add((guest.reserve.source, guest.reserve.stream_id))
        key = frozenset((peer.address, stream) for peer, stream in pairs)
        if key == self._watched:
            return
        self._watched = key
        peers: dict[str, tuple[Peer, frozenset[str]]] = {}
        for peer, stream in pairs:
            known = peers.get(peer.address, (peer, frozenset()))[1]
            peers[peer.address] = (peer, known | {stream})
        self._links.watch(peers)

    # ------------------------------------------------------------------ what the hooks ask

    @property
    def holds_kv_off_batch(self) -> bool:
        """Whether KV is held that SGLang's accounting does not see."""
        return bool(self._guests.arriving()) or any(
            move.off_batch for move in self._source.moves.values()
        )

    def may_sleep(self) -> bool:
        """Whether nothing waits for the next tick; call before anything that polls for work."""
        return self._links.idle()

    def wait(self) -> None:
        """Sleep until a message arrives or a short moment has passed."""
        self._links.wait(0.005)

    def queued(self, req: Req, *, is_retracted: bool) -> bool:
        """SGLang is about to queue ``req``; True if it is ours to keep."""
        if is_retracted:
            self._status.retractions += 1
            return False
        return self._arrivals.rebuilt(req)

    def emit(self, reqs: list[Req]) -> list[Req]:
        """Divert guests' output; return the requests whose clients are ours."""
        own = reqs
        if self._guests.by_rid:
            own = [req for req in reqs if not self._diverted(req)]
        for req in own:
            if CLOCK in req.__dict__:
                with self._faults.contained("the report of a move"):
                    self._log.token(req)
        return own

    def _diverted(self, req: Req) -> bool:
        """Whether the request is a guest; if so its tokens are on their way home."""

        def end() -> None:
            if (guest := self._guests.by_rid.get(req.rid)) is not None:
                self._guests.abandon(guest, "a defect while sending its tokens")

        with self._faults.contained("a guest's tokens", end):
            return self._outflow.emit(req)
        return True

    def aborted(self, rid: str, reason: dict[str, Any] | None) -> bool:
        """SGLang ends a request outside the output stream; True if it was a guest."""
        return self._outflow.aborted_here(rid, reason)

    def abort(self, wanted: Callable[[Req], bool], reason: FINISH_ABORT) -> None:
        """An abort of SGLang's, for requests that it does not find in its batch."""
        self._relay.abort(wanted, reason)
        for move in list(self._source.moves.values()):
            if move.off_batch and wanted(move.req):
                self._source.abort(move, "aborted")
                move.req.finished_reason = reason
                move.req.time_stats.set_completion_time()
                self._scheduler.output_streamer.stream_output([move.req], move.req.return_logprob)

    def overdue(self, started_before: float) -> list[str]:
        """Rids of shadows whose forward started before that ``time.perf_counter()``."""
        return [
            shadow.req.rid
            for shadow in self._relay.shadows.values()
            if 0 < shadow.req.time_stats.forward_entry_time < started_before
        ]

    def decoded(self, *, steady: bool) -> None:
        """A batch result was processed; ``steady`` if it was a decode step."""
        if steady:
            self._timer.decoded()
        else:
            self._timer.interrupted()
