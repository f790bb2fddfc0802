"""``/star/*`` on SGLang's own HTTP app, behind SGLang's own check of keys."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import zmq
import zmq.asyncio

from sglang_star import endpoints
from sglang_star.config import StarConfig
from sglang_star.launch import ATTRIBUTE
from sglang_star.protocol import OrderReply, decode, encode
from sglang_star.secrets import Redaction

ROUTES = [
    ("GET", "/star/status"),
    ("POST", "/star/migrate"),
    ("POST", "/star/disarm"),
    ("POST", "/star/drain"),
    ("POST", "/star/undrain"),
]


@pytest.mark.engine
def test_star_stands_under_the_keys_of_sglangs_admin_routes(tmp_path: Path) -> None:
    from fastapi import FastAPI
    from sglang.srt.entrypoints import http_server
    from sglang.srt.utils.auth import add_api_key_middleware

    address = f"ipc://{tmp_path}/orders"
    arguments = SimpleNamespace(api_key=None, **{ATTRIBUTE: StarConfig(predictor="off")})
    endpoints.install(arguments, None, None, None, [{"star_order_address": address}])

    async def status(client: httpx.AsyncClient, method: str, path: str, key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        body = {"rid": "r", "target": "x", "targets": []} if method == "POST" else None
        answer = await client.request(method, path, json=body, headers=headers)
        return answer.status_code

    async def obey(scheduler: zmq.asyncio.Socket) -> None:
        while True:
            sender, data = await scheduler.recv_multipart()
            reply = OrderReply(order_id=decode(data).order_id)
            await scheduler.send_multipart([sender, encode(reply)])

    async def check() -> None:
        scheduler = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        scheduler.bind(address)
        obeying = asyncio.create_task(obey(scheduler))
        for api_key, admin_key in ((None, None), ("c", None), (None, "a"), ("c", "a")):
            # The middleware in an app of its own, so that each pair of keys begins afresh.
            guarded = FastAPI()
            guarded.router.routes = http_server.app.router.routes
            add_api_key_middleware(guarded, api_key=api_key, admin_api_key=admin_key)
            needed = admin_key or api_key
            transport = httpx.ASGITransport(guarded)
            async with httpx.AsyncClient(transport=transport, base_url="http://e") as client:
                for method, path in ROUTES:
                    for given in ("", "c", "a"):
                        refused = await status(client, method, path, given) == 401
                        assert refused == (needed is not None and given != needed), (
                            api_key, admin_key, method, path, given,
                        )  # fmt: skip
                # Its handler needs an engine; what matters is that the answer comes through ours.
                assert any(one.cls is Redaction for one in http_server.app.user_middleware)
        obeying.cancel()
        scheduler.close(linger=0)

    asyncio.run(check())
