"""What a rank has said and done so far, as one number that is equal on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from zlib import crc32

from sglang_star.protocol import (
    Commit,
    Message,
    MoveMessage,
    PagesReady,
    PagesTaken,
    Tokens,
)


class Ledger:
    """A running checksum of the messages that rank 0 sends and the others would send.

    All that a rank decides about moves shows in a message sooner or later, and so does every token
    that a guest decodes: ranks with equal sums have gone the same way. Estimates are left out: only
    rank 0 has any.

    Attributes:
        sum: 32 bits.
    """

    __slots__ = ("sum",)

    def __init__(self) -> None:
        self.sum = 0

    def note(self, message: Message) -> None:
        """One more message."""
        for part in _essence(message):
            self.sum = crc32(repr(part).encode(), self.sum)


def _essence(message: Message) -> Iterator[object]:
    yield type(message).__name__
    if isinstance(message, MoveMessage):
        yield message.migration_id
        yield message.stream_id
    match message:
        case PagesReady():
            yield message.start, message.end, message.slot, message.stamp
        case PagesTaken():
            yield message.stamp
        case Commit():
            yield message.committed_tokens, message.output_ids
        case Tokens():
            for chunk in message.chunks:
                yield chunk.stream_id, chunk.index, chunk.token_ids, chunk.finished
