"""How KV bytes come from one engine to another: staging memory, and ways to read a peer's.

Staging belongs to the sender and the target pulls: a reader that is late harms only itself, while
one that wrote late would harm a stranger. An engine has one region, made once; a move has slots of
it, granted one piece of KV at a time. Control stays in the protocol (``PagesReady``,
``PagesTaken``).

A slot may be granted again while somebody who was given up still reads it. So every grant has a
*stamp* of its own, written beside the slot before anything of the slot is: who reads a slot looks
at the stamp after it has read, and what was read is good if it is still the one it was told.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec

from sglang_star.errors import PeerError
from sglang_star.migration.transport.slots import Slots

Setup = TypeVar("Setup", bound=msgspec.Struct)


def read_setup(data: bytes, kind: type[Setup]) -> Setup:
    """What a peer says of its memory, of a form of our own.

    Raises:
        PeerError: it is not of that form.
    """
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PeerError(f"malformed setup of a transport: {error}") from error


@dataclass(frozen=True, slots=True)
class Grant:
    """A slot that a move has for one piece of KV."""

    index: int
    stamp: int


class Region(abc.ABC):
    """Staging memory of this engine, in equal slots.

    Attributes:
        slots: how many; slot_bytes: the size of each.
    """

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        self._free = Slots(slots)
        self._stamps = 0

    def grant(self) -> Grant | None:
        """A slot that is free, stamped afresh; None if none is."""
        index = self._free.take()
        if index is None:
            return None
        self._stamps += 1
        self._stamp(index, self._stamps)
        return Grant(index, self._stamps)

    def give(self, grant: Grant) -> None:
        """The slot is free again; nothing here may write into it any more."""
        self._free.give(grant.index)

    @property
    def free(self) -> int:
        """Slots that could be granted now."""
        return len(self._free)

    @abc.abstractmethod
    def view(self, grant: Grant) -> Any:
        """The slot's memory, uint8 ``[slot_bytes]``."""

    @abc.abstractmethod
    def checksum(self, grant: Grant, size: int) -> int:
        """CRC-32 of the first ``size`` bytes of the slot."""

    @abc.abstractmethod
    def _stamp(self, index: int, stamp: int) -> None:
        """Write the stamp of a slot."""


class Fetch(Protocol):
    """The bytes of one slot of a peer, on their way here."""

    def arrived(self) -> Any:
        """The bytes as uint8 ``[size]`` once they can be read here; None before.

        Raises:
            PeerError: they do not come.
        """

    def intact(self) -> bool:
        """Whether all that was read of :meth:`arrived` until now is what the peer meant."""

    def cancel(self) -> None:
        """Nobody wants them any more; what has not arrived by now fails."""

    def close(self) -> None:
        """Nothing reads them any more; the last call."""


class Reader(Protocol):
    """The staging memory of one peer, as seen from here."""

    def fetch(self, grant: Grant, size: int, checksum: int) -> Fetch:
        """Begin to read the first ``size`` bytes of a slot.

        Args:
            grant: as the peer told it.
            size: in bytes.
            checksum: what their CRC-32 must be; 0 not to look.

        Raises:
            PeerError: there is no such slot.
        """

    def close(self) -> None:
        """Nothing is read of it any more; idempotent."""


class Transport(abc.ABC):
    """One way to read peers' staging memory, and to let them read ours.

    Attributes:
        name: as in ``--star-transport``.
        region: where what is to be read by it has to lie; None if it cannot be had here.
    """

    name: str
    region: Region | None

    @abc.abstractmethod
    def start(self) -> None:
        """Make it ready, off the scheduler's thread, if that takes long; idempotent."""

    @abc.abstractmethod
    def setup(self) -> bytes:
        """What a peer's :meth:`open` needs; empty while this is not ready.

        Raises:
            PeerError: it cannot be had here.
        """

    @abc.abstractmethod
    def open(self, setup: bytes) -> Reader:
        """Reach a peer's region.

        Raises:
            PeerError: it cannot be reached from here, or not yet.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """The engine ends; idempotent."""
