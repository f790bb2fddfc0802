"""Remaining output length as a survival curve: P(still decoding after h more steps).

A request's five quantiles become a log-logistic curve ``S(h) = 1 / (1 + (h / m) ** k)``: median
``m`` as given, shape ``k`` from the P10-P90 band. It has the heavy right tail output lengths have,
two parameters, and a conditional form, ``S(a + h) / S(a)``, which is what serves a request that
has no estimate: the fleet's recent output lengths, given the tokens it has already produced.
"""

from __future__ import annotations

import numpy as np

from sglang_star_router.policy.snapshot import FloatArray, Requests

_LOGIT_SPAN = 2.0 * float(np.log(9.0))
"""logit(0.9) - logit(0.1)."""
_MAX_SHAPE = 60.0
"""Beyond this the curve is a step; it keeps a zero-width band finite."""
_MAX_EXPONENT = 60.0
_UNKNOWN_SHARE = 0.25
"""Median output as a share of max_new_tokens while nothing at all is known."""


def curve(quantiles: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Log median and shape of each row of ``[R, 5]`` quantiles; NaN rows stay NaN."""
    log_q = np.log(np.maximum(quantiles, 1.0))
    band = np.maximum(log_q[:, 4] - log_q[:, 0], _LOGIT_SPAN / _MAX_SHAPE)
    return log_q[:, 2], _LOGIT_SPAN / band


def survival(requests: Requests, prior: FloatArray, steps: FloatArray) -> FloatArray:
    """P(request still decodes after each of ``steps``), shape ``[H, R]``.

    Args:
        requests: rows whose ``remaining`` may hold NaN.
        prior: output-length quantiles ``[5]`` of recent requests, possibly NaN.
        steps: ascending decode steps ahead, ``[H]``; 0 gives 1.
    """
    log_median, shape = curve(requests.remaining)
    log_steps = np.log(np.maximum(steps, 1e-9))
    exponent = shape * (log_steps[:, None] - log_median)
    np.minimum(exponent, _MAX_EXPONENT, out=exponent)
    alive: FloatArray = 1.0 / (1.0 + np.exp(exponent))
    blind = np.flatnonzero(np.isnan(log_median) | np.isnan(shape))
    if blind.size:
        alive[:, blind] = _from_prior(requests, blind, prior, steps)
    left = requests.max_new_tokens - requests.output_tokens
    alive[left <= steps[:, None]] = 0.0
    return alive


def _from_prior(
    requests: Requests,
    rows: np.ndarray[tuple[int], np.dtype[np.intp]],
    prior: FloatArray,
    steps: FloatArray,
) -> FloatArray:
    """Survival given age alone."""
    age = requests.output_tokens[rows].astype(np.float64)
    if np.isfinite(prior).all():
        (log_median,), (shape,) = curve(prior[None])
        median = np.full(rows.size, np.exp(log_median))
    else:
        median = np.maximum(requests.max_new_tokens[rows] * _UNKNOWN_SHARE, 1.0)
        shape = 1.5
    now = 1.0 + (age / median) ** shape
    then = 1.0 + ((age + steps[:, None]) / median) ** shape
    alive: FloatArray = now / then
    return alive


def point(requests: Requests, prior: FloatArray) -> FloatArray:
    """Median remaining output tokens, ``[R]``; from prior and age where nothing is estimated."""
    median = requests.remaining[:, 2].copy()
    blind = np.flatnonzero(np.isnan(median))
    if blind.size:
        grid = np.geomspace(1.0, 65536.0, 64)
        alive = _from_prior(requests, blind, prior, grid)
        median[blind] = grid[np.minimum((alive > 0.5).sum(axis=0), grid.size - 1)]
    ceiling = np.maximum(requests.max_new_tokens - requests.output_tokens, 0)
    capped: FloatArray = np.minimum(median, ceiling)
    return capped
