"""What came for the scheduler, until its next step boundary."""

from __future__ import annotations

import contextlib
import os
import select
from collections import deque
from dataclasses import dataclass
from typing import Final

from sglang_star.migration.post import PeerLost
from sglang_star.protocol import Inserted, Message, PagesTaken, Reserved, Tokens

URGENT: Final = (Tokens, Inserted, Reserved, PagesTaken)
"""What may be handled while a decode step runs, since it touches no request that is in it: a
token that comes home need not wait for home's own step."""
MAX_WAITING: Final = 1 << 16
"""Messages that wait at most; a scheduler that is so far behind loses further ones, as on the wire,
and notices by time-outs."""


@dataclass(frozen=True, slots=True)
class OrderEnvelope:
    """An order from this instance's HTTP process; answered with :meth:`Links.reply`."""

    sender: bytes
    message: Message


class Wake:
    """An eventfd: set by one thread, waited for by another thread's poller."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def set(self) -> None:
        """Make :attr:`fd` readable."""
        os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        """Make it unreadable again."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)


class Mailbox:
    """Filled by the links' thread, emptied by the scheduler's.

    Attributes:
        wake: readable while there may be something to take.
    """

    def __init__(self) -> None:
        self.wake = Wake()
        self._ordinary: deque[Message | OrderEnvelope | PeerLost] = deque()
        self._urgent: deque[Message | OrderEnvelope | PeerLost] = deque()

    def put(self, item: Message | OrderEnvelope | PeerLost) -> bool:
        """Add an item; False if as many wait as may, and it is dropped.

        The loss of a peer is never dropped: there are not more of these than peers.
        """
        box = self._urgent if isinstance(item, URGENT) else self._ordinary
        if len(box) >= MAX_WAITING and not isinstance(item, PeerLost):
            return False
        box.append(item)
        self.wake.set()
        return True

    def take(self, *, urgent_only: bool = False) -> Message | OrderEnvelope | PeerLost | None:
        """Pop the oldest item, urgent ones first."""
        if self._urgent:
            return self._urgent.popleft()
        return self._ordinary.popleft() if self._ordinary and not urgent_only else None

    def is_urgent(self) -> bool:
        """Whether there is something to take while a step runs."""
        return bool(self._urgent)

    def has(self, kind: type[Message]) -> bool:
        """Whether an ordinary message of that kind waits."""
        return any(isinstance(item, kind) for item in list(self._ordinary))

    def is_empty(self) -> bool:
        """Whether there is nothing to take; call before anything that waits for :attr:`wake`.

        A set wake-up whose messages were already taken would end every wait at once: it is
        cleared first and the boxes looked at afterwards, so that no message is slept over.
        """
        self.wake.clear()
        return not self._ordinary and not self._urgent

    def wait(self, seconds: float) -> None:
        """Sleep until a message arrives, or for so long."""
        select.select([self.wake.fd], [], [], seconds)
