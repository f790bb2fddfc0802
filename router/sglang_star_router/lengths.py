"""What requests that have ended tell: how long outputs are, and whether estimates held."""

from __future__ import annotations

from collections import deque

import numpy as np

from sglang_star.protocol import QUANTILE_LEVELS
from sglang_star_router.band import Band
from sglang_star_router.policy.calibration import Calibration
from sglang_star_router.policy.snapshot import FloatArray
from sglang_star_router.table import RequestTable

RECENT = 512
"""Outputs that the prior is made of."""


class Lengths:
    """Lengths of outputs, as far as the last statuses before the end tell.

    Args:
        calibrate: correct estimates by how earlier ones turned out.

    Attributes:
        recent: output tokens of recently finished requests.
        calibration: corrects estimates by how earlier ones turned out.
        band: how well the P10-P90 band kept what it promised, given and corrected.
    """

    def __init__(self, *, calibrate: bool) -> None:
        self._calibrate = calibrate
        self.recent: deque[int] = deque(maxlen=RECENT)
        self.calibration = Calibration(enabled=calibrate)
        self.band = Band()
        self._gone: dict[str, int] = {}

    def shown(self, table: RequestTable) -> None:
        """Take in the requests of a status."""
        for rid in self._gone.keys() & table.index.keys():
            del self._gone[rid]
        self.band.sighted(table, self.calibration.corrected(table.remaining))
        left = table.max_new_tokens - table.output_tokens
        for row, rid in enumerate(table.rids):
            tokens = int(table.output_tokens[row])
            self.calibration.note(rid, tokens, int(left[row]), table.remaining[row])

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

    def forget_corrections(self) -> None:
        """Begin anew: another head has other faults."""
        self.calibration = Calibration(enabled=self._calibrate)

    def lost(self, rid: str) -> None:
        """Forget a request whose instance restarted: its length is nobody's."""
        self.band.lost(rid)
        self.calibration.lost(rid)

    def prior(self) -> FloatArray:
        """Output length of recently finished requests at the protocol's quantile levels."""
        if not self.recent:
            return np.full(len(QUANTILE_LEVELS), np.nan)
        levels: FloatArray = np.quantile(np.array(self.recent), QUANTILE_LEVELS)
        return levels

    def _finished(self, rid: str, tokens: int) -> None:
        self.recent.append(tokens)
        self.band.ended(rid, tokens)
        self.calibration.ended(rid, tokens)
