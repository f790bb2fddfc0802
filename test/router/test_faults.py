"""Engines that fail in ordinary ways: the fault stays with them, and no client sees it."""

from __future__ import annotations

import asyncio
import contextlib

import orjson
import pytest

from router.fleet import FakeEngine, eventually, fleet
from router.test_proxy import STREAM, raw_exchange, raw_request, run
from sglang_star_router.faults import FaultLimits

QUICK = {"retry_initial_backoff_ms": 1.0, "retry_max_backoff_ms": 5.0}


def limits(**fields) -> FaultLimits:
    return FaultLimits(**(QUICK | fields))


def event(payload: object) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


async def metric(running, name: str) -> float:
    """One sample of the router's metrics, 0 if it is not there."""
    text = (await running.get("/metrics"))[1].decode()
    found = [line for line in text.splitlines() if line.startswith(f"star_router_{name} ")]
    return float(found[0].rpartition(" ")[2]) if found else 0.0


# --------------------------------------------------------------------------- black holes


@pytest.mark.parametrize("body", [{"text": "a"}, STREAM])
def test_an_engine_of_instant_errors_is_left_alone_and_no_client_sees_it(body):
    async def check():
        # Where all have as few requests, the first by name gets the next one.
        bad = FakeEngine(name="0", reply_status=500, reply_body=b'{"message":"broken"}')
        engines = [bad, FakeEngine(), FakeEngine()]
        faults = limits(cb_failure_threshold=5, cb_timeout=600.0)
        async with fleet(*engines, policy="least-requests", faults=faults) as running:
            for _ in range(60):
                assert (await running.post("/generate", body))[0] == 200
            assert len(bad.requests) == 5
            assert running.instance(bad).healthy, "its health checks pass"
            assert await metric(running, f'instance_circuit{{instance="{bad.name}"}}') == 2
            name = f'attempts_total{{instance="{bad.name}",outcome="answer"}}'
            assert await metric(running, name) == 5

    run(check())


FAILED_FIRST_EVENTS = [
    [event({"error": {"message": "KV transfer failed", "code": 500}}), b"data: [DONE]\n\n"],
    [b'data: {"error": {"mess', b'age": "x", "code": 503}}\n\n'],
    [event({"text": "", "meta_info": {"finish_reason": {
        "type": "abort", "message": "x", "status_code": 500}}})],
    [b'event: error\ndata: {"type": "error", "error": {"type": "api_error"}}\n\n'],
]  # fmt: skip


@pytest.mark.parametrize("chunks", FAILED_FIRST_EVENTS)
def test_a_first_event_that_is_an_error_is_tried_elsewhere(chunks):
    async def check():
        bad, good = FakeEngine(chunks=chunks), FakeEngine()
        async with fleet(bad, good, faults=limits()) as running:
            for _ in range(4):
                assert await running.post("/generate", STREAM) == (200, b"".join(good.chunks))
            assert bad.requests

    run(check())


def test_a_first_event_about_the_request_itself_is_passed_on():
    chunks = [event({"error": {"message": "too long", "code": 400}}), b"data: [DONE]\n\n"]

    async def check():
        engines = [FakeEngine(chunks=chunks), FakeEngine(chunks=chunks)]
        async with fleet(*engines, faults=limits()) as running:
            assert await running.post("/generate", STREAM) == (200, b"".join(chunks))
            assert sum(len(one.requests) for one in engines) == 1

    run(check())


def test_a_plain_answer_that_breaks_off_is_asked_for_elsewhere():
    async def check():
        async def half(reader, writer):
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET"):
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
                else:
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
                await writer.drain()
            writer.close()

        bad, good = FakeEngine(star=False), FakeEngine()
        server = await asyncio.start_server(half, "127.0.0.1", bad.port)
        await good.start()
        async with fleet(bad, good, start=False, faults=limits()) as running:
            await running.until_healthy()
            for _ in range(4):
                assert (await running.post("/generate", {"text": "a"}))[0] == 200
            server.close()

    run(check())


@pytest.mark.parametrize("way", ["stall", "mute"])
def test_an_engine_that_hangs_before_its_first_event_costs_a_wait(way):
    async def check():
        bad, good = FakeEngine(**{way: True}), FakeEngine()
        async with fleet(bad, good, faults=limits(first_byte_timeout=0.3)) as running:
            for _ in range(2):
                assert (await running.post("/generate", STREAM))[0] == 200
            assert await metric(running, f'attempts_total{{instance="{bad.name}",outcome="late"}}')
            await eventually(lambda: bad.disconnects == len(bad.requests))

    run(check())


def test_what_waits_at_an_engine_that_fails_its_health_checks_is_sent_elsewhere():
    async def check():
        bad, good = FakeEngine(stall=True), FakeEngine()
        async with fleet(bad, good, faults=limits()) as running:
            running.instance(good).held_back = True
            waiting = [asyncio.create_task(running.post("/generate", STREAM)) for _ in range(3)]
            await eventually(lambda: bad.active == 3)
            running.instance(good).held_back = False
            bad.health_status = 500
            assert [(await one)[0] for one in waiting] == [200] * 3

    run(check())


def test_an_engine_that_is_silent_about_waiting_requests_is_made_to_generate():
    """Its plain health check passes all along."""

    async def check():
        bad = FakeEngine(name="0", mute=True, stuck={"/health_generate"})
        good = FakeEngine()
        async with fleet(
            bad, good, faults=limits(), health_check_timeout=1.0, policy="least-requests"
        ) as running:
            answers = await asyncio.gather(*(running.post("/generate", STREAM) for _ in range(8)))
            assert [status for status, _ in answers] == [200] * 8
            assert (drawn := len(bad.requests))
            for _ in range(4):
                assert (await running.post("/generate", STREAM))[0] == 200
            assert len(bad.requests) == drawn, "it has to generate before it is trusted again"
            bad.mute, bad.stuck = False, set()
            await running.until_healthy(bad)

    run(check())


def test_a_stream_that_falls_silent_is_ended():
    async def check():
        engine = FakeEngine(gate=asyncio.Event())
        async with fleet(engine, faults=limits(token_timeout=0.3)) as running:
            status, body = await running.post("/generate", STREAM)
            assert status == 200
            assert b"upstream_error" in body
            assert await metric(running, "lost_streams_total") == 1
            await eventually(lambda: engine.disconnects == 1)

    run(check())


def test_an_engine_that_has_recovered_is_found_by_its_probes():
    async def check():
        bad, good = FakeEngine(name="0", reply_status=500), FakeEngine()
        faults = limits(cb_failure_threshold=3, cb_success_threshold=2, cb_timeout=0.2)
        async with fleet(bad, good, policy="least-requests", faults=faults) as running:
            breaker = running.instance(bad).breaker
            while breaker.state.name != "OPEN":
                assert (await running.post("/generate", {"text": "a"}))[0] == 200
            bad.reply_status = 200
            seen = len(bad.requests)
            while breaker.state.name != "CLOSED":
                assert (await running.post("/generate", {"text": "a"}))[0] == 200
            assert len(bad.requests) >= seen + 2

    run(check())


def test_a_request_that_every_engine_fails_is_nobodys_fault():
    async def check():
        engines = [FakeEngine(reply_status=500, reply_body=b"no") for _ in range(3)]
        async with fleet(*engines, faults=limits(cb_failure_threshold=2)) as running:
            for _ in range(10):
                assert await running.post("/generate", {"text": "a"}) == (500, b"no")
            assert [one.breaker.state.name for one in running.router.fleet] == ["CLOSED"] * 3

    run(check())


def test_retries_have_a_budget():
    async def check():
        engines = [FakeEngine(reply_status=500, reply_body=b"no") for _ in range(6)]
        async with fleet(*engines, faults=limits(retry_budget=0.5)) as running:
            budget = running.router.proxy.budget
            budget.floor = 4
            for _ in range(20):
                assert (await running.post("/generate", {"text": "a"}))[0] == 500
            asked = sum(len(one.requests) for one in engines)
            assert 20 < asked <= 20 + 4 + 10
            assert await metric(running, "retries_denied_total") > 0

    run(check())


def test_what_is_tried_again_does_not_queue_behind_others():
    from router.test_dispatch import Gatekeeper

    async def check():
        policy, bad, good = Gatekeeper(), FakeEngine(stall=True), FakeEngine()
        policies = {"dispatch_policy": policy}
        async with fleet(bad, good, policies=policies, queue_size=1, faults=limits()) as running:
            dispatcher = running.router.dispatcher
            policy.open = 1
            first = asyncio.create_task(running.post("/generate", {"text": "a"}))
            await eventually(lambda: bad.active)
            others = asyncio.create_task(running.post("/generate", {"text": "b"}))
            await eventually(lambda: dispatcher.holding == 1)
            # The queue is full when the first one comes back.
            bad.health_status = 500
            await eventually(lambda: dispatcher.holding == 2)
            policy.open = 1
            assert (await first)[0] == 200
            policy.open = 1
            assert (await others)[0] == 200
            assert [request["text"] for request in good.requests] == ["a", "b"]

    run(check())


# --------------------------------------------------------------------------- pairs


def transfer_failed() -> bytes:
    return b'{"object":"error","message":"KV transfer failed","code":500}'


def test_a_failed_transfer_reaches_no_client_and_is_laid_to_who_fails_with_everybody():
    async def check():
        prefills = [FakeEngine("prefill", name="0"), FakeEngine("prefill")]
        decodes = [FakeEngine("decode"), FakeEngine("decode")]
        faults = limits(cb_failure_threshold=4, cb_timeout=600.0)
        async with fleet(*prefills, *decodes, faults=faults) as running:
            lame = prefills[0]
            lame.bootstrap_port = 7777  # says so, and its KV never arrives
            running.instance(lame).bootstrap_port = 7777
            for one in decodes:
                one.fails = lambda body: body["bootstrap_port"] == 7777
                one.failure = transfer_failed()
            for _ in range(40):
                assert (await running.post("/generate", {"text": "a"}))[0] == 200
            states = {one.name: one.breaker.state.name for one in running.router.fleet}
            assert states == {
                lame.name: "OPEN", prefills[1].name: "CLOSED",
                decodes[0].name: "CLOSED", decodes[1].name: "CLOSED",
            }  # fmt: skip

    run(check())


@pytest.mark.parametrize("given", [None, 9123])
def test_prefill_on_another_bootstrap_port_is_followed(given):
    async def check():
        prefill, decode = FakeEngine("prefill", star=False), FakeEngine("decode", star=False)
        prefill.bootstrap_given = given
        async with fleet(prefill, decode, faults=limits()) as running:
            assert (await running.post("/generate", {"text": "a"}))[0] == 200
            decode.fails = lambda body: body["bootstrap_port"] != prefill.bootstrap_port
            decode.failure = transfer_failed()
            prefill.bootstrap_port = 9555
            await prefill.restart()
            while (await running.post("/generate", {"text": "a"}))[0] != 200:
                await asyncio.sleep(0.01)
            assert decode.requests[-1]["bootstrap_port"] == 9555

    run(check())


# --------------------------------------------------------------------------- endings


def raw_engine(head: bytes, *chunks: bytes):
    """An engine's HTTP server down to its bytes; it answers GETs plainly."""

    async def serve(reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                request = await reader.readuntil(b"\r\n\r\n")
                if request.startswith(b"GET"):
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
                    continue
                length = int(request.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                await reader.readexactly(length)
                writer.write(head + b"".join(chunks))
                await writer.drain()
                break
        writer.close()

    return serve


def test_an_engine_that_frames_twice_does_not_confuse_the_client():
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 3\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    chunks = (b"9\r\ndata: 1\n\n\r\n", b"9\r\ndata: 2\n\n\r\n", b"0\r\n\r\n")

    async def check():
        engine = FakeEngine(star=False)
        server = await asyncio.start_server(raw_engine(head, *chunks), "127.0.0.1", engine.port)
        async with fleet(engine, start=False) as running:
            await running.until_healthy()
            answer = await raw_exchange(running.url, raw_request("/generate", b'{"stream":true}'))
            head_out, _, body = answer.partition(b"\r\n\r\n")
            assert b"content-length" not in head_out.lower()
            assert body == b"".join(chunks)
            server.close()

    run(check())


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0_3\r\nabc\r\n0\r\n\r\n",
    ],
)
def test_ambiguous_framing_is_no_answer(head):
    async def check():
        engine = FakeEngine(star=False)
        server = await asyncio.start_server(raw_engine(head), "127.0.0.1", engine.port)
        async with fleet(engine, start=False, faults=limits()) as running:
            await running.until_healthy()
            status, body = await running.post("/generate", {"text": "a"})
            assert (status, b"framing" in body) == (503, True)
            server.close()

    run(check())


def test_a_broken_stream_ends_readably_for_an_http_1_0_client():
    async def check():
        engine = FakeEngine(chunks=[b"data: 1\n\n"] * 5, die_after=2)
        async with fleet(engine) as running:
            answer = await raw_exchange(
                running.url, raw_request("/generate", orjson.dumps(STREAM), "1.0")
            )
            events = answer.partition(b"\r\n\r\n")[2].split(b"\n\n")
            assert events[:2] == [b"data: 1"] * 2
            error = orjson.loads(events[2].removeprefix(b"data: "))["error"]
            assert error["type"] == "upstream_error"
            assert events[3:] == [b""], "chunk sizes in a body that has no chunks"

    run(check())


def test_a_broken_stream_leaves_the_clients_connection_usable():
    """Its head has said so, and its framing is whole: a client sends its next request there."""

    async def check():
        engine = FakeEngine(chunks=[b"data: 1\n\n"] * 5, die_after=2)
        async with fleet(engine) as running:
            host, _, port = running.url.removeprefix("http://").partition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            request = raw_request("/generate", orjson.dumps(STREAM)).replace(
                b"Connection: close\r\n", b""
            )
            writer.write(request)
            assert b"upstream_error" in await reader.readuntil(b"\r\n0\r\n\r\n")
            engine.die_after = None
            writer.write(request)
            answer = await reader.readuntil(b"\r\n0\r\n\r\n")
            assert answer.count(b"data: 1") == 5
            writer.close()

    run(check())


# --------------------------------------------------------------------------- counting


def test_every_request_is_counted():
    async def check():
        engine = FakeEngine(stall=True)
        async with fleet(engine, max_payload_bytes=1000) as running:
            request = asyncio.create_task(running.post("/generate", STREAM))
            await eventually(lambda: engine.active)
            request.cancel()
            await eventually(lambda: engine.disconnects)
            assert await metric(running, 'requests_total{path="/generate",status="499"}') == 1
            assert (await running.post("/generate", {"text": "a" * 2000}))[0] == 413
            assert await metric(running, 'requests_total{path="/generate",status="413"}') == 1

    run(check())


class Broken:
    """A dispatch policy with a defect."""

    name = "broken"

    def __init__(self, result=None):
        self.result = result

    def place(self, snapshot, arrival, sequence):
        if self.result is None:
            raise ZeroDivisionError("defect")
        return self.result


@pytest.mark.parametrize("kind", ["raises", "nobody knows it", "nonsense"])
def test_a_policy_that_fails_is_replaced_by_the_plain_one(kind, caplog):
    from sglang_star_router.policy.snapshot import Placement

    result = {"raises": None, "nobody knows it": Placement("x", "y"), "nonsense": 5}[kind]

    async def check():
        engine = FakeEngine()
        async with fleet(engine, policies={"dispatch_policy": Broken(result)}) as running:
            for _ in range(3):
                assert (await running.post("/generate", {"text": "a"}))[0] == 200
            assert await metric(running, 'policy_errors_total{policy="broken"}') == 3
            said = [r for r in caplog.records if "least-tokens" in r.getMessage()]
            assert len(said) == 1

    run(check())


def test_retry_after_tells_how_the_queue_moves():
    from router.test_dispatch import Gatekeeper

    async def check():
        policy = Gatekeeper()
        policies = {"dispatch_policy": policy}
        async with fleet(FakeEngine(), policies=policies, queue_size=3) as running:
            dispatcher = running.router.dispatcher
            held = []
            for number in range(3):
                held.append(asyncio.create_task(running.post("/generate", {"text": "a"})))
                await eventually(lambda n=number: dispatcher.holding == n + 1)
            # Nobody has left the queue for a while: so long it takes at least.
            for one in dispatcher.queue:
                object.__setattr__(one.arrival, "arrived_s", one.arrival.arrived_s - 30.0)
            async with running.session.post(running.url + "/generate", json={}) as response:
                assert response.status == 429
                assert 30 <= int(response.headers["Retry-After"]) <= 60
            policy.open = 3
            assert [(await one)[0] for one in held] == [200] * 3

    run(check())
