"""Staging memory, and how one process reads another's."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sglang_star.config import StarConfig
from sglang_star.errors import PeerError
from sglang_star.migration.transport import memory
from sglang_star.migration.transport.base import Grant
from sglang_star.migration.transport.build import MAX_SLOT, slot_shape
from sglang_star.migration.transport.memory import HostRegion, checksum
from sglang_star.migration.transport.shm import Setup, SharedMemory
from sglang_star.migration.transport.slots import Slots

SOURCE = """
import sys
sys.path[:0] = sys.argv[1:2]
from sglang_star.migration.transport.memory import HostRegion
from sglang_star.migration.transport.shm import SharedMemory

region = HostRegion(3, 1 << 20)
grant = region.grant()
region.view(grant).fill_(7)
print(SharedMemory(region).setup().hex(), grant.index, grant.stamp, flush=True)
for line in sys.stdin:
    region.give(grant)
    grant = region.grant()
    print(grant.stamp, flush=True)
"""


@contextmanager
def another_process(text: str, *arguments: str) -> Iterator[Any]:
    package = str(Path(__file__).resolve().parents[2] / "python")
    child = subprocess.Popen(
        [sys.executable, "-c", text, package, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def test_slots_are_granted_alike_on_every_rank() -> None:
    one, other = Slots(3), Slots(3)
    for slots in (one, other):
        assert [slots.take(), slots.take()] == [0, 1]
        slots.give(0)
        assert [slots.take(), slots.take(), slots.take()] == [0, 2, None]
        slots.give(1)
        assert len(slots) == 1
    for wrong in (1, 3, -1):
        with pytest.raises(ValueError, match="not taken"):
            one.give(wrong)


def test_every_grant_has_a_stamp_of_its_own() -> None:
    region = HostRegion(2, 64)
    first = region.grant()
    assert first is not None
    reader = SharedMemory(region).open(SharedMemory(region).setup())
    region.view(first).fill_(9)
    fetch = reader.fetch(first, 64, 0)
    data = fetch.arrived()
    assert data is not None
    assert data.tolist() == [9] * 64
    assert fetch.intact()
    region.give(first)
    assert fetch.intact(), "nobody has written there since"
    second = region.grant()
    assert second == Grant(first.index, first.stamp + 1)
    assert not fetch.intact()


def test_one_process_reads_anothers_memory_until_that_is_granted_again() -> None:
    with another_process(SOURCE) as child:
        setup, index, stamp = child.stdout.readline().split()
        reader = SharedMemory(None).open(bytes.fromhex(setup))
        fetch = reader.fetch(Grant(int(index), int(stamp)), 1 << 20, 0)
        data = fetch.arrived()
        assert data is not None
        assert int(data.sum()) == 7 << 20
        child.stdin.write("again\n")
        child.stdin.flush()
        assert child.stdout.readline()
        assert not fetch.intact()
        child.kill()
        child.wait()
        assert int(data.sum()) == 7 << 20, "what is mapped outlives its process"
        with pytest.raises(PeerError, match="not reachable"):
            SharedMemory(None).open(bytes.fromhex(setup))
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("star-")]


THIEF = """
import os, sys
path = f"/proc/{sys.argv[2]}/fd/{sys.argv[3]}"
descriptor = os.open(path, os.O_RDWR)
for size in (0, 1 << 30):
    try:
        os.ftruncate(descriptor, size)
        print("done", flush=True)
    except PermissionError:
        print("refused", flush=True)
sys.stdin.read()
"""
READER = """
import sys
sys.path[:0] = sys.argv[1:2]
from sglang_star.migration.transport.base import Grant
from sglang_star.migration.transport.shm import SharedMemory

reader = SharedMemory(None).open(bytes.fromhex(sys.argv[2]))
fetch = reader.fetch(Grant(0, 1), 1 << 20, 0)
print(int(fetch.arrived().sum()), flush=True)
sys.stdin.readline()
print(int(fetch.arrived().sum()), fetch.intact(), flush=True)
"""


def test_nobody_takes_memory_away_that_others_read_and_write() -> None:
    """Of a mapping that is longer than its memory, the first touch ends the process (SIGBUS)."""
    region = HostRegion(3, 1 << 20)
    grant = region.grant()
    assert grant is not None
    region.view(grant).fill_(7)
    with another_process(READER, SharedMemory(region).setup().hex()) as reader:
        assert reader.stdout.readline() == f"{7 << 20}\n"
        with another_process(THIEF, str(os.getpid()), str(region.descriptor)) as thief:
            assert [thief.stdout.readline() for _ in range(2)] == ["refused\n"] * 2
        reader.stdin.write("again\n")
        reader.stdin.flush()
        assert reader.stdout.readline() == f"{7 << 20} True\n"
        assert reader.wait() == 0
    region.view(grant).fill_(8)
    assert int(region.view(grant).sum()) == 8 << 20


def test_memory_that_its_owner_can_take_away_is_not_mapped() -> None:
    region = HostRegion(2, 64)
    loose = os.memfd_create(memory.name_of("0" * 16), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(loose, region.size)
    setup = of(region, token="0" * 16, descriptor=loose)
    with pytest.raises(PeerError, match="could be taken away"):
        SharedMemory(None).open(setup)
    fcntl.fcntl(loose, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    SharedMemory(None).open(setup)
    os.close(loose)


def test_what_was_corrupted_is_not_taken() -> None:
    region = HostRegion(1, 64)
    transport = SharedMemory(region)
    grant = region.grant()
    assert grant is not None
    region.view(grant).fill_(1)
    right = region.checksum(grant, 64)
    assert right == checksum(region.view(grant))
    reader = transport.open(transport.setup())
    assert reader.fetch(grant, 64, right).arrived() is not None
    region.view(grant)[3] = 2
    with pytest.raises(PeerError, match="corrupted"):
        reader.fetch(grant, 64, right).arrived()


def test_what_nobody_wants_any_more_fails() -> None:
    region = HostRegion(1, 64)
    transport = SharedMemory(region)
    fetch = transport.open(transport.setup()).fetch(Grant(0, 1), 64, 0)
    fetch.cancel()
    with pytest.raises(PeerError, match="nobody wants"):
        fetch.arrived()


@pytest.mark.parametrize(("index", "size"), [(-1, 8), (2, 8), (0, 65), (0, 0)])
def test_there_is_no_slot_beyond_the_last(index: int, size: int) -> None:
    region = HostRegion(2, 64)
    transport = SharedMemory(region)
    with pytest.raises(PeerError, match="no "):
        transport.open(transport.setup()).fetch(Grant(index, 1), size, 0)


def of(region: HostRegion, **other: Any) -> bytes:
    setup = msgspec.msgpack.decode(SharedMemory(region).setup(), type=Setup)
    return msgspec.msgpack.encode(msgspec.structs.replace(setup, **other))


@pytest.mark.parametrize(
    "other",
    [
        {"token": "0" * 16},
        {"token": "../../etc/passwd"},
        {"process": 1},
        {"process": -1},
        {"descriptor": 0},
        {"descriptor": -1},
        {"slots": 0},
        {"slots": 3},
        {"slot_bytes": -64},
        {"slots": 1 << 40},
    ],
)
def test_a_setup_that_is_not_ours_is_refused(other: dict[str, Any]) -> None:
    region = HostRegion(2, 64)
    with pytest.raises(PeerError):
        SharedMemory(None).open(of(region, **other))
    for noise in (b"noise", b"\x95\x01\x01\xa2\xe3a\x01\x01", b"\x91" * 100_000):
        with pytest.raises(PeerError):
            SharedMemory(None).open(noise)


def test_staging_larger_than_memory_is_refused_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1 << 20)
    with pytest.raises(PeerError, match="1 MB are available") as caught:
        HostRegion(2, 1 << 20)
    assert "--star-staging-mb" in caught.value.hint
    with pytest.raises(PeerError):
        SharedMemory(None).setup()


def test_a_region_is_no_larger_than_its_pool_and_a_slot_holds_a_page() -> None:
    config = StarConfig(predictor="off", staging_mb=128.0, max_moves=4)
    slots, size = slot_shape(config, 57_344, 10 << 30)
    assert slots == 16
    assert 7_000_000 < size <= 8_000_000
    assert slot_shape(config, 512, 1 << 20) == (16, 1 << 16)
    assert slot_shape(config, 1 << 26, 1 << 40)[1] == 1 << 26
    huge = StarConfig(predictor="off", staging_mb=10_000.0)
    assert slot_shape(huge, 57_344, 1 << 40)[1] <= MAX_SLOT
