"""The state machines of a move: enums and legal transitions, nothing else.

Three parties take part, and each owns one machine of a stream:

* the **sender** is where the request decodes and leaves: :class:`Sending`;
* the **target** is where it comes: :class:`Receiving` until it decodes there, and from then on, if
  the stream is another's, that of its **host**: :class:`Hosting`;
* the **home** is where the client is connected: :class:`Lent` while the stream is elsewhere.

A machine begins in the first state of its enum and ends in a state that the table does not leave.
Anything that is not in the table is a defect and raises.
"""

from __future__ import annotations

import enum
from typing import Final, Generic, TypeVar

from sglang_star.errors import IllegalTransition


class Sending(enum.Enum):
    """An outgoing move; owned by :mod:`sglang_star.migration.sender`.

    The request decodes while it is ``RESERVING`` or ``COPYING``. It is ``HELD`` if it left the
    batch before the target had answered, ``PARKED`` once its last KV may go, ``COMMITTED`` once
    everything is sent. One whose move ends while it is out of the batch is ``RESUMING`` until its
    last step's result is in.
    """

    RESERVING = "reserving"
    COPYING = "copying"
    HELD = "held"
    PARKED = "parked"
    COMMITTED = "committed"
    RESUMING = "resuming"
    HANDED_OVER = "handed over"
    CANCELLED = "cancelled"
    FINISHED = "finished"
    ABORTED = "aborted"


class SendingEvent(enum.Enum):
    """What moves a :class:`Sending` machine; ``PARK`` is the request leaving the batch."""

    RESERVED = "reserved"
    PARK = "park"
    COMMIT = "commit"
    INSERTED = "inserted"
    CANCEL = "cancel"
    RESUME = "resume"
    FINISH = "finish"
    ABORT = "abort"


class Receiving(enum.Enum):
    """An incoming move; owned by :mod:`sglang_star.migration.target`.

    ``REBUILDING`` until the engine has made a request of the message, ``COMMITTED`` while home
    still lacks tokens of an earlier host.
    """

    REBUILDING = "rebuilding"
    RESERVED = "reserved"
    RECEIVING = "receiving"
    COMMITTED = "committed"
    INSERTED = "inserted"
    CANCELLED = "cancelled"


class ReceivingEvent(enum.Enum):
    """What moves a :class:`Receiving` machine."""

    SEAT = "seat"
    PAGES = "pages"
    COMMIT = "commit"
    JOIN = "join"
    CANCEL = "cancel"


class Hosting(enum.Enum):
    """A guest; owned by :mod:`sglang_star.migration.host`.

    ``DROPPED`` while the engine still has to end it and nobody wants its tokens.
    """

    RUNNING = "running"
    DROPPED = "dropped"
    FINISHED = "finished"
    MOVED_ON = "moved on"


class HostingEvent(enum.Enum):
    """What moves a :class:`Hosting` machine."""

    DROP = "drop"
    FINISH = "finish"
    MOVE_ON = "move on"


class Lent(enum.Enum):
    """A stream of ours that decodes elsewhere; owned by :mod:`sglang_star.migration.home`."""

    AWAY = "away"
    RETURNED = "returned"
    FINISHED = "finished"
    ABORTED = "aborted"
    RECLAIMED = "reclaimed"


class LentEvent(enum.Enum):
    """What moves a :class:`Lent` machine."""

    RETURN = "return"
    FINISH = "finish"
    ABORT = "abort"
    RECLAIM = "reclaim"


_S, _E = Sending, SendingEvent
ON_BATCH: Final = frozenset({_S.RESERVING, _S.COPYING})
OFF_BATCH: Final = frozenset({_S.HELD, _S.PARKED, _S.COMMITTED, _S.RESUMING})
"""States in which the request does not decode, and its KV is still held where it was."""

SENDING: Final[dict[tuple[Sending, SendingEvent], Sending]] = {
    (_S.RESERVING, _E.RESERVED): _S.COPYING,
    (_S.RESERVING, _E.PARK): _S.HELD,
    (_S.HELD, _E.RESERVED): _S.PARKED,
    (_S.COPYING, _E.PARK): _S.PARKED,
    (_S.PARKED, _E.COMMIT): _S.COMMITTED,
    (_S.COMMITTED, _E.INSERTED): _S.HANDED_OVER,
    (_S.RESUMING, _E.RESUME): _S.CANCELLED,
    **{(state, _E.CANCEL): _S.CANCELLED for state in ON_BATCH},
    **{(state, _E.CANCEL): _S.RESUMING for state in OFF_BATCH - {_S.RESUMING}},
    # The step in flight when a request leaves the batch may be its last; after the commit none is.
    **{(state, _E.FINISH): _S.FINISHED for state in (ON_BATCH | OFF_BATCH) - {_S.COMMITTED}},
    **{(state, _E.ABORT): _S.ABORTED for state in OFF_BATCH},
}

_R, _F = Receiving, ReceivingEvent
RECEIVING: Final[dict[tuple[Receiving, ReceivingEvent], Receiving]] = {
    (_R.REBUILDING, _F.SEAT): _R.RESERVED,
    (_R.RESERVED, _F.PAGES): _R.RECEIVING,
    (_R.RECEIVING, _F.PAGES): _R.RECEIVING,
    (_R.RECEIVING, _F.COMMIT): _R.COMMITTED,
    (_R.COMMITTED, _F.JOIN): _R.INSERTED,
    **{
        (state, _F.CANCEL): _R.CANCELLED
        for state in (_R.REBUILDING, _R.RESERVED, _R.RECEIVING, _R.COMMITTED)
    },
}

_H, _G = Hosting, HostingEvent
HOSTING: Final[dict[tuple[Hosting, HostingEvent], Hosting]] = {
    (_H.RUNNING, _G.DROP): _H.DROPPED,
    (_H.RUNNING, _G.FINISH): _H.FINISHED,
    (_H.DROPPED, _G.FINISH): _H.FINISHED,
    (_H.RUNNING, _G.MOVE_ON): _H.MOVED_ON,
}

_L, _M = Lent, LentEvent
LENT: Final[dict[tuple[Lent, LentEvent], Lent]] = {
    (_L.AWAY, _M.RETURN): _L.RETURNED,
    (_L.AWAY, _M.FINISH): _L.FINISHED,
    (_L.AWAY, _M.ABORT): _L.ABORTED,
    (_L.AWAY, _M.RECLAIM): _L.RECLAIMED,
}

State = TypeVar("State", Sending, Receiving, Hosting, Lent)
Event = TypeVar("Event", SendingEvent, ReceivingEvent, HostingEvent, LentEvent)


class Machine(Generic[State, Event]):
    """A state and its transition table."""

    __slots__ = ("_table", "state")

    def __init__(self, state: State, table: dict[tuple[State, Event], State]) -> None:
        self.state: State = state
        self._table: dict[tuple[State, Event], State] = table

    def fire(self, event: Event) -> State:
        """Take one transition and return the new state.

        Raises:
            IllegalTransition: the table has no such step.
        """
        try:
            self.state = self._table[self.state, event]
        except KeyError:
            raise IllegalTransition(f"{self.state} does not allow {event}") from None
        return self.state

    def allows(self, event: Event) -> bool:
        """Whether :meth:`fire` would succeed."""
        return (self.state, event) in self._table


def sending() -> Machine[Sending, SendingEvent]:
    """The machine of a move that was just ordered."""
    return Machine(Sending.RESERVING, SENDING)


def receiving() -> Machine[Receiving, ReceivingEvent]:
    """The machine of a move that was just granted."""
    return Machine(Receiving.REBUILDING, RECEIVING)


def hosting() -> Machine[Hosting, HostingEvent]:
    """The machine of a guest that was just inserted."""
    return Machine(Hosting.RUNNING, HOSTING)


def lent() -> Machine[Lent, LentEvent]:
    """The machine of a stream that was just handed over."""
    return Machine(Lent.AWAY, LENT)
