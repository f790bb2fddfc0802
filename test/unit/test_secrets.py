"""Keys do not leave an engine in what it says of itself."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import msgspec
from fastapi import FastAPI, Response

from sglang_star.secrets import Redaction, redacted

INFO: dict[str, Any] = {
    "model_path": "m",
    "api_key": "one",
    "admin_api_key": "two words",
    "ssl_keyfile_password": None,
    "launch_command": "python -m sglang.launch_server --api-key one --admin-api-key 'two words' "
    "--ssl-keyfile-password=three --port 1",
}


def test_keys_are_hidden_and_nothing_else() -> None:
    shown = msgspec.json.decode(redacted(msgspec.json.encode(INFO)))
    assert shown == INFO | {
        "api_key": "***",
        "admin_api_key": "***",
        "launch_command": "python -m sglang.launch_server --api-key '***' --admin-api-key '***' "
        "'--ssl-keyfile-password=***' --port 1",
    }
    for other in (b"", b"no", b"[1]"):
        assert redacted(other) == other
    unclosed = msgspec.json.encode({"launch_command": "--api-key 'one"})
    assert b"one" not in redacted(unclosed)


def test_only_the_two_paths_are_touched() -> None:
    app = FastAPI()
    app.add_middleware(Redaction)
    body = msgspec.json.encode(INFO)

    async def info() -> Response:
        return Response(body, media_type="application/json")

    for path in ("/server_info", "/get_server_info", "/other"):
        app.add_api_route(path, info)

    async def check() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://star.invalid") as client:
            for path in ("/server_info", "/get_server_info"):
                answer = await client.get(path)
                assert answer.content == redacted(body)
                assert int(answer.headers["Content-Length"]) == len(answer.content)
            assert (await client.get("/other")).content == body
            assert (await client.get("/none")).status_code == 404

    asyncio.run(check())
