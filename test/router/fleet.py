"""Fake instances for router tests: real HTTP servers and real PUB sockets speaking our protocol."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson
import zmq
import zmq.asyncio
from aiohttp import web

from sglang_star.machine import free_ports
from sglang_star.protocol import (
    PROTOCOL_VERSION,
    InstanceStatus,
    MoveReport,
    RequestStatus,
    encode,
)
from sglang_star_router.app import Router
from sglang_star_router.config import RouterConfig
from sglang_star_router.listener import Listener
from sglang_star_router.members import Endpoint, Member

GENERATION = (
    "/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages",
    "/invocations", "/api/chat", "/api/generate", "/vertex_generate",
)  # fmt: skip
"""Paths that :class:`FakeEngine` generates at."""

WAIT_S = 180.0
"""Longest time a test waits for something that must happen; only what hangs takes so long."""


async def eventually(condition: Callable[[], Any], what: str = "") -> Any:
    """Wait until ``condition()`` is truthy and return it."""
    deadline = time.monotonic() + WAIT_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"did not happen: {what or condition}"
        await asyncio.sleep(0.01)
    return value


def free_port() -> int:
    """One that no connection is given meanwhile: outside the range that the kernel chooses from."""
    return free_ports(1)[0]


@dataclass
class FakeEngine:
    """One instance. Tests change its attributes to change its behaviour.

    Attributes:
        chunks: what a streaming request is answered with; gate: if set, waited for before the
            second chunk; die_after: chunks after which it drops the connection.
        mute: sends a head and then nothing; bootstrap_port: what it reports.
        bootstrap_given: what the router's command line says instead.
        fails: which requests are answered 500 with ``failure``.
        stuck: health paths that are never answered; told_port: where it says it publishes.
        requests: parsed bodies of generation requests; bodies: the same unparsed.
        disconnects: generation requests whose client went away.
    """

    role: str = "aggregated"
    name: str = ""
    star: bool = True
    port: int = field(default_factory=free_port)
    incarnation: int = 1
    reserve: int | None = None
    predictor: str = "off"
    fingerprint: str = "f"
    host_token: str = "h"
    transports: tuple[str, ...] = ("shm",)
    version: int = PROTOCOL_VERSION
    chunks: list[bytes] = field(default_factory=lambda: [b'data: {"i":0}\n\n', b"data: [DONE]\n\n"])
    gate: asyncio.Event | None = None
    die_after: int | None = None
    stall: bool = False
    mute: bool = False
    stuck: set[str] = field(default_factory=set)
    bootstrap_port: int = 9123
    bootstrap_given: int | None = None
    told_port: int = 0
    fails: Callable[[dict[str, Any]], bool] | None = None
    failure: bytes = b""
    reply_status: int = 200
    reply_body: bytes | None = None
    location: str = ""
    health_status: int = 200
    stored: set[str] = field(default_factory=set)
    migrate_reply: Callable[[dict[str, Any]], tuple[int, Any]] | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    order_keys: list[str] = field(default_factory=list)
    orders: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    others: list[tuple[str, str, bytes]] = field(default_factory=list)
    disconnects: int = 0
    active: int = 0

    def __post_init__(self) -> None:
        self.name = self.name or f"{self.role}-{self.port}"
        self.url = f"http://127.0.0.1:{self.port}"
        self._sequence = itertools.count(1)
        self._moves = itertools.count(1)

    @property
    def peer(self) -> dict[str, Any]:
        """What an order names it by."""
        address = "tcp://127.0.0.1:1"
        return {"instance_id": self.name, "incarnation": self.incarnation, "address": address}

    # -------------------------------------------------------------- life

    async def start(self) -> FakeEngine:
        self.context = zmq.asyncio.Context()
        self.pub = self.context.socket(zmq.PUB)
        self.pub_port = self.pub.bind_to_random_port("tcp://127.0.0.1")
        app = web.Application(client_max_size=2**30)
        for path in GENERATION:
            app.router.add_post(path, self.generate)
        app.router.add_get("/v1/responses/{name}", self.stored_response)
        app.router.add_post("/v1/responses/{name}/cancel", self.stored_response)
        app.router.add_get("/health", self.health)
        app.router.add_get("/health_generate", self.health)
        app.router.add_get("/server_info", self.server_info)
        app.router.add_post("/star/{what}", self.star_order)
        app.router.add_route("*", "/{rest:.*}", self.other)
        self.runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1
        )
        await self.runner.setup()
        await web.TCPSite(
            self.runner, "127.0.0.1", self.port, reuse_address=True, backlog=1024
        ).start()
        return self

    async def stop(self) -> None:
        await self.runner.cleanup()
        self.context.destroy(linger=0)

    async def restart(self) -> None:
        """Come back as a new incarnation on the same HTTP port and another PUB port."""
        await self.stop()
        self.incarnation += 1
        self._sequence = itertools.count(1)
        await self.start()

    # -------------------------------------------------------------- HTTP

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self.requests.append(orjson.loads(body))
        self.active += 1
        try:
            return await self._answer(request)
        except asyncio.CancelledError:
            self.disconnects += 1
            raise
        finally:
            self.active -= 1

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if self.stall:
            await asyncio.Event().wait()
        if self.fails is not None and self.fails(self.requests[-1]):
            return web.Response(body=self.failure, status=500, content_type="application/json")
        if self.reply_status != 200 or not self.requests[-1].get("stream"):
            body = self.reply_body or b'{"text": "hello",  "meta_info": {}}'
            answer = web.Response(
                body=body, status=self.reply_status, content_type="application/json"
            )
            if self.location:
                answer.headers["Location"] = self.location
            return answer
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "X-Engine": self.name}
        )
        await response.prepare(request)
        if self.mute:
            await asyncio.Event().wait()
        for number, chunk in enumerate(self.chunks):
            if self.die_after == number:
                assert request.transport is not None
                request.transport.abort()
                return response
            if number == 1 and self.gate is not None:
                await self.gate.wait()
            await response.write(chunk)
            await asyncio.sleep(0)
        return response

    async def stored_response(self, request: web.Request) -> web.Response:
        """Of the Responses API: 404 unless this engine stored it."""
        name = request.match_info["name"]
        self.others.append((request.method, request.raw_path, b""))
        known = name in self.stored
        return web.json_response({"id": name, "engine": self.name}, status=200 if known else 404)

    async def health(self, request: web.Request) -> web.Response:
        if request.path in self.stuck:
            await asyncio.Event().wait()
        return web.Response(status=self.health_status)

    async def server_info(self, request: web.Request) -> web.Response:
        info: dict[str, Any] = {
            "max_req_input_len": 4000,
            "max_total_num_tokens": 10_000,
            "tokenizer_path": "fake",
            "admin_api_key": "secret",
            "launch_command": "python -m sglang.launch_server --api-key secret",
            "internal_states": [{}],
            "disaggregation_bootstrap_port": self.bootstrap_port,
        }
        if self.reserve is not None:
            info["num_reserved_decode_tokens"] = self.reserve
        if self.star:
            info["star"] = {
                "protocol_version": self.version,
                "star_version": "0.1.0",
                "instance_id": self.name,
                "incarnation": self.incarnation,
                "role": self.role,
                "status_address": f"tcp://127.0.0.1:{self.told_port or self.pub_port}",
                "migration_address": self.peer["address"],
                "fingerprint": self.fingerprint,
                "host_token": self.host_token,
                "transports": self.transports,
                "predictor": self.predictor,
            }
        return web.json_response(info)

    async def star_order(self, request: web.Request) -> web.Response:
        body = orjson.loads(await request.read() or b"{}")
        what = request.match_info["what"]
        self.orders.append((what, body))
        self.order_keys.append(request.headers.get("Authorization", ""))
        if what == "migrate" and self.migrate_reply is not None:
            status, answer = self.migrate_reply(body)
            return web.json_response(answer, status=status)
        if what == "migrate":
            return web.json_response({"migration_id": self.move_id()}, status=202)
        return web.json_response({"ok": True})

    async def other(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.others.append((request.method, request.raw_path, body))
        return web.json_response({"path": request.path, "engine": self.name})

    # -------------------------------------------------------------- telemetry

    def move_id(self) -> str:
        return f"{self.name}/{self.incarnation}/{next(self._moves)}"

    def status(
        self,
        requests: tuple[RequestStatus, ...] = (),
        *,
        sequence: int | None = None,
        moves: tuple[MoveReport, ...] = (),
        **fields: Any,
    ) -> InstanceStatus:
        values: dict[str, Any] = {
            "instance_id": self.name,
            "incarnation": self.incarnation,
            "sequence": next(self._sequence) if sequence is None else sequence,
            "role": self.role,
            "wall_s": time.time(),
            "monotonic_s": time.monotonic(),
            "step_ms_ema": 30.0,
            "step_ms_p99": 40.0,
            "kv_capacity_tokens": 10_000,
            "kv_used_tokens": sum(r.prompt_tokens + r.output_tokens for r in requests),
            "kv_reserved_tokens": 0,
            "running": len(requests),
            "queued": 0,
            "retracted": 0,
        }
        return InstanceStatus(**(values | fields), requests=requests, recent_moves=moves)

    async def publish(self, message: InstanceStatus | bytes) -> None:
        await self.pub.send(message if isinstance(message, bytes) else encode(message))

    def report(self, migration_id: str, rid: str, target: FakeEngine, **fields: Any) -> MoveReport:
        values: dict[str, Any] = {"outcome": "moved", "stall_ms": 12.0, "context_tokens": 100}
        return MoveReport(
            migration_id=migration_id, rid=rid, source=self.name, target=target.name,
            **(values | fields),
        )  # fmt: skip


def request_status(rid: str, prompt: int = 100, output: int = 10, **fields: Any) -> RequestStatus:
    values: dict[str, Any] = {"max_new_tokens": 1000, "home": "x"}
    return RequestStatus(rid=rid, prompt_tokens=prompt, output_tokens=output, **(values | fields))


@dataclass
class Fleet:
    """A router in front of fake instances, and a client session."""

    router: Router
    engines: list[FakeEngine]
    url: str
    session: aiohttp.ClientSession

    async def post(self, path: str, body: Any, **kwargs: Any) -> tuple[int, bytes]:
        async with self.session.post(self.url + path, json=body, **kwargs) as response:
            return response.status, await response.read()

    async def get(self, path: str, **kwargs: Any) -> tuple[int, Any]:
        async with self.session.get(self.url + path, **kwargs) as response:
            return response.status, await response.read()

    async def until_healthy(self, *engines: FakeEngine) -> None:
        for engine in engines or self.engines:
            instance = self.instance(engine)
            await eventually(lambda one=instance: one.healthy, f"{engine.name} healthy")

    def instance(self, engine: FakeEngine) -> Any:
        return self.router.fleet.instances[engine.url]

    async def publish(self, engine: FakeEngine, *requests: RequestStatus, **fields: Any) -> None:
        """Publish a status until the router has taken it (a SUB socket joins late)."""
        instance = self.instance(engine)
        message = engine.status(requests, **fields)

        def taken() -> bool:
            return instance.status is not None and instance.status.sequence >= message.sequence

        deadline = time.monotonic() + WAIT_S
        while not taken():
            assert time.monotonic() < deadline, f"{engine.name}'s status never arrived"
            await engine.publish(message)
            await asyncio.sleep(0.01)


def member(engine: FakeEngine, bootstrap_port: int | None = None) -> Member:
    return Member(Endpoint.parse(engine.url), engine.role, bootstrap_port)


@contextlib.asynccontextmanager
async def fleet(
    *engines: FakeEngine, start: bool = True, policies: dict[str, Any] | None = None, **config: Any
) -> AsyncIterator[Fleet]:
    """Start engines and a router in front of them."""
    settings: dict[str, Any] = {
        "policy": "round-robin",
        "health_check_interval": 0.2,
        "health_check_timeout": WAIT_S,
        "health_failure_threshold": 1,
        "rescheduler_interval": 0.05,
        "status_stale": 600.0,
    }
    if start:
        for engine in engines:
            await engine.start()
    members = tuple(member(engine, engine.bootstrap_given) for engine in engines)
    router = Router(RouterConfig(members=members, **(settings | config)), **(policies or {}))
    listener = Listener(router, "127.0.0.1", 0)
    await listener.start()
    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
    running = Fleet(router, list(engines), listener.url, session)
    try:
        if start:
            await running.until_healthy()
        yield running
    finally:
        await session.close()
        await listener.close()
        for engine in engines:
            with contextlib.suppress(Exception):
                await engine.stop()
