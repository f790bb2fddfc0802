"""Whether the first event of a stream is an error, as SGLang's several APIs spell one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import orjson

UNKNOWN_CODE: Final = 500
_SIGNS: Final = (b'"error"', b'"abort"')


@dataclass(frozen=True, slots=True)
class EventError:
    """An error in place of an answer.

    Attributes:
        code: HTTP status it stands for; payload: the event's JSON.
    """

    code: int
    payload: bytes

    @property
    def about_the_request(self) -> bool:
        """Every instance would say the same."""
        return 400 <= self.code < 500 and self.code not in (408, 429)


def end_of_event(data: bytes) -> int | None:
    """Where the first event ends; inside chunked framing it may seem to end a little early."""
    plain, other = data.find(b"\n\n"), data.find(b"\r\n\r\n")
    if other < 0:
        return plain + 2 if plain >= 0 else None
    return min(plain + 2, other + 4) if plain >= 0 else other + 4


def error_in(payload: bytes) -> EventError | None:
    """Return the error that a stream begins with, None if it begins well.

    Args:
        payload: the first bytes of the body, without chunked framing.
    """
    # Nearly every stream begins well, and most of them are told by this.
    if not any(sign in payload for sign in _SIGNS):
        return None
    event = payload.replace(b"\r\n", b"\n").partition(b"\n\n")[0]
    lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
    data = b"\n".join(lines)
    try:
        content = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(content, dict):
        return None
    error = content.get("error")
    if error:
        code = _code(error) or _code(content) or _code_of_type(error)
        return EventError(code or UNKNOWN_CODE, data)
    meta = content.get("meta_info")
    reason = meta.get("finish_reason") if isinstance(meta, dict) else None
    if isinstance(reason, dict) and reason.get("type") == "abort" and _code(reason):
        return EventError(_code(reason), data)
    return None


def _code(fields: Any) -> int:
    for name in ("code", "status_code", "status"):
        value = fields.get(name) if isinstance(fields, dict) else None
        if isinstance(value, int) and 400 <= value < 600:
            return value
    return 0


def _code_of_type(error: Any) -> int:
    kind = error.get("type") if isinstance(error, dict) else None
    return 400 if kind in ("invalid_request_error", "BadRequestError") else 0
