"""A client's request as it goes on to an instance."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from sglang_star_router.door import AUTHORIZATION
from sglang_star_router.framing import HOP_BY_HOP
from sglang_star_router.instance import Instance

_NOT_FORWARDED: Final = HOP_BY_HOP | {
    b"host",
    b"content-length",
    b"content-encoding",  # aiohttp has decoded the body
    b"transfer-encoding",
    b"expect",
    b"trailer",
}


def request_block(
    request: web.Request, body: tuple[bytes, ...], instance: Instance
) -> tuple[bytes, ...]:
    """Return the request as it goes to an instance: the client's headers, this hop's framing."""
    endpoint = instance.endpoint
    size = sum(map(len, body))
    lines = [
        f"{request.method} {request.raw_path} HTTP/1.1".encode("latin-1"),
        b"Host: " + endpoint.url.partition("://")[2].encode("latin-1"),
    ]
    lines += [
        name + b": " + value
        for name, value in request.raw_headers
        if name.lower() not in _NOT_FORWARDED
    ]
    if (authorization := request.get(AUTHORIZATION)) is not None:
        lines = [line for line in lines if not line.lower().startswith(b"authorization:")]
        lines += [b"Authorization: " + authorization] if authorization else []
    if size or request.method not in ("GET", "HEAD"):
        lines.append(b"Content-Length: %d" % size)
    head = b"\r\n".join(lines) + b"\r\n\r\n"
    return (head + body[0], *body[1:])
