"""The transport between machines, here between two processes of one."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from sglang_star.errors import PeerError
from sglang_star.migration.transport import nixl_pump
from sglang_star.migration.transport.base import Grant
from sglang_star.migration.transport.memory import HostRegion
from sglang_star.migration.transport.nixl import Nixl
from unit.test_transport import another_process

pytest.importorskip("nixl")

SIZE = 1 << 20
SOURCE = """
import sys, time
sys.path[:0] = sys.argv[1:2]
from sglang_star.migration.transport.memory import HostRegion
from sglang_star.migration.transport.nixl import Nixl

region = HostRegion(4, 1 << 20)
transport = Nixl(region, sys.argv[2], 4)
transport.start()
while not transport.setup():
    time.sleep(0.01)
grants = [region.grant() for _ in range(3)]
for value, grant in enumerate(grants):
    region.view(grant).fill_(value + 1)
region.give(grants[2])
region.grant()
print(transport.setup().hex(), region.checksum(grants[0], 1 << 20), flush=True)
sys.stdin.read()
"""
STAMPS = (1, 2, 3)
"""Of the three grants; the third slot was granted again since."""


@pytest.fixture(scope="module")
def here() -> Iterator[Nixl]:
    transport = Nixl(HostRegion(4, SIZE), "here/1", 2)
    transport.start()
    wait_for(transport.setup)
    yield transport
    transport.close()


def wait_for(condition: Any) -> Any:
    until = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.005)
    return found


def arrived(fetch: Any) -> Any:
    """The bytes, or why they do not come."""

    def look() -> Any:
        try:
            data = fetch.arrived()
        except PeerError as error:
            return str(error)
        return None if data is None else (int(data.sum()), data.numel())

    return wait_for(look)


def test_slots_are_read_from_another_process(here: Nixl) -> None:
    with another_process(SOURCE, "there/1") as child:
        setup, checksum = child.stdout.readline().split()
        reader = here.open(bytes.fromhex(setup))
        fetches = [reader.fetch(Grant(i, STAMPS[i]), SIZE, 0) for i in range(2)]
        # There are two places to land in: the third waits for one.
        third = reader.fetch(Grant(0, STAMPS[0]), 1000, int(checksum))
        assert [arrived(fetch) for fetch in fetches] == [(SIZE, SIZE), (2 * SIZE, SIZE)]
        assert third.arrived() is None
        fetches[0].close()
        assert "checksum" in arrived(third), "that was of all the slot"
        third.close()
        for fetch, found in (
            (reader.fetch(Grant(0, STAMPS[0]), SIZE, int(checksum)), (SIZE, SIZE)),
            (reader.fetch(Grant(2, STAMPS[2]), SIZE, 0), "the sender has used the slot again"),
        ):
            told = arrived(fetch)
            assert told == found or str(found) in told
            fetch.close()
        fetches[1].close()
        with pytest.raises(PeerError, match="slot 4"):
            reader.fetch(Grant(4, 1), SIZE, 0)
        reader.close()


def test_a_peer_can_be_met_again(here: Nixl) -> None:
    with another_process(SOURCE, "again/1") as child:
        setup = bytes.fromhex(child.stdout.readline().split()[0])
        for _ in range(3):
            reader = here.open(setup)
            fetch = reader.fetch(Grant(0, STAMPS[0]), SIZE, 0)
            assert arrived(fetch) == (SIZE, SIZE)
            fetch.close()
            reader.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_peer_that_is_gone_or_silent_fails_what_is_read_of_it(
    here: Nixl, how: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixl_pump, "SILENCE_S", 1.0)
    with another_process(SOURCE, f"{how.name}/1") as child, another_process(SOURCE, "ok/1") as fine:
        reader = here.open(bytes.fromhex(child.stdout.readline().split()[0]))
        other = here.open(bytes.fromhex(fine.stdout.readline().split()[0]))
        first = reader.fetch(Grant(0, STAMPS[0]), SIZE, 0)
        assert arrived(first) == (SIZE, SIZE)
        first.close()
        child.send_signal(how)
        if how is signal.SIGKILL:
            child.wait()
        late = reader.fetch(Grant(1, STAMPS[1]), SIZE, 0)
        told = arrived(late)
        late.close()
        if how is signal.SIGKILL:
            assert isinstance(told, str), told
        else:
            # The kernel may read the memory of a process that stands still.
            assert told == (2 * SIZE, SIZE) or "nothing came" in told
        reader.close()
        for _ in range(5):  # and nobody else is any worse off: each place to land in is free again
            fetch = other.fetch(Grant(0, STAMPS[0]), SIZE, 0)
            assert arrived(fetch) == (SIZE, SIZE)
            fetch.close()
        other.close()


def test_a_setup_that_is_not_nixls_is_refused(here: Nixl) -> None:
    with pytest.raises(PeerError, match="malformed"):
        here.open(b"noise")


def test_without_staging_memory_there_is_none() -> None:
    with pytest.raises(PeerError, match="staging"):
        Nixl(None, "nobody/1", 2).setup()


def test_it_is_started_when_it_is_wanted() -> None:
    lazy = Nixl(HostRegion(1, SIZE), "lazy/1", 1)
    assert lazy.setup() == b""
    with pytest.raises(PeerError, match="being started") as caught:
        lazy.open(b"anything")
    assert "retry" in caught.value.hint
    assert wait_for(lazy.setup)
    lazy.close()
