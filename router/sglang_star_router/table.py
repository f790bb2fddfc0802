"""One status' requests as arrays, made when the status arrives so that a decision need not wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sglang_star.protocol import QUANTILE_LEVELS, RequestStatus
from sglang_star_router.policy.snapshot import BoolArray, FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class RequestTable:
    """Requests of one instance, columns as in ``policy.snapshot.Requests``.

    Attributes:
        settled_s: monotonic time since when each has stayed where it is.
    """

    rids: tuple[str, ...]
    index: dict[str, int]
    prompt_tokens: IntArray
    output_tokens: IntArray
    max_new_tokens: IntArray
    remaining: FloatArray
    movable: BoolArray
    queued: BoolArray
    settled_s: FloatArray

    @classmethod
    def empty(cls) -> RequestTable:
        """Return a table without rows."""
        return cls.of((), {}, 0.0)

    @classmethod
    def of(
        cls, requests: Sequence[RequestStatus], settled_s: dict[str, float], now: float
    ) -> RequestTable:
        """Build the table; rids that are new enter ``settled_s`` with ``now``."""
        n, levels = len(requests), len(QUANTILE_LEVELS)
        blank = (float("nan"),) * levels
        remaining = np.array(
            [r.remaining if len(r.remaining) == levels else blank for r in requests], np.float64
        ).reshape(n, levels)
        rids = tuple(r.rid for r in requests)
        return cls(
            rids=rids,
            index={rid: row for row, rid in enumerate(rids)},
            prompt_tokens=np.array([r.prompt_tokens for r in requests], np.int64),
            output_tokens=np.array([r.output_tokens for r in requests], np.int64),
            max_new_tokens=np.array([r.max_new_tokens for r in requests], np.int64),
            remaining=remaining,
            movable=np.array([r.state == "running" and not r.pinned for r in requests], np.bool_),
            queued=np.array([r.queued for r in requests], np.bool_),
            settled_s=np.array([settled_s.setdefault(rid, now) for rid in rids], np.float64),
        )

    def length_at_end(self, row: int, later: RequestTable) -> int:
        """Output tokens of a request that ``later`` shows no more.

        It ended somewhere between the two statuses: half of what the others made is added.
        """
        made = [
            later.output_tokens[there] - self.output_tokens[here]
            for rid, here in self.index.items()
            if not self.queued[here] and (there := later.index.get(rid)) is not None
        ]
        tokens = int(self.output_tokens[row])
        if made and not self.queued[row]:
            tokens += int(np.median(made)) // 2
        return min(tokens, int(self.max_new_tokens[row]))

    def row(self, rid: str) -> int | None:
        """Row of ``rid``, None if it is not here."""
        return self.index.get(rid)
