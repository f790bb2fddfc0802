"""Whether the predictor's P10-P90 band keeps what it promises on the traffic that is served.

A head knows nothing of kinds of work it was not trained on, and is as sure of itself as ever. Eight
of ten lengths should fall into the band; where far fewer do, it is time to train a new head.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from sglang_star.protocol import QUANTILE_LEVELS
from sglang_star_router.table import RequestTable

FIRST_TOKENS: Final = 16
"""A request is judged by its first estimate after so many output tokens."""
LOW: Final = QUANTILE_LEVELS.index(0.1)
HIGH: Final = QUANTILE_LEVELS.index(0.9)


class Band:
    """Counts over all requests since the router started.

    Attributes:
        judged: requests that ended and had an estimate.
        kept: those of them whose length lay within it, as far as their last status tells.
    """

    def __init__(self) -> None:
        self.judged = 0
        self.kept = 0
        self._promised: dict[str, tuple[float, float]] = {}

    def sighted(self, table: RequestTable) -> None:
        """Note the first estimate of every request, as the total lengths it allows."""
        told = (table.output_tokens >= FIRST_TOKENS) & np.isfinite(table.remaining).all(axis=1)
        for row in np.flatnonzero(told):
            if table.rids[row] not in self._promised:
                total = table.output_tokens[row] + table.remaining[row]
                total = np.minimum(total, table.max_new_tokens[row])
                self._promised[table.rids[row]] = (float(total[LOW]), float(total[HIGH]))

    def ended(self, rid: str, output_tokens: int) -> None:
        """Judge a request that ended with so many tokens."""
        promised = self._promised.pop(rid, None)
        if promised is not None:
            self.judged += 1
            self.kept += promised[0] <= output_tokens <= promised[1]

    def lost(self, rid: str) -> None:
        """Forget a request whose instance restarted: its length is nobody's."""
        self._promised.pop(rid, None)
