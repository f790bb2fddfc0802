"""Whatever is asked wrongly is answered clearly, and no running request notices."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator

import pytest
import zmq
import zmq.asyncio

from e2e.fleet import HANGS_S, Fleet, Hop, new_rid
from sglang_star.cluster import Cluster
from sglang_star.protocol import (
    PROTOCOL_VERSION,
    Peer,
    Refused,
    Reserve,
    Route,
    UndrainOrder,
    decode,
    encode,
)

pytestmark = pytest.mark.e2e


@contextlib.asynccontextmanager
async def running(fleet: Fleet) -> AsyncIterator[tuple[str, str]]:
    """One request in decode: yields (rid, engine name), checks that it goes on undisturbed."""
    await fleet.settle()
    rid = new_rid("goes-on")
    async with fleet.endless(rid):
        name, _ = await fleet.found(rid)
        yield rid, name


def test_wrong_orders_are_refused_with_a_remedy(cluster: Cluster) -> None:
    async def scenario() -> None:
        async with Fleet.connect(cluster) as fleet, running(fleet) as (rid, name):
            url, target = fleet.engines[name], fleet.engines[fleet.other(name)]
            for body, code, kind in (
                ({"rid": "nobody", "target": target}, 404, "UnknownRequest"),
                ({"rid": rid, "target": url}, 409, "OrderRefused"),
                ({"rid": rid, "target": "http://127.0.0.1:9"}, 503, "PeerError"),
                ({"rid": rid, "target": "elsewhere"}, 400, "ConfigError"),
                ({"rid": rid}, 400, "MalformedMessage"),
                ({"rid": rid, "target": target, "tarqet": 1}, 400, "MalformedMessage"),
            ):
                status, answer = await fleet.post(url + "/star/migrate", body)
                assert (status, answer["error"]["type"]) == (code, kind), (body, answer)
                assert answer["error"]["message"]
                assert answer["error"]["hint"]
            async with fleet.session.post(url + "/star/migrate", data=b"{not json") as response:
                assert response.status == 400

    asyncio.run(scenario())


@pytest.mark.parametrize("hold", [{}, {"hold_after": 0}], ids=["copied", "held"])
def test_a_draining_target_refuses_and_the_request_goes_on(
    cluster: Cluster, hold: dict[str, int]
) -> None:
    async def scenario() -> None:
        async with Fleet.connect(cluster) as fleet, running(fleet) as (rid, name):
            target = fleet.other(name)
            await fleet.post(fleet.engines[target] + "/star/drain", {})
            try:
                code, answer = await fleet.order(rid, name, target, **hold)
                assert code == 202
                report = await fleet.report(answer["migration_id"])
                assert report["outcome"] == "refused"
                assert "draining" in report["detail"]
            finally:
                await fleet.post(fleet.engines[target] + "/star/undrain", {})
            # It can move as if nothing had been.
            code, answer = await fleet.order(rid, name, target, **hold)
            assert (await fleet.report(answer["migration_id"]))["outcome"] == "moved"

    asyncio.run(scenario())


def test_drain_moves_everything_away(cluster: Cluster) -> None:
    async def scenario() -> None:
        async with Fleet.connect(cluster) as fleet, running(fleet) as (rid, name):
            target = fleet.other(name)
            url = fleet.engines[name]
            try:
                code, _ = await fleet.post(
                    url + "/star/drain", {"targets": [fleet.engines[target]]}
                )
                assert code == 202
                where, request = await fleet.found(rid, moves=1)
                assert (where, request["home"]) == (target, name)
            finally:
                await fleet.post(url + "/star/undrain", {})

    asyncio.run(scenario())


def test_armed_orders_that_never_start_say_so(cluster: Cluster) -> None:
    async def scenario() -> None:
        async with Fleet.connect(cluster) as fleet:
            await fleet.settle()
            source, target = list(fleet.engines)[:2]
            assert (await fleet.order("x", source, source, at_tokens=1))[0] == 409
            for wrong in ({"at_tokens": -1}, {"hold_after": -1}, {"expire_s": 0.0}, {"rid": ""}):
                body = {"rid": "x", "target": fleet.engines[target], "at_tokens": 1, **wrong}
                code, _ = await fleet.post(fleet.engines[source] + "/star/migrate", body)
                assert code == 400, wrong
            brief = await fleet.arm("nobody", source, target, Hop(1), expire_s=0.01)
            report = await fleet.report(brief)
            assert (report["outcome"], report["rid"]) == ("expired", "nobody")
            assert "no nobody came to 1 tokens" in report["detail"]
            kept = [await fleet.arm(rid, source, target, Hop(1)) for rid in ("a*", "b", "b")]
            assert (await fleet.status(source))["armed"] == 3
            url = fleet.engines[source] + "/star/disarm"
            assert (await fleet.post(url, {"rid": "b"}))[1] == {"disarmed": kept[1:]}
            assert (await fleet.post(url, {}))[1] == {"disarmed": kept[:1]}
            assert {r["outcome"] for r in await fleet.reports(kept)} == {"disarmed"}
            assert (await fleet.status(source))["armed"] == 0

    asyncio.run(scenario())


def test_garbage_on_the_sockets_is_dropped(cluster: Cluster) -> None:
    async def scenario() -> None:
        async with Fleet.connect(cluster) as fleet, running(fleet) as (rid, name):
            context = zmq.asyncio.Context()
            pull = context.socket(zmq.PULL)
            port = pull.bind_to_random_port("tcp://127.0.0.1")
            here = Peer(instance_id="test", incarnation=1, address=f"tcp://127.0.0.1:{port}")
            good = encode(UndrainOrder(order_id=1))
            for url in fleet.engines.values():
                star = (await fleet.get(url + "/server_info"))["star"]
                push = context.socket(zmq.PUSH)
                push.connect(star["migration_address"])
                for data in (b"", b"\x00" * 1000, b"garbage", good[:-1], good):
                    await push.send(data)
                await push.send(bytes([0x92, PROTOCOL_VERSION + 1]) + good[2:])
                await push.send_multipart([b"many", b"parts"])
                # The refusal of this shows that all before it has been read.
                await push.send(encode(stranger(here, star["incarnation"])))
                refusal = decode(await asyncio.wait_for(pull.recv(), HANGS_S))
                assert isinstance(refusal, Refused)
                push.close(linger=0)
            pull.close(linger=0)
            context.term()
            code, answer = await fleet.order(rid, name, fleet.other(name))
            assert code == 202, answer
            assert (await fleet.report(answer["migration_id"]))["outcome"] == "moved"

    asyncio.run(scenario())


def stranger(here: Peer, incarnation: int) -> Reserve:
    """Asks for a place with another model's fingerprint."""
    return Reserve(
        route=Route(
            migration_id=uuid.uuid4().hex, stream_id=uuid.uuid4().hex, receiver=incarnation
        ),
        source=here,
        home=here,
        fingerprint="another model's",
        client_rid="x",
        request=b"",
        prompt_ids=b"",
        weights="default",
        context_tokens=1,
        max_new_tokens=1,
        moves=0,
        reason="test",
        offers=(),
    )
