"""What ranks agree on, between two processes."""

from __future__ import annotations

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from sglang_star.migration.mailbox import OrderEnvelope
from sglang_star.migration.post import PeerLost
from sglang_star.protocol import (
    Heartbeat,
    MigrateOrder,
    Peer,
    Reserved,
    Route,
    TokenChunk,
    Tokens,
)
from sglang_star.ranks.clock import StepClock
from sglang_star.ranks.ledger import Ledger
from sglang_star.ranks.posts import HeldPost
from sglang_star.ranks.step import StepInput
from unit.rank import member

HERE = Peer(instance_id="a", incarnation=1, address="tcp://127.0.0.1:1")
THERE = Peer(instance_id="b", incarnation=1, address="tcp://127.0.0.1:2")
ROUTE = Route(migration_id="m", stream_id="s", receiver=1)


def step(*items: Any, seed: bytes = b"seed", now: float = 1.0) -> StepInput:
    return StepInput(items=items, now=now, wall=2.0, seed=seed, step_ms=3.0)


def tokens(*ids: int) -> Tokens:
    chunk = TokenChunk(migration_id="m", stream_id="s", index=0, token_ids=ids, remaining=(1.0,))
    return Tokens(receiver=1, chunks=(chunk,))


# --------------------------------------------------------------------------- one rank's part


def test_an_input_arrives_as_it_left() -> None:
    order = MigrateOrder(order_id=1, rid="r", target=THERE)
    sent = step(
        Reserved(route=ROUTE, transport="shm"), PeerLost(THERE, "gone"), OrderEnvelope(b"x", order)
    )
    assert pickle.loads(pickle.dumps(sent)) == sent
    assert sent.moves


def test_tokens_and_heartbeats_are_about_no_move() -> None:
    assert not step(tokens(1), Heartbeat(sender=THERE, receiver=1, live=())).moves


def test_ranks_derive_the_same_names_and_no_name_twice() -> None:
    clocks = StepClock(), StepClock()
    names = []
    for seed in (b"one", b"two"):
        for clock in clocks:
            clock.advance(step(seed=seed, now=7.0))
        for _ in range(3):
            [name] = {clock.new_id() for clock in clocks}
            names.append(name)
    assert len(set(names)) == 6
    assert {(clock.now(), clock.wall(), clock.step_ms) for clock in clocks} == {(7.0, 2.0, 3.0)}


def test_what_is_said_within_a_tick_leaves_after_it() -> None:
    left: list[Any] = []
    through: Any = type("Through", (), {"send": lambda self, to, message: left.append(message)})()
    post = HeldPost(HERE, Ledger(), through)
    post.hold()
    post.send(THERE, Reserved(route=ROUTE, transport="shm"))
    assert left == []
    post.release()
    post.send(THERE, tokens(1))
    assert left == [Reserved(route=ROUTE, transport="shm"), tokens(1)]


def test_the_ledger_sees_another_token_and_no_estimate() -> None:
    one, same, other = Ledger(), Ledger(), Ledger()
    one.note(tokens(1, 2))
    chunk = TokenChunk(migration_id="m", stream_id="s", index=0, token_ids=(1, 2))
    same.note(Tokens(receiver=1, chunks=(chunk,)))
    other.note(tokens(1, 3))
    assert one.sum == same.sum != other.sum


# --------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    place = str(tmp_path_factory.mktemp("ranks") / "meeting")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        return list(pool.map(member, (0, 1), (place, place)))


def test_all_ranks_get_what_each_gave(seen: list[dict[str, Any]]) -> None:
    expected = [(b"", b""), (b"", b"x"), (bytes(range(9)), bytes(range(8)))]
    assert [one["gathered"] for one in seen] == [expected, expected]
    assert [one["least"] for one in seen] == [(0, -1, 5), (0, -1, 5)]


def test_each_rank_reads_what_its_own_number_wrote(seen: list[dict[str, Any]]) -> None:
    assert [one["read"] for one in seen] == [7, 8]
    assert seen[0]["offers"] == seen[1]["offers"]


def test_what_one_rank_lacks_none_offers(seen: list[dict[str, Any]]) -> None:
    assert all("on all ranks" in one["setup"] for one in seen)


def test_what_one_rank_cannot_open_none_has(seen: list[dict[str, Any]]) -> None:
    assert "another rank" in seen[0]["open"]
    assert "no memory" in seen[1]["open"]


def test_a_fetch_that_cannot_begin_fails_as_one_that_did(seen: list[dict[str, Any]]) -> None:
    assert all("slot 9" in one["missing"] for one in seen)
