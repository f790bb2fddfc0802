"""What the router believes of its fleet, and what it refuses to believe."""

from __future__ import annotations

import asyncio
import logging

import msgspec
import orjson
import pytest

from router.fleet import FakeEngine, eventually, fleet, request_status
from router.test_proxy import run
from sglang_star.protocol import PROTOCOL_VERSION, InstanceStatus, encode
from sglang_star_router.fleet import Verdict


def dropped(running, engine):
    """Messages of one engine dropped for what they are; ``publish`` itself repeats some."""
    counts = running.router.feed.dropped
    return {
        reason: n for (url, reason), n in counts.items() if url == engine.url and reason != "stale"
    }


def test_status_becomes_visible_to_policies_and_operators():
    async def check():
        engine = FakeEngine()
        async with fleet(engine) as running:
            await running.publish(
                engine,
                request_status("r1", 100, 5, remaining=(1.0, 2.0, 3.0, 4.0, 5.0)),
                request_status("r2", 50, 0, queued=True),
                kv_used_tokens=105,
            )
            cluster = orjson.loads((await running.get("/star/cluster"))[1])
            (shown,) = cluster["instances"]
            assert shown["name"] == engine.name
            assert shown["status"]["kv_used_tokens"] == 105
            assert [r["rid"] for r in shown["status"]["requests"]] == ["r1", "r2"]
            snapshot = running.router.dispatcher._snapshots.for_arrival()
            assert snapshot.instances.ids == (engine.name,)
            assert snapshot.requests.rids == ("r1", "r2")
            assert snapshot.requests.remaining[0].tolist() == [1, 2, 3, 4, 5]
            assert list(snapshot.requests.queued) == [False, True]

    run(check())


def test_the_promise_of_an_estimate_is_held_against_how_a_request_ended():
    def estimated(rid: str, output: int, remaining: float, **fields):
        quantiles = tuple(remaining * share for share in (0.5, 0.7, 1.0, 1.5, 2.0))
        return request_status(rid, output=output, remaining=quantiles, **fields)

    async def check():
        first = FakeEngine()
        async with fleet(first) as running:
            await running.publish(
                first,
                estimated("early", 5, 9.0),
                estimated("held", 20, 100.0),
                estimated("too-long", 20, 100.0),
                estimated("to-the-limit", 20, 500.0, max_new_tokens=150),
                request_status("untold", output=20),
            )
            # The first estimate counts, whatever is said later.
            await running.publish(
                first,
                estimated("held", 120, 900.0),
                estimated("too-long", 500, 1.0),
                estimated("to-the-limit", 150, 1.0, max_new_tokens=150),
            )
            await running.publish(first)
            cluster = orjson.loads((await running.get("/star/cluster"))[1])
            assert (cluster["predictor_judged"], cluster["predictor_kept"]) == (3, 2)
            assert cluster["predictor_kept_corrected"] == 2  # nothing to correct by so far
            text = (await running.get("/metrics"))[1].decode()
            assert "star_router_predictor_judged_total 3.0" in text
            assert "star_router_predictor_kept_total 2.0" in text

    run(check())


@pytest.mark.parametrize("calibrate", [True, False])
def test_estimates_are_corrected_by_how_earlier_ones_turned_out(calibrate):
    short = {"remaining": (5.0, 7.0, 10.0, 15.0, 20.0)}

    async def check():
        engine = FakeEngine()
        async with fleet(engine, calibrate=calibrate) as running:
            first = [f"r{i}" for i in range(64)]
            await running.publish(engine, *(request_status(r, output=20, **short) for r in first))
            await running.publish(
                engine, *(request_status(r, output=90 + i) for i, r in enumerate(first))
            )
            await running.publish(engine, request_status("next", output=20, **short))
            (median,) = running.router.dispatcher._snapshots.for_arrival().requests.remaining[:, 2]
            assert 60 < median < 110 if calibrate else median == 10
            await running.publish(engine, request_status("next", output=120))
            await running.publish(engine)
            band = running.router.fleet.lengths.band
            assert (band.judged, band.kept, band.kept_corrected) == (65, 0, int(calibrate))

    run(check())


def test_a_request_ended_between_two_statuses():
    async def check():
        engine = FakeEngine()
        async with fleet(engine) as running:
            lengths = running.router.fleet.lengths
            await running.publish(
                engine,
                request_status("goes-on", output=100),
                request_status("ends", output=50),
                request_status("at-limit", output=60, max_new_tokens=62),
                request_status("never-ran", output=0, queued=True),
            )
            await running.publish(engine, request_status("goes-on", output=120))
            assert list(lengths.recent) == [60, 62, 0]

    run(check())


def test_a_request_between_two_instances_has_not_finished():
    async def check():
        source, target = FakeEngine(gate=asyncio.Event()), FakeEngine()
        async with fleet(source, target) as running:
            cluster = running.router.fleet
            running.instance(target).held_back = True
            request = asyncio.create_task(running.post("/generate", {"text": "a", "stream": True}))
            await eventually(lambda: source.active)
            rid = source.requests[0]["rid"]
            said = {"remaining": (50.0, 70.0, 100.0, 150.0, 200.0)}
            await running.publish(source, request_status(rid, output=20, **said))
            await running.publish(source)  # handed over; the target's status is still to come
            assert list(cluster.lengths.recent) == []
            await running.publish(target, request_status(rid, output=120, **said))
            await running.publish(target)
            assert (list(cluster.lengths.recent), cluster.lengths.band.judged) == ([], 0)
            source.gate.set()
            await request
            await eventually(lambda: list(cluster.lengths.recent) == [120])
            assert (
                cluster.lengths.band.judged,
                cluster.lengths.band.kept,
                cluster.lengths._gone,
            ) == (1, 1, {})

    run(check())


def test_a_restart_judges_no_estimate():
    async def check():
        engine = FakeEngine()
        async with fleet(engine) as running:
            await running.publish(
                engine, request_status("r", output=20, remaining=(1.0, 2.0, 3.0, 4.0, 5.0))
            )
            band = running.router.fleet.lengths.band
            assert len(band._promised) == 1
            engine.incarnation = 2
            await engine.publish(engine.status())  # another incarnation: described afresh
            await eventually(lambda: running.instance(engine).restarts == 1)
            assert (band.judged, band._promised) == (0, {})

    run(check())


def test_another_head_begins_with_a_clean_slate():
    async def check():
        engine = FakeEngine(predictor="old")
        async with fleet(engine) as running:
            lengths = running.router.fleet.lengths
            for restart, (head, forgotten) in enumerate([("old", False), ("new", True)], 1):
                before = lengths.calibration
                engine.incarnation, engine.predictor = engine.incarnation + 1, head
                await engine.publish(engine.status())
                await eventually(lambda count=restart: running.instance(engine).restarts == count)
                assert (lengths.calibration is not before) == forgotten

    run(check())


def test_policies_know_what_each_engine_keeps_free_for_growth():
    async def check():
        engines = FakeEngine(), FakeEngine(reserve=64)
        async with fleet(*engines) as running:
            for engine in engines:
                await running.publish(engine)
            instances = running.router.dispatcher._snapshots.for_arrival().instances
            assert instances.ids == tuple(engine.name for engine in engines)
            assert instances.reserve_each.tolist() == [512, 64]
            assert instances.guest_reserve.tolist() == [0, 0], "aggregated engines keep none"

    run(check())


def test_garbage_and_foreign_versions_are_counted_logged_once_and_harmless(caplog):
    # SGLang, once imported by another test, raises the root logger's level.
    caplog.set_level(logging.WARNING, logger="sglang_star_router")

    async def check():
        engine = FakeEngine()
        async with fleet(engine) as running:
            await running.publish(engine, request_status("r1"))
            other = msgspec.msgpack.encode((PROTOCOL_VERSION + 1, ["InstanceStatus"]))
            unexpected = encode(engine.status())[:-1]
            for garbage in (b"", b"\x00" * 100, b"\xc1", other, unexpected, b"\x93" * 9000):
                await engine.publish(garbage)
                await engine.publish(garbage)
            await eventually(lambda: sum(dropped(running, engine).values()) == 12)
            assert dropped(running, engine) == {"MalformedMessage": 10, "VersionMismatch": 2}
            warnings = [r for r in caplog.records if "dropping messages" in r.getMessage()]
            assert len(warnings) == 2
            await running.publish(engine, request_status("r2"))
            assert running.instance(engine).table.rids == ("r2",)
            text = (await running.get("/metrics"))[1].decode()
            assert f'instance="{engine.url}",reason="VersionMismatch"}} 2.0' in text

    run(check())


def test_duplicate_late_and_foreign_statuses_are_ignored():
    async def check():
        engine = FakeEngine()
        async with fleet(engine) as running:
            cluster, instance = running.router.fleet, running.instance(engine)
            assert cluster.apply(instance, engine.status(sequence=10)) is Verdict.TAKEN
            late = engine.status((request_status("old"),), sequence=9)
            assert cluster.apply(instance, late) is Verdict.STALE
            assert cluster.apply(instance, engine.status(sequence=10)) is Verdict.STALE
            ghost = msgspec.structs.replace(engine.status(sequence=99), incarnation=7)
            assert cluster.apply(instance, ghost) is Verdict.OTHER_INCARNATION
            stranger = msgspec.structs.replace(engine.status(sequence=99), instance_id="x")
            assert cluster.apply(instance, stranger) is Verdict.OTHER_INSTANCE
            assert instance.status.sequence == 10
            assert instance.table.rids == ()
            assert cluster.apply(instance, engine.status(sequence=11)) is Verdict.TAKEN

    run(check())


def test_restart_on_another_status_port_is_followed():
    async def check():
        engine = FakeEngine()
        async with fleet(engine, status_stale=0.3) as running:
            instance = running.instance(engine)
            await running.publish(engine, request_status("before"), sequence=500)
            await engine.restart()
            await eventually(lambda: instance.restarts == 1, "restart noticed")
            assert instance.table.rids == ()
            await running.until_healthy(engine)
            # Sequence numbers begin again, and count.
            await running.publish(engine, request_status("after"))
            assert instance.table.rids == ("after",)
            assert instance.status.incarnation == 2

    run(check())


def test_status_of_a_new_incarnation_leads_to_a_new_description():
    async def check():
        engine = FakeEngine()
        async with fleet(engine, health_check_interval=30.0) as running:
            instance = running.instance(engine)
            await running.publish(engine)
            engine.incarnation = 2

            async def keep_publishing():
                while True:
                    await engine.publish(engine.status((request_status("new"),)))
                    await asyncio.sleep(0.02)

            task = asyncio.create_task(keep_publishing())
            await eventually(lambda: instance.table.rids == ("new",))
            task.cancel()
            assert instance.restarts == 1
            assert dropped(running, engine)["other_incarnation"] >= 1

    run(check())


def test_unhealthy_instance_is_excluded_and_readmitted():
    async def check():
        sick, well = FakeEngine(), FakeEngine()
        async with fleet(sick, well) as running:
            sick.health_status = 503
            await eventually(lambda: not running.instance(sick).healthy)
            for _ in range(4):
                assert (await running.post("/generate", {"text": "a"}))[0] == 200
            assert sick.requests == []
            assert (await running.get("/health"))[0] == 200
            well.health_status = 500
            await eventually(lambda: not running.instance(well).healthy)
            status, body = await running.get("/health")
            assert status == 503
            assert orjson.loads(body)["missing"] == ["aggregated"]
            sick.health_status = 200
            await running.until_healthy(sick)
            assert (await running.post("/generate", {"text": "a"}))[0] == 200
            assert len(sick.requests) == 1

    run(check())


def test_dead_instance_comes_back():
    async def check():
        engine, other = FakeEngine(), FakeEngine()
        async with fleet(engine, other) as running:
            await engine.stop()
            for _ in range(3):
                assert (await running.post("/generate", {"text": "a"}))[0] == 200
            assert not running.instance(engine).healthy
            assert "cannot connect" in running.instance(engine).trouble
            await engine.start()
            await running.until_healthy(engine)

    run(check())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"star": False}, "--rescheduler off"),
        ({"version": PROTOCOL_VERSION + 1}, "same sglang-star release"),
    ],
)
def test_instance_that_cannot_take_part_is_refused_with_the_remedy(change, words):
    async def check():
        bad, good = FakeEngine(**change), FakeEngine()
        async with fleet(good, rescheduler="reactive"):
            pass
        good = FakeEngine()
        await bad.start()
        await good.start()
        async with fleet(bad, good, start=False, rescheduler="reactive") as running:
            await running.until_healthy(good)
            trouble = await eventually(
                lambda: (
                    running.instance(bad).trouble
                    if "contacted" not in running.instance(bad).trouble
                    else ""
                )
            )
            assert words in trouble
            assert (await running.post("/generate", {"text": "a"}))[0] == 200
            assert bad.requests == []

    run(check())


def test_plain_sglang_is_fine_without_rescheduling_and_its_load_is_counted():
    async def check():
        plain = [FakeEngine(star=False, gate=asyncio.Event()) for _ in range(2)]
        async with fleet(*plain, policy="least-requests") as running:
            body = {"text": "a" * 400, "stream": True}
            open_requests = [asyncio.create_task(running.post("/generate", body)) for _ in "1234"]
            await eventually(lambda: [engine.active for engine in plain] == [2, 2])
            snapshot = running.router.dispatcher._snapshots.for_arrival()
            assert sorted(snapshot.placed.instance.tolist()) == [0, 0, 1, 1]
            assert snapshot.placed.prompt_tokens.min() > 50
            for engine in plain:
                engine.gate.set()
            await asyncio.gather(*open_requests)
            assert running.router.dispatcher._snapshots.for_arrival().placed.instance.size == 0

    run(check())


def test_role_and_name_mix_ups_are_refused():
    async def check():
        liar = FakeEngine("decode")
        twin_a, twin_b = FakeEngine(name="twin"), FakeEngine(name="twin")
        for engine in (liar, twin_a, twin_b):
            await engine.start()
        liar.role = "prefill"
        async with fleet(twin_a, twin_b, start=False) as running:
            instances = [running.instance(twin_a), running.instance(twin_b)]
            await eventually(lambda: any("instance-id" in one.trouble for one in instances))
            await eventually(lambda: sum(one.healthy for one in instances) == 1)
        liar.role = "decode"
        async with fleet(FakeEngine("prefill"), liar, start=False) as running:
            liar.role = "aggregated"
            await eventually(lambda: "aggregated instance" in running.instance(liar).trouble)

    run(check())


def test_sent_requests_count_until_a_status_shows_them():
    async def check():
        engine = FakeEngine(gate=asyncio.Event())
        async with fleet(engine) as running:
            await running.publish(engine)
            body = {"text": "x" * 4000, "stream": True}
            request = asyncio.create_task(running.post("/generate", body))
            await eventually(lambda: engine.active)
            snapshots = running.router.dispatcher._snapshots
            placed = snapshots.for_arrival().placed
            assert placed.instance.tolist() == [0]
            assert 900 < placed.prompt_tokens[0] < 1100
            rid = engine.requests[0]["rid"]
            # An older status that does not show it yet changes nothing.
            await running.publish(engine)
            assert snapshots.for_arrival().placed.instance.size == 1
            await running.publish(engine, request_status(rid, prompt=2000))
            assert snapshots.for_arrival().placed.instance.size == 0
            engine.gate.set()
            await request

    run(check())


def test_lengths_of_what_finished_become_the_prior():
    async def check():
        a, b = FakeEngine(), FakeEngine()
        async with fleet(a, b) as running:
            cluster = running.router.fleet
            await running.publish(a, request_status("done", output=77), request_status("moves"))
            await running.publish(b, request_status("moves", output=11))
            await running.publish(a)
            assert list(cluster.lengths.recent) == [77]
            assert cluster.lengths.prior().tolist() == [77.0] * 5

    run(check())


def test_decoded_status_types_are_checked():
    fields = dict.fromkeys(InstanceStatus.__struct_fields__, 0)
    with pytest.raises(TypeError):
        InstanceStatus(**fields, unknown=1)
