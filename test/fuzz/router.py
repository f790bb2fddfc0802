"""The router: every HTTP handler, by raw bytes over real sockets, and the statuses it hears."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
from typing import Any

import orjson
from aiohttp import web

from fuzz.found import Errors, Found, resident_mb
from router.fleet import FakeEngine, Fleet, eventually, fleet, request_status
from router.test_proxy import STREAM, raw_exchange, raw_request
from sglang_star.protocol import MoveReport
from sglang_star_router.door import FLEET_PATHS
from sglang_star_router.engine_api import ANY_INSTANCE
from sglang_star_router.paths import PATHS
from sglang_star_router.probes import READINESS
from simulation import garble

AT_ONCE = 256
HONEST = 200
"""After so many changed requests, one that must be served as ever."""
BODIES: tuple[dict[str, Any], ...] = (
    STREAM,
    {"text": ["a", "b"], "sampling_params": {"n": 2}, "stream": False, "rid": "r"},
    {"input_ids": [[1], [4]], "sampling_params": [{"max_new_tokens": 3}], "return_logprob": True},
    {"model": "m", "prompt": "x", "max_tokens": 4, "stream": True, "n": 1},
    {"model": "m", "messages": [{"role": "user", "content": [
        {"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "data:,"}}]}],
     "max_completion_tokens": 5, "tools": [{}]},
    {"model": "m", "input": "x", "previous_response_id": "resp_1", "background": False,
     "instructions": "y", "max_output_tokens": 9},
    {"query": "q", "documents": ["a"], "items": [], "instances": [{"text": "t"}]},
    {"rid": "r0", "target": "TARGET"},
    {"instance": "TARGET", "targets": ["TARGET"]},
    {"rid": "", "abort_all": True},
)  # fmt: skip
HEADERS = (
    b"Content-Type: application/json", b"Connection: close", b"Transfer-Encoding: chunked",
    b"Content-Length: 5", b"Content-Length: -1", b"Content-Encoding: gzip", b"Expect: 100-continue",
    b"Upgrade: websocket", b"Authorization: Bearer \xff\xfe", b"Authorization: Bearer key",
    b"Origin: http://x.invalid", b"X-Long: " + b"y" * 9000, b"Accept-Encoding: \x80",
    b"X-Request-Id: \t", b"Host: \xc3\x28", b"Cookie: a=b; c",
)  # fmt: skip

QUERIES = ("?", "?limit=x", "?requests=0", "?limit=-1", "/..", "%00", "//", "?%zz")


class Engine(FakeEngine):
    """As a real one, it refuses what is no JSON object instead of failing."""

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        try:
            asked = orjson.loads(body)
        except orjson.JSONDecodeError:
            return web.Response(status=400)
        if not isinstance(asked, dict):
            return web.Response(status=400)
        self.requests[:] = [asked]
        return await self._answer(request)

    async def star_order(self, request: web.Request) -> web.Response:
        await request.read()
        return web.json_response({"migration_id": self.move_id(), "ok": True}, status=202)

    async def other(self, request: web.Request) -> web.Response:
        await request.read()
        return web.json_response({"path": request.path})


def paths() -> list[tuple[str, str]]:
    """Every (method, path) that the router serves."""
    own = ["/star/cluster", "/star/migrations", "/metrics", "/dashboard", "/server_info",
           "/get_server_info", "/v1/realtime", "/v1/responses/resp_1",
           "/liveness", "/ping"]  # fmt: skip
    posts = ["/star/migrate", "/star/drain", "/star/undrain", "/v1/responses/resp_1/cancel"]
    anywhere = [path.replace("{rest:.*}", "models") for path in ANY_INSTANCE]
    found = [(method, path) for path, kind in PATHS.items() for method in kind.methods]
    found += [("GET", path) for path in (*own, *READINESS, *anywhere, "/nowhere")]
    found += [("POST", path) for path in (*posts, *FLEET_PATHS, *anywhere)]
    return found


def changed_request(dice: random.Random, names: list[str]) -> bytes:
    """The bytes of a real request with something changed."""
    method, path = dice.choice(paths())
    tree: Any = dice.choice(BODIES)
    text = orjson.dumps(tree).replace(b"TARGET", dice.choice(names).encode())
    tree = orjson.loads(text)
    for _ in range(dice.choice((0, 1, 1, 2, 3))):
        tree = garble._other(tree, dice)
    try:
        body = orjson.dumps(tree, default=lambda one: one.decode("latin-1"))
    except (TypeError, orjson.JSONEncodeError):
        body = text
    if dice.random() < 0.15 and body:
        body = garble._bent(body, dice)
    if dice.random() < 0.1:
        path += dice.choice(
            ("?", "?limit=x", "?requests=0", "?limit=-1", "/..", "%00", "//", "?%zz")
        )
    lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: x", b"Content-Length: %d" % len(body)]
    if dice.random() < 0.7:
        lines += [b"Connection: close"]
    for _ in range(dice.choice((0, 0, 0, 1, 2))):
        lines.insert(dice.randrange(1, len(lines) + 1), dice.choice(HEADERS))
    whole = b"\r\n".join(lines) + b"\r\n\r\n" + body
    return garble._bent(whole, dice) if dice.random() < 0.15 else whole


async def patiently(url: str, request: bytes) -> bytes:
    """An exchange, again if its head came too late for all the others."""
    for _ in range(5):
        with contextlib.suppress(OSError):
            return await raw_exchange(url, request)
    return b""


async def http(running: Fleet, count: int, dice: random.Random, found: Found) -> None:
    """Send so many changed requests; between them honest ones, which must be served as ever."""
    host, _, port = running.url.removeprefix("http://").partition(":")
    # Nobody has a key here: what an order names is drained. The others serve honest requests.
    scapegoat = running.engines[-1]
    names = [scapegoat.name, scapegoat.url, "nobody"]
    running.instance(scapegoat).held_back = False
    honest = raw_request("/generate", orjson.dumps(STREAM))
    expected = (await raw_exchange(running.url, honest)).partition(b"\r\n\r\n")[2]

    async def one(number: int) -> None:
        if number % HONEST == 0:
            answer = await patiently(running.url, honest)
            if answer.partition(b"\r\n\r\n")[2] != expected:
                found.note("http: an honest stream was not served as ever", answer)
        data = changed_request(dice, names)
        found.sent += 1
        try:
            async with asyncio.timeout(20):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(data)
                if dice.random() < 0.6:
                    writer.write_eof()
                head = await reader.read(65536)
                writer.transport.abort()
        except TimeoutError:
            found.note("http: no answer and no end within 20 s", data)
            return
        except OSError:
            return
        if head.startswith(b"HTTP/1.") and head[9:12].isdigit():
            found.taken += head[9:10] == b"2"
            if head[9:12] == b"500":
                found.note("http: answered 500", data + b"\n" + head)
        elif head:
            found.note("http: not an HTTP answer", data + b"\n" + head)

    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            await one(number)

    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))


async def statuses(running: Fleet, count: int, dice: random.Random, found: Found) -> None:
    """Publish so many changed statuses, and look at all that is shown of them."""
    engine = running.engines[0]
    requests = tuple(
        request_status(f"r{i}", remaining=(1.0, 2.0, 3.0, 4.0, 5.0), home=engine.name)
        for i in range(3)
    )
    move = engine.report(engine.move_id(), "r0", running.engines[-1])
    assert isinstance(move, MoveReport)
    feed = running.router.feed
    before = feed.received
    for number in range(count):
        message = engine.status(
            requests, moves=(move,), faults={"a": 1}, dropped={"no key": 2},
            transports={"shm": "ready"}, move_outcomes={"moved": 1},
        )  # fmt: skip
        data = garble.changed(message, dice)
        found.sent += 1
        await engine.publish(data)
        if number % 50 == 49:
            await asyncio.sleep(0.001)
        if number % 500 == 499:
            for path in ("/star/cluster", "/metrics", "/star/migrations"):
                status, body = await running.get(path)
                if status != 200:
                    found.note(f"statuses: {path} answered {status}", body)
            status, body = await running.post("/generate", STREAM)
            if status != 200 or body != b"".join(engine.chunks):
                found.note("statuses: an honest stream was not served as ever", (status, body))
    found.taken += feed.received - before
    # What is true is believed again: of a process that has started anew, whatever was said of it.
    await engine.restart()
    await running.until_healthy(engine)
    await running.publish(engine, *requests)


async def run(share: float, seed: int, found: Found) -> None:
    """All of it, with a rescheduler that reads what is told."""
    dice = random.Random(seed)
    errors = Errors(found)
    logging.getLogger().addHandler(errors)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(
        lambda _, context: found.note("the loop's exception handler", context)
    )
    try:
        for pd in (False, True):
            roles = ("prefill", "decode", "decode") if pd else ("aggregated",) * 3
            engines = [Engine(role) for role in roles]
            async with fleet(
                *engines, rescheduler="star", policy="star", head_timeout=1.0, body_timeout=1.0,
                health_failure_threshold=1000,
            ) as running:  # fmt: skip
                warm = max(50, int(2000 * share))
                await http(running, warm, dice, found)
                gc.collect()
                began = resident_mb()
                await http(running, int(25_000 * share), dice, found)
                if not pd:
                    await statuses(running, int(30_000 * share), dice, found)
                gc.collect()
                if (grown := resident_mb() - began) > 60:
                    found.note(f"memory: the router grew by {grown:.0f} MB", "")
                await eventually(lambda one=running: all(i.healthy for i in one.router.fleet))
                print(f"router {'pd' if pd else 'aggregated'}: grew by {grown:.1f} MB", flush=True)
    finally:
        logging.getLogger().removeHandler(errors)
