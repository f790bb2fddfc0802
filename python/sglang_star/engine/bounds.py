"""What a model can take: token ids of its vocabulary, and so many of them.

Ids that come from another instance are looked at before they are used. One outside the vocabulary
would end the engine in its next forward, with every request it serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_star.errors import MalformedMessage


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of one model.

    Attributes:
        vocabulary: number of token ids; context: most tokens of a request, output included.
    """

    vocabulary: int
    context: int

    def check(self, ids: Sequence[int], *, beside: int = 0) -> None:
        """Look at token ids of a request that has ``beside`` other tokens.

        Raises:
            MalformedMessage: one is no token of this model, or they are too many.
        """
        if not ids:
            return
        if min(ids) < 0 or max(ids) >= self.vocabulary:
            raise MalformedMessage(f"token ids outside the vocabulary of {self.vocabulary}")
        self.check_length(len(ids) + beside)

    def check_length(self, tokens: int) -> None:
        """Look at the length of a request.

        Raises:
            MalformedMessage: it is longer than the context.
        """
        if tokens > self.context:
            raise MalformedMessage(f"{tokens} tokens do not fit a context of {self.context}")
