"""Real sockets on loopback: heartbeats, restarts, silence, garbage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from sglang_star.errors import ConfigError
from sglang_star.fleet_key import Unlocked
from sglang_star.migration.links import Links
from sglang_star.migration.mailbox import MAX_WAITING, URGENT, Mailbox, OrderEnvelope
from sglang_star.migration.post import PeerLost
from sglang_star.protocol import (
    Heartbeat,
    InstanceStatus,
    OrderReply,
    Peer,
    StatusOrder,
    decode,
    encode,
)
from unit.test_protocol import MESSAGES

TIMEOUT_S = 0.4
BEAT_S = 0.05
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
                "heartbeat_s": BEAT_S,
                "timeout_s": TIMEOUT_S,
                "stuck_s": HANGS_S,
                "access": Unlocked(),
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
        item = links.mail.take()
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
    while len(b.mail._urgent) < len(urgent) and time.monotonic() < deadline:
        b.mail.wait(0.01)
    assert not b.mail.is_empty()
    assert [b.mail.take(urgent_only=True) for _ in urgent] == urgent
    assert b.mail.take(urgent_only=True) is None
    assert b.mail.take() == plain
    assert b.mail.is_empty()


class Clock:
    """Stands still unless a test moves it, so that no machine is too slow for a heartbeat."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    stopped = Clock()
    monkeypatch.setattr("sglang_star.migration.links.time", stopped)
    return stopped


def watch(links: Links, *peers: Peer) -> None:
    links.watch([(peer, "s") for peer in peers])


class Mute:
    """Holds its connections and reads what comes, but never says a word: as if it were frozen."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.peer = Peer(instance_id="mute", incarnation=1, address=f"tcp://127.0.0.1:{port}")

    def beats(self, number: int) -> None:
        """Wait for so many heartbeats to come."""
        for _ in range(number):
            assert self._socket.poll(int(HANGS_S * 1e3)), "no heartbeat came"
            assert isinstance(decode(self._socket.recv()), Heartbeat)

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()


@pytest.fixture
def mute() -> Iterator[Mute]:
    peer = Mute()
    yield peer
    peer.close()


def test_heartbeats_keep_a_peer_alive(make: Callable[..., Links], clock: Clock) -> None:
    a, b = make("a"), make("b")
    watch(a, b.peer)
    watch(b, a.peer)
    # Many times the time-out, with a beat from each side in every part of it.
    for _ in range(20):
        clock.now += TIMEOUT_S / 4
        for here, there in ((a, b), (b, a)):
            beat = wait_for(here, Heartbeat, never=PeerLost)
            while not beat.live:  # the answer of one that did not watch yet
                beat = wait_for(here, Heartbeat, never=PeerLost)
            assert beat.sender == there.peer
            assert beat.live == ("s",)


def test_silence_loses_a_peer_once(make: Callable[..., Links], clock: Clock, mute: Mute) -> None:
    a = make("a", heartbeat_s=BEAT_S)
    watch(a, mute.peer)
    begun = clock.now
    mute.beats(1)
    while (item := a.mail.take()) is None:
        clock.now += BEAT_S
        time.sleep(0.002)
    assert item == PeerLost(mute.peer, f"silent for {TIMEOUT_S:g} s")
    assert clock.now - begun > TIMEOUT_S
    # Nobody is watched any more: a beat of another peer comes after whatever else would.
    clock.now += 2 * TIMEOUT_S
    other = make("other")
    watch(other, a.peer)
    assert wait_for(a, Heartbeat, never=PeerLost).sender == other.peer


def test_who_did_not_listen_calls_nobody_silent(
    make: Callable[..., Links], clock: Clock, mute: Mute
) -> None:
    """As after SIGSTOP: time has passed, and what was said meanwhile is still to be read."""
    a = make("a", heartbeat_s=BEAT_S)
    watch(a, mute.peer)
    mute.beats(1)
    clock.now += 100 * TIMEOUT_S
    mute.beats(1)
    assert a.mail.take() is None


def test_a_peer_whose_process_is_gone_is_lost_before_the_time_out(
    make: Callable[..., Links],
) -> None:
    a, b = make("a", timeout_s=2 * HANGS_S), make("b")
    watch(a, b.peer)
    wait_for(b, Heartbeat)
    b.close()
    assert wait_for(a, PeerLost) == PeerLost(b.peer, "its process is gone")
    # Nor need it ever have been reached.
    watch(a, b.peer)
    assert wait_for(a, PeerLost) == PeerLost(b.peer, "its process is gone")


def test_a_peer_that_is_not_watched_may_go(make: Callable[..., Links]) -> None:
    a, b = make("a", timeout_s=2 * HANGS_S), make("b")
    watch(a, b.peer)
    wait_for(b, Heartbeat)
    watch(a)
    b.close()
    deadline = time.monotonic() + HANGS_S
    while a._connections and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not a._connections, "it goes on trying to reach who is gone"
    while (item := a.mail.take()) is not None:
        assert not isinstance(item, PeerLost), item


def test_a_restarted_peer_is_noticed_before_the_time_out(
    make: Callable[..., Links], monkeypatch: pytest.MonkeyPatch
) -> None:
    # However long the restart takes here.
    monkeypatch.setattr("sglang_star.migration.connection.GONE_S", HANGS_S)
    a = make("a", timeout_s=2 * HANGS_S)
    b = make("b")
    port = int(b.peer.address.rsplit(":", 1)[1])
    watch(a, b.peer)
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


def test_a_stuck_scheduler_is_given_up_though_its_process_goes_on(
    make: Callable[..., Links], caplog: pytest.LogCaptureFixture
) -> None:
    a, b = make("a"), make("b", stuck_s=0.0)
    b.pulse.beat(time.monotonic() + HANGS_S)
    a.watch([(b.peer, "s")])
    b.watch([(a.peer, "s")])
    wait_for(a, Heartbeat)
    b.pulse.beat(time.monotonic() - 1.0)
    # On a busy machine it may have been given up before, for another silence.
    deadline = time.monotonic() + HANGS_S
    while "step boundary" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)
    a.watch([(b.peer, "s")])
    lost = wait_for(a, PeerLost)
    assert (lost.peer, "silent" in lost.why) == (b.peer, True)


def test_only_so_many_messages_wait() -> None:
    mail = Mailbox()
    [urgent] = [m for m in MESSAGES if isinstance(m, URGENT)][:1]
    order = OrderEnvelope(b"", StatusOrder(order_id=1))
    lost = PeerLost(Peer(instance_id="b", incarnation=1, address="tcp://127.0.0.1:1"), "gone")
    for _ in range(MAX_WAITING):
        assert mail.put(order)
        assert mail.put(urgent)
    assert not mail.put(order)
    assert not mail.put(urgent)
    assert mail.put(lost), "whose loss is not noticed would be waited for"
    assert mail.take() == urgent
    assert mail.put(urgent)


def test_orders_are_answered_and_the_wake_up_clears(make: Callable[..., Links]) -> None:
    links = make("a")
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.connect(links.order_address)
    dealer.send(encode(StatusOrder(order_id=4)))
    order = wait_for(links, OrderEnvelope)
    links.reply(order, OrderReply(order_id=4, payload=b"{}"))
    assert dealer.poll(int(HANGS_S * 1e3))
    assert decode(dealer.recv()) == OrderReply(order_id=4, payload=b"{}")
    links.mail.wake.clear()
    links.mail.wake.clear()
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


def test_of_two_processes_at_one_address_the_former_is_gone(make: Callable[..., Links]) -> None:
    links = make("a")
    new = make("b", 2).peer
    old = Peer(instance_id="b", incarnation=1, address=new.address)
    links.watch([(old, "s"), (new, "t")])
    assert wait_for(links, PeerLost) == PeerLost(old, "it has restarted")
