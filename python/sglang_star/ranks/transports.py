"""Transports of several ranks: an offer is one for all, a peer's memory is open for all or none.

Every rank has staging memory of its own, in which the same piece of KV has the same slot and the
same stamp, and reads that of the peer's rank of its number. What fails on one rank while a piece is
read is told by the ticket of that copy; what can fail before there is one is agreed here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from sglang_star.errors import NoTransport, PeerError
from sglang_star.migration.transport.base import Fetch, Grant, Reader, Transport
from sglang_star.migration.transport.choice import Transports
from sglang_star.protocol import Offer
from sglang_star.ranks.group import Ranks

_encode = msgspec.msgpack.encode
_setups = msgspec.msgpack.Decoder(tuple[bytes, ...])
_offers = msgspec.msgpack.Decoder(dict[str, bytes])


class RankTransports(Transports):
    """See :class:`Transports`; all ranks call its methods in the same order."""

    def __init__(self, ranks: Ranks, kinds: Sequence[Transport], now: Callable[[], float]) -> None:
        super().__init__([_Together(kind, ranks) for kind in kinds], now)
        self._ranks = ranks

    def offers(self) -> tuple[Offer, ...]:
        """See :class:`Transports`: what can be had on every rank."""
        everyone = [_offers.decode(one) for one in self._ranks.gather(self.here())]
        offers = []
        for name in everyone[0]:
            if all(name in one for one in everyone):
                setups = [one[name] for one in everyone]
                setup = _encode(setups) if all(setups) else b""  # one is being started
                offers.append(Offer(name=name, setup=setup))
        if not offers:
            raise NoTransport(
                "no transport can be had on all ranks of this instance",
                hint="see what each rank logged when it started",
            )
        return tuple(offers)

    def here(self) -> bytes:
        """What this rank has, encoded."""
        try:
            return _encode({offer.name: offer.setup for offer in super().offers()})
        except NoTransport:
            return _encode({})


class _Together(Transport):
    """One of this rank's transports."""

    def __init__(self, kind: Transport, ranks: Ranks) -> None:
        self.name = kind.name
        self.region = kind.region
        self._kind = kind
        self._ranks = ranks

    def start(self) -> None:
        self._kind.start()

    def setup(self) -> bytes:
        return self._kind.setup()

    def open(self, setup: bytes) -> Reader:
        try:
            setups = _setups.decode(setup)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise PeerError(f"malformed setup of several ranks: {error}") from error
        if len(setups) != self._ranks.size:
            raise PeerError(f"the source has {len(setups)} ranks, this one {self._ranks.size}")
        reader: Reader | None = None
        problem = PeerError("another rank of the target cannot reach it")
        try:
            reader = self._kind.open(setups[self._ranks.rank])
        except PeerError as error:
            problem = error
        (all_open,) = self._ranks.least(int(reader is not None))
        if reader is None or not all_open:
            if reader is not None:
                reader.close()
            raise problem
        return _RankReader(reader, self._ranks.rank)

    def close(self) -> None:
        self._kind.close()


class _RankReader:
    """A peer's staging memory as this rank reads it."""

    def __init__(self, reader: Reader, rank: int) -> None:
        self._reader = reader
        self._rank = rank

    def fetch(self, grant: Grant, size: int, checksum: int) -> Fetch:
        try:
            # The message has rank 0's checksum; the other ranks' bytes are others.
            return self._reader.fetch(grant, size, 0 if self._rank else checksum)
        except PeerError as error:
            return _Missing(error)

    def close(self) -> None:
        self._reader.close()


class _Missing:
    """A fetch that could not even begin here."""

    def __init__(self, error: PeerError) -> None:
        self._error = error

    def arrived(self) -> Any:
        raise self._error

    def intact(self) -> bool:
        return False

    def cancel(self) -> None:
        pass

    def close(self) -> None:
        pass
