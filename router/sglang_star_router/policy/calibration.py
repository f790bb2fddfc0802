"""Estimates corrected by how earlier ones turned out on the traffic that is served.

A head knows nothing of kinds of work it was not trained on and is as sure of itself as ever. What
has ended tells how far each quantile ``q`` was off, ``k log(remaining / q)`` with ``k`` from the
width of the request's own band; the ``p`` quantile of that, which is 0 where the head is right, is
what the quantile at level ``p`` is moved by from then on (conformalized quantile regression,
Romano et al., NeurIPS 2019, two-sided and on the log scale). A length is what was served, cut by
``max_new_tokens`` or not, and an estimate beyond that limit counts as the limit.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import numpy as np

from sglang_star_router.policy.snapshot import FloatArray
from sglang_star_router.policy.survival import curve

LEVELS: Final = np.array([0.1, 0.25, 0.5, 0.75, 0.9])
FIRST_TOKENS: Final = 16
"""A request is first scored at so many output tokens."""
GROWTH: Final = 1.2
"""And whenever they have grown by this factor."""
RECENT: Final = 2048
"""Requests the correction is made of."""
REFRESH: Final = 32
"""Requests that end between two corrections."""
SURE: Final = 2.0
"""A shift of fewer standard errors than this is chance, and the head's own word stands."""
TURNOVERS: Final = 4
"""A fleet that has just started ends its short requests first: what has ended speaks for all only
once so many times as many have ended as are running."""


class Calibration:
    """Learns from requests as they run and end; corrects estimates.

    Args:
        enabled: False leaves every estimate as it is.

    Attributes:
        shift: what is added to each quantile's logarithm, in units of ``1 / k``, ``[5]``; all 0
            until enough has ended.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self.shift: FloatArray = np.zeros(LEVELS.size)
        self._open: dict[str, list[tuple[int, float, FloatArray]]] = {}
        self._ended: deque[tuple[FloatArray, FloatArray]] = deque(maxlen=RECENT)
        self._count = 0
        self._due = REFRESH

    def due(self, rid: str) -> float:
        """Output tokens at which ``rid`` is scored next."""
        noted = self._open.get(rid)
        return GROWTH * noted[-1][0] if noted else FIRST_TOKENS

    def note(self, rid: str, output_tokens: int, left: int, remaining: FloatArray) -> None:
        """Remember an estimate if one is due, to be scored when the request ends.

        Args:
            left: output tokens to the request's limit.
            remaining: quantiles ``[5]`` as the head gave them.
        """
        if output_tokens >= self.due(rid) and np.isfinite(remaining).all():
            _, (shape,) = curve(remaining[None])
            quantiles = np.clip(remaining, 1.0, max(left, 1))
            self._open.setdefault(rid, []).append((output_tokens, shape, np.log(quantiles)))

    def ended(self, rid: str, output_tokens: int) -> None:
        """Score a request that ended."""
        noted = self._open.pop(rid, None)
        if not noted:
            return
        age = np.array([tokens for tokens, _, _ in noted], np.float64)
        shape = np.array([shape for _, shape, _ in noted])
        log_quantiles = np.stack([quantiles for _, _, quantiles in noted])
        log_remaining = np.log(np.maximum(output_tokens - age, 1.0))
        scores = shape[:, None] * (log_remaining[:, None] - log_quantiles)
        # An estimate speaks for the steps nearest to it: so often a policy acted on one like it.
        edges = np.append(age, max(output_tokens, age[-1] + 1.0))
        steps = np.diff((edges[1:] + edges[:-1]) / 2, prepend=age[0])
        self._ended.append((scores, steps))
        self._count += 1
        if self._enabled and self._count >= max(self._due, TURNOVERS * len(self._open)):
            self._due = self._count + REFRESH
            self.shift = self._fit()

    def lost(self, rid: str) -> None:
        """Forget a request whose length will not be known."""
        self._open.pop(rid, None)

    def corrected(self, remaining: FloatArray) -> FloatArray:
        """Quantiles ``[R, 5]`` as the past says they should have been; NaN rows stay NaN."""
        if not self.shift.any() or not remaining.size:
            return remaining
        _, shape = curve(remaining)
        moved = np.maximum(remaining, 1.0) * np.exp(self.shift / shape[:, None])
        ordered: FloatArray = np.maximum.accumulate(moved, axis=1)
        return ordered

    def _fit(self) -> FloatArray:
        """Quantile of the scores at each level, drawn towards 0 as far as it may be chance.

        The standard error is a quantile's, ``sqrt(p (1 - p) / n) / density``, on a logistic scale;
        the shrinkage the positive part of James and Stein's (1961), per level.
        """
        scores = np.concatenate([scores for scores, _ in self._ended])
        weight = np.concatenate([steps for _, steps in self._ended])
        shift = np.array([_quantile(scores[:, i], weight, p) for i, p in enumerate(LEVELS)])
        each = np.array([steps.sum() for _, steps in self._ended])
        effective = each.sum() ** 2 / (each**2).sum()
        error = 1.0 / np.sqrt(effective * LEVELS * (1.0 - LEVELS))
        chance = (SURE * error / np.where(shift == 0.0, np.inf, shift)) ** 2
        sure: FloatArray = shift * np.maximum(1.0 - chance, 0.0)
        return sure


def _quantile(values: FloatArray, weight: FloatArray, level: float) -> float:
    order = np.argsort(values, kind="stable")
    share = np.cumsum(weight[order]) / weight.sum()
    return float(values[order[min(int(np.searchsorted(share, level)), values.size - 1)]])
