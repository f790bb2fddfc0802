"""The fake engine of ``star bench router``: streams events at a fixed pace and costs little.

Run as ``python -m sglang_star_bench.router_engine TTFT_MS ITL_MS TOKENS PORT[:prefill]...``; a
prefill instance answers with its one token and is done.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys

import uvloop

HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
INFO = {
    "model_path": "fake", "served_model_name": "fake", "is_generation": True, "tp_size": 1,
    "dp_size": 1, "max_total_num_tokens": 1_000_000, "max_req_input_len": 32768, "version": "0",
    "internal_states": [{}], "disaggregation_mode": "null",
}  # fmt: skip
MODELS = {"object": "list", "data": [{"id": "fake", "object": "model", "root": "fake"}]}


def free_port() -> int:
    """Return a TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def event(index: int) -> bytes:
    """Return one chunk as SGLang's chat endpoint writes it."""
    payload = {
        "id": "0" * 32, "object": "chat.completion.chunk", "created": 1_700_000_000,
        "model": "fake",
        "choices": [{"index": 0, "delta": {"content": f" token{index}"}, "logprobs": None,
                     "finish_reason": None, "matched_stop": None}],
    }  # fmt: skip
    text = b"data: " + json.dumps(payload).encode() + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(text), text)


class Engine(asyncio.Protocol):
    """One connection from a router."""

    def __init__(self, ttft_s: float, itl_s: float, events: list[bytes]) -> None:
        self._ttft_s, self._itl_s, self._events = ttft_s, itl_s, events
        self._buffer = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Answer every complete request."""
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end]
            length = 0
            for line in head.split(b"\r\n")[1:]:
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            if len(self._buffer) < end + 4 + length:
                return
            self._buffer = self._buffer[end + 4 + length :]
            self._answer(head.split(b" ")[0], head.split(b" ")[1])

    def _answer(self, method: bytes, path: bytes) -> None:
        if method == b"POST":
            asyncio.get_running_loop().call_later(self._ttft_s, self._token, 0)
            return
        body = json.dumps(MODELS if path == b"/v1/models" else INFO).encode()
        self._transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            % len(body)
            + body
        )

    def _token(self, index: int) -> None:
        if self._transport.is_closing():
            return
        chunk = self._events[index]
        self._transport.write(HEAD + chunk if index == 0 else chunk)
        if index + 1 < len(self._events):
            asyncio.get_running_loop().call_later(self._itl_s, self._token, index + 1)


async def serve(ttft_s: float, itl_s: float, tokens: int, instances: list[str]) -> None:
    """Serve until terminated."""
    done = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
    loop = asyncio.get_running_loop()
    for instance in instances:
        port, _, role = instance.partition(":")
        events = [event(i) for i in range(1 if role == "prefill" else tokens)] + [done]
        await loop.create_server(
            lambda events=events: Engine(ttft_s, itl_s, events),  # type: ignore[misc]
            "127.0.0.1",
            int(port),
            backlog=4096,
        )
    await asyncio.Event().wait()


if __name__ == "__main__":
    ttft_ms, itl_ms, count, *listen = sys.argv[1:]
    uvloop.run(serve(float(ttft_ms) / 1e3, float(itl_ms) / 1e3, int(count), listen))
