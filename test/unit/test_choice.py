"""Which transport a move takes: the fastest in common, and why."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_star.errors import NoTransport, PeerError
from sglang_star.migration.transport.base import Transport
from sglang_star.migration.transport.choice import FAILED_S, IDLE_S, Transports
from sglang_star.migration.transport.memory import HostRegion
from sglang_star.protocol import Offer, Peer

PEER = Peer(instance_id="a", incarnation=1, address="tcp://127.0.0.1:1")
AGAIN = Peer(instance_id="a", incarnation=2, address="tcp://127.0.0.1:1")


class Kind(Transport):
    """One that opens unless it is told why not."""

    def __init__(self, name: str, why: str = "", setup: bytes = b"x") -> None:
        self.name = name
        self.region = HostRegion(1, 64)
        self.why = why
        self.ready = setup
        self.opened: list[Any] = []
        self.closed: list[Any] = []
        self.started = 0

    def start(self) -> None:
        self.started += 1

    def close(self) -> None:
        self.started = -1

    def setup(self) -> bytes:
        return self.ready

    def open(self, setup: bytes) -> Any:
        if self.why:
            raise PeerError(self.why, hint=f"mend {self.name}")
        made: Any = type("Reader", (), {"close": lambda reader: self.closed.append(reader)})()
        self.opened.append(made)
        return made


class Both:
    """The target's transports, and a clock."""

    def __init__(self, *kinds: Kind) -> None:
        self.now = 0.0
        self.kinds = kinds
        self.transports = Transports(kinds, lambda: self.now)

    def choose(self, *names: str, peer: Peer = PEER) -> Any:
        offers = [Offer(name=name, setup=b"x") for name in names]
        return self.transports.choose(offers, peer)


def test_the_fastest_in_common_is_taken_and_it_is_said_why() -> None:
    both = Both(Kind("fast", "another machine"), Kind("middle"), Kind("slow"))
    way = both.choose("slow", "middle", "fast")
    assert way.name == "middle"
    assert "middle is the fastest in common" in way.why
    assert "fast: another machine" in way.why
    assert both.choose("slow").name == "slow"


def test_nothing_in_common_is_refused_with_what_to_do() -> None:
    both = Both(Kind("fast", "another machine"))
    with pytest.raises(NoTransport, match="fast: another machine; slow: not used here") as caught:
        both.choose("fast", "slow")
    assert caught.value.hint == "mend fast"
    with pytest.raises(NoTransport, match="not offered"):
        both.choose()
    with pytest.raises(NoTransport, match="none is offered"):
        Transports([], lambda: 0.0).offers()


def test_what_is_not_started_is_and_the_next_move_has_it() -> None:
    kind = Kind("slow")
    both = Both(kind)
    with pytest.raises(NoTransport, match="being started") as caught:
        both.transports.choose([Offer(name="slow", setup=b"")], PEER)
    assert kind.started == 1
    assert "retry" in caught.value.hint
    source = Both(Kind("slow", setup=b""))
    assert source.transports.states() == {"slow": "not started"}
    source.transports.start()
    assert source.kinds[0].started == 1


def test_one_that_failed_is_passed_over_for_a_while_if_there_is_another() -> None:
    both = Both(Kind("fast"), Kind("slow"))
    way = both.choose("fast", "slow")
    both.transports.failed(way, "the link is cut")
    assert way.gone, "it is opened afresh next time"
    instead = both.choose("fast", "slow")
    assert instead.name == "slow"
    assert "fast: it failed lately (the link is cut)" in instead.why
    assert both.choose("fast").name == "fast", "better than nothing"
    assert both.choose("fast", "slow", peer=AGAIN).name == "fast", "of that process"
    both.now = FAILED_S
    assert both.choose("fast", "slow").name == "fast"


def test_a_peers_memory_stays_open_between_moves_and_not_for_ever() -> None:
    both = Both(Kind("fast"))
    [kind] = both.kinds
    one, other = both.choose("fast"), both.choose("fast")
    assert one is other
    assert both.transports.in_use == 2
    for way in (one, other):
        both.transports.leave(way)
    both.now = IDLE_S
    both.transports.step()
    assert kind.closed == []
    assert both.choose("fast") is one
    both.now = 5 * IDLE_S
    both.transports.step()
    assert kind.closed == [], "a move uses it"
    both.transports.leave(one)
    both.now = 7 * IDLE_S
    both.transports.step()
    assert kind.closed == kind.opened


def test_memory_of_a_process_that_is_gone_is_closed_and_not_opened_again() -> None:
    both = Both(Kind("fast"))
    [kind] = both.kinds
    way = both.choose("fast")
    both.transports.forget(PEER)
    both.transports.step()
    assert kind.closed == [], "a move still has a copy under way"
    both.transports.leave(way)
    both.transports.step()
    assert kind.closed == kind.opened
    first = both.choose("fast")
    both.transports.leave(first)
    second = both.choose("fast", peer=AGAIN)  # another process under that name
    assert second is not first
    both.transports.step()
    assert kind.closed == kind.opened[:2]


def test_what_is_sent_lies_where_the_chosen_transport_reads_it() -> None:
    both = Both(Kind("fast"))
    assert both.transports.region("fast") is both.kinds[0].region
    with pytest.raises(PeerError, match="slow"):
        both.transports.region("slow")
    assert both.transports.offers() == (Offer(name="fast", setup=b"x"),)
    both.transports.close()
    assert both.kinds[0].started == -1
