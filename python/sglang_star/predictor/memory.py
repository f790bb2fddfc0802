"""What is kept of many requests' projections, side by side: one row each, updated all at once."""

from __future__ import annotations

from typing import Final

import numpy as np

from sglang_star.predictor.hazard import Array
from sglang_star.protocol import QUANTILE_LEVELS

FADE: Final = 0.98
"""What is left of a projection's weight in ``recent`` with every further token."""

_WEIGHTS: Final = np.array(
    [0.0, *((1.0 - FADE) / (1.0 - FADE**steps) for steps in range(1, 2048))], np.float32
)
"""Weight of the n-th projection in ``recent``; it does not change any more past the last."""


class Memory:
    """Rows that requests take and give back; it grows when all are taken.

    Attributes:
        width: numbers of a projection, ``m``.
        recent: ``[rows, m]`` float32, mean of the projections in which older ones fade.
        total: ``[rows, m]`` float32, their sum.
        steps: ``[rows]``, how many there were.
        prompt, limit: ``[rows]``, prompt tokens and the limit on output tokens.
        base: ``[rows, q]``, the latest estimate; at: ``[rows]``, output tokens it was made at, 0
            if there is none; looked: ``[rows]``, when that was, in steps of the estimator.
    """

    def __init__(self, width: int, rows: int = 1) -> None:
        self.width = width
        self.recent = np.zeros((rows, width), np.float32)
        self.total = np.zeros((rows, width), np.float32)
        self.steps = np.zeros(rows, np.int64)
        self.prompt = np.zeros(rows, np.float64)
        self.limit = np.zeros(rows, np.float64)
        self.base = np.zeros((rows, len(QUANTILE_LEVELS)))
        self.at = np.zeros(rows, np.int64)
        self.looked = np.zeros(rows, np.int64)
        self._free = list(range(rows))[::-1]

    def take(self) -> int:
        """Return a row of nothing."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        for column in (self.recent, self.total, self.steps, self.base, self.at, self.looked):
            column[row] = 0
        return row

    def give(self, row: int) -> None:
        """Take a row back."""
        self._free.append(row)

    def add(self, rows: Array, projections: Array) -> None:
        """One decode step: ``projections[i]`` joins row ``rows[i]``; no row twice.

        Args:
            rows: ``[n]`` indices; projections: ``[n, m]`` float32, finite.
        """
        steps = self.steps[rows] + 1
        self.steps[rows] = steps
        recent = self.recent.take(rows, axis=0)
        change = projections - recent
        change *= _WEIGHTS.take(steps, mode="clip")[:, None]
        change += recent
        self.recent[rows] = change
        total = self.total.take(rows, axis=0)
        total += projections
        self.total[rows] = total

    def _grow(self) -> None:
        have = len(self.steps)
        for name, column in vars(self).items():
            if isinstance(column, np.ndarray):
                setattr(self, name, np.concatenate([column, np.zeros_like(column)]))
        self._free = list(range(have, 2 * have))[::-1]
