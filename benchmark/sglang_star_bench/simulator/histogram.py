"""Distributions in bounded memory: counts in logarithmic bins, quantiles to half a percent."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_LOWEST = 1e-3
_STEP = 0.005
_BINS = 4096
"""Covers 1e-3 to 7.8e5 (milliseconds everywhere here); what is outside lands in the end bins."""


class LogHistogram:
    """Counts of positive values; the mean and the maximum are exact.

    Infinite ones count in ``count`` and in quantiles, and lie in no bin.
    """

    def __init__(self) -> None:
        self.counts: npt.NDArray[np.float64] = np.zeros(_BINS)
        self.total = 0.0
        self.count = 0.0
        self.max = 0.0
        self.infinite = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        """Count ``value`` ``weight`` times."""
        if value == math.inf:
            self.infinite += weight
            self.count += weight
            self.total = self.max = math.inf
            return
        position = int(math.log(value / _LOWEST) / _STEP) if value > _LOWEST else 0
        self.counts[min(position, _BINS - 1)] += weight
        self.total += value * weight
        self.count += weight
        if value > self.max:
            self.max = value

    @property
    def mean(self) -> float:
        """NaN when empty."""
        return self.total / self.count if self.count else math.nan

    def quantile(self, level: float) -> float:
        """Value below which ``level`` of the weight lies; NaN when empty."""
        if not self.count:
            return math.nan
        rank = level * self.count
        if rank > self.count - self.infinite:
            return math.inf
        position = int(np.searchsorted(np.cumsum(self.counts), rank))
        middle = _LOWEST * math.exp((min(position, _BINS - 1) + 0.5) * _STEP)
        return min(middle, self.max)

    def cdf(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Values and the share of weight at or below each, for plotting."""
        used = np.flatnonzero(self.counts)
        if used.size == 0:
            return np.zeros(0), np.zeros(0)
        bins = np.arange(used[0], used[-1] + 1)
        share = np.cumsum(self.counts[bins]) / self.counts.sum()
        return _LOWEST * np.exp((bins + 1) * _STEP), share
