"""What requests that have ended tell: how long outputs are, and whether estimates held."""

from __future__ import annotations

from collections import deque

import numpy as np

from sglang_star.protocol import QUANTILE_LEVELS
from sglang_star_router.band import Band
from sglang_star_router.policy.snapshot import FloatArray
from sglang_star_router.table import RequestTable

RECENT = 512
"""Outputs that the prior is made of."""


class Lengths:
    """Lengths of outputs, as far as the last status before the end tells.

    Attributes:
        recent: output tokens of recently finished requests.
        band: how well the predictor's band kept what it promised.
    """

    def __init__(self) -> None:
        self.recent: deque[int] = deque(maxlen=RECENT)
        self.band = Band()
        self._gone: dict[str, int] = {}

    def shown(self, table: RequestTable) -> None:
        """Take in the requests of a status."""
        for rid in self._gone.keys() & table.index.keys():
            del self._gone[rid]
        self.band.sighted(table)

    def vanished(self, rid: str, tokens: int, *, in_flight: bool) -> None:
        """Take in that no status shows a request any more.

        One whose stream goes on has moved, and its target has not told of it yet: that is no end.
        """
        if in_flight:
            self._gone[rid] = tokens
        else:
            self._finished(rid, tokens)

    def awaits(self, rid: str) -> bool:
        """Whether no status shows a request whose stream went on: rare, and cheap to ask."""
        return rid in self._gone

    def ended(self, rid: str) -> None:
        """Take in that the stream of a request that :meth:`awaits` it has ended."""
        self._finished(rid, self._gone.pop(rid))

    def prior(self) -> FloatArray:
        """Output length of recently finished requests at the protocol's quantile levels."""
        if not self.recent:
            return np.full(len(QUANTILE_LEVELS), np.nan)
        levels: FloatArray = np.quantile(np.array(self.recent), QUANTILE_LEVELS)
        return levels

    def _finished(self, rid: str, tokens: int) -> None:
        self.recent.append(tokens)
        self.band.ended(rid, tokens)
