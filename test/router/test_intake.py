"""Clients that are slow, hostile or carry much: what they may cost, and whom."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import signal
import time

import orjson
import pytest

from router.fleet import FakeEngine, eventually, fleet
from router.test_proxy import STREAM, raw_exchange, raw_request, run
from sglang_star_router import calls

HEAD = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


async def connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = url.removeprefix("http://").partition(":")
    return await asyncio.open_connection(host, int(port))


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    """What comes until the connection is closed, or reset because bytes of ours were on the way."""
    with contextlib.suppress(ConnectionError):
        return await reader.read()
    return b""


@pytest.mark.parametrize("sent", [b"", b"POST /gen", HEAD], ids=["nothing", "line", "no-end"])
def test_a_head_that_does_not_come_ends_the_connection(sent):
    async def check():
        async with fleet(FakeEngine(), head_timeout=0.2) as running:
            reader, writer = await connect(running.url)
            writer.write(sent)
            assert await until_closed(reader) == b""
            writer.close()

    run(check())


def test_a_head_that_drips_ends_the_connection():
    async def check():
        async with fleet(FakeEngine(), head_timeout=0.3) as running:
            reader, writer = await connect(running.url)

            async def drip():
                for byte in HEAD.rstrip() + b"x" * 100_000:
                    writer.write(bytes([byte]))
                    await asyncio.sleep(0.02)

            dripping = asyncio.create_task(drip())
            # Long before its end: that is half an hour away.
            assert await until_closed(reader) == b""
            dripping.cancel()
            writer.close()

    run(check())


def test_an_idle_connection_outlives_the_time_for_a_head():
    async def check():
        async with fleet(FakeEngine(), head_timeout=0.2) as running:
            reader, writer = await connect(running.url)
            body = orjson.dumps({"text": "a"})
            request = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
            for _ in range(2):
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                assert b" 200 " in head
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                # Longer than a head may take: between two requests there is no head to wait for.
                await asyncio.sleep(0.5)
            writer.close()

    run(check())


@pytest.mark.parametrize("path", ["/generate", "/tokenize", "/flush_cache", "/star/drain"])
def test_a_body_that_does_not_come_is_refused_in_time(path):
    async def check():
        engine = FakeEngine()
        async with fleet(engine, body_timeout=0.2) as running:
            reader, writer = await connect(running.url)
            writer.write(
                f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode()
            )
            head = await reader.readuntil(b"\r\n\r\n")
            assert b" 408 " in head
            assert b"connection: close" in head.lower()
            assert engine.bodies == []
            writer.close()

    run(check())


def test_a_body_that_is_too_large_is_refused_before_it_is_read():
    async def check():
        engine = FakeEngine()
        async with fleet(engine, max_payload_bytes=1000) as running:
            reader, writer = await connect(running.url)
            # Not a byte of the body is sent: the answer must not wait for it.
            writer.write(HEAD + b"Content-Length: 1001\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            assert b" 413 " in head
            writer.close()
            for body, headers in (
                (b'{"text": "%s"}' % (b"x" * 1000), {}),
                (gzip.compress(b'{"text": "%s"}' % (b"x" * 1000)), {"Content-Encoding": "gzip"}),
            ):

                async def chunks(data=body):
                    yield data

                data = body if headers else chunks()
                async with running.session.post(
                    running.url + "/generate", data=data, headers=headers
                ) as answer:
                    assert answer.status == 413
                    error = (await answer.json())["error"]
                    assert error["type"] == "invalid_request_error"
                    assert "--max-payload-size" in error["message"]
            assert engine.bodies == []

    run(check())


def test_bodies_together_are_bounded():
    async def check():
        engine = FakeEngine(stall=True)
        async with fleet(engine, max_buffered_bytes=10_000) as running:
            large = {"text": "x" * 6000}
            first = asyncio.create_task(running.post("/generate", large))
            await eventually(lambda: engine.requests)
            status, body = await running.post("/generate", large)
            assert status == 503
            assert "--max-buffered-size" in orjson.loads(body)["error"]["message"]
            first.cancel()
            await eventually(lambda: engine.disconnects)
            engine.stall = False
            assert (await running.post("/generate", large))[0] == 200

    run(check())


def test_a_full_queue_is_told_before_the_body_is_read():
    async def check():
        engine = FakeEngine()
        async with fleet(engine, queue_size=1) as running:
            running.instance(engine).held_back = True
            running.router.fleet.changed()
            held = asyncio.create_task(running.post("/generate", STREAM))
            await eventually(lambda: running.router.dispatcher.holding == 1)
            reader, writer = await connect(running.url)
            writer.write(HEAD + b"Content-Length: 100000\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            assert b" 429 " in head
            assert b"retry-after:" in head.lower()
            writer.close()
            held.cancel()

    run(check())


@pytest.mark.parametrize("kind", ["image", "text", "ids", "embeds"])
def test_a_large_body_does_not_stop_the_streams_of_others(kind, monkeypatch):
    """While a large body is taken in, everything else of the router goes on."""
    prompts = {
        "image": {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 40_000_000}}
        ]}]},
        "text": {"text": "hello " * 7_000_000},
        "ids": {"input_ids": list(range(100_000)) * 60},
        "embeds": {"input_embeds": [[0.123456] * 4096] * 1000},
    }  # fmt: skip
    body = orjson.dumps(prompts[kind] | {"stream": True})
    path = "/v1/chat/completions" if kind == "image" else "/generate"

    def read_here(path, body):
        raise AssertionError(f"{len(body)} bytes were parsed in the router's own process")

    monkeypatch.setattr(calls, "read_facts", read_here)

    async def check():
        engine = FakeEngine()
        async with fleet(engine) as running:
            async with running.session.post(running.url + path, data=body) as answer:
                assert answer.status == 200
            sent = engine.bodies[0]
            assert sent.startswith(body[:-1])
            assert set(engine.requests[0]) - set(orjson.loads(body)) == {"rid"}

    run(check())


def test_whitespace_around_a_large_body_is_no_trouble():
    async def check():
        engine = FakeEngine()
        async with fleet(engine) as running:
            for body in (
                b"  {" + b" " * 3_000_000 + b"}  ",
                b'{"text": "a"' + b"\n" * 3_000_000 + b"}" + b" " * 2_000_000,
            ):
                async with running.session.post(running.url + "/generate", data=body) as answer:
                    assert answer.status == 200
                assert set(engine.requests[-1]) - {"text"} == {"rid"}
            async with running.session.post(
                running.url + "/generate", data=b"[" + b" " * 3_000_000 + b"]"
            ) as answer:
                assert answer.status == 400

    run(check())


def test_the_process_that_reads_large_bodies_may_die():
    async def check():
        engine = FakeEngine()
        body = {"text": "x" * 3_000_000}
        async with fleet(engine) as running:
            assert (await running.post("/generate", body))[0] == 200
            reader = running.router.intake.reader
            assert reader.pid
            os.kill(reader.pid, signal.SIGKILL)
            for _ in range(3):
                assert (await running.post("/generate", body))[0] == 200

    run(check())


def test_a_held_stream_is_kept_alive_if_asked_for():
    async def check():
        engine = FakeEngine()
        async with fleet(engine, sse_keepalive=0.1) as running:
            direct = await raw_exchange(engine.url, raw_request("/generate", orjson.dumps(STREAM)))
            running.instance(engine).held_back = True
            running.router.fleet.changed()
            reader, writer = await connect(running.url)
            body = orjson.dumps(STREAM)
            writer.write(raw_request("/generate", body))
            head = await reader.readuntil(b"\r\n\r\n")
            assert b" 200 " in head
            assert b"text/event-stream" in head
            for _ in range(2):
                assert (await reader.readuntil(b"\n\n\r\n")).endswith(b": held\n\n\r\n")
            running.instance(engine).held_back = False
            running.router.fleet.changed()
            rest = await reader.read()
            while rest.startswith(b"8\r\n: held\n\n\r\n"):
                rest = rest.removeprefix(b"8\r\n: held\n\n\r\n")
            assert rest == direct.partition(b"\r\n\r\n")[2]
            writer.close()

    run(check())


def test_what_fails_after_comments_were_sent_is_an_event():
    async def check():
        engine = FakeEngine(reply_status=400, reply_body=b'{"object":"error","message":"no"}')
        async with fleet(engine, sse_keepalive=0.1, queue_timeout=0.5) as running:
            running.instance(engine).held_back = True
            running.router.fleet.changed()
            status, answer = await running.post("/generate", STREAM)
            assert status == 200
            events = [line for line in answer.split(b"\n\n") if line and line != b": held"]
            assert orjson.loads(events[0].removeprefix(b"data: "))["error"]["code"] == 503
            asked = asyncio.create_task(running.post("/generate", STREAM))
            await eventually(lambda: running.router.dispatcher.holding)
            await asyncio.sleep(0.2)
            running.instance(engine).held_back = False
            running.router.fleet.changed()
            status, answer = await asked
            if status == 200:
                events = [line for line in answer.split(b"\n\n") if line and line != b": held"]
                assert b'"message":"no"' in events[0]
            # Not held, or nothing but a plain answer wanted: no comments, and the true status.
            assert (await running.post("/generate", STREAM))[0] == 400
            assert (await running.post("/generate", {"text": "a"}))[0] == 400

    run(check())


def test_requests_at_a_time_are_bounded_if_asked_for():
    async def check():
        engine = FakeEngine(stall=True)
        async with fleet(engine, max_concurrent_requests=2, queue_size=1) as running:
            asked = [asyncio.create_task(running.post("/generate", STREAM)) for _ in range(2)]
            await eventually(lambda: engine.active == 2)
            waiting = asyncio.create_task(running.post("/generate", STREAM))
            await eventually(lambda: running.router.intake.gate.waiting == 1)
            assert (await running.post("/generate", STREAM))[0] == 429
            asked[0].cancel()
            await eventually(lambda: len(engine.requests) == 3)
            for task in (*asked, waiting):
                task.cancel()
            await asyncio.gather(*asked, waiting, return_exceptions=True)
            await eventually(lambda: running.router.intake.gate.active == 0)

    run(check())


def test_requests_begun_per_second_are_bounded_if_asked_for():
    async def check():
        async with fleet(FakeEngine(), rate_limit=5.0) as running:
            began = time.monotonic()
            for _ in range(8):
                assert (await running.post("/generate", {"text": "a"}))[0] == 200
            # Five at once, three more at 0.2 s each: a floor, however slow the machine.
            assert time.monotonic() - began >= 0.5

    run(check())
