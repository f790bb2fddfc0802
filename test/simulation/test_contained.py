"""A defect costs the move it happens in: the streams go on, and all is given back."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_star.errors import MalformedMessage
from sglang_star.faults import Faults
from sglang_star.protocol import (
    DisarmOrder,
    MigrateOrder,
    OrderReply,
    Peer,
    StatusOrder,
    TokenChunk,
    Tokens,
    UndrainOrder,
)
from simulation.history import History
from simulation.node import Node, Watcher
from simulation.plan import EngineShape, Event, Plan
from simulation.run import quiet
from simulation.tokens import Spec

SPEC = Spec("r0", (5, 6, 7), 120, 10**9, -1, 0.0)


def there_and_on(*, spec: Spec = SPEC, path: str = "bca") -> History:
    shape = EngineShape(page_size=4, pages=100, rows=8, overlap=True, step_s=0.02)
    follow = Event(0.3, "follow", ("r0", path, 0, 0.1), False)
    return History(Plan(1, dict.fromkeys("abc", shape), 16, ((0.0, "a", spec),), (follow,)))


@pytest.mark.parametrize("error", [RuntimeError("a defect"), MalformedMessage("not that")])
@pytest.mark.parametrize("host", "abc")
@pytest.mark.parametrize(
    "verb",
    [
        "gather",
        "extend",
        "scatter",
        "seat",
        "rebuild",
        "adopt",
        "join",
        "append",
        "details",
        "describe",
        "state",
        "written",
    ],
)
def test_a_defect_costs_one_move(
    verb: str, host: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet()
    monkeypatch.setattr(Watcher, "_note", Faults._note)
    history = there_and_on()
    history.gentle = False  # what cannot be told or taken in is reclaimed
    node = history.nodes[host]
    original = getattr(node.engine, verb)
    left = [error]

    def fails_once(req: Any, *args: Any, **kwargs: Any) -> Any:
        own_prefill = verb in ("seat", "extend") and not str(req.rid).startswith("star-guest")
        if left and history.clock.now > 0.3 and not own_prefill:
            raise left.pop()
        return original(req, *args, **kwargs)

    setattr(node.engine, verb, fails_once)
    assert not history.run(), history.trace
    assert history.clients["r0"].seen == SPEC.max_new_tokens


def test_a_finish_reason_that_is_none() -> None:
    quiet()
    history = there_and_on(path="b")
    home = history.nodes["a"]

    def strike() -> None:
        (shadow,) = home.mover.home.shadows.values()
        for finished in (b"{", b"[]"):
            chunk = TokenChunk(
                migration_id=shadow.migration_id,
                stream_id=shadow.stream_id,
                index=len(shadow.req.output_ids),
                token_ids=(1,),
                finished=finished,
            )
            home.arrived(Tokens(receiver=1, chunks=(chunk,)), urgent=True)

    history.clock.at(1.0, strike)
    assert not history.run()
    assert history.clients["r0"].seen == SPEC.max_new_tokens


# ------------------------------------------------------------------ what is refused, and why


def ask(node: Node, order: Any) -> OrderReply:
    return node.orders.obey(order)


def move(target: Peer, rid: str = "r0", **more: Any) -> MigrateOrder:
    return MigrateOrder(order_id=1, rid=rid, target=target, **more)


def test_orders_that_are_refused_say_why() -> None:
    quiet()
    history = there_and_on(path="b")
    a, b = history.nodes["a"], history.nodes["b"]
    said: list[str] = []

    def early() -> None:
        engine: Any = a.engine
        said.append(ask(a, move(a.peer)).message)
        said.append(ask(a, move(a.peer, at_tokens=3, expire_s=1.0)).message)
        said.append(ask(a, move(b.peer, at_tokens=3, expire_s=-1.0)).message)
        said.append(ask(a, OrderReply(order_id=1)).message)
        engine.unsupported = "it has odd KV"
        said.append(ask(a, move(b.peer)).message)
        assert not ask(a, move(b.peer, "r*", at_tokens=1, expire_s=5.0)).error_type
        engine.unsupported = ""
        engine.pinned = lambda req: "a session"
        said.append(ask(a, move(b.peer)).message)
        assert not ask(a, move(b.peer, "r0", at_tokens=2, expire_s=5.0)).error_type
        a.orders.step()  # cannot ever start: reported, and forgotten
        del engine.pinned
        engine.serves_decode = False
        said.append(ask(a, move(b.peer)).message)
        engine.serves_decode = True
        assert not ask(a, move(b.peer, "r1", at_tokens=1, expire_s=5.0)).error_type
        assert ask(a, DisarmOrder(order_id=1, rid="r1")).payload.count(b"a1.") == 1

    def later() -> None:
        said.append(ask(a, move(b.peer)).message)
        assert ask(a, UndrainOrder(order_id=1)).payload == b'{"draining":false}'

    history.clock.at(0.2, a.input, early)
    history.clock.at(1.0, a.input, later)
    assert not history.run(), history.failure
    wanted = ("already runs on a", "no target of its own", "cannot wait", "unknown order")
    wanted += ("odd KV", "uses a session", "prefill instance", "decodes on b now")
    assert [want for want, got in zip(wanted, said, strict=True) if want not in got] == []
    assert a.mover.log.outcomes["disarmed"] == 1
    assert a.mover.log.outcomes["refused"] == 1
    assert a.mover.log.recent()


def test_a_status_is_told_as_json() -> None:
    history = there_and_on(path="b")
    a = history.nodes["a"]
    a.orders._status = lambda: a.peer  # type: ignore[assignment, return-value]
    assert b'"instance_id":"a"' in ask(a, StatusOrder(order_id=1)).payload


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("fingerprint", "another model"),
        ("draining", "draining"),
        ("guests", "as many guests"),
        ("slot", "no request slot"),
        ("seat", "no request slot"),
        ("retracted", "wait for it here"),
        ("kept", "kept for requests to grow"),
        ("refuses", "does not accept"),
        ("ends", "Aborted"),
    ],
)
def test_a_target_that_cannot_says_why(how: str, why: str) -> None:
    quiet()
    history = there_and_on(path="b")
    node = history.nodes["b"]
    mover, engine = node.mover, node.engine
    odd: Any = engine
    if how == "fingerprint":
        mover.target._fingerprint = "another"
    elif how == "draining":
        mover.target.draining = True
    elif how == "guests":
        object.__setattr__(history.config, "max_guests", 0)
    else:
        name, answer = {
            "slot": ("has_slot", False),
            "seat": ("seat", False),
            "retracted": ("retracted", 2),
            "kept": ("kept_free", 10**6),
            "refuses": ("rebuild", None),
            "ends": ("refusal", "Aborted"),
        }[how]
        setattr(odd, name, lambda *args: answer)
    assert not history.run(), history.failure
    reports = history.nodes["a"].mover.log.reports
    assert [report.outcome for report in reports] == ["refused"]
    assert why in reports[0].detail
