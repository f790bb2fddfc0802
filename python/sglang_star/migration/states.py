"""The migration state machine: enums and legal transitions, nothing else.

A request's *stream* has one owner at any time. The source side of a move runs
``RUNNING -> RESERVING -> COPYING -> PARKED -> COMMITTED`` and then hands over; the home keeps a
``SHADOW`` until the stream ends; the target runs
``RESERVED -> RECEIVING -> INSERTED -> RUNNING``. A request that is taken out of the batch before
the target has answered is ``HELD`` meanwhile and goes from there to ``PARKED``. One whose move
ends while it is out of the batch is ``RESUMING`` until its last step's result is in, and runs on.
Every transition is fired by exactly one owner, named in ``OWNER``; anything not in the tables is a
defect and raises.
"""

from __future__ import annotations

import enum
from typing import Final, Generic, TypeVar

from sglang_star.errors import IllegalTransition


class Home(enum.Enum):
    """States of a request on the instance that decodes it and may send it away."""

    RUNNING = "running"
    RESERVING = "reserving"
    COPYING = "copying"
    HELD = "held"
    PARKED = "parked"
    COMMITTED = "committed"
    RESUMING = "resuming"
    SHADOW = "shadow"
    HANDED_OVER = "handed_over"
    FINISHED = "finished"
    ABORTED = "aborted"
    RECLAIMED = "reclaimed"


class HomeEvent(enum.Enum):
    """What moves a :class:`Home` machine; ``PARK`` is the request leaving the batch."""

    ORDER = "order"
    RESERVED = "reserved"
    PARK = "park"
    COMMIT = "commit"
    INSERTED_OWN = "inserted, stream is ours"
    INSERTED_GUEST = "inserted, stream belongs to another home"
    CANCEL = "cancel"
    RESUME = "resume"
    RETURN = "returned home"
    FINISH = "finish"
    ABORT = "abort"
    RECLAIM = "reclaim"


class Target(enum.Enum):
    """States of a guest on the instance that receives it."""

    RESERVED = "reserved"
    RECEIVING = "receiving"
    INSERTED = "inserted"
    RUNNING = "running"
    FINISHED = "finished"
    ABORTED = "aborted"
    CANCELLED = "cancelled"
    MOVED_ON = "moved_on"


class TargetEvent(enum.Enum):
    """What moves a :class:`Target` machine."""

    PAGES = "pages"
    COMMIT = "commit"
    DECODED = "decoded"
    FINISH = "finish"
    ABORT = "abort"
    CANCEL = "cancel"
    MOVE_ON = "move on"


_H, _E = Home, HomeEvent
OFF_BATCH: Final = frozenset({_H.HELD, _H.PARKED, _H.COMMITTED, _H.RESUMING})
"""States in which the request does not decode, and its KV is still held where it was."""

HOME_TRANSITIONS: Final[dict[tuple[Home, HomeEvent], Home]] = {
    (_H.RUNNING, _E.ORDER): _H.RESERVING,
    (_H.RESERVING, _E.RESERVED): _H.COPYING,
    (_H.RESERVING, _E.PARK): _H.HELD,
    (_H.HELD, _E.RESERVED): _H.PARKED,
    (_H.COPYING, _E.PARK): _H.PARKED,
    (_H.PARKED, _E.COMMIT): _H.COMMITTED,
    (_H.COMMITTED, _E.INSERTED_OWN): _H.SHADOW,
    (_H.COMMITTED, _E.INSERTED_GUEST): _H.HANDED_OVER,
    (_H.SHADOW, _E.RETURN): _H.RUNNING,
    (_H.SHADOW, _E.FINISH): _H.FINISHED,
    (_H.SHADOW, _E.ABORT): _H.ABORTED,
    (_H.SHADOW, _E.RECLAIM): _H.RECLAIMED,
    (_H.RESUMING, _E.RESUME): _H.RUNNING,
    **{(state, _E.CANCEL): _H.RUNNING for state in (_H.RESERVING, _H.COPYING)},
    **{(state, _E.CANCEL): _H.RESUMING for state in OFF_BATCH - {_H.RESUMING}},
    # The step in flight when a request leaves the batch may be its last; after the commit none is.
    **{
        (state, _E.FINISH): _H.FINISHED
        for state in (_H.RUNNING, _H.RESERVING, _H.COPYING, _H.HELD, _H.PARKED, _H.RESUMING)
    },
    **{
        (state, _E.ABORT): _H.ABORTED
        for state in OFF_BATCH | {_H.RUNNING, _H.RESERVING, _H.COPYING}
    },
}

_T, _F = Target, TargetEvent
TARGET_TRANSITIONS: Final[dict[tuple[Target, TargetEvent], Target]] = {
    (_T.RESERVED, _F.PAGES): _T.RECEIVING,
    (_T.RECEIVING, _F.PAGES): _T.RECEIVING,
    (_T.RECEIVING, _F.COMMIT): _T.INSERTED,
    (_T.INSERTED, _F.DECODED): _T.RUNNING,
    (_T.RUNNING, _F.DECODED): _T.RUNNING,
    **{(state, _F.MOVE_ON): _T.MOVED_ON for state in (_T.INSERTED, _T.RUNNING)},
    **{(state, _F.FINISH): _T.FINISHED for state in (_T.INSERTED, _T.RUNNING)},
    **{
        (state, _F.ABORT): _T.ABORTED
        for state in (_T.RESERVED, _T.RECEIVING, _T.INSERTED, _T.RUNNING)
    },
    **{
        (state, _F.CANCEL): _T.CANCELLED
        for state in (_T.RESERVED, _T.RECEIVING, _T.INSERTED, _T.RUNNING)
    },
}

OWNER: Final[dict[Home | Target, str]] = {
    _H.RUNNING: "scheduler",
    _H.RESERVING: "source",
    _H.COPYING: "source",
    _H.HELD: "source",
    _H.PARKED: "source",
    _H.COMMITTED: "source",
    _H.RESUMING: "source",
    _H.SHADOW: "relay",
    _H.HANDED_OVER: "nobody",
    _H.FINISHED: "nobody",
    _H.ABORTED: "nobody",
    _H.RECLAIMED: "scheduler",
    _T.RESERVED: "arrival",
    _T.RECEIVING: "arrival",
    _T.INSERTED: "outflow",
    _T.RUNNING: "outflow",
    _T.FINISHED: "nobody",
    _T.ABORTED: "nobody",
    _T.CANCELLED: "nobody",
    _T.MOVED_ON: "nobody",
}
"""The module whose code fires the events of this state; ``guests`` cancels and aborts besides."""

State = TypeVar("State", Home, Target)
Event = TypeVar("Event", HomeEvent, TargetEvent)


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


def home_machine() -> Machine[Home, HomeEvent]:
    """A machine for a request that runs here."""
    return Machine(Home.RUNNING, HOME_TRANSITIONS)


def target_machine() -> Machine[Target, TargetEvent]:
    """A machine for a guest whose reservation was just granted."""
    return Machine(Target.RESERVED, TARGET_TRANSITIONS)
