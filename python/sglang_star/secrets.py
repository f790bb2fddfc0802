"""What ``/server_info`` must not tell: SGLang shows every argument there, its keys among them.

Whoever may generate may ask for it, and with an admin key alone everybody may; an admin key that
stands in it protects nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

import msgspec

FIELDS: Final = ("api_key", "admin_api_key", "ssl_keyfile_password")
PATHS: Final = frozenset({"/server_info", "/get_server_info"})
HIDDEN: Final = "***"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class Redaction:
    """ASGI middleware that hides keys in what the paths of :data:`PATHS` answer."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request; all but those two paths pass untouched."""
        if scope["type"] != "http" or scope["path"] not in PATHS:
            await self._app(scope, receive, send)
            return
        start: list[Message] = []
        body: list[bytes] = []

        async def hold(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.append(message)
                return
            body.append(message.get("body", b""))
            if message.get("more_body"):
                return
            whole = redacted(b"".join(body))
            head = start[0]
            head["headers"] = [
                (name, str(len(whole)).encode() if name.lower() == b"content-length" else value)
                for name, value in head["headers"]
            ]
            await send(head)
            await send({"type": "http.response.body", "body": whole})

        await self._app(scope, receive, hold)


def redacted(body: bytes) -> bytes:
    """Hide keys in an answer; what is not a JSON object stays as it is."""
    try:
        info = msgspec.json.decode(body)
    except msgspec.MsgspecError:
        return body
    if not isinstance(info, dict):
        return body
    for name in FIELDS:
        if info.get(name) is not None:
            info[name] = HIDDEN
    command = info.get("launch_command")
    if isinstance(command, str):
        info["launch_command"] = _without_values(command)
    return msgspec.json.encode(info)


def _without_values(command: str) -> str:
    """A command line whose secret flags have no values."""
    try:
        words = shlex.split(command)
    except ValueError:
        return HIDDEN
    secret = {"--" + name.replace("_", "-") for name in FIELDS}
    shown: list[str] = []
    for word in words:
        flag, equals, _ = word.partition("=")
        if shown and shown[-1] in secret:
            shown.append(HIDDEN)
        elif equals and flag in secret:
            shown.append(f"{flag}={HIDDEN}")
        else:
            shown.append(word)
    return shlex.join(shown)
