"""Which instances can hand requests to each other, and why others cannot.

What an instance advertises says it all: KV moves only between equal models, layouts and releases,
and by a transport that both have: by one that needs memory in common only within a machine.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from enum import Enum

import numpy as np

from sglang_star.protocol import Advertisement
from sglang_star_router.policy.snapshot import IntArray

logger = logging.getLogger(__name__)

NETWORK = "nixl"
"""The transport that reaches other machines."""


class Obstacle(Enum):
    """Why no request can move between two instances; the value is the metric's label."""

    FINGERPRINT = "fingerprint"
    HOST = "host"
    TRANSPORT = "transport"

    @property
    def text(self) -> str:
        """For people: what stands between the two."""
        return _TEXTS[self]


_TEXTS = {
    Obstacle.FINGERPRINT: "they differ in model, dtype, KV layout, role or release",
    Obstacle.HOST: "they share no memory, and do not both have --star-transport auto or nixl",
    Obstacle.TRANSPORT: "they have no --star-transport in common",
}


def obstacle(one: Advertisement, other: Advertisement) -> Obstacle | None:
    """What keeps requests from moving between two instances, in either direction."""
    if one.fingerprint != other.fingerprint:
        return Obstacle.FINGERPRINT
    common = set(one.transports) & set(other.transports)
    if not common:
        return Obstacle.TRANSPORT
    # An instance that cannot tell has no shared memory at all.
    apart = one.host_token != other.host_token or not one.host_token
    return Obstacle.HOST if apart and NETWORK not in common else None


def groups(advertised: Sequence[Advertisement | None]) -> IntArray:
    """Number instances so that equal numbers can hand requests to each other, ``[I]``.

    One without STAR, or without any transport, is a group of its own; so are those of a machine
    that no network transport leads out of.
    """
    numbers: dict[object, int] = {}
    found = [
        numbers.setdefault(_group(known) or row, len(numbers))
        for row, known in enumerate(advertised)
    ]
    return np.array(found, np.int64)


def _group(known: Advertisement | None) -> tuple[str, str] | None:
    if known is None or not known.transports:
        return None
    if NETWORK in known.transports:
        return known.fingerprint, NETWORK
    return (known.fingerprint, known.host_token) if known.host_token else None


class Obstacles:
    """What keeps requests from moving within the fleet, by pair; the log tells each pair once."""

    def __init__(self) -> None:
        self._pairs: dict[frozenset[str], Obstacle] = {}

    def between(self, one: str, other: str) -> Obstacle | None:
        """What stands between two instances, by name."""
        return self._pairs.get(frozenset((one, other)))

    def of(self, name: str) -> dict[str, Obstacle]:
        """All instances that ``name`` cannot exchange requests with, and why."""
        return {
            other: why
            for pair, why in self._pairs.items()
            if name in pair
            for other in pair - {name}
        }

    def counts(self) -> dict[str, int]:
        """Pairs per obstacle."""
        found = Counter(why.value for why in self._pairs.values())
        return {why.value: found[why.value] for why in Obstacle}

    def update(
        self, name: str, known: Advertisement, others: Iterable[tuple[str, Advertisement]]
    ) -> None:
        """Compare an instance, described afresh, with the others."""
        new: dict[Obstacle, list[str]] = {}
        for other, theirs in others:
            pair, why = frozenset((name, other)), obstacle(known, theirs)
            if why is None:
                self._pairs.pop(pair, None)
            elif self._pairs.get(pair) is not why:
                self._pairs[pair] = why
                new.setdefault(why, []).append(other)
        for why, names in new.items():
            logger.warning(
                "no request can move between %s and %s: %s", name, ", ".join(names), why.text
            )

    def forget(self, name: str) -> None:
        """The instance of that name is no more, or runs without STAR."""
        self._pairs = {pair: why for pair, why in self._pairs.items() if name not in pair}
