"""The prefill pool: first come, first served on whichever instance is free first."""

from __future__ import annotations

import heapq

from sglang_star.platform.profile import Profile

CHUNK_TOKENS = 8192
"""SGLang sends KV chunk by chunk while prefilling, so only the last chunk's transfer shows."""


class PrefillPool:
    """``count`` equal prefill instances, one prompt at a time each."""

    def __init__(self, profile: Profile, count: int) -> None:
        self.profile = profile
        self._free_s = [0.0] * count
        self.busy_s = 0.0

    def submit(self, tokens: int, now_s: float) -> float:
        """Queue a prompt; returns when its prefill ends, seconds."""
        start = max(now_s, heapq.heappop(self._free_s))
        span = self.profile.prefill_ms(tokens) / 1e3
        heapq.heappush(self._free_s, start + span)
        self.busy_s += span
        return start + span


def exposed_transfer_s(tokens: int, decode: Profile) -> float:
    """Time between the end of prefill and the KV being complete on the decode instance."""
    sent = min(tokens, CHUNK_TOKENS) * decode.kv_bytes
    return decode.link_latency_ms / 1e3 + sent / decode.link_bytes_per_s
