"""Fitting the distribution head: a small ensemble by cross-validation, then calibration.

Every member leaves out one fold of the requests, whole instances, and stops when that fold gets
worse, so all data trains and all data judges. The folds are drawn several times over. What the
members that left a request out say about it, together, tells which level to read for each nominal
one.

One member in five is less sure than all of them, so a band calibrated so is somewhat too wide.
Where requests are many, a tenth of them is left out by every member and calibrates the whole
ensemble; where they are few, they are worth more as something to learn from.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from sglang_star.predictor import dataset, ensemble, hazard, projection
from sglang_star.predictor.ensemble import Curves, Ensemble, nll
from sglang_star.predictor.hazard import Array
from sglang_star.predictor.head import BLOCKS, FEATURES, Weights
from sglang_star.predictor.recipe import PARTS, Recipe
from sglang_star.predictor.samples import Samples
from sglang_star.protocol import QUANTILE_LEVELS

FOLDS: Final = 5
ASIDE: Final = 0.1
"""Share of the requests that only calibrate ..."""
ASIDE_FROM: Final = 4000
"""... where there are so many."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """Training samples as the members see them, and how they came to be.

    Attributes:
        mean, projection: of the device half; x: ``[n, inputs]`` float32, standardised.
        center, gain: of the standardisation; a gain of 0 keeps a column from acting.
        trains: ``[members, n]`` who trains on what.
        calibrates: ``[n]`` samples whose left-out predictions set the levels.
    """

    mean: Array
    projection: Array
    x: Array
    center: Array
    gain: Array
    trains: Array
    calibrates: Array

    @classmethod
    def of(cls, samples: Samples, recipe: Recipe) -> Inputs:
        """Project, standardise and deal into folds."""
        requests, instance = len(samples.rids), samples.instance
        if not recipe.settled:
            raise ValueError("a head's sizes and dropout must be chosen before it is fitted")
        mean, basis = projection.project(samples, recipe.width)
        width = basis.shape[1]
        x = dataset.columns(dataset.inputs(samples, mean, basis))
        center, scale = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
        # A feature that never varied was never learnt: it must not act when it varies in service.
        acts = (scale > 1e-5 * (1.0 + np.abs(center))) & _used(recipe, width)
        gain = np.divide(1.0, scale, out=np.zeros_like(scale), where=acts)
        generator = np.random.default_rng(recipe.seed)
        dealt = np.arange(int(instance.max()) + 1)
        folds = [generator.permutation(dealt % FOLDS)[instance] for _ in range(recipe.repeats)]
        trains = np.stack([fold != left for fold in folds for left in range(FOLDS)])
        calibrates = np.ones(requests, bool)
        if requests >= ASIDE_FROM:
            calibrates = (generator.permutation(dealt) < ASIDE * len(dealt))[instance]
            trains &= ~calibrates
        x = ((x - center) * gain).astype(np.float32)
        return cls(
            mean,
            basis,
            x,
            center,
            gain,
            trains[:, samples.request],
            calibrates[samples.request],
        )

    def again(self, samples: Samples) -> torch.Tensor:
        """Other samples, seen the same way."""
        x = dataset.columns(dataset.inputs(samples, self.mean, self.projection))
        return torch.tensor(((x - self.center) * self.gain).astype(np.float32))


def fit(samples: Samples, recipe: Recipe, *, quiet: bool = False) -> tuple[Weights, Curves]:
    """Train, calibrate and return a head's tensors.

    Args:
        samples: requests to train on; validation folds are taken from among them.
        recipe: hyperparameters and seed.
        quiet: no progress on stderr.
    """
    inputs, edges, model, curves = _survival(samples, recipe, quiet)
    with torch.no_grad():
        left_out = _left_out(model, inputs)[inputs.calibrates]
    age_edges, age_quantiles = dataset.by_age(samples, np.array(QUANTILE_LEVELS))
    w1, b1, w2, b2 = (p.detach().numpy() for p in (model.w1, model.b1, model.w2, model.b2))
    weights = Weights(
        mean=inputs.mean,
        projection=inputs.projection,
        w1=(w1 * inputs.gain[:, None]).astype(np.float32),
        b1=(b1 - (inputs.center * inputs.gain) @ w1[:, None]).astype(np.float32),
        w2=w2,
        b2=b2,
        edges=edges,
        levels=calibrate(
            left_out,
            edges,
            samples.remaining[inputs.calibrates],
            samples.censored[samples.request][inputs.calibrates],
        ),
        age_edges=age_edges,
        age_quantiles=age_quantiles,
    )
    return weights, curves


def trial(samples: Samples, recipe: Recipe, judged: int, *, quiet: bool = False) -> float:
    """Left-out loss of a recipe, nats per sample: the lowest mean over its members.

    Args:
        samples: what would be fitted on; recipe: hyperparameters and seed.
        judged: only as many folds of one draw are trained as leave out so many requests.
        quiet: no progress on stderr.
    """
    folds = min(FOLDS, math.ceil(judged * FOLDS / len(samples.rids)))
    _, _, _, curves = _survival(samples, dataclasses.replace(recipe, repeats=1), quiet, folds)
    return min(curves.held_out)


def _survival(
    samples: Samples, recipe: Recipe, quiet: bool, folds: int | None = None
) -> tuple[Inputs, Array, Ensemble, Curves]:
    """Train on the survival likelihood, the first so many folds; also inputs and bin edges."""
    inputs = Inputs.of(samples, recipe)
    inputs = dataclasses.replace(inputs, trains=inputs.trains[:folds])
    edges = hazard.bin_edges(int(samples.max_new_tokens.max()))
    exposure, event = targets(samples, edges)
    prior = _prior(exposure, event)
    model, curves = ensemble.train(
        inputs.x, inputs.trains, prior, nll, (exposure, event), recipe, quiet
    )
    return inputs, edges, model, curves


def _used(recipe: Recipe, width: int) -> Array:
    """Which input columns the recipe lets act."""
    sizes = [*[width] * BLOCKS, FEATURES - 1, 1]
    return np.repeat([part in recipe.parts for part in PARTS], sizes)


def _left_out(model: Ensemble, inputs: Inputs, rows: int = 4096) -> Array:
    """Mean logits of the members that did not train on a sample, ``[n, bins]``."""
    left = ~inputs.trains
    parts = []
    for i in range(0, len(inputs.x), rows):
        logits = model(torch.tensor(inputs.x[i : i + rows])).numpy()
        parts.append((logits * left[:, i : i + rows, None]).sum(axis=0))
    return np.concatenate(parts) / left.sum(axis=0)[:, None]


def targets(samples: Samples, edges: Array) -> tuple[Array, Array]:
    """Exposure and event, ``[n, bins]`` float32 each, as :func:`nll` wants them."""
    remaining = samples.remaining.astype(np.float64)
    exposure = hazard.exposure(remaining, edges)
    event = np.zeros_like(exposure)
    ended = ~samples.censored[samples.request]
    index = np.clip(np.searchsorted(edges, remaining, side="right") - 1, 0, len(edges) - 2)
    event[np.flatnonzero(ended), index[ended]] = 1.0
    return exposure.astype(np.float32), event.astype(np.float32)


def _prior(exposure: Array, event: Array) -> Array:
    """Logits of the hazard regardless of inputs, smoothed by one event in all."""
    rate = (event.sum(axis=0) + 1 / event.shape[1]) / (exposure.sum(axis=0) + 1.0)
    return np.asarray(np.log(np.expm1(np.clip(rate, 1e-6, 20.0))))


def calibrate(logits: Array, edges: Array, remaining: Array, censored: Array) -> Array:
    """Level to read for each of ``QUANTILE_LEVELS``, from predictions of left-out requests."""
    place = hazard.cdf(logits, edges, remaining.astype(np.float64))
    levels = dataset.survival_quantiles(place, censored, np.array(QUANTILE_LEVELS))
    return np.clip(np.maximum.accumulate(levels), 1e-3, 1 - 1e-3)
