"""Whether the predictor's P10-P90 band keeps what it promises on the traffic that is served.

A head knows nothing of kinds of work it was not trained on, and is as sure of itself as ever. Eight
of ten lengths should fall into the band; where far fewer do, it is time to train a new head.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from sglang_star.protocol import QUANTILE_LEVELS
from sglang_star_router.policy.calibration import FIRST_TOKENS
from sglang_star_router.policy.snapshot import FloatArray
from sglang_star_router.table import RequestTable

LOW: Final = QUANTILE_LEVELS.index(0.1)
HIGH: Final = QUANTILE_LEVELS.index(0.9)


class Band:
    """Counts over all requests since the router started.

    Attributes:
        judged: requests that ended and had an estimate.
        kept: those of them whose length lay within it, as far as their last status tells.
        kept_corrected: the same of the band that policies see, corrected by earlier requests.
    """

    def __init__(self) -> None:
        self.judged = 0
        self.kept = 0
        self.kept_corrected = 0
        self._promised: dict[str, FloatArray] = {}

    def sighted(self, table: RequestTable, corrected: FloatArray) -> None:
        """Note each request's first estimate from FIRST_TOKENS on, as the total lengths it allows.

        Args:
            corrected: ``table.remaining`` as policies see it.
        """
        told = (table.output_tokens >= FIRST_TOKENS) & np.isfinite(table.remaining).all(axis=1)
        for row in np.flatnonzero(told):
            if table.rids[row] not in self._promised:
                both = np.stack([table.remaining[row], corrected[row]])[:, (LOW, HIGH)]
                total = np.minimum(table.output_tokens[row] + both, table.max_new_tokens[row])
                self._promised[table.rids[row]] = total

    def ended(self, rid: str, output_tokens: int) -> None:
        """Judge a request that ended with so many tokens."""
        promised = self._promised.pop(rid, None)
        if promised is not None:
            self.judged += 1
            given, corrected = (low <= output_tokens <= high for low, high in promised)
            self.kept += given
            self.kept_corrected += corrected

    def lost(self, rid: str) -> None:
        """Forget a request whose instance restarted: its length is nobody's."""
        self._promised.pop(rid, None)
