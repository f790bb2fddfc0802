"""Measured error against progress, in the form that the simulator's emulated predictor reads.

The emulated predictor sees the logarithm of the truth with noise of standard deviation ``s`` and
combines it with what age alone says (spread ``v``), which leaves a spread ``e`` with ``1/e² =
1/s² + 1/v²``. Measured are ``e`` (the head) and ``v`` (the median by age); exported is ``s``.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from sglang_star.errors import ConfigError
from sglang_star.predictor import metrics
from sglang_star.predictor.hazard import Array
from sglang_star.predictor.samples import Samples

STEPS: Final = 10
USELESS: Final = 10.0
"""Written where the head knows no more than age does."""


def measure(star: Array, by_age: Array, samples: Samples, model: str) -> dict[str, Any]:
    """The curve of a head from its predictions and the by-age ones, ``[n, q]`` each.

    Raises:
        ConfigError: some tenth of the progress has too few samples.
    """
    progress = samples.tokens / samples.output_tokens[samples.request]
    step = np.minimum((progress * STEPS).astype(int), STEPS - 1)
    if (np.bincount(step, minlength=STEPS) < 2).any():
        raise ConfigError("too few samples for an error curve", hint="collect more prompts")
    ours, ages = _log_error(star, samples), _log_error(by_age, samples)
    noise = []
    for i in range(STEPS):
        left, known = float(ours[step == i].std()), float(ages[step == i].std())
        precision = 1 / max(left, 1e-3) ** 2 - 1 / max(known, 1e-3) ** 2
        noise.append(min(USELESS, precision**-0.5) if precision > 0 else USELESS)
    return {
        "label": f"measured: {model}, {len(samples.rids)} held-back requests, outputs up to "
        f"{int(samples.max_new_tokens.max())} tokens",
        "measured": True,
        "progress": [(i + 0.5) / STEPS for i in range(STEPS)],
        "log_error_std": [round(value, 4) for value in noise],
        "turns": round(_turns(ours, progress, samples), 3),
    }


def _log_error(predicted: Array, samples: Samples) -> Array:
    point = np.maximum(metrics.clip(predicted, samples)[:, metrics.MEDIAN], 1.0)
    return np.asarray(np.log(point) - np.log(np.maximum(samples.remaining, 1)))


def _turns(error: Array, progress: Array, samples: Samples) -> float:
    """Quarter turns between a request's errors early and late, from their correlation."""
    early = _mean_of(error, progress < 0.25, samples)
    late = _mean_of(error, progress >= 0.75, samples)
    both = np.isfinite(early) & np.isfinite(late)
    if both.sum() < 3 or not early[both].std() or not late[both].std():
        return 1.0
    correlation = float(np.corrcoef(early[both], late[both])[0, 1])
    # Between the middles of the first and the last quarter lie three quarters of a life.
    return math.acos(min(max(correlation, 0.0), 1.0)) / (math.pi / 2) / 0.75


def _mean_of(values: Array, rows: Array, samples: Samples) -> Array:
    """Mean over the chosen samples of each request, NaN where it has none."""
    requests = len(samples.rids)
    counts = np.bincount(samples.request[rows], minlength=requests)
    sums = np.bincount(samples.request[rows], values[rows], minlength=requests)
    return np.divide(sums, counts, out=np.full(requests, np.nan), where=counts > 0)
