"""How many tokens a prompt has, by its size: the ratio is learnt from statuses."""

from __future__ import annotations

WEIGHT = 0.05
"""Of one prompt in the running mean."""


class PromptSizes:
    """Sizes of the prompts under way, and what a token takes on the average."""

    def __init__(self) -> None:
        self._bytes_per_token = 4.0
        self._sizes: dict[str, int] = {}

    def tokens_of(self, size: int) -> int:
        """Estimate the tokens of a prompt of ``size`` bytes."""
        return max(1, round(size / self._bytes_per_token))

    def note(self, rid: str, size: int) -> None:
        """Note a request that was sent; 0 bytes teach nothing."""
        self._sizes[rid] = size

    def forget(self, rid: str) -> None:
        """The request has ended."""
        self._sizes.pop(rid, None)

    def learn(self, rid: str, tokens: int) -> None:
        """Take in how many tokens a prompt really has, once."""
        size = self._sizes.pop(rid, 0)
        if size and tokens:
            self._bytes_per_token += WEIGHT * (size / tokens - self._bytes_per_token)
