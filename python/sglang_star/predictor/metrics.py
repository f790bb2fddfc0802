"""How good a remaining-length predictor is, with intervals over instances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from sglang_star.predictor.hazard import Array
from sglang_star.predictor.samples import Samples
from sglang_star.protocol import QUANTILE_LEVELS

RESAMPLES: Final = 1000
PAIRED_SAMPLES: Final = 2000
"""The C-index looks at all pairs of this many samples."""

MEDIAN: Final = 2
"""Column of the point estimate among the quantiles."""


def clip(predicted: Array, samples: Samples) -> Array:
    """Limit predictions to what ``max_new_tokens`` leaves, as the engine does."""
    room = samples.max_new_tokens[samples.request] - samples.tokens
    return np.clip(predicted, 0.0, room if predicted.ndim == 1 else room[:, None])


def errors(predicted: Array, samples: Samples) -> Array:
    """Absolute error of the point estimate of every sample, tokens."""
    predicted = clip(predicted, samples)
    return np.abs((predicted if predicted.ndim == 1 else predicted[:, MEDIAN]) - samples.remaining)


def score(
    predicted: Array, samples: Samples, seed: int = 0, sources: Sequence[str] = ()
) -> dict[str, Any]:
    """Judge predictions against what happened.

    Args:
        predicted: ``[n]`` point estimates, or ``[n, q]`` at ``QUANTILE_LEVELS``, tokens.
        samples: ``n`` samples of requests that all ended.
        seed: of the bootstrap.
        sources: the source of each request, for the errors by source.

    Returns:
        ``mae`` and its 95 % interval over instances, ``mae_per_request`` (every request counts
        alike), ``mae_by_progress`` (ten tenths of the output), ``mae_by_source``, ``spearman``,
        ``c_index`` and, given quantiles, ``coverage`` of P10-P90 and what :func:`calibration`
        finds.
    """
    clipped = clip(predicted, samples)
    point = clipped if clipped.ndim == 1 else clipped[:, MEDIAN]
    actual = samples.remaining.astype(np.float64)
    error = np.abs(point - actual)
    low, high = bootstrap(error, drawn_as(samples), seed)
    counts = np.bincount(samples.request)
    result: dict[str, Any] = {
        "mae": float(error.mean()),
        "mae_ci": [low, high],
        "mae_per_request": float((np.bincount(samples.request, error) / counts).mean()),
        "mae_by_progress": _by_progress(error, samples),
        "mae_by_source": _by_source(error, samples, sources, seed),
        "spearman": _correlation(_ranks(point), _ranks(actual)),
        "c_index": concordance(point, actual, samples.censored[samples.request], seed),
        "coverage": None,
    }
    if predicted.ndim == 2:
        inside = (clipped[:, 0] <= actual) & (actual <= clipped[:, -1])
        result["coverage"] = float(inside.mean())
        result |= calibration(predicted, samples, seed)
    return result


def calibration(predicted: Array, samples: Samples, seed: int = 0) -> dict[str, Any]:
    """How often outputs end within each quantile, where ``max_new_tokens`` does not decide it.

    A quantile beyond the limit is neither right nor wrong: the output is cut before. So each level
    is judged on the samples whose quantile lies below the limit, and the band P10-P90 on those
    whose P10 does; it should hold 80 % of the lengths, or 90 % where the limit replaces P90.
    Choosing samples by what was predicted leaves a calibrated predictor calibrated.

    Returns:
        ``calibration``: per level the share of outputs within it and the share of samples judged;
        ``coverage_open``: of the band, with its 95 % interval over instances ``coverage_open_ci``,
        what it should be ``coverage_open_expected`` and the share judged ``coverage_open_judged``.
    """
    room = samples.max_new_tokens[samples.request] - samples.tokens
    actual = samples.remaining
    curve = []
    for level, quantile in zip(QUANTILE_LEVELS, predicted.T, strict=True):
        judged = quantile < room
        share = float((actual <= quantile)[judged].mean()) if judged.any() else None
        curve.append({"level": level, "within": share, "judged": float(judged.mean())})
    low, high = predicted[:, 0], predicted[:, -1]
    judged = low < room
    result: dict[str, Any] = {"calibration": curve, "coverage_open_judged": float(judged.mean())}
    if not judged.any():
        return result | dict.fromkeys(("coverage_open", "coverage_open_ci"))
    inside = ((low <= actual) & (actual <= high))[judged].astype(float)
    expected = np.where(high < room, QUANTILE_LEVELS[-1], 1.0)[judged] - QUANTILE_LEVELS[0]
    return result | {
        "coverage_open": float(inside.mean()),
        "coverage_open_ci": list(bootstrap(inside, drawn_as(samples)[judged], seed)),
        "coverage_open_expected": float(expected.mean()),
    }


def drawn_as(samples: Samples) -> Array:
    """What is drawn again for an interval, the instance, of every sample, ``[n]``."""
    return np.asarray(samples.instance[samples.request])


def paired(error: Array, other: Array, unit: Array, seed: int = 0) -> dict[str, Any]:
    """Mean difference of two predictors' errors on the same samples, with its 95 % interval."""
    low, high = bootstrap(error - other, unit, seed)
    return {"difference": float((error - other).mean()), "ci": [low, high]}


def draws(units: int, seed: int) -> Array:
    """How often each unit is in each of the bootstrap's resamples, ``[RESAMPLES, units]``."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(units, np.full(units, 1 / units), RESAMPLES)


def bootstrap(values: Array, unit: Array, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of values when units (:func:`drawn_as`) are drawn again."""
    _, unit = np.unique(unit, return_inverse=True)
    sums, counts = np.bincount(unit, values), np.bincount(unit)
    drawn = draws(len(sums), seed)
    low, high = np.percentile((drawn @ sums) / (drawn @ counts), [2.5, 97.5])
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


def _by_source(
    error: Array, samples: Samples, sources: Sequence[str], seed: int
) -> dict[str, dict[str, Any]]:
    names = np.array(sources)
    result = {}
    for name in sorted(set(sources)):
        rows = (names == name)[samples.request]
        if rows.any():
            result[name] = {
                "mae": float(error[rows].mean()),
                "mae_ci": list(bootstrap(error[rows], drawn_as(samples)[rows], seed)),
                "requests": int((names == name).sum()),
            }
    return result


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2.0)[inverse])


def _correlation(left: Array, right: Array) -> float:
    if left.std() == 0 or right.std() == 0:
        return 0.0
    return float(np.corrcoef(left, right)[0, 1])
