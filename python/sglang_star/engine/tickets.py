"""Copies under way on one engine, by ticket.

A copy is advanced where nothing waits for it: once per step boundary it is asked whether it is
over. With several ranks all of them begin the same copies in the same order; ``agree`` then makes
one answer of theirs, so that every rank sees a copy end at the same boundary and in the same way.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from sglang_star.errors import StarError

KEPT_FAILURES: Final = 256
"""Reasons kept of copies that failed; whoever began one asks within a step or two."""


class Copying(enum.IntEnum):
    """How a copy fares. The minimum over ranks is how it fares on all of them."""

    UNDER_WAY = 0
    FAILED = 1
    DONE = 2


class Copy(Protocol):
    """One copy that was begun."""

    def is_over(self) -> bool:
        """Whether it is; called until it is, never after.

        Raises:
            StarError: it is, and has failed.
        """


class Tickets:
    """Gives copies their numbers.

    Args:
        agree: takes how the copies under way fare here, in order of their tickets, and returns how
            they fare on all ranks: a minimum by element. None where there is one rank only; a copy
            that is over as soon as it is begun is known to be at once then.

    Attributes:
        begun: copies so far.
    """

    def __init__(self, agree: Callable[[Sequence[int]], Sequence[int]] | None = None) -> None:
        self._agree = agree
        self.begun = 0
        self._under_way: dict[int, Copy] = {}
        self._here: dict[int, Copying] = {}
        self._failures: OrderedDict[int, str] = OrderedDict()

    def __bool__(self) -> bool:
        """Whether any copy is under way."""
        return bool(self._under_way)

    def begin(self, copy: Copy) -> int:
        """Take up a copy that was just begun; its ticket."""
        self.begun += 1
        ticket = self.begun
        self._under_way[ticket] = copy
        self._look(ticket)
        if self._agree is None:
            self._settle(ticket, self._here[ticket])
        return ticket

    def poll(self) -> None:
        """Look at all that are under way; nothing changes until the next call."""
        for ticket, fares in list(self._here.items()):
            if fares is Copying.UNDER_WAY:
                self._look(ticket)
        fares_here = list(self._here.values())
        agreed = fares_here if self._agree is None else self._agree(fares_here)
        for ticket, fares_everywhere in zip(list(self._here), agreed, strict=True):
            self._settle(ticket, Copying(fares_everywhere))

    def is_over(self, ticket: int) -> bool:
        """Whether the copy of that ticket is over."""
        return ticket not in self._under_way

    def failure(self, ticket: int) -> str:
        """Why the copy failed; empty if it did not."""
        return self._failures.get(ticket, "")

    def _look(self, ticket: int) -> None:
        try:
            over = self._under_way[ticket].is_over()
            self._here[ticket] = Copying.DONE if over else Copying.UNDER_WAY
        except StarError as error:
            self._here[ticket] = Copying.FAILED
            self._failures[ticket] = str(error)

    def _settle(self, ticket: int, fares: Copying) -> None:
        if fares is Copying.UNDER_WAY:
            return
        if fares is Copying.FAILED:
            self._failures.setdefault(ticket, "it failed on another rank")
            while len(self._failures) > KEPT_FAILURES:
                self._failures.popitem(last=False)
        del self._under_way[ticket], self._here[ticket]
