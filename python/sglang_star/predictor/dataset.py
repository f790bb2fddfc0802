"""From samples on disk to what a head is trained on and judged by."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from sglang_star.errors import ConfigError
from sglang_star.predictor import echo
from sglang_star.predictor.hazard import Array
from sglang_star.predictor.memory import FADE
from sglang_star.predictor.prompts import split_of
from sglang_star.predictor.samples import Samples

FEWEST_REQUESTS: Final = 20
"""Fewer requests than this in a split and nothing said about it would mean anything."""


@dataclass(frozen=True, slots=True)
class Split:
    """Requests to fit on (with early stopping and calibration among them) and to judge by.

    Judged are only requests that the model or the client's limit ended.
    """

    fit: Samples
    test: Samples


def split(samples: Samples, held_out: Array | None = None) -> Split:
    """Divide by instance: 85 % to fit (70 train, 15 validation), 15 % to judge.

    Args:
        samples: a collection.
        held_out: ``[requests]`` bool; these judge and those of other instances fit.

    Raises:
        ConfigError: too few requests, or none of them ended by itself.
    """
    if samples.censored.all():
        raise ConfigError(
            "every output was cut by max_new_tokens, so no length was ever seen",
            hint="collect with a larger --max-new-tokens",
        )
    hashed = np.array([split_of(rid) == "test" for rid in samples.rids])
    if held_out is None:
        held_out = hashed
    # An instance that judges in one wording fits in none, and those of the ordinary test split fit
    # nothing, so that every head can be judged by them.
    judges = np.isin(samples.instance, samples.instance[held_out])
    return _checked(
        Split(samples.select(~judges & ~hashed), samples.select(held_out & ~samples.cut))
    )


def choice(fit: Samples) -> Split:
    """Divide what a head is fitted on once more, to choose between ways of fitting it.

    Whatever is chosen by comparing errors is chosen here: the test split judges what was chosen.

    Args:
        fit: the part of :func:`split` of that name.

    Raises:
        ConfigError: too few requests.
    """
    judges = validation(fit)
    return _checked(Split(fit.select(~judges), fit.select(judges & ~fit.cut)))


def _checked(parts: Split) -> Split:
    for name, part in (("fit", parts.fit), ("test", parts.test)):
        if len(part.rids) < FEWEST_REQUESTS:
            raise ConfigError(
                f"only {len(part.rids)} requests to {name} on, at least {FEWEST_REQUESTS} needed",
                hint="collect more prompts with `star predictor collect`",
            )
    return parts


def of_sources(samples: Samples, sources: dict[str, str], names: Sequence[str]) -> Array:
    """Which requests have a prompt from one of the sources named, ``[requests]`` bool.

    Raises:
        ConfigError: a name is no source of these prompts, or where they came from is not known.
    """
    found = np.array(source_of(samples, sources))
    if unknown := sorted(set(names) - set(found)):
        known_ones = ", ".join(sorted(set(found))) or "none"
        raise ConfigError(
            f"no prompt is from {', '.join(unknown)}",
            hint=f"the sources here are {known_ones}; --sources names the prompt file",
        )
    return np.isin(found, names)


def source_of(samples: Samples, sources: dict[str, str]) -> list[str]:
    """The source of each request's prompt, ``unknown`` where it was not recorded."""
    return [sources.get(rid.partition("#")[0], "unknown") for rid in samples.rids]


def known(samples: Samples) -> Samples:
    """Requests whose served length is known, for methods that cannot take a lower bound.

    An output that reached ``max_new_tokens`` counts with that length: predictions are limited to
    it when judged, so for them it is exact.
    """
    return samples.select(~samples.cut)


def validation(samples: Samples) -> Array:
    """The requests by which methods choose among fits, ``[requests]`` bool.

    Raises:
        ConfigError: there are none, or nothing else.
    """
    found = np.array([split_of(rid) == "validation" for rid in samples.rids])
    if found.all() or not found.any():
        raise ConfigError("too few requests to choose by", hint="collect more prompts")
    return found


def thinned(samples: Samples, interval: int) -> Samples:
    """Keep one sample every ``interval`` output tokens, a multiple of what was recorded."""
    rows = (samples.tokens - 1) % interval == 0
    return dataclasses.replace(
        samples,
        request=samples.request[rows],
        tokens=samples.tokens[rows],
        hidden=samples.hidden[rows],
        pooled=_pooled_over(samples, rows),
    )


def _pooled_over(samples: Samples, rows: Array) -> Array:
    """Mean states since the sample kept before, from those since the sample before."""
    each = steps(samples)
    group = np.concatenate([[0], np.cumsum(rows)[:-1]])[: len(rows)]
    inside = group < rows.sum()
    total = np.zeros((int(rows.sum()), samples.pooled.shape[1]), np.float32)
    # Samples after the last one kept of a request belong to the next group: leave them out.
    inside &= samples.request == samples.request[rows][np.minimum(group, len(total) - 1)]
    np.add.at(total, group[inside], samples.pooled[inside].astype(np.float32) * each[inside, None])
    weight = np.bincount(group[inside], each[inside], minlength=len(total))
    return (total / weight[:, None]).astype(np.float16)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the host half of a head sees for every sample; see ``Head.logits``."""

    now: Array
    recent: Array
    mean: Array
    features: Array


def inputs(samples: Samples, mean: Array, projection: Array) -> Inputs:
    """Repeat on a collection what the engine computes step by step."""
    project = _Projector(mean, projection)
    now, pooled = project(samples.hidden), project(samples.pooled)
    repeated = [
        echo.shares(ids, tokens)
        for ids, tokens in zip(samples.output_ids, tokens_of(samples), strict=True)
    ]
    features = np.stack(
        [
            samples.tokens,
            samples.prompt_tokens[samples.request],
            samples.max_new_tokens[samples.request],
            np.concatenate(repeated),
        ],
        axis=1,
    ).astype(np.float64)
    recent, running = _recent_mean(pooled, samples), _running_mean(pooled, samples)
    return Inputs(now, recent, running, features)


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


def tokens_of(samples: Samples) -> list[Array]:
    """Output tokens at each sample, request by request."""
    return np.split(samples.tokens, starts(samples)[1:])


def _running_mean(pooled: Array, samples: Samples) -> Array:
    """``Fusion.mean``: over all decode steps so far, from means over those between two samples."""
    each = steps(samples).astype(np.float64)
    each[starts(samples)] = 0.0  # prefill is not in it
    begin = starts(samples)[samples.request]
    total, count = np.cumsum(pooled * each[:, None], axis=0), np.cumsum(each)
    total, count = total - total[begin], count - count[begin]
    mean = total / np.maximum(count, 1.0)[:, None]
    return np.where(count[:, None] > 0, mean, pooled).astype(np.float32)


def _recent_mean(pooled: Array, samples: Samples) -> Array:
    """``Fusion.recent`` as far as means over the steps between two samples tell it."""
    begins = np.isin(np.arange(len(pooled)), starts(samples))
    kept = FADE ** steps(samples)
    recent, weight = pooled.copy(), np.zeros(len(pooled))
    for i in np.flatnonzero(~begins):
        old = kept[i] * weight[i - 1]
        weight[i] = old + 1.0 - kept[i]
        recent[i] += np.float32(old / weight[i]) * (recent[i - 1] - pooled[i])
    return recent


def steps(samples: Samples) -> Array:
    """Tokens since the sample before."""
    steps = np.diff(samples.tokens, prepend=0)
    steps[starts(samples)] = 1
    return steps


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
    parts = [x.now, x.recent, x.mean, np.log1p(x.features)]
    return np.concatenate(parts, axis=1, dtype=np.float32)
