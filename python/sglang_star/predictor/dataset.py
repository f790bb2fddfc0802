"""From samples on disk to what a head is trained on and judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from sglang_star.errors import ConfigError
from sglang_star.predictor.hazard import Array
from sglang_star.predictor.prompts import split_of
from sglang_star.predictor.samples import Samples

FEWEST_REQUESTS: Final = 10
"""Fewer requests than this in a split and nothing said about it would mean anything."""


@dataclass(frozen=True, slots=True)
class Split:
    """Requests to fit on (with early stopping and calibration among them) and to judge by.

    Judged are only requests that the model or the client's limit ended.
    """

    fit: Samples
    test: Samples


def split(samples: Samples) -> Split:
    """Divide by prompt: 85 % to fit (70 train, 15 validation), 15 % to judge.

    Raises:
        ConfigError: too few requests, or none of them ended by itself.
    """
    if samples.censored.all():
        raise ConfigError(
            "every output was cut by max_new_tokens, so no length was ever seen",
            hint="collect with a larger --max-new-tokens",
        )
    held_back = np.array([split_of(rid) == "test" for rid in samples.rids])
    parts = Split(samples.select(~held_back), samples.select(held_back & ~samples.cut))
    for name, part in (("fit", parts.fit), ("test", parts.test)):
        if len(part.rids) < FEWEST_REQUESTS:
            raise ConfigError(
                f"only {len(part.rids)} requests to {name} on, at least {FEWEST_REQUESTS} needed",
                hint="collect more prompts with `star predictor collect`",
            )
    return parts


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the host half of a head sees for every sample; see ``Head.logits``."""

    now: Array
    mean: Array
    first: Array
    counts: Array


def inputs(samples: Samples, mean: Array, projection: Array) -> Inputs:
    """Repeat on a collection what the engine computes step by step."""
    project = _Projector(mean, projection)
    now = project(samples.hidden)
    counts = np.stack(
        [
            samples.tokens,
            samples.prompt_tokens[samples.request],
            samples.max_new_tokens[samples.request],
        ],
        axis=1,
    ).astype(np.float64)
    first = now[starts(samples)[samples.request]]
    return Inputs(now, _running_mean(project(samples.pooled), samples), first, counts)


@dataclass(frozen=True, slots=True)
class _Projector:
    mean: Array
    projection: Array

    def __call__(self, hidden: Array, rows: int = 65536) -> Array:
        # In slices: a collection in half precision may be larger than memory in single.
        parts = [
            (hidden[i : i + rows].astype(np.float32) - self.mean) @ self.projection
            for i in range(0, len(hidden), rows)
        ]
        return np.concatenate(parts).astype(np.float32)


def starts(samples: Samples) -> Array:
    """Index of the first sample of each request."""
    return np.searchsorted(samples.request, np.arange(len(samples.rids)))


def _running_mean(pooled: Array, samples: Samples) -> Array:
    """Mean over all tokens so far, from means over the tokens since the sample before."""
    begin = starts(samples)[samples.request]
    steps = np.diff(samples.tokens, prepend=0)
    steps[begin == np.arange(len(begin))] = 1
    total = np.cumsum(pooled * steps[:, None], axis=0, dtype=np.float64)
    before = np.concatenate([np.zeros((1, total.shape[1])), total])[begin]
    return ((total - before) / samples.tokens[:, None]).astype(np.float32)


def whiten(hidden: Array, width: int) -> tuple[Array, Array]:
    """Mean and projection onto the ``width`` strongest principal directions, unit variance each.

    Returns:
        ``[d]`` and ``[d, width]`` float32.
    """
    mean = hidden.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((hidden.shape[1], hidden.shape[1]))
    for i in range(0, len(hidden), 65536):
        part = hidden[i : i + 65536].astype(np.float64) - mean
        covariance += part.T @ part
    values, vectors = np.linalg.eigh(covariance / len(hidden))
    order = np.argsort(values)[::-1][:width]
    scale = np.sqrt(np.maximum(values[order], 1e-12 * values.max()))
    return mean.astype(np.float32), (vectors[:, order] / scale).astype(np.float32)


def survival_quantiles(values: Array, censored: Array, levels: Array) -> Array:
    """Kaplan-Meier quantiles of possibly censored values.

    Args:
        values: ``[n]``; censored: ``[n]`` bool, the true value is larger.
        levels: ``[q]``.

    Returns:
        ``[q]``; where the curve never reaches a level, the largest value seen.
    """
    order = np.argsort(values, kind="stable")
    at_risk = np.arange(len(values), 0, -1)
    survival = np.cumprod(1.0 - (~censored[order]) / at_risk)
    index = np.searchsorted(-survival, -(1.0 - levels), side="left")
    return np.asarray(values[order][np.minimum(index, len(values) - 1)], np.float64)


def by_age(samples: Samples, levels: Array) -> tuple[Array, Array]:
    """Quantiles of remaining length by tokens so far.

    Returns:
        ``[a]`` lower ends of the age groups and ``[a, q]`` quantiles.
    """
    remaining, censored = samples.remaining, samples.censored[samples.request]
    edges, table = [], []
    end = int(samples.tokens.max()) + 1
    low = 0
    while low < end:
        high = max(low + 21, int(low * 1.5))
        inside = (samples.tokens >= low) & (samples.tokens < high)
        rest = samples.tokens >= high
        if len(np.unique(samples.request[rest])) < FEWEST_REQUESTS:
            inside, high = samples.tokens >= low, end
        if inside.any():
            edges.append(float(low))
            table.append(survival_quantiles(remaining[inside], censored[inside], levels))
        low = high
    return np.array(edges), np.array(table)


def columns(x: Inputs) -> Array:
    """Concatenate in the order of ``Weights.w1``."""
    return np.concatenate([x.now, x.mean, x.first, np.log1p(x.counts)], axis=1, dtype=np.float32)
