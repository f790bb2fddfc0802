"""Orders over HTTP: what a router knows of a target is believed, and else the target is asked."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import zmq
import zmq.asyncio
from aiohttp import web
from fastapi import FastAPI

from sglang_star.endpoints import Endpoints, OrderClient
from sglang_star.protocol import (
    PROTOCOL_VERSION,
    Advertisement,
    DrainOrder,
    MigrateOrder,
    OrderReply,
    Peer,
    decode,
    encode,
)

PEER = {"instance_id": "decode-1", "incarnation": 7, "address": "tcp://127.0.0.1:4000"}
NOBODY = "http://127.0.0.1:1"
"""Refuses connections: an order that asks it fails."""


@contextlib.asynccontextmanager
async def instance(folder: Path) -> AsyncIterator[tuple[httpx.AsyncClient, list[Any]]]:
    """An instance's routes before a scheduler that obeys everything: a client, its orders."""
    orders: list[Any] = []
    address = f"ipc://{folder}/orders"
    scheduler = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
    scheduler.bind(address)

    async def obey() -> None:
        while True:
            sender, data = await scheduler.recv_multipart()
            orders.append(decode(data))
            await scheduler.send_multipart(
                [sender, encode(OrderReply(order_id=orders[-1].order_id))]
            )

    app = FastAPI()
    Endpoints(OrderClient(address)).join(app, lambda handler: handler)
    obeying = asyncio.create_task(obey())
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://star.invalid") as client:
        yield client, orders
    obeying.cancel()
    scheduler.close(linger=0)


@contextlib.asynccontextmanager
async def target(seen: list[dict[str, str]] | None = None) -> AsyncIterator[str]:
    """Another instance, as far as it is asked who it is: its base URL.

    ``seen`` gets the headers of every request; at ``/elsewhere`` it sends one on to itself.
    """
    star = Advertisement(
        protocol_version=PROTOCOL_VERSION, star_version="0", instance_id="decode-1", incarnation=7,
        role="decode", status_address="", migration_address="tcp://127.0.0.1:4000",
        fingerprint="f", host_token="h",
    )  # fmt: skip

    async def server_info(request: web.Request) -> web.Response:
        if seen is not None:
            seen.append(dict(request.headers))
        return web.json_response({"star": msgspec.structs.asdict(star)})

    async def elsewhere(request: web.Request) -> web.Response:
        raise web.HTTPTemporaryRedirect("/server_info")

    app = web.Application()
    app.router.add_get("/server_info", server_info)
    app.router.add_get("/elsewhere/server_info", elsewhere)
    runner = web.AppRunner(app)
    await runner.setup()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        await web.SockSite(runner, listening).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        await runner.cleanup()


def test_a_target_that_the_order_names_is_not_asked(tmp_path: Path) -> None:
    async def check() -> None:
        async with instance(tmp_path) as (client, orders):
            body: dict[str, Any] = {"rid": "r", "target": NOBODY, "peer": PEER}
            answer = await client.post("/star/migrate", json=body)
            assert answer.status_code == 202, answer.text
            body = {"targets": [NOBODY, NOBODY], "peers": [PEER, {**PEER, "instance_id": "x"}]}
            answer = await client.post("/star/drain", json=body)
            assert answer.status_code == 202, answer.text
            move, drain = orders
            assert isinstance(move, MigrateOrder)
            assert move.target == Peer(**PEER)  # type: ignore[arg-type]
            assert isinstance(drain, DrainOrder)
            assert [peer.instance_id for peer in drain.targets] == ["decode-1", "x"]

    asyncio.run(check())


def test_a_target_known_by_its_url_alone_is_asked(tmp_path: Path) -> None:
    async def check() -> None:
        async with instance(tmp_path) as (client, orders), target() as url:
            bodies = ({"rid": "r", "target": url}, {"rid": "r", "target": url, "peer": None})
            for body in bodies:
                assert (await client.post("/star/migrate", json=body)).status_code == 202
                assert orders.pop().target == Peer(**PEER)  # type: ignore[arg-type]
            for more in ({}, {"peers": [None]}):
                answer = await client.post("/star/drain", json={"targets": [url], **more})
                assert answer.status_code == 202, answer.text
                assert orders.pop().targets == (Peer(**PEER),)  # type: ignore[arg-type]
            answer = await client.post("/star/migrate", json={"rid": "r", "target": NOBODY})
            assert answer.status_code == 503
            assert "does not answer" in answer.json()["error"]["message"]

    asyncio.run(check())


def test_no_key_goes_to_an_address_in_an_order(tmp_path: Path) -> None:
    async def check() -> None:
        seen: list[dict[str, str]] = []
        async with instance(tmp_path) as (client, _), target(seen) as url:
            client.headers["Authorization"] = "Bearer secret"
            body = {"rid": "r", "target": url}
            assert (await client.post("/star/migrate", json=body)).status_code == 202
            assert (await client.post("/star/drain", json={"targets": [url]})).status_code == 202
            assert len(seen) == 2
            assert not any("Authorization" in headers for headers in seen)
            # Nor does the one who is asked choose who is asked next.
            body["target"] = url + "/elsewhere"
            answer = await client.post("/star/migrate", json=body)
            assert answer.status_code == 503, answer.text
            assert len(seen) == 2

    asyncio.run(check())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/star/migrate", {"peer": {**PEER, "address": "ipc:///tmp/x"}}),
        ("/star/migrate", {"peer": {**PEER, "instance_id": ""}}),
        ("/star/migrate", {"peer": {**PEER, "more": 1}}),
        ("/star/migrate", {"peer": {"instance_id": "x"}}),
        ("/star/drain", {"targets": [NOBODY], "peers": [PEER, PEER]}),
    ],
)
def test_a_target_named_wrongly_is_refused(tmp_path: Path, path: str, body: dict[str, Any]) -> None:
    async def check() -> None:
        async with instance(tmp_path) as (client, orders):
            whole = {"rid": "r", "target": NOBODY, **body} if path == "/star/migrate" else body
            answer = await client.post(path, json=whole)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["type"] == "MalformedMessage"
            assert orders == []

    asyncio.run(check())


@pytest.mark.parametrize("body", [b'{"rid":"\xf2"}', b"[" * 100_000, b"\x00"])
def test_a_body_that_is_no_json_is_refused_whatever_its_bytes(tmp_path: Path, body: bytes) -> None:
    async def check() -> None:
        async with instance(tmp_path) as (client, orders):
            answer = await client.post("/star/migrate", content=body)
            assert answer.status_code == 400, answer.text
            assert orders == []

    asyncio.run(check())
