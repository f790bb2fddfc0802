"""Real sockets on loopback: members speak to members, everybody else is refused and counted."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from sglang_star import keys_command
from sglang_star.config import StarConfig
from sglang_star.errors import ConfigError, PeerError
from sglang_star.fleet_key import Access, FleetKey, Unlocked, create, is_loopback
from sglang_star.migration.links import Links
from sglang_star.migration.post import PeerLost
from sglang_star.protocol import Peer, Release, Route, encode

HANGS_S = 180.0
"""What takes longer than this will never happen."""
GREETING = Release(route=Route(migration_id="m", stream_id="s", receiver=1), reason="hello")


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.key"
    create(path)
    return path


@pytest.fixture
def make() -> Iterator[Callable[..., Links]]:
    opened: list[Links] = []

    def build(name: str, access: Access) -> Links:
        links = Links(
            name,
            1,
            host="127.0.0.1",
            advertise_host="127.0.0.1",
            migration_port=0,
            status_port=0,
            heartbeat_s=0.05,
            timeout_s=HANGS_S,
            stuck_s=HANGS_S,
            access=access,
        )
        opened.append(links)
        return links

    yield build
    for links in opened:
        links.close()


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.linger = 0  # what an outsider never got rid of does not keep the test waiting
    yield context
    context.destroy(linger=0)


def until(met: Callable[[], object]) -> None:
    deadline = time.monotonic() + HANGS_S
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def arrives(at: Links, sender: Links) -> None:
    sender.send(at.peer, GREETING)
    taken: list[object] = []
    until(lambda: taken.append(at.mail.take()) or taken[-1] == GREETING)


def place(address: str) -> str:
    return address.partition("#")[0]


def test_members_reach_each_other(make: Callable[..., Links], key_file: Path) -> None:
    a, b = make("a", FleetKey(key_file)), make("b", FleetKey(key_file))
    arrives(b, a)
    arrives(a, b)


def test_who_has_no_key_is_refused_and_counted(
    make: Callable[..., Links], key_file: Path, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    member = make("a", FleetKey(key_file))
    outsider = context.socket(zmq.PUSH)
    outsider.connect(place(member.peer.address))
    outsider.send(encode(GREETING))
    until(lambda: member.dropped["no key"])
    assert member.mail.is_empty()


def test_who_has_another_key_is_refused_and_counted(
    make: Callable[..., Links],
    key_file: Path,
    tmp_path: Path,
    context: zmq.Context[zmq.Socket[bytes]],
) -> None:
    # It even knows the member's public key, which is no secret.
    member = make("a", FleetKey(key_file))
    stranger = context.socket(zmq.PUSH)
    stranger.curve_publickey, stranger.curve_secretkey = zmq.curve_keypair()
    stranger.curve_serverkey = zmq.curve_public(FleetKey(key_file).secrets[0])
    stranger.connect(place(member.peer.address))
    stranger.send(encode(GREETING))
    until(lambda: member.dropped["unknown key"])
    assert member.mail.is_empty()


def test_a_status_is_told_to_members_only(
    make: Callable[..., Links], key_file: Path, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    member = make("a", FleetKey(key_file))
    outsider, listener = context.socket(zmq.SUB), context.socket(zmq.SUB)
    outsider.connect(place(member.status_address))
    FleetKey(key_file).connect(listener, member.status_address)
    for socket in (outsider, listener):
        socket.subscribe(b"")
    until(lambda: member.dropped["no key"])

    def heard() -> int:
        member.publish(GREETING)
        return listener.poll(5)

    until(heard)
    assert not outsider.poll(0)


def test_nothing_is_sent_to_who_is_no_member(
    make: Callable[..., Links], key_file: Path, tmp_path: Path
) -> None:
    other = create(tmp_path / "other.key")
    member, open_one, foreign = (
        make("a", FleetKey(key_file)),
        make("b", Unlocked()),
        make("c", other),
    )
    for victim in (open_one, foreign):
        member.watch([(victim.peer, "s")])
        member.send(victim.peer, GREETING)
        lost: list[object] = []
        until(lambda lost=lost: lost.append(member.mail.take()) or isinstance(lost[-1], PeerLost))
        assert victim.mail.is_empty()
    # An address that promises our key does not have it: the handshake fails at our own end.
    lie = place(foreign.peer.address) + "#" + FleetKey(key_file).ids()[0]
    liar = Peer(instance_id="c", incarnation=1, address=lie)
    member.send(liar, GREETING)
    until(lambda: foreign.dropped["no key"])
    assert foreign.mail.is_empty()


def test_a_keyless_process_speaks_to_this_machine_only(
    context: zmq.Context[zmq.Socket[bytes]], key_file: Path
) -> None:
    socket = context.socket(zmq.PUSH)
    with pytest.raises(PeerError, match="another machine"):
        Unlocked().connect(socket, "tcp://engine.example:1")
    with pytest.raises(PeerError, match="wants fleet key"):
        Unlocked().connect(socket, FleetKey(key_file).advertise("tcp://127.0.0.1:1"))
    Unlocked(insecure=True).connect(socket, "tcp://engine.example:1")
    Unlocked().connect(socket, "tcp://127.0.0.1:1")


def test_keys_are_exchanged_while_the_fleet_runs(
    make: Callable[..., Links], key_file: Path, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    def star_keys(action: str) -> None:
        assert keys_command.main([action, str(key_file)]) == 0

    old, other = make("a", FleetKey(key_file)), make("b", FleetKey(key_file))
    star_keys("add")
    arrives(old, other)
    star_keys("use")
    new = make("c", FleetKey(key_file))
    assert new.peer.address.partition("#")[2] != old.peer.address.partition("#")[2]
    arrives(old, new)
    arrives(new, old)
    arrives(other, old)
    newer = make("d", FleetKey(key_file))
    star_keys("drop")
    arrives(new, newer)
    with pytest.raises(PeerError, match="does not have"):
        FleetKey(key_file).connect(context.socket(zmq.PUSH), old.peer.address)


def test_a_damaged_file_leaves_the_keys_that_were_read(
    make: Callable[..., Links], key_file: Path
) -> None:
    a, b = make("a", FleetKey(key_file)), make("b", FleetKey(key_file))
    key_file.write_text("no key\n")
    arrives(b, a)


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        ("", 0o600, "is no key file"),
        ("# only words\n", 0o600, "is no key file"),
        ("x" * 39 + "\n", 0o600, "no key"),
        ("x" * 40 + "é\n", 0o600, "cannot be read"),
        ("~" * 40 + "\n", 0o600, "no key"),
        (None, 0o640, "may be read by others"),
        (None, 0o604, "may be read by others"),
    ],
)
def test_a_file_that_is_none_is_named(
    key_file: Path, content: str | None, mode: int, said: str
) -> None:
    if content is not None:
        key_file.write_text(content, encoding="utf-8")
    os.chmod(key_file, mode)
    with pytest.raises(ConfigError, match=said):
        FleetKey(key_file)


def test_a_new_file_is_for_this_user_only_and_never_overwrites(key_file: Path) -> None:
    assert key_file.stat().st_mode & 0o777 == 0o600
    before = key_file.read_bytes()
    with pytest.raises(ConfigError, match="exists"):
        keys_command.main(["new", str(key_file)])
    with pytest.raises(ConfigError, match="only one key"):
        keys_command.main(["use", str(key_file)])
    assert key_file.read_bytes() == before


@pytest.mark.parametrize("host", ["0.0.0.0", "engine.example", "::"])
def test_sockets_of_other_machines_need_a_key(host: str, key_file: Path) -> None:
    with pytest.raises(ConfigError, match="--star-fleet-key"):
        StarConfig(predictor="off", host=host)
    StarConfig(predictor="off", host=host, fleet_key=str(key_file))
    StarConfig(predictor="off", host=host, insecure=True)
    assert not is_loopback(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]"])
def test_loopback_needs_none(host: str) -> None:
    assert is_loopback(host)
