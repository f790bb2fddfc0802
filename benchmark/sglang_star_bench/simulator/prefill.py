"""The prefill pool: first come, first served on whichever instance is free first."""

from __future__ import annotations

import heapq

from sglang_star.platform.profile import Profile

CHUNK_TOKENS = 8192
"""SGLang sends KV chunk by chunk while prefilling, so only the last chunk's transfer shows."""

Chunk = tuple[float, int, bool]
"""When it is computed (seconds), its tokens, whether it is the last."""


class PrefillPool:
    """``count`` equal prefill instances, one prompt at a time each."""

    def __init__(self, profile: Profile, count: int) -> None:
        self.profile = profile
        self._free_s = [0.0] * count
        self.busy_s = 0.0

    def submit(self, tokens: int, now_s: float) -> list[Chunk]:
        """Queue a prompt; returns its chunks, the last of which ends its prefill."""
        start = max(now_s, heapq.heappop(self._free_s))
        span = self.profile.prefill_ms(tokens) / 1e3
        heapq.heappush(self._free_s, start + span)
        self.busy_s += span
        chunks: list[Chunk] = []
        for first in range(0, tokens, CHUNK_TOKENS):
            end = min(first + CHUNK_TOKENS, tokens)
            chunks.append((start + span * end / tokens, end - first, end == tokens))
        return chunks
