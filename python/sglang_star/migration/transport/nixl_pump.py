"""What the thread of the transport ``nixl`` does: reads of peers' slots, from wish to end."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import torch

from sglang_star.errors import PeerError
from sglang_star.migration.transport.base import Grant
from sglang_star.migration.transport.memory import HostRegion, checksum, shape
from sglang_star.migration.transport.nixl_agent import Agent
from sglang_star.migration.transport.slots import Slots

if TYPE_CHECKING:
    from sglang_star.migration.transport.nixl import NixlFetch, NixlReader

logger = logging.getLogger(__name__)

SILENCE_S: Final = 5.0
"""A peer from which no transfer ends for so long while one is wanted has failed."""
UNWANTED: Final = "nobody wants it any more"


class Pump:
    """What the thread does in one turn: post what is wanted, look at what is under way."""

    def __init__(self, agent: Agent, landing: HostRegion, free: Slots) -> None:
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
        """Whether to look again soon."""
        return bool(self._waiting or self._under_way or self._given_up)

    def meet(self, reader: NixlReader) -> None:
        """A peer's memory was opened."""
        self._readers.append(reader)
        attempt(lambda: self._meet(reader), [])

    def want(self, fetch: NixlFetch) -> None:
        """Something is to be read as soon as there is a place for it."""
        self._waiting.append(fetch)

    def turn(self, now: float) -> None:
        """Take all that is under way as far as it goes now; ``now`` in monotonic seconds."""
        for fetch in [f for f in self._here if f.closed]:
            self._here.remove(fetch)
            self._land(fetch)
        for fetch in [f for f in self._waiting if f.closed or f.reader.closed]:
            self._waiting.remove(fetch)
            fetch.error = UNWANTED
        self._post(now)
        for fetch in list(self._under_way):
            attempt(lambda fetch=fetch: self._look(fetch, now), [fetch])  # type: ignore[misc]
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
            attempt(lambda fetch=fetch: self._read(fetch), [fetch])  # type: ignore[misc]

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
                attempt(lambda reader=reader: self._agent.forget(reader.agent), [])  # type: ignore[misc]
                # Its connection is closed: what it had not sent yet comes nowhere any more.
                for fetch in [f for f in self._given_up if f.reader.agent == reader.agent]:
                    self._end(fetch)


def attempt(act: Callable[[], object], fetches: list[NixlFetch]) -> None:
    """Do it; what goes wrong is said of these fetches."""
    try:
        act()
    except Exception as error:  # NIXL's errors have no base of their own
        for fetch in fetches:
            fetch.error = str(error) or type(error).__name__
        if not fetches:
            logger.warning("STAR's transport nixl: %s", error)
