from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_star import protocol
from sglang_star.errors import MalformedMessage, VersionMismatch

PEER = protocol.Peer(instance_id="a", incarnation=7, address="tcp://127.0.0.1:1")
FACTS = protocol.MoveFacts(
    source="a",
    reason="overflow",
    context_tokens=10,
    precopied_tokens=9,
    transport_bytes=512,
    step_ms=3.5,
    started_at=1.0,
)
ROUTE = protocol.Route(migration_id="m", stream_id="a/7/1", receiver=8)
CHUNK = protocol.TokenChunk(
    migration_id="m",
    stream_id="a/7/1",
    index=3,
    token_ids=(5,),
    remaining=(1.0, 2.0, 3.0, 4.0, 5.0),
)
MESSAGES = [
    protocol.Parked(route=ROUTE, step_ms=30.0),
    protocol.PagesReady(route=ROUTE, start=0, end=16, slot=2, stamp=7),
    protocol.Commit(
        route=ROUTE,
        weights="default",
        committed_tokens=10,
        output_ids=(1, 2),
        penalty_log=(1,),
        predictor=b"x",
        facts=FACTS,
    ),
    protocol.Inserted(route=ROUTE, host=PEER, home=PEER, facts=FACTS, moves=2),
    protocol.Tokens(receiver=8, chunks=(CHUNK, CHUNK)),
    protocol.Heartbeat(receiver=8, sender=PEER, live=("a/7/1",)),
    protocol.MigrateOrder(order_id=1, rid="r", target=PEER),
    protocol.MigrateOrder(
        order_id=2, rid="r*", target=PEER, at_tokens=20, hold_after=0, expire_s=60.0
    ),
    protocol.DisarmOrder(order_id=3, rid="r*"),
    protocol.InstanceStatus(
        instance_id="a",
        incarnation=7,
        sequence=1,
        role="decode",
        wall_s=0.0,
        monotonic_s=0.0,
        step_ms_ema=1.0,
        step_ms_p99=2.0,
        kv_capacity_tokens=100,
        kv_used_tokens=10,
        kv_reserved_tokens=0,
        running=1,
        queued=0,
        retracted=0,
        requests=(
            protocol.RequestStatus(rid="r", prompt_tokens=3, output_tokens=4, max_new_tokens=9),
        ),
    ),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_round_trip(message: protocol.Message) -> None:
    assert protocol.decode(protocol.encode(message)) == message


def test_another_version_is_named() -> None:
    data = msgspec.msgpack.encode((protocol.PROTOCOL_VERSION + 1, MESSAGES[0]))
    with pytest.raises(VersionMismatch, match=str(protocol.PROTOCOL_VERSION + 1)):
        protocol.decode(data)


@given(st.binary(max_size=200))
def test_noise_is_malformed(data: bytes) -> None:
    with pytest.raises((MalformedMessage, VersionMismatch)):
        protocol.decode(data)


@given(st.sampled_from(MESSAGES), st.data())
def test_a_damaged_message_is_refused_or_decodes_to_a_message(
    message: protocol.Message, data: st.DataObject
) -> None:
    wire = bytearray(protocol.encode(message))
    place = data.draw(st.integers(0, len(wire) - 1))
    wire[place] ^= data.draw(st.integers(1, 255))
    try:
        decoded = protocol.decode(bytes(wire))
    except (MalformedMessage, VersionMismatch):
        return
    assert isinstance(decoded, protocol.Message)


def test_pickle_is_not_understood() -> None:
    import pickle

    with pytest.raises(MalformedMessage):
        protocol.decode(pickle.dumps({"a": 1}))
