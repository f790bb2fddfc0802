"""Messages about one stream come from several hosts, over several connections, in any order."""

from __future__ import annotations

import time
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec import structs

from sglang_star.config import StarConfig
from sglang_star.migration.home import Home
from sglang_star.migration.host import Guest, Host
from sglang_star.migration.incoming import Homecoming
from sglang_star.migration.outgoing import Outgoing
from sglang_star.migration.report import MoveLog
from sglang_star.migration.sender import Sender
from sglang_star.migration.states import (
    Hosting,
    Receiving,
    ReceivingEvent,
    Sending,
    SendingEvent,
)
from sglang_star.migration.target import Target
from sglang_star.migration.transport.choice import Transports
from sglang_star.protocol import (
    Commit,
    Inserted,
    MoveFacts,
    PagesReady,
    Parked,
    Peer,
    Release,
    Reserve,
    Route,
    TokenChunk,
)
from sglang_star.star_request import star_of
from unit.no_faults import NoFaults


def peer(name: str) -> Peer:
    return Peer(instance_id=name, incarnation=1, address=f"tcp://127.0.0.1:{ord(name)}")


A, B, C, D = map(peer, "abcd")
STREAM = "a/1/1"
FACTS = MoveFacts(
    source="?",
    reason="test",
    context_tokens=9,
    precopied_tokens=0,
    transport_bytes=0,
    step_ms=1.0,
    started_at=1.0,
)


def request(tokens: int = 4) -> Any:
    return SimpleNamespace(
        rid="r",
        output_ids=array("q", range(tokens)),
        origin_input_ids=[1, 2, 3],
        finished=lambda: False,
        seqlen=3 + tokens,
    )


def route(migration_id: str) -> Route:
    return Route(migration_id=migration_id, stream_id=STREAM, receiver=1)


def inserted(migration_id: str, host: Peer, moves: int, tokens: int = 6) -> Inserted:
    facts = structs.replace(FACTS, context_tokens=tokens + 3 - 1)
    return Inserted(route=route(migration_id), host=host, home=A, facts=facts, moves=moves)


def chunk(migration_id: str, index: int, *tokens: int, finished: bytes = b"") -> TokenChunk:
    return TokenChunk(
        migration_id=migration_id,
        stream_id=STREAM,
        index=index,
        token_ids=tokens,
        finished=finished,
    )


class AtHome:
    """Instance A with a request that it has just sent to B."""

    def __init__(self) -> None:
        self.req = request()
        self.sent: list[Any] = []
        self.joined: list[Any] = []
        self.engine: Any = SimpleNamespace(
            new_id=lambda: "id",
            page_size=1,
            token_bytes=8,
            now=time.monotonic,
            wall=time.time,
            tokens=lambda req: 3 + len(req.output_ids),
            release=lambda req, **_: None,
            weights=lambda: "default",
            join=lambda *args: self.joined.append(args),
        )
        self.log = MoveLog(self.engine)
        self.post: Any = SimpleNamespace(
            peer=A, send=lambda to, message: self.sent.append((to, message))
        )
        self.home = Home(self.engine, self.post, self.log, lambda stream, why: None, timeout_s=3.0)
        self.sender = Sender(
            self.engine,
            self.post,
            self.home,
            self.log,
            StarConfig(predictor="off"),
            "f",
            lambda stream: None,
            Transports([], time.monotonic),
        )
        self.log.clock(self.req)
        self.move = Outgoing(
            migration_id="to-b",
            stream_id=STREAM,
            req=self.req,
            client_rid="r",
            source=A,
            home=A,
            target=B,
            reason="test",
            token_bytes=8,
            step_ms=1.0,
            deadline=time.monotonic() + 60,
            started_at=time.time(),
        )
        for event in (SendingEvent.RESERVED, SendingEvent.PARK, SendingEvent.COMMIT):
            self.move.machine.fire(event)
        self.sender.moves["to-b"] = self.move

    def token(self) -> list[str]:
        """The client gets one; returns the moves reported so far."""
        self.log.token(self.req, self.log.clock(self.req))
        return [report.migration_id for report in self.log.reports]

    def hear(self, message: Any) -> None:
        self.sender.proven(message)
        if message.migration_id in self.sender.moves:
            self.sender.on_inserted(message)
        else:
            self.home.on_inserted(message)


def test_the_latest_host_counts_in_whatever_order_they_report() -> None:
    home = AtHome()
    home.hear(inserted("to-b", B, 1))
    home.hear(inserted("to-d", D, 3))
    home.hear(inserted("to-c", C, 2))
    shadow = home.home.shadows[STREAM]
    assert (shadow.host, shadow.migration_id) == (D, "to-d")
    assert star_of(home.req).moves == 3
    assert sorted(home.token()) == ["to-b", "to-c", "to-d"]
    home.hear(inserted("to-c", C, 2))
    assert len(home.token()) == 3, "reported once"
    assert home.sent == [], "nobody is told to let go of the stream"


def test_a_later_host_proves_that_the_target_has_the_request() -> None:
    home = AtHome()
    home.hear(inserted("to-c", C, 2))
    assert home.move.machine.state is Sending.HANDED_OVER
    assert home.home.shadows[STREAM].host == C
    home.hear(inserted("to-b", B, 1))
    assert home.home.shadows[STREAM].host == C
    assert sorted(home.token()) == ["to-b", "to-c"]
    assert home.sent == []


def test_so_does_a_token_of_a_later_host() -> None:
    home = AtHome()
    home.sender.proven(chunk("to-c", 4, 7))
    assert home.home.shadows[STREAM].host == B
    assert not home.sender.moves


def test_a_message_of_the_same_move_proves_nothing() -> None:
    home = AtHome()
    home.sender.proven(chunk("to-b", 4, 7))
    assert home.move.machine.state is Sending.COMMITTED


@pytest.fixture
def returning() -> SimpleNamespace:
    """A request that comes home from C with a token that home lacks: B's last one."""
    home = AtHome()
    home.hear(inserted("to-b", B, 1))
    home.hear(inserted("to-c", C, 2))
    req = home.req
    reserve = Reserve(
        route=route("to-a"),
        source=C,
        home=A,
        fingerprint="f",
        client_rid="r",
        request=b"",
        prompt_ids=b"",
        weights="default",
        context_tokens=7,
        max_new_tokens=9,
        moves=2,
        reason="test",
        offers=(),
    )
    target = Target(
        home.engine,
        home.post,
        home.home,
        SimpleNamespace(by_stream={}),  # type: ignore[arg-type]
        StarConfig(predictor="off"),
        "f",
        SimpleNamespace(leave=lambda way: None, forget=lambda peer: None),  # type: ignore[arg-type]
    )
    home.home._over = target.stay_away
    move = Homecoming(
        reserve=reserve,
        rid="r",
        way=SimpleNamespace(name="shm"),  # type: ignore[arg-type]
        deadline=time.monotonic() + 60,
        req=req,
        shadow=home.home.shadows[STREAM],
    )
    move.machine.fire(ReceivingEvent.SEAT)
    move.machine.fire(ReceivingEvent.PAGES)
    target.moves[STREAM] = target._by_rid["r"] = move
    return SimpleNamespace(home=home, move=move, target=target, joined=home.joined)


def commit(*tokens: int) -> Commit:
    return Commit(
        route=route("to-a"),
        weights="default",
        committed_tokens=3 + len(tokens) - 1,
        output_ids=tokens,
        penalty_log=(),
        predictor=b"",
        facts=FACTS,
    )


def test_a_commit_waits_for_the_last_tokens_of_an_earlier_host(returning: SimpleNamespace) -> None:
    returning.target.on_commit(commit(0, 1, 2, 3, 4))
    returning.target.step(NoFaults())
    assert not returning.joined
    assert returning.move.machine.state is Receiving.COMMITTED
    assert returning.home.sent == []
    returning.home.req.output_ids.append(4)
    returning.target.step(NoFaults())
    assert len(returning.joined) == 1
    assert returning.move.machine.state is Receiving.INSERTED
    assert not returning.home.home.shadows
    [(to, answer)] = returning.home.sent
    assert (to, answer.host, answer.moves) == (C, A, 3)


def test_a_stream_that_ends_at_home_does_not_come_there(returning: SimpleNamespace) -> None:
    home = returning.home
    home.engine.append = lambda req, tokens, details: req.output_ids.extend(tokens)
    home.engine.end = lambda req, reason: None
    home.home.on_chunk(chunk("to-c", 4, 7, finished=b'{"type": "stop"}'))
    assert not home.home.shadows
    [(to, answer)] = home.sent
    assert (to, answer.message) == (C, "the stream has ended at home")
    returning.target.on_commit(commit(0, 1, 2, 3))
    returning.target.step(NoFaults())
    assert not returning.joined


def test_pages_and_notices_of_another_move_are_not_this_ones(returning: SimpleNamespace) -> None:
    move, target = returning.move, returning.target
    target.on_parked(Parked(route=route("to-b"), step_ms=1e6))
    assert move.due == 0.0
    # None of the engine's verbs for pages is there: reaching one would raise.
    target.on_pages(PagesReady(route=route("to-b"), start=0, end=1, slot=0, stamp=1))
    target.on_release(Release(route=route("to-b"), reason="an earlier one"))
    assert returning.home.sent == []
    target.on_parked(Parked(route=route("to-a"), step_ms=1e6))
    assert move.due > 0.0


def test_a_former_host_speaks_only_of_what_the_present_one_came_with() -> None:
    home = AtHome()
    home.engine.append = lambda req, tokens, details: req.output_ids.extend(tokens)
    home.hear(inserted("to-b", B, 1, tokens=4))
    home.hear(inserted("to-c", C, 2, tokens=6))
    home.home.on_chunk(chunk("to-c", 6, 16))
    # B gave the stream away at 6 tokens; had it gone on, its seventh would be another one.
    home.home.on_chunk(chunk("to-b", 6, 99))
    home.home.on_chunk(chunk("to-b", 5, 15, 99))
    home.home.on_chunk(chunk("to-b", 4, 14, finished=b'{"type": "abort"}'))
    assert list(home.req.output_ids) == [0, 1, 2, 3]
    home.home.on_chunk(chunk("to-b", 4, 14, 15))
    assert list(home.req.output_ids) == [0, 1, 2, 3, 14, 15, 16]


def test_a_release_of_an_earlier_visit_does_not_end_this_one() -> None:
    ended: list[str] = []
    engine: Any = SimpleNamespace(abort=ended.append)
    host = Host(engine, SimpleNamespace(peer=B), timeout_s=3.0)  # type: ignore[arg-type]
    guest = Guest(
        req=request(),
        client_rid="r",
        stream_id=STREAM,
        migration_id="second",
        home=A,
        base=4,
        sent=4,
        confirmed_at=0.0,
    )
    host.take(guest)
    host.on_release(Release(route=route("first"), reason="late"))
    assert (guest.machine.state, ended) == (Hosting.RUNNING, [])
    host.on_release(Release(route=route("second"), reason="aborted"))
    assert (guest.machine.state, ended) == (Hosting.DROPPED, ["r"])


def test_a_commit_of_other_tokens_is_refused(returning: SimpleNamespace) -> None:
    returning.target.on_commit(commit(0, 1, 2, 99))
    assert not returning.joined
    [(to, answer)] = returning.home.sent
    assert (to, answer.message) == (C, "home has other tokens of this stream")
    assert returning.move.machine.state is Receiving.CANCELLED
    assert returning.home.home.shadows, "its host still has it"


def test_a_commit_before_the_pages_is_refused(returning: SimpleNamespace) -> None:
    returning.move.machine.state = Receiving.RESERVED
    returning.target.on_commit(commit(0, 1, 2, 3))
    [(_, answer)] = returning.home.sent
    assert answer.message == "commit before the pages"


def test_a_defect_while_a_move_arrives_refuses_it(returning: SimpleNamespace) -> None:
    parked = Parked(route=route("to-a"), step_ms=1.0)
    returning.target.abandon(parked, "a defect")
    [(to, answer)] = returning.home.sent
    assert (to, answer.message) == (C, "a defect")
    # A reservation that got nowhere is refused, too; of anything else nobody waits for an answer.
    returning.target.abandon(returning.move.reserve, "another")
    returning.target.abandon(parked, "another")
    assert [answer.message for _, answer in returning.home.sent] == ["a defect", "another"]
