"""Real sockets on loopback: heartbeats, restarts, silence, garbage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from sglang_star.errors import ConfigError
from sglang_star.migration.links import URGENT, Links, Order, PeerLost
from sglang_star.protocol import Heartbeat, InstanceStatus, OrderReply, StatusOrder, decode, encode
from unit.test_protocol import MESSAGES

TIMEOUT_S = 0.4
HANGS_S = 180.0
"""What takes longer than this will never happen."""


@pytest.fixture
def make() -> Iterator[Callable[..., Links]]:
    opened: list[Links] = []

    def build(name: str, incarnation: int = 1, **options: Any) -> Links:
        links = Links(
            name,
            incarnation,
            host="127.0.0.1",
            advertise_host="127.0.0.1",
            **{
                "migration_port": 0,
                "status_port": 0,
                "heartbeat_s": 0.05,
                "timeout_s": TIMEOUT_S,
                **options,
            },
        )
        opened.append(links)
        return links

    yield build
    for links in opened:
        links.close()


def wait_for(links: Links, kind: type[Any], *, never: type[Any] | tuple[()] = ()) -> Any:
    deadline = time.monotonic() + HANGS_S
    while time.monotonic() < deadline:
        item = links.take()
        assert not isinstance(item, never), item
        if isinstance(item, kind):
            return item
        if item is None:
            time.sleep(0.005)
    raise AssertionError(f"no {kind.__name__} came")


def test_messages_arrive_in_order(make: Callable[..., Links]) -> None:
    a, b = make("a"), make("b")
    plain = [m for m in MESSAGES if not isinstance(m, (*URGENT, Heartbeat))][:4]
    for message in plain:
        a.send(b.peer, message)
    assert [wait_for(b, type(m)) for m in plain] == plain


def test_urgent_messages_overtake_the_others(make: Callable[..., Links]) -> None:
    a, b = make("a"), make("b")
    urgent = [m for m in MESSAGES if isinstance(m, URGENT)]
    plain = next(m for m in MESSAGES if not isinstance(m, (*URGENT, Heartbeat)))
    assert urgent
    for message in (plain, *urgent):
        a.send(b.peer, message)
    deadline = time.monotonic() + HANGS_S
    while len(b.urgent) < len(urgent) and time.monotonic() < deadline:
        b.wait(0.01)
    assert not b.idle()
    assert [b.take(urgent_only=True) for _ in urgent] == urgent
    assert b.take(urgent_only=True) is None
    assert b.take() == plain
    assert b.idle()


class Clock:
    """Stands still unless a test moves it, so that no machine is too slow for a heartbeat."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_heartbeats_keep_a_peer_alive_and_silence_loses_it_once(
    make: Callable[..., Links], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("sglang_star.migration.links.time", clock)
    a, b = make("a"), make("b")
    a.watch({b.peer.address: (b.peer, frozenset({"s"}))})
    b.watch({a.peer.address: (a.peer, frozenset({"s"}))})
    # Many times the time-out, with a beat from each side in every part of it.
    for _ in range(20):
        clock.now += TIMEOUT_S / 4
        for here, there in ((a, b), (b, a)):
            beat = wait_for(here, Heartbeat, never=PeerLost)
            while not beat.live:  # the answer of one that did not watch yet
                beat = wait_for(here, Heartbeat, never=PeerLost)
            assert beat.sender == there.peer
            assert beat.live == ("s",)
    b.close()
    while isinstance(a.take(), Heartbeat):
        pass
    clock.now += 2 * TIMEOUT_S
    assert wait_for(a, PeerLost).peer == b.peer
    # Nobody is watched any more: a beat of another peer comes after whatever else would.
    clock.now += 2 * TIMEOUT_S
    other = make("other")
    other.watch({a.peer.address: (a.peer, frozenset({"t"}))})
    assert wait_for(a, Heartbeat, never=PeerLost).sender == other.peer


def test_a_restarted_peer_is_noticed_before_the_time_out(make: Callable[..., Links]) -> None:
    a = make("a", timeout_s=2 * HANGS_S)
    b = make("b")
    port = int(b.peer.address.rsplit(":", 1)[1])
    a.watch({b.peer.address: (b.peer, frozenset({"s"}))})
    wait_for(b, Heartbeat)
    b.close()
    make("b", incarnation=2, migration_port=port)
    lost = wait_for(a, PeerLost)
    assert lost.peer == b.peer
    assert "restarted" in lost.why


def test_garbage_is_counted_and_dropped(make: Callable[..., Links]) -> None:
    a, b = make("a"), make("b")
    context = zmq.Context()
    push = context.socket(zmq.PUSH)
    push.connect(b.peer.address)
    for data in (b"", b"noise", b"\xc1" * 99, b"\x92\x7f\x90"):
        push.send(data)
    push.close(linger=1000)
    context.term()
    a.send(b.peer, MESSAGES[0])
    assert wait_for(b, type(MESSAGES[0])) == MESSAGES[0]
    deadline = time.monotonic() + HANGS_S
    while sum(b.dropped.values()) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert b.dropped == {"MalformedMessage": 3, "VersionMismatch": 1}


def test_orders_are_answered_and_the_wake_up_clears(make: Callable[..., Links]) -> None:
    links = make("a")
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.connect(links.order_address)
    dealer.send(encode(StatusOrder(order_id=4)))
    order = wait_for(links, Order)
    links.reply(order, OrderReply(order_id=4, payload=b"{}"))
    assert dealer.poll(int(HANGS_S * 1e3))
    assert decode(dealer.recv()) == OrderReply(order_id=4, payload=b"{}")
    links.wake.clear()
    links.wake.clear()
    dealer.close(linger=0)
    context.term()


def test_statuses_are_published(make: Callable[..., Links]) -> None:
    links = make("a")
    status = next(m for m in MESSAGES if isinstance(m, InstanceStatus))
    context = zmq.Context()
    subscriber = context.socket(zmq.SUB)
    subscriber.subscribe(b"")
    subscriber.connect(links.status_address)
    deadline = time.monotonic() + HANGS_S
    while time.monotonic() < deadline:
        links.publish(status)
        if subscriber.poll(50):
            break
    assert decode(subscriber.recv()) == status
    subscriber.close(linger=0)
    context.term()


def test_a_taken_port_names_the_flag(make: Callable[..., Links]) -> None:
    port = int(make("a").peer.address.rsplit(":", 1)[1])
    with pytest.raises(ConfigError, match="cannot bind") as caught:
        make("b", migration_port=port)
    assert "--star-migration-port" in caught.value.hint
