"""NIXL, over UCX: RDMA, NVLink or TCP, between machines as well.

The target reads a slot in one transfer into registered memory of its own, and the slot's stamp in
a second one after it. All of it happens on one thread per engine, which owns NIXL's agent: making
it, meeting peers and moving bytes take milliseconds that the scheduler's thread does not have. A
peer's agent is forgotten with its reader.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import torch

from sglang_star.errors import PeerError
from sglang_star.migration.transport.base import Grant, Transport, read_setup
from sglang_star.migration.transport.memory import HostRegion
from sglang_star.migration.transport.nixl_agent import Agent
from sglang_star.migration.transport.nixl_pump import UNWANTED, Pump
from sglang_star.migration.transport.slots import Slots

logger = logging.getLogger(__name__)

POLL_S: Final = 0.0002
"""Between two looks at transfers under way."""


class Setup(msgspec.Struct, array_like=True, frozen=True):
    """An agent, and where its region lies in its process."""

    metadata: bytes
    address: int
    slots: int
    slot_bytes: int


@dataclass(slots=True, eq=False)
class NixlFetch:
    """See :class:`Fetch`. Only the thread writes it, but for ``cancelled`` and ``closed``."""

    reader: NixlReader
    grant: Grant
    size: int
    checksum: int
    landing: int | None = None
    handle: Any = None
    stamping: bool = False
    data: torch.Tensor | None = None
    error: str = ""
    cancelled: bool = False
    closed: bool = False

    def arrived(self) -> torch.Tensor | None:
        """See :class:`Fetch`."""
        if self.cancelled:
            raise PeerError(UNWANTED)
        if self.error:
            raise PeerError(self.error, hint="see both instances' logs; --star-transport")
        return self.data

    def intact(self) -> bool:
        """See :class:`Fetch`: that was seen before :meth:`arrived` gave anything."""
        return True

    def cancel(self) -> None:
        """See :class:`Fetch`."""
        self.cancelled = True

    def close(self) -> None:
        """See :class:`Fetch`."""
        self.closed = True
        self.reader.transport.wake()


@dataclass(slots=True, eq=False)
class NixlReader:
    """See :class:`Reader`.

    Attributes:
        agent: the peer's name for NIXL once it has been met.
        heard_at: when a transfer from it ended last, or was first wanted again.
    """

    transport: Nixl
    setup: Setup
    agent: str = ""
    heard_at: float = 0.0
    closed: bool = False
    wanted: list[NixlFetch] = field(default_factory=list)

    def fetch(self, grant: Grant, size: int, checksum: int) -> NixlFetch:
        """See :class:`Reader`."""
        if not (0 <= grant.index < self.setup.slots and 0 < size <= self.setup.slot_bytes):
            raise PeerError(f"no {size} bytes in slot {grant.index}")
        if size > self.transport.landing_bytes:
            raise PeerError(
                f"a piece of {size} bytes is larger than the slots that are to take it in",
                hint="give all instances the same --star-staging-mb and --star-max-moves",
            )
        fetch = NixlFetch(self, grant, size, checksum)
        self.transport.take(fetch)
        return fetch

    def close(self) -> None:
        """See :class:`Reader`."""
        self.closed = True
        self.transport.wake()


class Nixl(Transport):
    """See the module's text.

    Args:
        region: ours.
        name: of the agent: nobody else's.
        landing: how many slots what is read comes into, each as large as one of the region's.
    """

    name = "nixl"

    def __init__(self, region: HostRegion | None, agent: str, landing: int) -> None:
        self.region: HostRegion | None = region
        self.landing_bytes = region.slot_bytes if region is not None else 0
        self._name = agent
        self._landings = landing
        self._thread: threading.Thread | None = None
        self._lock = threading.Condition()
        self._inbox: deque[NixlFetch | NixlReader] = deque()
        self._woken = False
        self._stop = False
        self._setup = b""
        self._why = "" if region is not None else "no staging memory"

    # ------------------------------------------------------------------ the scheduler's side

    def start(self) -> None:
        """See :class:`Transport`."""
        if self._thread is None and not self._why:
            self._thread = threading.Thread(target=self._run, name="star-nixl", daemon=True)
            self._thread.start()

    def setup(self) -> bytes:
        """See :class:`Transport`."""
        if self._why:
            raise PeerError(self._why)
        return self._setup

    def open(self, setup: bytes) -> NixlReader:
        """See :class:`Transport`."""
        self.start()
        if not self.setup():
            raise PeerError("NIXL is being started here", hint="retry in a few seconds")
        wanted = read_setup(setup, Setup)
        if wanted.slots <= 0 or wanted.slot_bytes <= 0 or not wanted.metadata:
            raise PeerError("malformed NIXL setup")
        reader = NixlReader(self, wanted)
        self._put(reader)
        return reader

    def take(self, fetch: NixlFetch) -> None:
        """Read it, as soon as there is a place for it."""
        self._put(fetch)

    def wake(self) -> None:
        """Something that the thread works at is no longer wanted."""
        with self._lock:
            self._woken = True
            self._lock.notify()

    def close(self) -> None:
        """See :class:`Transport`."""
        self._stop = True
        self.wake()

    def _put(self, item: NixlFetch | NixlReader) -> None:
        with self._lock:
            self._inbox.append(item)
            self._woken = True
            self._lock.notify()

    # ------------------------------------------------------------------ the thread's side

    def _run(self) -> None:
        try:
            agent = Agent(self._name)
            assert self.region is not None
            landing = HostRegion(self._landings, self.region.slot_bytes)
            agent.register(self.region.tensor)
            agent.register(landing.tensor)
            setup = Setup(
                agent.metadata(),
                self.region.tensor.data_ptr(),
                self.region.slots,
                self.region.slot_bytes,
            )
        except Exception as error:  # NIXL's own, and a package that is not there
            logger.warning("STAR has no transport nixl: %s", error)
            self._why = f"NIXL does not start: {error}"
            return
        self._setup = msgspec.msgpack.encode(setup)
        logger.info("STAR's transport nixl is ready")
        pump = Pump(agent, landing, Slots(self._landings))
        while not self._stop:
            with self._lock:
                if not self._woken:
                    self._lock.wait(POLL_S if pump.busy else None)
                self._woken = False
                taken = list(self._inbox)
                self._inbox.clear()
            for item in taken:
                if isinstance(item, NixlReader):
                    pump.meet(item)
                else:
                    pump.want(item)
            pump.turn(time.monotonic())
