"""What one scheduler of an engine has for all its ranks: the sockets, and what is told by them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import zmq

from sglang_star import __version__, hooks
from sglang_star.config import StarConfig
from sglang_star.engine.real import SglangEngine
from sglang_star.faults import Faults
from sglang_star.fleet_key import access
from sglang_star.identity import host_token
from sglang_star.migration.links import Links
from sglang_star.migration.mover import Mover
from sglang_star.migration.transport.base import Transport
from sglang_star.migration.transport.build import build, names
from sglang_star.migration.transport.choice import Transports
from sglang_star.predictor import runner
from sglang_star.protocol import PROTOCOL_VERSION, Advertisement, InstanceStatus, Peer
from sglang_star.status import ROLES, StatusReporter, StepTimer

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)


def open_links(scheduler: Scheduler, config: StarConfig) -> Links:
    """Bind this instance's sockets.

    Raises:
        ConfigError: an address is taken.
    """
    args = scheduler.server_args
    return Links(
        config.instance_id or f"{ROLES[scheduler.disaggregation_mode]}@{args.host}:{args.port}",
        time.time_ns(),
        host=config.host,
        advertise_host=config.advertise_host or config.host,
        migration_port=config.migration_port,
        status_port=config.status_port,
        heartbeat_s=config.heartbeat_s,
        timeout_s=config.peer_timeout_s,
        stuck_s=config.stuck_timeout_s,
        access=access(config.fleet_key, insecure=config.insecure),
    )


def open_transports(
    engine: SglangEngine,
    config: StarConfig,
    agent: str,
    made: Callable[[Sequence[Transport], Callable[[], float]], Transports] = Transports,
) -> Transports:
    """Make this scheduler's staging memory, and its ways to read that of others."""
    return build(
        config,
        agent=agent,
        device=str(engine.pages.device),
        page_bytes=engine.page_size * engine.token_bytes,
        pool_bytes=engine.pages.capacity * engine.token_bytes,
        moves=engine.serves_decode and not engine.unsupported,
        now=engine.now,
        made=made,
    )


class Front:
    """Heartbeats, published statuses, and what this instance shows of itself.

    Attributes:
        links: its sockets; advertisement: what ``/server_info`` shows under ``star``.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        config: StarConfig,
        links: Links,
        engine: SglangEngine,
        mover: Mover,
        timer: StepTimer,
        faults: Faults,
        fingerprint: str,
        transports: Transports,
    ) -> None:
        self.links = links
        self._mover = mover
        self._faults = faults
        self._interval_s = config.status_interval_ms / 1e3
        self._next_status = 0.0
        self._watched: frozenset[tuple[Peer, str]] = frozenset()
        self._status = StatusReporter(
            scheduler, engine, links.peer, mover, timer, faults, links.dropped, transports
        )
        role = ROLES[scheduler.disaggregation_mode]
        self.advertisement = Advertisement(
            protocol_version=PROTOCOL_VERSION,
            star_version=__version__,
            instance_id=links.peer.instance_id,
            incarnation=links.peer.incarnation,
            role=role,
            status_address=links.status_address,
            migration_address="" if role == "prefill" else links.peer.address,
            fingerprint=fingerprint,
            host_token=host_token(),
            predictor=runner.serving,
            transports=names(config, str(engine.pages.device)),
        )
        if scheduler.idle_sleeper is not None:
            scheduler.idle_sleeper.poller.register(links.mail.wake.fd, zmq.POLLIN)
        logger.info(
            "STAR %s in SGLang %s: instance %s, status %s, migration %s",
            __version__,
            hooks.release(),
            links.peer.instance_id,
            links.status_address,
            links.peer.address,
        )

    def report(self) -> InstanceStatus:
        """The status now, with the older reports of moves."""
        return self._status.report(all_reports=True)

    def retracted(self) -> None:
        """SGLang has taken a request's KV."""
        self._status.retractions += 1

    def beat(self) -> None:
        """The scheduler is at a step boundary."""
        self.links.pulse.beat(time.monotonic())

    def tell(self) -> None:
        """Say to the links thread whom to watch, and to the fleet how we are, if it is time."""
        with self._faults.contained("heartbeats"):
            self._watch()
        if time.monotonic() >= self._next_status:
            self._next_status = time.monotonic() + self._interval_s
            with self._faults.contained("the status"):
                self.links.publish(self._status.report())

    def _watch(self) -> None:
        """Tell the links thread whom to exchange heartbeats with, when that changed."""
        pairs = self._mover.watched()
        if pairs == self._watched:
            return
        self._watched = pairs
        self.links.watch(pairs)
