"""Discrete-time survival over log-spaced bins of remaining length, in NumPy.

A distribution of the remaining length R is a vector of logits: ``hazard[j] = P(R < edge[j+1] |
R >= edge[j])``. Within a bin the hazard per token is constant, so survival falls geometrically
there; that rule serves the quantiles, and the censored likelihood in training, alike.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BINS: Final = 32
LINEAR_TOKENS: Final = 8.0
"""Bins are about one token wide below this and grow in proportion above it."""

_LOGIT_LIMIT: Final = 30.0


def bin_edges(longest: int, bins: int = BINS) -> Array:
    """Lower edges of ``bins`` bins from 0, spaced evenly in ``log(1 + R/8)`` up to ``longest``.

    Returns:
        ``[bins + 1]`` float64, strictly increasing, the last one the end of the last bin.
    """
    longest = max(longest, bins)
    top = np.log1p(longest / LINEAR_TOKENS)
    edges = LINEAR_TOKENS * np.expm1(np.linspace(0.0, top, bins + 1))
    edges[-1] = longest
    # At least a token per bin: two edges between the same pair of integers could not differ.
    return np.maximum(edges, np.arange(bins + 1, dtype=np.float64))


def exposure(remaining: Array, edges: Array) -> Array:
    """Fraction of each bin that a remaining length outlived, in [0, 1].

    Args:
        remaining: ``[n]`` tokens.
        edges: as from :func:`bin_edges`.

    Returns:
        ``[n, bins]``; 1 for bins survived entirely, 0 for bins never reached.
    """
    return np.clip((remaining[:, None] - edges[:-1]) / np.diff(edges), 0.0, 1.0)


def log_survival(logits: Array) -> Array:
    """Return ``log P(R >= edge)`` at every edge, ``[n, bins + 1]``, from ``[n, bins]`` logits."""
    stay = -np.logaddexp(0.0, np.clip(logits, -_LOGIT_LIMIT, _LOGIT_LIMIT))
    result = np.zeros((logits.shape[0], logits.shape[1] + 1))
    np.cumsum(stay, axis=1, out=result[:, 1:])
    return result


def quantiles(logits: Array, edges: Array, levels: Array) -> Array:
    """Remaining length at each level.

    Args:
        logits: ``[n, bins]`` hazard logits.
        edges: ``[bins + 1]``.
        levels: ``[q]`` in (0, 1), ascending.

    Returns:
        ``[n, q]`` tokens, ascending along the second axis; at most the last edge.
    """
    survival = log_survival(logits)
    wanted = np.log1p(-levels)
    # The bin in which survival falls below the wanted value; the last one if it never does.
    index = (survival[:, None, 1:] > wanted[None, :, None]).sum(axis=2)
    index = np.minimum(index, logits.shape[1] - 1)
    rows = np.arange(logits.shape[0])[:, None]
    high, low = survival[rows, index], survival[rows, index + 1]
    share = np.clip((high - wanted) / (high - low), 0.0, 1.0)
    return edges[index] + share * (edges[index + 1] - edges[index])


def cdf(logits: Array, edges: Array, remaining: Array) -> Array:
    """``P(R <= remaining)`` of each row, ``[n]``: the probability integral transform."""
    stay = np.diff(log_survival(logits), axis=1)
    return -np.expm1((stay * exposure(remaining, edges)).sum(axis=1))
