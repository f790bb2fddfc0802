"""Real sockets on loopback: what strangers and members may take of an instance, and no more."""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from sglang_star.fleet_key import Access, FleetKey, Unlocked, create
from sglang_star.migration import links as links_module
from sglang_star.migration.links import Links
from sglang_star.protocol import Heartbeat, Peer, Release, Route, encode

HANGS_S = 180.0
"""What takes longer than this will never happen."""


def greeting(text: str) -> Release:
    return Release(route=Route(migration_id="m", stream_id="s", receiver=1), reason=text)


@pytest.fixture
def make() -> Iterator[Callable[..., Links]]:
    opened: list[Links] = []

    def build(name: str, access: Access | None = None) -> Links:
        links = Links(
            name, 1, host="127.0.0.1", advertise_host="127.0.0.1", migration_port=0,
            status_port=0, heartbeat_s=0.05, timeout_s=HANGS_S, stuck_s=HANGS_S,
            access=access or Unlocked(),
        )  # fmt: skip
        opened.append(links)
        return links

    yield build
    for links in opened:
        links.close()


@pytest.fixture
def key(tmp_path: Path) -> FleetKey:
    return create(tmp_path / "fleet.key")


def until(met: Callable[[], Any]) -> None:
    deadline = time.monotonic() + HANGS_S
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def take(at: Links) -> Any:
    """The next message that is no heartbeat."""
    deadline = time.monotonic() + HANGS_S
    while (item := at.mail.take()) is None or isinstance(item, Heartbeat):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return item


def port_of(address: str) -> int:
    return int(address.partition("#")[0].rpartition(":")[2])


def test_a_message_that_is_too_large_is_not_taken_in(
    make: Callable[..., Links], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links_module, "MAX_MESSAGE_BYTES", 1000)
    here = make("a")
    context: zmq.Context[Any] = zmq.Context()
    for size in (2000, 10):
        sender = context.socket(zmq.PUSH)
        sender.connect(here.peer.address)
        sender.send(encode(greeting("x" * size)))
        if size == 10:
            assert take(here).reason == "x" * 10
        else:
            # It is cut off for it, and so no longer there to be written to.
            events = sender.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            assert events.poll(int(HANGS_S * 1e3)), "who sent too much was not cut off"
            sender.disable_monitor()
            events.close(linger=0)
        sender.close(linger=0)
    context.destroy(linger=0)
    assert here.mail.is_empty()


def test_made_up_senders_use_up_neither_sockets_nor_the_log(
    make: Callable[..., Links], caplog: pytest.LogCaptureFixture
) -> None:
    """A heartbeat of somebody unknown is answered, at the address that it names."""
    here, other = make("a"), make("b")
    context: zmq.Context[Any] = zmq.Context()
    sender = context.socket(zmq.PUSH)
    sender.connect(here.peer.address)
    with caplog.at_level(logging.WARNING):
        for number in range(1500):
            address = f"tcp://127.1.{number // 250}.{number % 250 + 1}:1"
            if number % 2:
                address = f"tcp://127.0.0.1:1#{number:016x}"
            nobody = Peer(instance_id=f"n{number}", incarnation=1, address=address)
            sender.send(encode(Heartbeat(sender=nobody, receiver=1, live=("s",))))
        until(lambda: here.dropped["not a member"] == 750)
        sender.close(linger=0)
        context.destroy(linger=0)
        here.send(other.peer, greeting("still here"))
        assert take(other).reason == "still here"
    assert not here.dropped["send"]
    assert len(here._connections) <= links_module.MAX_PEERS
    assert len(here._blamed) <= links_module.MAX_WARNINGS
    assert len(caplog.records) <= 2 * links_module.MAX_WARNINGS


def test_a_connection_that_nobody_uses_is_closed(
    make: Callable[..., Links], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, other = make("a"), make("b")
    here.send(other.peer, greeting("once"))
    assert take(other).reason == "once"
    assert here._connections
    monkeypatch.setattr(links_module, "IDLE_S", 0.0)
    until(lambda: not here._connections)
    here.send(other.peer, greeting("again"))
    assert take(other).reason == "again"


def test_a_crowd_is_kept_out_and_members_stay(
    make: Callable[..., Links], key: FleetKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang_star.migration.entrance.LIMIT", 8)
    here, member = make("a", key), make("b", key)
    here_port = port_of(here.peer.address)
    member.send(here.peer, greeting("before"))
    assert take(here).reason == "before"
    with contextlib.ExitStack() as crowd:
        while not here.dropped["too many connections"]:
            stranger = crowd.enter_context(socket.socket())
            stranger.settimeout(1.0)
            with contextlib.suppress(TimeoutError):
                stranger.connect(("127.0.0.1", here_port))
        member.send(here.peer, greeting("meanwhile"))
        assert take(here).reason == "meanwhile"
        # They are cut off for want of a key; who waits gets in then.
        late = make("c", key)
        late.send(here.peer, greeting("late"))
        assert take(here).reason == "late"
    until(lambda: here.dropped["no key"])


CROWD = """
import resource, socket, sys, time
sys.path[:0] = sys.argv[1:2]
resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))
from sglang_star.fleet_key import FleetKey
from sglang_star.migration.links import Links
from sglang_star.protocol import Heartbeat

links = Links("a", 1, host="127.0.0.1", advertise_host="127.0.0.1", access=FleetKey(sys.argv[2]),
              migration_port=0, status_port=0, heartbeat_s=0.1, timeout_s=600.0, stuck_s=600.0)
print(links.peer.address, links.status_address, flush=True)
while True:
    item = links.mail.take()
    if item is None:
        time.sleep(0.005)
        continue
    if isinstance(item, Heartbeat):
        continue
    # What a scheduler does now and then: open a file.
    with open("/proc/self/stat") as file:
        print(item.reason, len(file.read()) > 0, dict(links.dropped), flush=True)
"""


def test_strangers_leave_an_engine_the_descriptors_that_it_needs(
    make: Callable[..., Links], key: FleetKey, tmp_path: Path
) -> None:
    package = str(Path(links_module.__file__).parents[2])
    child = subprocess.Popen(
        [sys.executable, "-c", CROWD, package, str(tmp_path / "fleet.key")],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    member = make("b", key)
    try:
        address, status = child.stdout.readline().split()
        there = Peer(instance_id="a", incarnation=1, address=address)
        member.send(there, greeting("before"))
        assert child.stdout.readline().startswith("before True")
        with contextlib.ExitStack() as crowd:
            for number in range(600):
                stranger = crowd.enter_context(socket.socket())
                stranger.setblocking(False)
                stranger.connect_ex(("127.0.0.1", port_of((address, status)[number % 2])))
                if number % 10 == 9:  # it has looked who is there since
                    member.send(there, greeting(f"during-{number}"))
                    assert child.stdout.readline().startswith(f"during-{number} True")
        member.send(there, greeting("after"))
        said = child.stdout.readline()
        assert said.startswith("after True")
        assert "too many connections" in said
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()
