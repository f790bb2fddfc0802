"""Which transport a move takes, and the peers' staging memory that is open here.

The source offers what it has; the target takes the fastest of it that it has, too, and says why
it is not a faster one. A transport that failed between two instances is passed over for a while
if there is another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from sglang_star.errors import NoTransport, PeerError
from sglang_star.migration.transport.base import Reader, Region, Transport
from sglang_star.protocol import Offer, Peer

FAILED_S: Final = 60.0
"""How long a transport that failed is passed over."""
IDLE_S: Final = 60.0
"""How long a peer's memory stays open after the last move from it."""


@dataclass(slots=True, eq=False)
class Way:
    """A peer's memory, open here.

    Attributes:
        why: which transport, and why no faster one.
        moves: that use it; idle_since: when the last of them ended.
        gone: nobody else may use it any more.
    """

    peer: Peer
    setup: bytes
    name: str
    reader: Reader
    why: str = ""
    moves: int = 0
    idle_since: float = 0.0
    gone: bool = False


class Transports:
    """All transports of one engine.

    Args:
        kinds: the fastest first.
        now: monotonic seconds.
    """

    def __init__(self, kinds: Sequence[Transport], now: Callable[[], float]) -> None:
        self._kinds = tuple(kinds)
        self._now = now
        self._ways: list[Way] = []
        self._failed: dict[tuple[Peer, str], tuple[float, str]] = {}

    # ------------------------------------------------------------------ at the source

    def offers(self) -> tuple[Offer, ...]:
        """What can be had here.

        Raises:
            NoTransport: nothing.
        """
        offers, missing = [], []
        for kind in self._kinds:
            try:
                offers.append(Offer(name=kind.name, setup=kind.setup()))
            except PeerError as error:
                missing.append(f"{kind.name}: {error.message}")
        if not offers:
            raise NoTransport(_none(missing), hint="see the log of this instance's start")
        return tuple(offers)

    def region(self, name: str) -> Region:
        """Where what goes by that transport has to lie.

        Raises:
            PeerError: nothing goes by it from here.
        """
        for kind in self._kinds:
            if kind.name == name and kind.region is not None:
                return kind.region
        raise PeerError(f"this instance does not send by transport {name!r}")

    def start(self) -> None:
        """Make all ready that can be had: a peer had nothing in common with what was."""
        for kind in self._kinds:
            kind.start()

    # ------------------------------------------------------------------ at the target

    def choose(self, offers: Sequence[Offer], peer: Peer) -> Way:
        """Open a peer's memory by the fastest transport there is; end it with :meth:`leave`.

        Raises:
            NoTransport: there is none; the hint says what to do.
        """
        offered = {offer.name: offer.setup for offer in offers}
        now, missing, hints, later = self._now(), [], [], []
        for kind in self._kinds:
            name = kind.name
            if name not in offered:
                missing.append(f"{name}: not offered")
                continue
            failed_at, failure = self._failed.get((peer, name), (-FAILED_S, ""))
            if now - failed_at < FAILED_S:
                missing.append(f"{name}: it failed lately ({failure})")
                later.append(kind)
                continue
            try:
                return self._open(kind, offered[name], peer, missing)
            except PeerError as error:
                missing.append(f"{name}: {error.message}")
                hints.append(error.hint)
        for kind in later:  # better than nothing
            try:
                return self._open(kind, offered[kind.name], peer, missing)
            except PeerError as error:
                hints.append(error.hint)
        unknown = [offer.name for offer in offers if all(k.name != offer.name for k in self._kinds)]
        missing += [f"{name}: not used here" for name in unknown]
        hint = "; ".join(dict.fromkeys(hint for hint in hints if hint))
        raise NoTransport(_none(missing), hint=hint or "give both --star-transport auto")

    def failed(self, way: Way, why: str) -> None:
        """A move by it failed on its way: who moves next opens the peer's memory afresh."""
        way.gone = True
        self._failed[way.peer, way.name] = self._now(), why

    def leave(self, way: Way) -> None:
        """A move has ended that used it."""
        way.moves -= 1
        way.idle_since = self._now()

    def forget(self, peer: Peer) -> None:
        """That process is gone."""
        for way in self._ways:
            if way.peer == peer:
                way.gone = True
        for key in [key for key in self._failed if key[0] == peer]:
            del self._failed[key]

    def step(self) -> None:
        """Close what was not used for long."""
        now = self._now()
        for way in [w for w in self._ways if not w.moves]:
            if way.gone or now - way.idle_since > IDLE_S:
                self._ways.remove(way)
                way.reader.close()

    def close(self) -> None:
        """The engine ends."""
        for way in self._ways:
            way.reader.close()
        self._ways.clear()
        for kind in self._kinds:
            kind.close()

    def states(self) -> dict[str, str]:
        """How they fare: ``ready``, ``not started``, or why one cannot be had."""
        states = {}
        for kind in self._kinds:
            try:
                states[kind.name] = "ready" if kind.setup() else "not started"
            except PeerError as error:
                states[kind.name] = error.message
        return states

    @property
    def in_use(self) -> int:
        """Ways that moves use."""
        return sum(way.moves for way in self._ways)

    def _open(self, kind: Transport, setup: bytes, peer: Peer, missing: Sequence[str]) -> Way:
        if not setup:
            kind.start()
            raise PeerError("it is being started at the source", hint="retry in a few seconds")
        for way in self._ways:
            if way.peer.instance_id == peer.instance_id and way.peer != peer:
                way.gone = True  # of a process that was there before
        for way in self._ways:
            if (way.peer, way.name, way.setup) == (peer, kind.name, setup) and not way.gone:
                break
        else:
            way = Way(peer, setup, kind.name, kind.open(setup))
            self._ways.append(way)
        way.moves += 1
        way.why = "; ".join([f"{kind.name} is the fastest in common", *missing])
        return way


def _none(missing: Sequence[str]) -> str:
    return f"no transport in common ({'; '.join(missing) or 'none is offered'})"
