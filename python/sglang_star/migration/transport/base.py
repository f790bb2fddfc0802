"""What a carrier does: a few fixed-size slots that one side fills and the other empties.

Control stays in the protocol (``PagesReady``, ``PagesTaken``); a carrier only makes the bytes of
a slot visible to the other side.
"""

from __future__ import annotations

import abc

import torch


class Carrier(abc.ABC):
    """One move's staging slots.

    Attributes:
        name: as in ``--star-transport``.
        slots: number of slots; slot_bytes: size of each.
        setup: what :meth:`receive` needs on the other side, opaque bytes.
    """

    name: str
    slots: int
    slot_bytes: int
    setup: bytes

    @classmethod
    @abc.abstractmethod
    def send(cls, slots: int, slot_bytes: int) -> Carrier:
        """Open the sending side.

        Raises:
            PeerError: the memory cannot be had.
        """

    @classmethod
    @abc.abstractmethod
    def receive(cls, setup: bytes) -> Carrier:
        """Open the receiving side.

        Raises:
            PeerError: the setup is malformed, or the memory cannot be reached from here.
        """

    @classmethod
    def sweep(cls) -> list[str]:
        """Remove what senders that were killed have left on this machine; returns its names."""
        return []

    @abc.abstractmethod
    def slot(self, index: int) -> torch.Tensor:
        """Slot ``index`` as uint8 ``[slot_bytes]``.

        Raises:
            PeerError: there is no such slot.
        """

    @abc.abstractmethod
    def connected(self) -> None:
        """Sending side: the other side is open, names may be forgotten."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give the memory back; idempotent."""
