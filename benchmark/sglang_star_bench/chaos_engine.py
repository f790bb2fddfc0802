"""An engine without a model that fails on request: the engines of ``star bench chaos``.

Run as ``python -m sglang_star_bench.chaos_engine SPEC_JSON``. It speaks HTTP down to the bytes, so
that it can break it anywhere, advertises STAR and publishes statuses. A prefill instance listens at
its bootstrap port; a decode instance connects there, as for a transfer of KV, and answers 500 if
nobody listens. ``POST /chaos`` chooses the fault.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import uvloop
import zmq
import zmq.asyncio

from sglang_star.machine import free_ports
from sglang_star.protocol import PROTOCOL_VERSION, InstanceStatus, encode

HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
STATUS_S = 0.5
DRIP = 20
"""A slow drip is so many times slower."""
RESET_AFTER = 3
"""Tokens of a stream that is reset in the middle."""


@dataclass(frozen=True)
class EngineSpec:
    """One fake engine; times in milliseconds."""

    name: str
    port: int
    role: str
    tokens: int
    ttft_ms: float
    itl_ms: float
    bootstrap_port: int = 0

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        """Return its command line."""
        return [sys.executable, "-m", "sglang_star_bench.chaos_engine", json.dumps(asdict(self))]


def token(prompt: str, index: int) -> str:
    """The text of one token: what a prompt is answered with depends on nothing else."""
    return hashlib.blake2b(f"{prompt}/{index}".encode(), digest_size=4).hexdigest()


def frame(payload: object) -> bytes:
    """One server-sent event as one chunk."""
    text = b"data: " + (payload if isinstance(payload, bytes) else json.dumps(payload).encode())
    return b"%x\r\n%s\n\n\r\n" % (len(text) + 2, text)


class Engine:
    """State of the process, shared by its connections.

    Attributes:
        fault: what it does wrong now; drawn: generation requests since the fault began.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.fault = ""
        self.drawn = 0
        self.connections: set[Connection] = set()
        self.streams: set[Connection] = set()
        self.incarnation = time.time_ns()
        self._relays: list[asyncio.Task[None]] = []
        self._frozen: set[asyncio.Task[None]] = set()
        self.pub_port, self.told_port = free_ports(2)

    async def serve(self) -> None:
        """Serve until the process ends."""
        loop = asyncio.get_running_loop()
        spec = self.spec
        await loop.create_server(lambda: Connection(self), "127.0.0.1", spec.port, backlog=4096)
        if spec.bootstrap_port:
            await asyncio.start_server(_hang_up, "127.0.0.1", spec.bootstrap_port, backlog=4096)
        await asyncio.start_server(self._relay, "127.0.0.1", self.told_port)
        context = zmq.asyncio.Context()
        publisher = context.socket(zmq.PUB)
        publisher.bind(f"tcp://127.0.0.1:{self.pub_port}")
        for sequence in itertools.count(1):
            await publisher.send(encode(self._status(sequence)))
            await asyncio.sleep(STATUS_S)

    def begin(self, fault: str) -> None:
        """Change what it does wrong."""
        self.fault, self.drawn = fault, 0
        if fault == "status half open":
            self._frozen = set(self._relays)
        if fault == "reset in the middle":
            for connection in tuple(self.streams):
                connection.reset()

    def info(self) -> dict[str, Any]:
        """Return the body of ``/server_info``, read by both routers."""
        return {
            "model_path": "fake", "served_model_name": "fake", "is_generation": True, "tp_size": 1,
            "dp_size": 1, "max_total_num_tokens": 1_000_000, "max_req_input_len": 32768,
            "version": "0", "internal_states": [{}], "disaggregation_mode": "null",
            "disaggregation_bootstrap_port": self.spec.bootstrap_port,
            "star": {
                "protocol_version": PROTOCOL_VERSION, "star_version": "0",
                "instance_id": self.spec.name, "incarnation": self.incarnation,
                "role": self.spec.role, "status_address": f"tcp://127.0.0.1:{self.told_port}",
                "migration_address": "tcp://127.0.0.1:1", "fingerprint": "fake", "host_token": "",
                "predictor": "off",
            },
        }  # fmt: skip

    def _status(self, sequence: int) -> InstanceStatus:
        jump = {"clock ahead": 3600.0, "clock behind": -3600.0}.get(self.fault, 0.0)
        return InstanceStatus(
            instance_id=self.spec.name, incarnation=self.incarnation, sequence=sequence,
            role=self.spec.role, wall_s=time.time() + jump, monotonic_s=time.monotonic() + jump,
            step_ms_ema=self.spec.itl_ms, step_ms_p99=self.spec.itl_ms,
            kv_capacity_tokens=1_000_000, kv_used_tokens=0, kv_reserved_tokens=0,
            running=len(self.streams), queued=0, retracted=0, requests=(), recent_moves=(),
        )  # fmt: skip

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Stand between publisher and subscriber, so that a link can die without an end."""
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self.pub_port)
        for source, sink in ((reader, inner_writer), (inner_reader, writer)):
            self._relays.append(asyncio.create_task(self._pump(source, sink)))

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                if asyncio.current_task() in self._frozen:
                    await asyncio.Event().wait()
                sink.write(data)


async def _hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Be there, which is all that a bootstrap server has to do here."""
    writer.close()


class Connection(asyncio.Protocol):
    """One connection from a router."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._buffer = b""
        self._transport: asyncio.Transport
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport  # type: ignore[assignment]
        self._engine.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop what is streamed there."""
        self._engine.connections.discard(self)
        self._engine.streams.discard(self)
        for task in self._tasks:
            task.cancel()

    def reset(self) -> None:
        """End it without a farewell."""
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Answer every complete request."""
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end]
            if not head.split(b"\r\n")[0].endswith(b"HTTP/1.1"):
                # sglang_router asks whether it speaks gRPC.
                return self._transport.close()
            length = 0
            for line in head.split(b"\r\n")[1:]:
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            if len(self._buffer) < end + 4 + length:
                return None
            body = self._buffer[end + 4 : end + 4 + length]
            self._buffer = self._buffer[end + 4 + length :]
            method, path = head.split(b" ")[:2]
            self._answer(method, path, body)
        return None

    def _answer(self, method: bytes, path: bytes, body: bytes) -> None:
        engine = self._engine
        if path == b"/chaos":
            drawn = engine.drawn
            engine.begin(json.loads(body)["fault"])
            return self._reply(200, {"drawn": drawn})
        if engine.fault == "hang after connect":
            return None
        if method == b"POST" and b"abort" not in path:
            task = asyncio.get_running_loop().create_task(self._generate(json.loads(body)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return None
        if path == b"/health_generate" and engine.fault == "hang after head":
            return None
        if path == b"/v1/models":
            models = {"object": "list", "data": [{"id": "fake", "object": "model", "root": "fake"}]}
            return self._reply(200, models)
        return self._reply(200, engine.info())

    def _reply(self, status: int, payload: object) -> None:
        body = json.dumps(payload).encode()
        self._transport.write(
            b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            % (status, len(body))
            + body
        )

    async def _generate(self, request: dict[str, Any]) -> None:
        engine, spec = self._engine, self._engine.spec
        engine.drawn += 1
        error = {"error": {"message": "out of order", "code": 500}}
        if engine.fault == "instant 500":
            return self._reply(500, error)
        if engine.fault == "error event":
            self._transport.write(HEAD + frame(error) + frame(b"[DONE]") + b"0\r\n\r\n")
            return None
        if engine.fault == "hang after head":
            self._transport.write(HEAD)
            await asyncio.Event().wait()
        if spec.role == "decode" and not await _reachable(request):
            return self._reply(500, {"error": {"message": "KV transfer failed", "code": 500}})
        self._engine.streams.add(self)
        await asyncio.sleep(spec.ttft_ms / 1e3)
        prompt = str(request["messages"][-1]["content"])
        self._transport.write(HEAD)
        for index in range(1 if spec.role == "prefill" else spec.tokens):
            choice = {"index": 0, "delta": {"content": token(prompt, index) + " "}}
            event = {
                "id": "0", "object": "chat.completion.chunk", "created": 0, "model": spec.name,
                "choices": [choice],
            }  # fmt: skip
            self._transport.write(frame(event))
            if engine.fault == "reset in the middle" and index + 1 == RESET_AFTER:
                return self.reset()
            for _ in range(DRIP):
                await asyncio.sleep(spec.itl_ms / 1e3)
                if engine.fault != "slow drip":
                    break
        self._engine.streams.discard(self)
        self._transport.write(frame(b"[DONE]") + b"0\r\n\r\n")
        return None


async def _reachable(request: dict[str, Any]) -> bool:
    host, port = request.get("bootstrap_host"), request.get("bootstrap_port")
    if not isinstance(host, str) or not isinstance(port, int):
        return False
    try:
        _, writer = await asyncio.open_connection(host, port)
    except OSError:
        return False
    writer.close()
    return True


if __name__ == "__main__":
    uvloop.run(Engine(EngineSpec(**json.loads(sys.argv[1]))).serve())
