"""The loop, its limits, and the orders operators give."""

from __future__ import annotations

import asyncio

import orjson
import pytest

from router.fleet import FakeEngine, eventually, fleet, request_status
from router.test_proxy import run
from sglang_star_router.policy.snapshot import MoveOrder


class Scripted:
    """A policy that orders what the test says."""

    name = "scripted"

    def __init__(self) -> None:
        self.script = lambda snapshot: []
        self.snapshots = []

    def orders(self, snapshot):
        self.snapshots.append(snapshot)
        return self.script(snapshot)


def always(*orders):
    return lambda snapshot: list(orders)


def order(rid, source, target, **fields):
    return MoveOrder(rid, source.name, target.name, "test", 1.5, {"why": 2.0}, **fields)


def history(running):
    return list(running.router.ledger)


def test_order_is_sent_reported_and_explained():
    async def check():
        policy = Scripted()
        a, b = FakeEngine(), FakeEngine()
        async with fleet(a, b, policies={"rescheduler_policy": policy}) as running:
            await running.publish(a, request_status("r1"), kv_used_tokens=5000)
            await running.publish(b, kv_used_tokens=1000)
            policy.script = always(order("r1", a, b))
            await eventually(lambda: a.orders)
            sent = {"rid": "r1", "target": b.url, "peer": b.peer, "reason": "test"}
            assert a.orders == [("migrate", sent)]
            await eventually(lambda: history(running)[0].state == "accepted")
            # While it moves it is not movable, and the policy sees the move.
            await eventually(lambda: policy.snapshots[-1].instances.moves_out.tolist() == [1, 0])
            assert policy.snapshots[-1].instances.moves_in.tolist() == [0, 1]
            assert not policy.snapshots[-1].requests.movable.any()
            report = a.report(f"{a.name}/1/1", "r1", b, stall_ms=33.0, finished_at=7.0)
            await running.publish(a, moves=(report,))
            await running.publish(b, request_status("r1"))
            await running.publish(a, moves=(report,))
            shown = orjson.loads((await running.get("/star/migrations"))[1])
            assert shown["outcomes"] == {"moved": 1}
            (row,) = shown["migrations"]
            assert row["state"] == "moved"
            assert (row["reason"], row["expected_gain"], row["explain"]) == (
                "test", 1.5, {"why": 2.0},
            )  # fmt: skip
            assert row["stall_ms"] == 33.0
            assert row["kv_share_before"] == [0.5, 0.1]
            assert len(a.orders) == 1, "the cool-down was not kept"
            text = (await running.get("/metrics"))[1].decode()
            assert 'star_router_migrations_total{outcome="moved"} 1.0' in text

    run(check())


@pytest.mark.parametrize(
    ("reply", "state", "words"),
    [
        ((409, {"error": {"type": "NotMovable", "message": "beam", "hint": ""}}), "refused",
         "beam"),
        ((404, {"error": {"type": "UnknownRequest", "message": "gone", "hint": ""}}), "refused",
         "gone"),
        ((404, {"detail": "Not Found"}), "refused", "no /star/migrate"),
        ((503, {"error": {"type": "PeerError", "message": "dead", "hint": ""}}), "failed", "dead"),
        ((202, {}), "failed", "202"),
        ((202, []), "failed", "202"),
    ],
)  # fmt: skip
def test_refused_order_is_recorded_and_the_loop_goes_on(reply, state, words):
    async def check():
        policy = Scripted()
        a, b = FakeEngine(migrate_reply=lambda body: reply), FakeEngine()
        async with fleet(a, b, policies={"rescheduler_policy": policy}) as running:
            policy.script = always(order("r1", a, b))
            await eventually(lambda: history(running) and not history(running)[0].open)
            assert history(running)[0].state == state
            assert words in history(running)[0].detail
            rounds = running.router.rescheduler.rounds
            await eventually(lambda: running.router.rescheduler.rounds > rounds + 2)
            assert len(a.orders) == 1

    run(check())


def test_policy_that_raises_does_not_end_the_loop(caplog):
    async def check():
        policy = Scripted()
        a, b = FakeEngine(), FakeEngine()

        def broken(snapshot):
            raise ZeroDivisionError("defect")

        async with fleet(a, b, policies={"rescheduler_policy": policy}) as running:
            policy.script = broken
            await eventually(lambda: running.router.rescheduler.errors >= 3)
            assert sum("round failed" in r.getMessage() for r in caplog.records) == 1
            policy.script = always(order("r1", a, b))
            await eventually(lambda: a.orders)
            assert (await running.post("/generate", {"text": "a"}))[0] == 200
            text = (await running.get("/metrics"))[1].decode()
            errors = running.router.rescheduler.errors
            assert f"star_router_rescheduler_errors_total {float(errors)}" in text

    run(check())


def test_orders_to_nowhere_are_skipped():
    async def check():
        policy = Scripted()
        a, b, c = FakeEngine(), FakeEngine(), FakeEngine()
        async with fleet(a, b, policies={"rescheduler_policy": policy}) as running:
            policy.script = always(
                order("r1", a, c), order("r2", c, a), order("r3", a, a),
                order("r4", a, b, mode="recompute"),
            )  # fmt: skip
            skipped = running.router.rescheduler.skipped
            await eventually(lambda: skipped["endpoints"] >= 3 and skipped["mode"] >= 1)
            assert a.orders == b.orders == []

    run(check())


def test_limits_on_concurrency_and_rate():
    async def check():
        policy = Scripted()
        a, b = FakeEngine(), FakeEngine()
        policies = {"rescheduler_policy": policy}
        async with fleet(a, b, policies=policies, max_moves=2) as running:
            policy.script = always(*(order(f"r{i}", a, b) for i in range(5)))
            await eventually(lambda: running.router.rescheduler.skipped["concurrency"] >= 6)
            await eventually(lambda: len(a.orders) >= 2)
            assert [body["rid"] for _, body in a.orders] == ["r0", "r1"]
        a, b = FakeEngine(), FakeEngine()
        async with fleet(
            a, b, policies=policies, max_moves=99, max_moves_per_second=0.001
        ) as running:
            policy.script = always(*(order(f"r{i}", a, b) for i in range(5)))
            await eventually(lambda: running.router.rescheduler.skipped["rate"] >= 4)
            await eventually(lambda: a.orders)
            assert len(a.orders) == 1

    run(check())


def test_move_without_report_is_lost_and_its_late_report_still_counts():
    async def check():
        policy = Scripted()
        a, b = FakeEngine(), FakeEngine()
        async with fleet(
            a, b, policies={"rescheduler_policy": policy}, move_report_timeout=0.2
        ) as running:
            policy.script = always(order("r1", a, b))
            await eventually(lambda: a.orders)
            policy.script = always()
            await eventually(lambda: history(running)[0].state == "lost")
            assert running.router.ledger.outcomes["lost"] == 1
            await running.publish(a, moves=(a.report(f"{a.name}/1/1", "r1", b),))
            assert history(running)[0].state == "moved"
            assert running.router.ledger.outcomes == {"moved": 1, "lost": 0}

    run(check())


def test_report_that_overtakes_the_reply_is_not_counted_twice():
    async def check():
        a, b = FakeEngine(), FakeEngine()
        async with fleet(a, b) as running:
            await running.publish(a, request_status("r1"))
            ledger = running.router.ledger
            migration = ledger.ordered(order("r1", a, b), "operator")
            await running.publish(a, moves=(a.report("m1", "r1", b, stall_ms=5.0),))
            ledger.accepted(migration, "m1")
            assert [one.state for one in ledger] == ["moved"]
            assert migration.stall_ms == 5.0
            assert ledger.outcomes == {"moved": 1}
            assert ledger.open_count == 0

    run(check())


def test_source_that_dies_ends_its_moves():
    async def check():
        policy = Scripted()
        a, b = FakeEngine(), FakeEngine()
        async with fleet(a, b, policies={"rescheduler_policy": policy}) as running:
            policy.script = always(order("r1", a, b))
            await eventually(lambda: a.orders)
            policy.script = always()
            await a.stop()
            await eventually(lambda: running.router.ledger.open_count == 0)
            assert history(running)[0].state == "lost"

    run(check())


def test_moves_the_engines_made_themselves_are_shown():
    async def check():
        a, b = FakeEngine(), FakeEngine()
        async with fleet(a, b) as running:
            await running.publish(a, moves=(a.report("drain-1", "r9", b, reason="drain"),))
            (row,) = orjson.loads((await running.get("/star/migrations"))[1])["migrations"]
            assert (row["rid"], row["ordered_by"], row["state"]) == ("r9", "engine", "moved")

    run(check())


def test_stale_instance_is_no_target():
    async def check():
        policy = Scripted()
        a, b = FakeEngine(), FakeEngine()
        policies = {"rescheduler_policy": policy}
        async with fleet(a, b, policies=policies, status_stale=0.3) as running:

            def accepting():
                return policy.snapshots[-1].instances.accepts.tolist() if policy.snapshots else None

            while accepting() != [True, False]:
                await running.publish(a)
            await eventually(lambda: accepting() == [False, False])
            # Requests are still served: silence is no reason to refuse them.
            assert (await running.post("/generate", {"text": "a"}))[0] == 200

    run(check())


@pytest.mark.parametrize(
    ("other", "reason", "words"),
    [
        ({"fingerprint": "another"}, "fingerprint", "model"),
        ({"host_token": "elsewhere"}, "host", "share no memory"),
        ({"host_token": ""}, "host", "share no memory"),
        ({"host_token": "elsewhere", "transports": ("nixl",)}, "transport", "in common"),
    ],
)
def test_instances_that_cannot_exchange_requests_are_told_apart(other, reason, words, caplog):
    async def check():
        policy = Scripted()
        a, b, c = FakeEngine(), FakeEngine(), FakeEngine(**other)
        async with fleet(a, b, c, policies={"rescheduler_policy": policy}) as running:
            await eventually(lambda: policy.snapshots)
            first, second, third = policy.snapshots[-1].instances.group.tolist()
            assert first == second != third
            # Whatever a policy says: what cannot come about is not ordered.
            policy.script = always(order("r1", a, c))
            await eventually(lambda: running.router.rescheduler.skipped["endpoints"] >= 2)
            assert a.orders == []
            shown = orjson.loads((await running.get("/star/cluster"))[1])["instances"]
            kept_apart = {row["name"]: row["no_moves_with"] for row in shown}
            assert set(kept_apart[a.name]) == set(kept_apart[b.name]) == {c.name}
            assert set(kept_apart[c.name]) == {a.name, b.name}
            assert words in kept_apart[a.name][c.name]
            text = (await running.get("/metrics"))[1].decode()
            assert f'star_router_pairs_without_moves{{reason="{reason}"}} 2.0' in text
            # Described again, and again: said once of each pair.
            for engine in (a, b, c):
                running.router.health.doubt(running.instance(engine))
            instances = [running.instance(engine) for engine in (a, b, c)]
            await eventually(lambda: all(one.described for one in instances))
            said = [r.getMessage() for r in caplog.records if "no request can move" in r.msg]
            assert sum(text.count(c.name) for text in said if a.name in text) == 1
            assert sum(text.count(c.name) for text in said if b.name in text) == 1
            # And drained to whom it can.
            assert (await running.post("/star/drain", {"instance": a.name}))[0] == 200
            assert a.orders == [("drain", {"targets": [b.url], "peers": [b.peer]})]
            body = {"instance": b.name, "targets": [c.name]}
            assert (await running.post("/star/drain", body))[0] == 409

    run(check())


def test_instances_of_two_machines_exchange_requests_where_both_have_a_network_transport():
    async def check():
        policy = Scripted()
        a = FakeEngine(transports=("shm", "nixl"))
        b = FakeEngine(transports=("nixl",), host_token="elsewhere")
        async with fleet(a, b, policies={"rescheduler_policy": policy}) as running:
            await eventually(lambda: policy.snapshots)
            first, second = policy.snapshots[-1].instances.group.tolist()
            assert first == second
            assert running.router.fleet.obstacles.between(a.name, b.name) is None

    run(check())


# --------------------------------------------------------------------------- operators


def test_operator_moves_a_request():
    async def check():
        a, b = FakeEngine(gate=asyncio.Event()), FakeEngine()
        async with fleet(a, b) as running:
            await running.publish(a, request_status("r1"))
            status, body = await running.post("/star/migrate", {"rid": "r1", "target": b.name})
            assert status == 202
            assert orjson.loads(body)["migration_id"] == f"{a.name}/1/1"
            assert a.orders[0][1]["target"] == b.url
            assert a.orders[0][1]["peer"] == b.peer
            again = await running.post("/star/migrate", {"rid": "r1", "target": b.url})
            assert again[0] == 409

    run(check())


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "not JSON"),
        (b"[]", 400, "object"),
        (b'{"rid": 5, "target": "x"}', 400, "rid"),
        (b'{"rid": "r1"}', 400, "target"),
        (b'{"rid": "nope", "target": "x"}', 404, "nope"),
        (b'{"rid": "r1", "target": "nowhere"}', 409, "nowhere"),
        (b'{"rid": "r1", "target": "SELF"}', 409, "already"),
    ],
)
def test_operator_errors_name_the_remedy(body, status, words):
    async def check():
        a = FakeEngine()
        async with fleet(a) as running:
            await running.publish(a, request_status("r1"))
            data = body.replace(b"SELF", a.name.encode())
            async with running.session.post(running.url + "/star/migrate", data=data) as response:
                error = (await response.json())["error"]
            assert response.status == status
            assert set(error) == {"type", "message", "hint"}
            assert words in error["message"]
            assert a.orders == []

    run(check())


def test_engine_refusal_reaches_the_operator():
    async def check():
        refusal = {"error": {"type": "NotMovable", "message": "multimodal", "hint": "wait"}}
        a, b = FakeEngine(migrate_reply=lambda body: (409, refusal)), FakeEngine()
        async with fleet(a, b) as running:
            await running.publish(a, request_status("r1"))
            status, body = await running.post("/star/migrate", {"rid": "r1", "target": b.name})
            assert status == 409
            assert orjson.loads(body)["error"]["message"] == "multimodal"

    run(check())


def test_drain_and_undrain():
    async def check():
        a, b, c = FakeEngine(), FakeEngine(), FakeEngine()
        async with fleet(a, b, c) as running:
            for engine in (a, b, c):
                await running.publish(engine)
            status, _ = await running.post("/star/drain", {"instance": a.name})
            assert status == 200
            expected = {"targets": [b.url, c.url], "peers": [b.peer, c.peer]}
            assert a.orders == [("drain", expected)]
            for _ in range(4):
                await running.post("/generate", {"text": "a"})
            assert a.requests == []
            status, _ = await running.post("/star/migrate", {"rid": "r1", "target": a.name})
            assert status == 404
            await running.publish(b, request_status("r1"))
            status, _ = await running.post("/star/migrate", {"rid": "r1", "target": a.name})
            assert status == 409
            assert (await running.post("/star/undrain", {"instance": a.url}))[0] == 200
            for _ in range(3):
                await running.post("/generate", {"text": "a"})
            assert len(a.requests) == 1

    run(check())


def test_drain_errors():
    async def check():
        a, b = FakeEngine(), FakeEngine()
        async with fleet(a, b) as running:
            assert (await running.post("/star/drain", {"instance": "nope"}))[0] == 404
            assert (await running.post("/star/drain", {}))[0] == 400
            assert (await running.post("/star/drain", {"instance": a.name, "targets": "x"}))[
                0
            ] == 400
            body = {"instance": a.name, "targets": [a.name]}
            assert (await running.post("/star/drain", body))[0] == 409
            await a.stop()
            assert (await running.post("/star/drain", {"instance": a.name}))[0] == 503
            assert not running.instance(a).held_back

    run(check())
