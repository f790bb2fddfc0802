"""Streams that moved beside their twins that did not: the same question, sampled the same way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_star.demo.client import Stream


@dataclass(frozen=True, slots=True)
class Twin:
    """A migrated stream and its repetition that stayed where it was."""

    moved: Stream
    still: Stream

    @property
    def identical(self) -> bool:
        """Whether both completed with the same token ids for the same reason."""
        return (
            self.moved.completed
            and self.still.completed
            and self.moved.token_ids == self.still.token_ids
            and self.moved.finish_reason == self.still.finish_reason
        )

    @property
    def first_difference(self) -> int | None:
        """Position of the first token that differs, None if there is none."""
        pairs = zip(self.moved.token_ids, self.still.token_ids, strict=False)
        for position, (ours, theirs) in enumerate(pairs):
            if ours != theirs:
                return position
        lengths = len(self.moved.token_ids), len(self.still.token_ids)
        return None if lengths[0] == lengths[1] else min(lengths)


def twins_of(
    streams: Iterable[Stream], stills: Iterable[Stream], moves: Sequence[dict[str, Any]]
) -> list[Twin]:
    """Pair every stream that moved with the still one of the same question."""
    moved = {move["rid"] for move in moves}
    still = {stream.prompt: stream for stream in stills if stream.rid not in moved}
    return [
        Twin(stream, still[stream.prompt])
        for stream in streams
        if stream.rid in moved and stream.prompt in still
    ]
