from __future__ import annotations

import os

import msgspec
import pytest

from sglang_star.errors import PeerError
from sglang_star.migration.transport import carrier
from sglang_star.migration.transport.shm import SharedMemoryCarrier


def named(carrier: SharedMemoryCarrier) -> bool:
    """Whether the segment still has a name, so that it would outlive both sides."""
    return os.path.exists(f"/dev/shm/{msgspec.msgpack.decode(carrier.setup)[0]}")


def test_what_one_side_writes_the_other_reads() -> None:
    sender = SharedMemoryCarrier.send(3, 1024)
    receiver = SharedMemoryCarrier.receive(sender.setup)
    sender.slot(2).fill_(7)
    assert int(receiver.slot(2).sum()) == 7 * 1024
    assert int(receiver.slot(1).sum()) == 0
    sender.connected()
    assert not named(sender)
    receiver.slot(0).fill_(1)
    assert int(sender.slot(0).sum()) == 1024
    sender.close()
    receiver.close()


def test_closing_early_leaves_nothing_behind() -> None:
    sender = SharedMemoryCarrier.send(1, 64)
    assert named(sender)
    sender.close()
    sender.close()
    assert not named(sender)
    with pytest.raises(PeerError, match="no slot"):
        sender.slot(0)


@pytest.mark.parametrize(
    "setup",
    [
        b"noise",
        msgspec.msgpack.encode(["../etc/passwd", 1, 64]),
        msgspec.msgpack.encode(["star-kv-" + "0" * 16, 1, 64]),
        msgspec.msgpack.encode(["star-kv-" + "0" * 16, -1, 64]),
        msgspec.msgpack.encode(["star-kv-" + "0" * 16 + "/../x", 1, 64]),
    ],
)
def test_a_setup_that_is_not_ours_is_refused(setup: bytes) -> None:
    with pytest.raises(PeerError):
        SharedMemoryCarrier.receive(setup)


def test_a_segment_of_another_size_is_refused() -> None:
    sender = SharedMemoryCarrier.send(2, 64)
    name, slots, size = msgspec.msgpack.decode(sender.setup)
    with pytest.raises(PeerError, match="another size"):
        SharedMemoryCarrier.receive(msgspec.msgpack.encode([name, slots + 1, size]))
    sender.close()


def test_an_unknown_carrier_is_named() -> None:
    with pytest.raises(PeerError, match="pigeon"):
        carrier("pigeon")
