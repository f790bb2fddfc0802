"""HTTP/1.1 response framing: where a head ends, where a body ends, without touching its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"upgrade",
    }
)
"""Headers that belong to one connection; ``transfer-encoding`` is passed on with the framing."""

MAX_LINE: Final = 16 * 1024
_X: Final = (b"x", b"X")


class FramingError(Exception):
    """The peer does not speak HTTP/1.1 as we understand it."""


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """Status line and headers of a response.

    Attributes:
        status: HTTP status.
        lines: status line and end-to-end headers as received, each without CRLF.
        content_type: lower case, empty if absent.
        length: ``Content-Length``; None if the body is chunked or runs until the connection ends.
        chunked, reusable: framing, and whether the connection survives the response.
    """

    status: int
    lines: tuple[bytes, ...]
    content_type: bytes
    length: int | None
    chunked: bool
    reusable: bool

    @classmethod
    def parse(cls, block: bytes, *, bodiless: bool) -> ResponseHead:
        """Read the block before the blank line.

        Args:
            bodiless: the request was a HEAD.

        Raises:
            FramingError: not a response head.
        """
        status_line, *headers = block.split(b"\r\n")
        if not status_line.startswith(b"HTTP/1.") or not status_line[9:12].isdigit():
            raise FramingError(f"not an HTTP/1 status line: {status_line[:80]!r}")
        status = int(status_line[9:12])
        modern = reusable = status_line.startswith(b"HTTP/1.1")
        kept, content_type = [status_line], b""
        length: int | None = None
        chunked = False
        for line in headers:
            name, colon, value = line.partition(b":")
            if not colon or name != name.strip():
                raise FramingError(f"not a header: {line[:80]!r}")
            name = name.lower()
            if name == b"connection":
                reusable = reusable and b"close" not in value.lower()
            if name in HOP_BY_HOP:
                continue
            if name == b"content-type":
                content_type = value.strip().lower()
            elif name == b"transfer-encoding":
                if chunked or value.strip().lower() != b"chunked":
                    raise FramingError(f"unknown transfer coding {value[:80]!r}")
                if not modern:
                    raise FramingError("chunked framing in an HTTP/1.0 response")
                chunked = True
            elif name == b"content-length":
                if not value.strip().isdigit():
                    raise FramingError(f"bad content length {value[:80]!r}")
                if length not in (None, int(value)):
                    raise FramingError("two content lengths")
                length = int(value)
            kept.append(line)
        if bodiless or status in (204, 304) or status < 200:
            length, chunked = 0, False
        elif chunked and length is not None:
            # Two framings: chunks win, and nobody further on may read it otherwise.
            kept = [line for line in kept if line[:15].lower() != b"content-length:"]
            length, reusable = None, False
        return cls(
            status, tuple(kept), content_type, length, chunked,
            reusable and (chunked or length is not None),
        )  # fmt: skip


@lru_cache(maxsize=32)
def parse_head(block: bytes, *, bodiless: bool) -> ResponseHead:
    """:meth:`ResponseHead.parse`; an instance's heads are all alike, but for the date in them.

    Raises:
        FramingError: not a response head.
    """
    return ResponseHead.parse(block, bodiless=bodiless)


class ChunkScanner:
    """Follows chunked framing and says where the body ends.

    Attributes:
        at_boundary: every chunk seen so far is complete, so that one more may be appended.
        done: the last chunk and its trailers have been seen.
    """

    __slots__ = ("_line", "_skip", "_trailers", "at_boundary", "done")

    def __init__(self) -> None:
        self._skip = 0
        self._line = b""
        self._trailers = False
        self.at_boundary = True
        self.done = False

    def feed(self, data: bytes, payload: list[bytes] | None = None) -> int:
        """Advance over ``data`` and return how many of its bytes belong to this body.

        Args:
            payload: receives the chunk contents when the caller wants them unframed.

        Raises:
            FramingError: not chunked framing.
        """
        position, size = 0, len(data)
        while position < size:
            if self._skip:
                end = position + self._skip
                # The last two bytes of what is skipped are the chunk's CRLF.
                if payload is not None and self._skip > 2:
                    payload.append(data[position : min(end - 2, size)])
                if end > size:
                    self._skip = end - size
                    break
                self._skip = 0
                position = end
                continue
            end = data.find(b"\n", position)
            if end < 0:
                self._line += data[position:]
                if len(self._line) > MAX_LINE:
                    raise FramingError("endless chunk header")
                self.at_boundary = False
                return size
            line = data[position : end + 1]
            if self._line:
                line, self._line = self._line + line, b""
            position = end + 1
            if self._trailers:
                if not line.rstrip(b"\r\n"):
                    self.done = True
                    return position
                continue
            length = _chunk_size(line)
            self._skip = length + 2 if length else 0
            self._trailers = not length
        self.at_boundary = self._skip == 0 and not self._trailers
        return size


@lru_cache(maxsize=1024)
def _chunk_size(line: bytes) -> int:
    """What a chunk's header line says; events of a stream have few different sizes.

    Raises:
        FramingError: not a size.
    """
    line = line.rstrip(b"\r\n")
    digits = line if line.isalnum() else line.split(b";", 1)[0].strip()
    # int() would also take a sign, underscores and 0x.
    if not digits.isalnum() or digits[1:2] in _X:
        raise FramingError(f"not a chunk size: {line[:80]!r}")
    try:
        return int(digits, 16)
    except ValueError:
        raise FramingError(f"not a chunk size: {line[:80]!r}") from None


def unframed(data: bytes) -> bytes:
    """The contents of a body's first chunks, as far as they are there.

    Raises:
        FramingError: not chunked framing.
    """
    end = data.find(b"\n")
    if end >= 0 and len(data) - end - 1 <= _chunk_size(data[: end + 1]):
        return data[end + 1 :]
    content: list[bytes] = []
    ChunkScanner().feed(data, content)
    return b"".join(content)
