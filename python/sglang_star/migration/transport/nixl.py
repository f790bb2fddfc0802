"""NIXL, over UCX: RDMA, NVLink or TCP, between machines as well.

The target reads a slot in one transfer into registered memory of its own, and the slot's stamp in
a second one after it. All of it happens on one thread per engine, which owns NIXL's agent: making
it, meeting peers and moving bytes take milliseconds that the scheduler's thread does not have. A
peer's agent is forgotten with its reader.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import torch

from sglang_star.errors import PeerError
from sglang_star.migration.transport.base import Grant, Transport
from sglang_star.migration.transport.memory import HostRegion, checksum, shape
from sglang_star.migration.transport.slots import Slots

logger = logging.getLogger(__name__)

PROGRESS_US: Final = 1000
"""Pause of NIXL's own thread between two looks; its default, 0, keeps a core busy for ever."""
POLL_S: Final = 0.0002
"""Between two looks at transfers under way."""
SILENCE_S: Final = 5.0
"""A peer from which no transfer ends for so long while one is wanted has failed."""


UNWANTED: Final = "nobody wants it any more"


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
        try:
            wanted = msgspec.msgpack.decode(setup, type=Setup)
        except msgspec.MsgspecError as error:
            raise PeerError(f"malformed NIXL setup: {error}") from error
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
            agent = _Agent(self._name)
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
        pump = _Pump(agent, landing, Slots(self._landings))
        while not self._stop:
            with self._lock:
                if not self._woken:
                    self._lock.wait(POLL_S if pump.busy else None)
                self._woken = False
                taken = list(self._inbox)
                self._inbox.clear()
            for item in taken:
                pump.take(item)
            pump.turn(time.monotonic())


class _Pump:
    """What the thread does in one turn: post what is wanted, look at what is under way."""

    def __init__(self, agent: _Agent, landing: HostRegion, free: Slots) -> None:
        self._agent = agent
        self._landing = landing
        self._free = free
        self._readers: list[NixlReader] = []
        self._waiting: deque[NixlFetch] = deque()
        self._under_way: list[NixlFetch] = []
        self._here: list[NixlFetch] = []
        self._given_up: list[NixlFetch] = []

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._under_way or self._given_up)

    def take(self, item: NixlFetch | NixlReader) -> None:
        if isinstance(item, NixlReader):
            self._readers.append(item)
            _attempt(lambda: self._meet(item), [])
        else:
            self._waiting.append(item)

    def turn(self, now: float) -> None:
        for fetch in [f for f in self._here if f.closed]:
            self._here.remove(fetch)
            self._land(fetch)
        for fetch in [f for f in self._waiting if f.closed or f.reader.closed]:
            self._waiting.remove(fetch)
            fetch.error = UNWANTED
        self._post(now)
        for fetch in list(self._under_way):
            _attempt(lambda fetch=fetch: self._look(fetch, now), [fetch])  # type: ignore[misc]
            if fetch.error or (fetch.closed and fetch.data is None):
                self._under_way.remove(fetch)
                self._give_up(fetch)
            elif fetch.data is not None:
                self._under_way.remove(fetch)
                self._here.append(fetch)
        self._settle()
        self._forget()

    def _meet(self, reader: NixlReader) -> None:
        # A connection that broke stays so until its agent is forgotten, by all that know it.
        self._forget()
        reader.agent = self._agent.meet(reader.setup.metadata)

    def _post(self, now: float) -> None:
        while self._waiting and len(self._free):
            fetch = self._waiting.popleft()
            reader = fetch.reader
            if not any(f.reader is reader for f in self._under_way):
                reader.heard_at = now
            fetch.landing = self._free.take()
            self._under_way.append(fetch)
            _attempt(lambda fetch=fetch: self._read(fetch), [fetch])  # type: ignore[misc]

    def _read(self, fetch: NixlFetch) -> None:
        setup = fetch.reader.setup
        if not fetch.reader.agent:
            raise PeerError("its NIXL agent cannot be reached")
        assert fetch.landing is not None
        start, _ = shape(setup.slots, setup.slot_bytes)
        here = self._slot(fetch)
        there = setup.address + start + fetch.grant.index * setup.slot_bytes
        fetch.handle = self._agent.read(fetch.reader.agent, here.data_ptr(), there, fetch.size)

    def _read_stamp(self, fetch: NixlFetch) -> None:
        """The slot's stamp, into the place of the landing's own."""
        assert fetch.landing is not None
        here = self._landing.tensor.data_ptr() + 8 * fetch.landing
        there = fetch.reader.setup.address + 8 * fetch.grant.index
        fetch.handle = self._agent.read(fetch.reader.agent, here, there, 8)
        fetch.stamping = True

    def _look(self, fetch: NixlFetch, now: float) -> None:
        if fetch.handle is None:
            return
        if not self._agent.is_done(fetch.handle):
            if now - fetch.reader.heard_at > SILENCE_S:
                raise PeerError(f"nothing came from it for {SILENCE_S:g} s")
            return
        fetch.reader.heard_at = now
        self._agent.release(fetch.handle)
        fetch.handle = None
        if not fetch.stamping:
            self._read_stamp(fetch)
            return
        assert fetch.landing is not None
        if self._landing.stamped(fetch.landing) != fetch.grant.stamp:
            raise PeerError("the sender has used the slot again")
        data = self._slot(fetch)[: fetch.size]
        if fetch.checksum and checksum(data) != fetch.checksum:
            raise PeerError("KV was corrupted on its way: its checksum differs")
        fetch.data = data

    def _slot(self, fetch: NixlFetch) -> torch.Tensor:
        assert fetch.landing is not None
        return self._landing.view(Grant(fetch.landing, 0))

    def _give_up(self, fetch: NixlFetch) -> None:
        """Its landing is free only once NIXL writes there no more."""
        fetch.error = fetch.error or UNWANTED
        if fetch.handle is None:
            self._land(fetch)
        else:
            self._given_up.append(fetch)

    def _settle(self) -> None:
        for fetch in list(self._given_up):
            try:
                over = self._agent.is_done(fetch.handle)
            except PeerError:
                over = True
            if over:
                self._end(fetch)

    def _end(self, fetch: NixlFetch) -> None:
        self._agent.release(fetch.handle)
        fetch.handle = None
        self._given_up.remove(fetch)
        self._land(fetch)

    def _land(self, fetch: NixlFetch) -> None:
        if fetch.landing is not None:
            self._free.give(fetch.landing)
            fetch.landing = None

    def _forget(self) -> None:
        used = {id(f.reader) for f in (*self._under_way, *self._waiting)}
        for reader in [r for r in self._readers if r.closed and id(r) not in used]:
            self._readers.remove(reader)
            if reader.agent and not any(r.agent == reader.agent for r in self._readers):
                _attempt(lambda reader=reader: self._agent.forget(reader.agent), [])  # type: ignore[misc]
                # Its connection is closed: what it had not sent yet comes nowhere any more.
                for fetch in [f for f in self._given_up if f.reader.agent == reader.agent]:
                    self._end(fetch)


def _attempt(act: Callable[[], object], fetches: list[NixlFetch]) -> None:
    """Do it; what goes wrong is said of these fetches."""
    try:
        act()
    except Exception as error:  # NIXL's errors have no base of their own
        for fetch in fetches:
            fetch.error = str(error) or type(error).__name__
        if not fetches:
            logger.warning("STAR's transport nixl: %s", error)


class _Agent:
    """NIXL's agent, as much of it as is needed; for one thread."""

    def __init__(self, name: str) -> None:
        import nixl._api

        self._nixl: Any = nixl._api.nixlBind
        config = self._nixl.nixlAgentConfig()
        config.useProgThread = True
        config.useListenThread = False
        config.pthrDelay = PROGRESS_US
        self._agent = self._nixl.nixlAgent(name, config)
        self._backend = self._agent.createBackend("UCX", {})

    def register(self, tensor: torch.Tensor) -> None:
        """Memory that is read, or read into."""
        listed = self._nixl.nixlRegDList(self._nixl.DRAM_SEG)
        listed.addDesc((tensor.data_ptr(), tensor.numel(), 0, b""))
        self._agent.registerMem(listed, [self._backend])

    def metadata(self) -> bytes:
        """What others meet this agent by."""
        return bytes(self._agent.getLocalMD())

    def meet(self, metadata: bytes) -> str:
        """Take up a peer's agent; its name."""
        name = self._agent.loadRemoteMD(metadata)
        return name.decode() if isinstance(name, bytes) else str(name)

    def forget(self, name: str) -> None:
        """Drop a peer's agent, and the connection to it."""
        self._agent.invalidateRemoteMD(name)

    def read(self, name: str, here: int, there: int, size: int) -> Any:
        """Begin to read; the handle of the transfer."""
        handle = self._agent.createXferReq(
            self._nixl.NIXL_READ,
            self._piece(here, size),
            self._piece(there, size),
            name,
            b"",
            [self._backend],
        )
        self._agent.postXferReq(handle, b"")
        return handle

    def is_done(self, handle: Any) -> bool:
        """Whether it is.

        Raises:
            PeerError: it has failed.
        """
        status = self._agent.getXferStatus(handle)
        if status == self._nixl.NIXL_SUCCESS:
            return True
        if status == self._nixl.NIXL_IN_PROG:
            return False
        raise PeerError(f"a transfer failed: {status}")

    def release(self, handle: Any) -> None:
        """Forget a transfer that is over, or can end no more."""
        with contextlib.suppress(Exception):  # what cannot be released is NIXL's to keep
            self._agent.releaseXferReq(handle)

    def _piece(self, address: int, size: int) -> Any:
        listed = self._nixl.nixlXferDList(self._nixl.DRAM_SEG)
        listed.addDesc((address, size, 0))
        return listed
