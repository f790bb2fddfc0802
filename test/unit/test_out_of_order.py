"""Messages about one stream come from several hosts, over several connections, in any order."""

from __future__ import annotations

import time
from array import array
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_star.migration.arrival import Arrivals
from sglang_star.migration.guests import Guest, Guests
from sglang_star.migration.move import Move
from sglang_star.migration.relay import Relay
from sglang_star.migration.report import MoveLog
from sglang_star.migration.source import Source
from sglang_star.migration.states import (
    Home,
    HomeEvent,
    Target,
    TargetEvent,
    home_machine,
    target_machine,
)
from sglang_star.protocol import (
    Commit,
    Inserted,
    MoveFacts,
    PagesReady,
    Parked,
    Peer,
    Reserve,
    TokenChunk,
)
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


def address(migration_id: str) -> dict[str, Any]:
    return {
        "migration_id": migration_id,
        "stream_id": STREAM,
        "sender_incarnation": 1,
        "receiver_incarnation": 1,
    }


def inserted(migration_id: str, host: Peer, moves: int) -> Inserted:
    return Inserted(**address(migration_id), host=host, facts=FACTS, moves=moves)


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
            join=lambda *args: self.joined.append(args),
        )
        self.log = MoveLog(self.engine)
        self.post: Any = SimpleNamespace(
            peer=A, send=lambda to, message: self.sent.append((to, message))
        )
        self.relay = Relay(
            self.engine, self.post, self.log, lambda stream, why: None, timeout_s=3.0
        )
        self.source = Source(
            self.engine,
            self.post,
            self.relay,
            self.log,
            None,  # type: ignore[arg-type]
            "f",
            lambda stream: None,
        )
        self.log.clock(self.req)
        self.move = Move(
            migration_id="to-b",
            stream_id=STREAM,
            req=self.req,
            client_rid="r",
            source=A,
            home=A,
            target=B,
            reason="test",
            carrier=SimpleNamespace(close=lambda: None),  # type: ignore[arg-type]
            slot_tokens=8,
            token_bytes=8,
            step_ms=1.0,
            deadline=time.monotonic() + 60,
            started_at=time.time(),
            machine=home_machine(),
        )
        for event in (HomeEvent.ORDER, HomeEvent.RESERVED, HomeEvent.PARK, HomeEvent.COMMIT):
            self.move.machine.fire(event)
        self.source.moves["to-b"] = self.move

    def token(self) -> list[str]:
        """The client gets one; returns the moves reported so far."""
        self.log.token(self.req)
        return [report.migration_id for report in self.log.reports]

    def hear(self, message: Any) -> None:
        self.source.proven(message)
        if message.migration_id in self.source.moves:
            self.source.on_inserted(message)
        else:
            self.relay.on_inserted(message)


def test_the_latest_host_counts_in_whatever_order_they_report() -> None:
    home = AtHome()
    home.hear(inserted("to-b", B, 1))
    home.hear(inserted("to-d", D, 3))
    home.hear(inserted("to-c", C, 2))
    shadow = home.relay.shadows[STREAM]
    assert (shadow.host, shadow.migration_id) == (D, "to-d")
    assert home.req._star_moves == 3
    assert sorted(home.token()) == ["to-b", "to-c", "to-d"]
    home.hear(inserted("to-c", C, 2))
    assert len(home.token()) == 3, "reported once"
    assert home.sent == [], "nobody is told to let go of the stream"


def test_a_later_host_proves_that_the_target_has_the_request() -> None:
    home = AtHome()
    home.hear(inserted("to-c", C, 2))
    assert home.move.machine.state is Home.SHADOW
    assert home.relay.shadows[STREAM].host == C
    home.hear(inserted("to-b", B, 1))
    assert home.relay.shadows[STREAM].host == C
    assert sorted(home.token()) == ["to-b", "to-c"]
    assert home.sent == []


def test_so_does_a_token_of_a_later_host() -> None:
    home = AtHome()
    home.source.proven(TokenChunk(**address("to-c"), index=4, token_ids=(7,)))
    assert home.relay.shadows[STREAM].host == B
    assert not home.source.moves


def test_a_message_of_the_same_move_proves_nothing() -> None:
    home = AtHome()
    home.source.proven(TokenChunk(**address("to-b"), index=4, token_ids=(7,)))
    assert home.move.machine.state is Home.COMMITTED


@pytest.fixture
def returning() -> SimpleNamespace:
    """A request that comes home from C with a token that home lacks: B's last one."""
    home = AtHome()
    home.hear(inserted("to-b", B, 1))
    home.hear(inserted("to-c", C, 2))
    req = home.req
    guests = Guests(home.engine, home.post, SimpleNamespace())  # type: ignore[arg-type]
    reserve = Reserve(
        **address("to-a"),
        source=C,
        home=A,
        fingerprint="f",
        client_rid="r",
        request=b"",
        prompt_ids=b"",
        context_tokens=7,
        max_new_tokens=9,
        moves=2,
        reason="test",
        transport="shm",
        transport_setup=b"",
    )
    guest = Guest(
        reserve=reserve,
        rid="r",
        carrier=SimpleNamespace(close=lambda: None),  # type: ignore[arg-type]
        deadline=time.monotonic() + 60,
        confirmed_at=time.monotonic(),
        comes_home=True,
        machine=target_machine(),
        req=req,
    )
    guest.machine.fire(TargetEvent.PAGES)  # type: ignore[union-attr]
    guests.add(guest)
    arrivals = Arrivals(
        home.engine,
        home.post,
        home.relay,
        guests,
        SimpleNamespace(),  # type: ignore[arg-type]
        "f",
    )
    return SimpleNamespace(
        home=home, guest=guest, guests=guests, arrivals=arrivals, joined=home.joined
    )


def commit(*tokens: int) -> Commit:
    return Commit(
        **address("to-a"),
        committed_tokens=3 + len(tokens) - 1,
        output_ids=tokens,
        penalty_log=(),
        predictor=b"",
        facts=FACTS,
    )


def test_a_commit_waits_for_the_last_tokens_of_an_earlier_host(returning: SimpleNamespace) -> None:
    returning.arrivals.on_commit(commit(0, 1, 2, 3, 4))
    returning.arrivals.step(NoFaults())
    assert not returning.joined
    assert returning.guest.arriving
    assert returning.home.sent == []
    returning.home.req.output_ids.append(4)
    returning.arrivals.step(NoFaults())
    assert len(returning.joined) == 1
    assert returning.guest.machine.state is Target.INSERTED
    assert not returning.home.relay.shadows
    [(to, answer)] = returning.home.sent
    assert (to, answer.host, answer.moves) == (C, A, 3)


def test_a_commit_for_a_stream_that_has_ended_is_refused(
    returning: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(returning.guests, "drop", lambda guest, why: None)
    del returning.home.relay.shadows[STREAM]
    returning.arrivals.on_commit(commit(0, 1, 2, 3))
    assert not returning.joined
    [(to, answer)] = returning.home.sent
    assert (to, answer.message) == (C, "the stream has ended at home")


def test_pages_and_notices_of_another_move_are_not_this_ones(returning: SimpleNamespace) -> None:
    guest, arrivals = returning.guest, returning.arrivals
    arrivals.on_parked(Parked(**address("to-b"), step_ms=1e6))
    assert guest.due == 0.0
    # None of the engine's verbs for pages is there: reaching one would raise.
    arrivals.on_pages(PagesReady(**address("to-b"), start=0, end=1, slot=0))
    assert returning.home.sent == []
    arrivals.on_parked(Parked(**address("to-a"), step_ms=1e6))
    assert guest.due > 0.0
