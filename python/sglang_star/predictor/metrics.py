"""How good a remaining-length predictor is, with intervals over requests."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from sglang_star.predictor.hazard import Array
from sglang_star.predictor.samples import Samples

RESAMPLES: Final = 1000
PAIRED_SAMPLES: Final = 2000
"""The C-index looks at all pairs of this many samples."""

MEDIAN: Final = 2
"""Column of the point estimate among the quantiles."""


def clip(predicted: Array, samples: Samples) -> Array:
    """Limit predictions to what ``max_new_tokens`` leaves, as the engine does."""
    room = samples.max_new_tokens[samples.request] - samples.tokens
    return np.clip(predicted, 0.0, room if predicted.ndim == 1 else room[:, None])


def score(predicted: Array, samples: Samples, seed: int = 0) -> dict[str, Any]:
    """Judge predictions against what happened.

    Args:
        predicted: ``[n]`` point estimates, or ``[n, q]`` at ``QUANTILE_LEVELS``, tokens.
        samples: ``n`` samples of requests that all ended.
        seed: of the bootstrap.

    Returns:
        ``mae`` and its 95 % interval over requests, ``mae_per_request`` (every request counts
        alike), ``mae_by_progress`` (ten tenths of the output), ``spearman``, ``c_index`` and,
        given quantiles, ``coverage`` of P10-P90.
    """
    predicted = clip(predicted, samples)
    point = predicted if predicted.ndim == 1 else predicted[:, MEDIAN]
    actual = samples.remaining.astype(np.float64)
    error = np.abs(point - actual)
    low, high = bootstrap(error, samples.request, seed)
    counts = np.bincount(samples.request)
    result: dict[str, Any] = {
        "mae": float(error.mean()),
        "mae_ci": [low, high],
        "mae_per_request": float((np.bincount(samples.request, error) / counts).mean()),
        "mae_by_progress": _by_progress(error, samples),
        "spearman": _correlation(_ranks(point), _ranks(actual)),
        "c_index": concordance(point, actual, samples.censored[samples.request], seed),
        "coverage": None,
    }
    if predicted.ndim == 2:
        inside = (predicted[:, 0] <= actual) & (actual <= predicted[:, -1])
        result["coverage"] = float(inside.mean())
    return result


def bootstrap(error: Array, request: Array, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean error when whole requests are drawn again."""
    sums, counts = np.bincount(request, error), np.bincount(request)
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, len(sums), (RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def concordance(predicted: Array, actual: Array, censored: Array, seed: int = 0) -> float:
    """Harrell's C: how often the one that ended earlier was predicted to; ties count half."""
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(actual))[:PAIRED_SAMPLES]
    predicted, actual, censored = predicted[chosen], actual[chosen], censored[chosen]
    comparable = (actual[:, None] < actual[None]) & ~censored[:, None]
    right = predicted[:, None] < predicted[None]
    tied = predicted[:, None] == predicted[None]
    wins = float((comparable & right).sum() + 0.5 * (comparable & tied).sum())
    return wins / max(int(comparable.sum()), 1)


def _by_progress(error: Array, samples: Samples) -> list[float | None]:
    total = samples.output_tokens[samples.request]
    tenth = np.minimum(samples.tokens * 10 // total, 9)
    return [float(error[tenth == i].mean()) if (tenth == i).any() else None for i in range(10)]


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2.0)[inverse])


def _correlation(left: Array, right: Array) -> float:
    if left.std() == 0 or right.std() == 0:
        return 0.0
    return float(np.corrcoef(left, right)[0, 1])
