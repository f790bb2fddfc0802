"""Errors as clients of SGLang expect them, and as our own endpoints give them."""

from __future__ import annotations

import orjson
from aiohttp import web

from sglang_star.errors import StarError


class Rejected(StarError):
    """The router cannot serve a request; ``status`` is what the client is told.

    Attributes:
        kind: OpenAI error type, e.g. ``service_unavailable``.
        retry_after_s: what the client should wait before it tries again; 0 sends no header.
        close: the connection takes no other request, for the rest of this one is not read.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        kind: str,
        retry_after_s: int = 0,
        hint: str = "",
        close: bool = False,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.kind = kind
        self.retry_after_s = retry_after_s
        self.close = close


def openai_error(message: str, status: int, kind: str) -> bytes:
    """Return the JSON that SGLang's OpenAI server answers an error with, plus OpenAI's own key."""
    detail = {"message": message, "type": kind, "param": None, "code": status}
    return orjson.dumps({"object": "error", **detail, "error": detail})


def rejection(error: Rejected) -> web.Response:
    """Return the whole HTTP answer for a request that was not served."""
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s else None
    response = web.Response(
        body=openai_error(str(error), error.status, error.kind),
        status=error.status,
        headers=headers,
        content_type="application/json",
    )
    if error.close:
        response.force_close()
    return response


def sse_error(message: str, status: int, kind: str, path: str = "") -> bytes:
    """Return one server-sent event that clients of ``path`` raise as an error."""
    return error_event(openai_error(message, status, kind), path)


def error_event(error: bytes, path: str) -> bytes:
    """Return an error, as JSON, as one event; Anthropic's clients know it by the event's name."""
    name = b"event: error\n" if path == "/v1/messages" else b""
    return name + b"data: " + error.replace(b"\n", b" ") + b"\n\n"


def json_reply(payload: object, status: int = 200) -> web.Response:
    """Answer with JSON."""
    return web.Response(
        body=orjson.dumps(payload, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS),
        status=status,
        content_type="application/json",
    )


def star_error(error: StarError) -> web.Response:
    """Answer one of our own endpoints with an error."""
    response = json_reply(error.to_json(), error.status)
    if isinstance(error, Rejected) and error.close:
        response.force_close()
    return response
