"""A request that is held for its move: out of the batch at once, copied then, back if it fails."""

from __future__ import annotations

import itertools
import time
from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_star.config import StarConfig
from sglang_star.errors import NoTransport, OrderRefused
from sglang_star.migration.report import MoveLog
from sglang_star.migration.sender import Sender
from sglang_star.migration.states import Sending
from sglang_star.migration.transport.choice import Transports
from sglang_star.migration.transport.memory import HostRegion
from sglang_star.migration.transport.shm import SharedMemory
from sglang_star.protocol import (
    Commit,
    PagesReady,
    PagesTaken,
    Peer,
    Refused,
    Release,
    Reserved,
    Route,
)
from unit.no_faults import NoFaults

HERE = Peer(instance_id="a", incarnation=1, address="tcp://127.0.0.1:1")
THERE = Peer(instance_id="b", incarnation=1, address="tcp://127.0.0.1:2")
PROMPT, BUDGET, PAGE = 500, 64, 16


class Engine:
    """Instance A between two steps: the verbs that its sender uses.

    Attributes:
        batch: requests that decode; in_flight: whether a step of those parked is not over yet.
        copies_last: whether no copy is over; error: of those that are.
    """

    unsupported = ""
    page_size = PAGE
    token_bytes = 8

    def __init__(self) -> None:
        self.batch: list[Any] = []
        self.in_flight = False
        self.copies_last = False
        self.error = ""
        self.sent: list[Any] = []
        self.ids = map(str, itertools.count())
        self.region = HostRegion(4 * StarConfig(predictor="off").max_moves, 8 * BUDGET)
        self.transports = Transports([SharedMemory(self.region)], time.monotonic)
        self.log = MoveLog(self)  # type: ignore[arg-type]
        self.sender = Sender(
            self,  # type: ignore[arg-type]
            SimpleNamespace(peer=HERE, send=lambda to, message: self.sent.append(message)),
            SimpleNamespace(shadows={}),  # type: ignore[arg-type]
            self.log,
            StarConfig(copy_mb_per_step=(8 * BUDGET + 0.5) / 1e6, predictor="off"),
            "f",
            lambda stream: None,
            self.transports,
        )

    def now(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()

    def new_id(self) -> str:
        return next(self.ids)

    def is_running(self, req: Any) -> bool:
        return req in self.batch

    def is_ending(self, req: Any) -> bool:
        return bool(req.to_finish)

    def pinned(self, req: Any) -> str:
        return ""

    def tokens(self, req: Any) -> int:
        return PROMPT + len(req.output_ids)

    def max_new_tokens(self, req: Any) -> int:
        return 99

    def written(self, req: Any) -> int:
        return PROMPT + len(req.output_ids) - 1

    def is_settled(self, req: Any) -> bool:
        return not self.in_flight

    def park(self, req: Any) -> None:
        self.batch.remove(req)

    def unpark(self, req: Any) -> None:
        self.batch.append(req)

    def describe(self, req: Any) -> tuple[bytes, bytes]:
        return b"", b""

    def state(self, req: Any) -> tuple[tuple[int, ...], bytes]:
        return (), b""

    def weights(self) -> str:
        return "default"

    def gather(self, req: Any, start: int, end: int, slot: Any) -> int:
        return 1

    def copied(self, ticket: int) -> bool:
        return not self.copies_last

    def failure(self, ticket: int) -> str:
        return self.error

    def release(self, req: Any, *, keep_prefix: bool) -> None:
        pass

    def request(self, tokens: int = 5) -> Any:
        ended: list[bool] = []
        req = SimpleNamespace(
            rid="r",
            output_ids=array("q", range(tokens)),
            to_finish=None,
            ended=ended,
            finished=lambda: bool(ended),
        )
        self.batch.append(req)
        return req

    def start(self, req: Any, hold_after: int | None = 0) -> Any:
        return self.sender.start(req, "r", THERE, "test", step_ms=1.0, hold_after=hold_after)

    def answer(self, kind: type[Any], move: Any, **fields: Any) -> Any:
        route = Route(migration_id=move.migration_id, stream_id=move.stream_id, receiver=1)
        return kind(route=route, **fields)

    def refuse(self, move: Any) -> None:
        refusal = self.answer(Refused, move, error_type="OrderRefused", message="full")
        self.sender.on_refused(refusal)

    def all_of(self, kind: type[Any]) -> list[Any]:
        return [message for message in self.sent if isinstance(message, kind)]

    def step(self, token_for: Any = None) -> None:
        """One step of the scheduler: the target empties every slot, running requests decode."""
        for move in list(self.sender.moves.values()):
            for stamp in list(move.filled):
                self.sender.on_taken(self.answer(PagesTaken, move, stamp=stamp))
        for req in self.batch:
            req.output_ids.append(0)
        self.sender.step(NoFaults())


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine()
    yield made
    on_their_way = sum(move.on_their_way for move in made.sender.moves.values())
    assert made.region.free == made.region.slots - on_their_way


def test_held_at_once_it_waits_and_is_then_copied_within_the_budget(engine: Engine) -> None:
    req = engine.request()
    move = engine.start(req)
    assert move.machine.state is Sending.HELD
    assert engine.batch == []
    engine.step()
    assert engine.all_of(PagesReady) == []
    engine.sender.on_reserved(engine.answer(Reserved, move, transport="shm"))
    before, steps = 0, 0
    while move.machine.state is not Sending.COMMITTED:
        engine.step()
        assert move.sent - before <= BUDGET
        before, steps = move.sent, steps + 1
    pieces = engine.all_of(PagesReady)
    assert [piece.start for piece in pieces[1:]] == [piece.end for piece in pieces[:-1]]
    [commit] = engine.all_of(Commit)
    assert pieces[-1].end == commit.committed_tokens == PROMPT + 5 - 1
    assert commit.facts.precopied_tokens == 0
    assert steps >= commit.committed_tokens // BUDGET


@pytest.mark.parametrize("tokens", [5, 13], ids=["within a page", "at the end of a page"])
def test_the_step_in_flight_still_counts(engine: Engine, tokens: int) -> None:
    req = engine.request(tokens)
    engine.in_flight = True
    move = engine.start(req)
    engine.sender.on_reserved(engine.answer(Reserved, move, transport="shm"))
    for _ in range(20):
        engine.step()
    # All whole pages went, and no commit before the last token is known.
    assert move.sent == (PROMPT + tokens - 1) // PAGE * PAGE
    assert move.machine.state is Sending.PARKED
    req.output_ids.append(0)
    engine.in_flight = False
    engine.step()
    [commit] = engine.all_of(Commit)
    assert len(commit.output_ids) == tokens + 1
    assert move.sent == commit.committed_tokens == PROMPT + tokens


@pytest.mark.parametrize("reserved", [False, True])
def test_refused_it_is_back_in_the_batch_with_the_next_step(engine: Engine, reserved: bool) -> None:
    req = engine.request()
    engine.in_flight = True
    move = engine.start(req)
    if reserved:
        engine.sender.on_reserved(engine.answer(Reserved, move, transport="shm"))
        engine.step()
    engine.refuse(move)
    # Its KV is not complete before the result of the step in flight is in.
    assert move.machine.state is Sending.RESUMING
    assert engine.batch == []
    assert move.off_batch
    for late in (Reserved, PagesTaken):
        taken = late is PagesTaken
        message = engine.answer(late, move, **({"stamp": 1} if taken else {"transport": "shm"}))
        (engine.sender.on_taken if taken else engine.sender.on_reserved)(message)
    engine.refuse(move)
    engine.sender.on_lost(THERE, "gone")
    engine.in_flight = False
    engine.step()
    assert engine.batch == [req]
    assert engine.sender.moves == {}
    assert [report.outcome for report in engine.log.reports] == ["refused"]
    # And it can move again.
    assert engine.start(req).machine.state is Sending.HELD


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        (lambda engine, move: engine.sender.on_lost(THERE, "silent"), "failed"),
        (lambda engine, move: setattr(move, "deadline", 0.0), "failed"),
        (lambda engine, move: engine.refuse(move), "refused"),
    ],
    ids=["lost", "late", "refused"],
)
def test_whatever_ends_the_move_the_request_decodes_on(
    engine: Engine, end: Any, outcome: str
) -> None:
    req = engine.request()
    move = engine.start(req)
    end(engine, move)
    engine.step()
    assert engine.batch == [req]
    assert [report.outcome for report in engine.log.reports] == [outcome]
    # A target that is merely slow is told to let go; one that refused holds nothing.
    assert len(engine.all_of(Release)) == (outcome == "failed")


@pytest.mark.parametrize("refused", [False, True])
def test_a_request_that_ends_with_its_step_in_flight_is_not_put_back(
    engine: Engine, refused: bool
) -> None:
    req = engine.request()
    engine.in_flight = True
    move = engine.start(req)
    if refused:
        engine.refuse(move)
    req.ended.append(True)
    engine.in_flight = False
    engine.step()
    assert engine.batch == []
    assert engine.sender.moves == {}
    outcomes = [report.outcome for report in engine.log.reports]
    assert outcomes == ["refused" if refused else "cancelled"]


def test_held_later_it_decodes_so_many_tokens_before(engine: Engine) -> None:
    req = engine.request()
    move = engine.start(req, hold_after=3)
    for tokens in (6, 7):
        engine.step()
        assert (len(req.output_ids), move.machine.state) == (tokens, Sending.RESERVING)
    engine.step()
    assert (len(req.output_ids), move.machine.state) == (8, Sending.HELD)


def test_held_while_copying_it_keeps_what_was_copied(engine: Engine) -> None:
    req = engine.request()
    move = engine.start(req, hold_after=2)
    engine.sender.on_reserved(engine.answer(Reserved, move, transport="shm"))
    engine.step()
    assert move.machine.state is Sending.COPYING
    engine.step()
    assert move.machine.state is Sending.PARKED
    copied = move.precopied
    assert 0 < copied < PROMPT
    for _ in range(20):
        engine.step()
    [commit] = engine.all_of(Commit)
    assert commit.facts.precopied_tokens == copied
    assert commit.committed_tokens == PROMPT + len(req.output_ids) - 1


def test_those_that_wait_are_copied_before_those_that_decode(engine: Engine) -> None:
    decoding, waiting = engine.request(), engine.request()
    first = engine.start(decoding, hold_after=None)
    second = engine.start(waiting)
    for move in (first, second):
        engine.sender.on_reserved(engine.answer(Reserved, move, transport="shm"))
    engine.step()
    assert (first.sent, second.sent) == (0, BUDGET)


def test_a_request_moves_once_at_a_time_and_not_all_at_once(engine: Engine) -> None:
    first = engine.request()
    engine.start(first)
    with pytest.raises(OrderRefused, match="already moving"):
        engine.start(first)
    with pytest.raises(OrderRefused, match="already runs on"):
        engine.sender.start(engine.request(), "r", HERE, "test", step_ms=1.0)
    for _ in range(StarConfig().max_moves - 1):
        engine.start(engine.request())
    late = engine.request()
    with pytest.raises(OrderRefused, match="the most allowed"):
        engine.start(late)
    assert engine.batch[-1] is late


def test_a_move_without_any_transport_is_refused(engine: Engine) -> None:
    engine.transports._kinds = (SharedMemory(None),)
    req = engine.request()
    with pytest.raises(NoTransport, match="shm: no staging memory"):
        engine.start(req)
    assert engine.batch == [req]
    assert engine.sender.moves == {}


def test_a_target_that_knows_another_transport_costs_the_move(engine: Engine) -> None:
    req = engine.request()
    move = engine.start(req)
    engine.sender.on_reserved(engine.answer(Reserved, move, transport="pigeon"))
    assert engine.batch == [req]
    [report] = engine.log.reports
    assert (report.outcome, "pigeon" in report.detail) == ("failed", True)


def test_its_slots_go_back_once_they_are_not_written_any_more(engine: Engine) -> None:
    move = engine.start(engine.request())
    engine.copies_last = True
    engine.sender.on_reserved(engine.answer(Reserved, move, transport="shm"))
    engine.step()
    assert len(move.loading) == 1
    assert engine.all_of(PagesReady) == [], "it is still being gathered"
    engine.refuse(move)
    assert engine.region.free == engine.region.slots - 1
    engine.copies_last = False
    engine.step()
    assert engine.region.free == engine.region.slots


def test_a_copy_that_fails_costs_the_move(engine: Engine) -> None:
    req = engine.request()
    move = engine.start(req)
    engine.error = "the device is gone"
    engine.sender.on_reserved(engine.answer(Reserved, move, transport="shm"))
    engine.step()
    assert engine.batch == [req]
    [report] = engine.log.reports
    assert (report.outcome, report.detail) == ("failed", "the device is gone")
