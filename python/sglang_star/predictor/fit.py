"""Fitting the distribution head: a small ensemble by cross-validation, then calibration.

Every member leaves out one fold of the requests and stops when that fold gets worse, so all data
trains and all data judges. The folds are drawn several times over. What the members that left a
request out say about it, together, tells which level to read for each nominal one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch.nn import functional

from sglang_star.predictor import dataset, hazard, projection
from sglang_star.predictor.hazard import Array
from sglang_star.predictor.head import BLOCKS, FEATURES, Weights
from sglang_star.predictor.samples import Samples
from sglang_star.protocol import QUANTILE_LEVELS

FOLDS: Final = 5
LEAST_INNER: Final = 32

PARTS: Final = ("now", "recent", "mean", "counts", "echo")
"""Parts of a member's input: projection now, its recent mean and its mean so far; what is known for
free, and how much of the output repeats."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Hyperparameters.

    Attributes:
        width: numbers per request from the device half; 0 leaves it to :mod:`size`, which
            :func:`fit` does not call.
        inner: width of a member's inner layer; 0 is the projection's, at least ``LEAST_INNER``.
        repeats: how often the folds are drawn; five members each.
        parts: of ``PARTS``, what the members may use.
        input_dropout, inner_dropout, weight_decay: what keeps a few hundred requests from being
            learnt by heart.
        patience: epochs without improvement of its left-out fold after which a member stops.
    """

    seed: int = 0
    width: int = 0
    inner: int = 0
    learning_rate: float = 3e-3
    batch: int = 1024
    epochs: int = 120
    patience: int = 12
    input_dropout: float = 0.4
    inner_dropout: float = 0.5
    weight_decay: float = 0.1
    repeats: int = 2
    parts: tuple[str, ...] = PARTS


@dataclass(slots=True)
class Curves:
    """Loss per epoch, nats per sample: mean over members, on what they train on and left out."""

    train: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)


def nll(logits: torch.Tensor, exposure: torch.Tensor, event: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of possibly censored remaining lengths.

    Args:
        logits: ``[..., n, bins]`` hazard logits.
        exposure: ``[n, bins]`` fraction of each bin outlived.
        event: ``[n, bins]`` one-hot bin the output ended in; all zero where censored.

    Returns:
        ``[..., n]`` nats, up to a constant.
    """
    rate = functional.softplus(logits)  # integral of the hazard over the bin
    return (exposure * rate - event * torch.log(rate + 1e-12)).sum(dim=-1)


class Ensemble(torch.nn.Module):
    """``members`` two-layer networks evaluated as one batched product."""

    def __init__(self, members: int, inputs: int, inner: int, prior: Array, recipe: Recipe) -> None:
        super().__init__()
        bins = len(prior)
        self.w1 = torch.nn.Parameter(torch.randn(members, inputs, inner) * (2 / inputs) ** 0.5)
        self.b1 = torch.nn.Parameter(torch.zeros(members, 1, inner))
        self.w2 = torch.nn.Parameter(torch.randn(members, inner, bins) * 0.01)
        self.b2 = torch.nn.Parameter(torch.tensor(prior, dtype=torch.float32).repeat(members, 1, 1))
        self._recipe = recipe

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, inputs]`` to ``[members, n, bins]``."""
        x = x.expand(self.w1.shape[0], -1, -1)
        x = functional.dropout(x, self._recipe.input_dropout, self.training)
        inner = torch.relu(torch.baddbmm(self.b1, x, self.w1))
        inner = functional.dropout(inner, self._recipe.inner_dropout, self.training)
        return torch.baddbmm(self.b2, inner, self.w2)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Training samples as the members see them, and how they came to be.

    Attributes:
        mean, projection: of the device half; x: ``[n, inputs]`` float32, standardised.
        center, gain: of the standardisation; a gain of 0 keeps a column from acting.
        inner: width of a member's inner layer; trains: ``[members, n]`` who trains on what.
    """

    mean: Array
    projection: Array
    x: Array
    center: Array
    gain: Array
    inner: int
    trains: Array

    @classmethod
    def of(cls, samples: Samples, recipe: Recipe) -> Inputs:
        """Project, standardise and deal into folds."""
        requests = len(samples.rids)
        if not recipe.width:
            raise ValueError("a head's width must be chosen before it is fitted")
        mean, basis = projection.project(samples, recipe.width)
        width = basis.shape[1]
        inner = recipe.inner or max(LEAST_INNER, width)
        x = dataset.columns(dataset.inputs(samples, mean, basis))
        center, scale = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
        # A feature that never varied was never learnt: it must not act when it varies in service.
        acts = (scale > 1e-5 * (1.0 + np.abs(center))) & _used(recipe, width)
        gain = np.divide(1.0, scale, out=np.zeros_like(scale), where=acts)
        generator = np.random.default_rng(recipe.seed)
        folds = [generator.permutation(np.arange(requests) % FOLDS) for _ in range(recipe.repeats)]
        trains = np.stack([fold != left for fold in folds for left in range(FOLDS)])
        x = ((x - center) * gain).astype(np.float32)
        return cls(mean, basis, x, center, gain, inner, trains[:, samples.request])

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
        left_out = _left_out(model, inputs)
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
        levels=calibrate(left_out, edges, samples),
        age_edges=age_edges,
        age_quantiles=age_quantiles,
    )
    return weights, curves


def trial(samples: Samples, recipe: Recipe, *, quiet: bool = False) -> float:
    """Left-out loss of a recipe, nats per sample: the lowest mean over its members."""
    _, _, _, curves = _survival(samples, recipe, quiet)
    return min(curves.held_out)


def _survival(
    samples: Samples, recipe: Recipe, quiet: bool
) -> tuple[Inputs, Array, Ensemble, Curves]:
    """Train on the survival likelihood; also the inputs and the bin edges."""
    inputs = Inputs.of(samples, recipe)
    edges = hazard.bin_edges(int(samples.max_new_tokens.max()))
    exposure, event = targets(samples, edges)
    model, curves = train(inputs, _prior(exposure, event), nll, (exposure, event), recipe, quiet)
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


def calibrate(logits: Array, edges: Array, samples: Samples) -> Array:
    """Level to read for each of ``QUANTILE_LEVELS``, from predictions of left-out requests."""
    place = hazard.cdf(logits, edges, samples.remaining.astype(np.float64))
    levels = dataset.survival_quantiles(
        place, samples.censored[samples.request], np.array(QUANTILE_LEVELS)
    )
    return np.clip(np.maximum.accumulate(levels), 1e-3, 1 - 1e-3)


Loss = Callable[..., torch.Tensor]
"""(output ``[members, n, outputs]``, targets ``[n, ...]`` ...) to ``[members, n]``."""


def train(
    inputs: Inputs,
    prior: Array,
    loss: Loss,
    targets: tuple[Array, ...],
    recipe: Recipe,
    quiet: bool = False,
) -> tuple[Ensemble, Curves]:
    """Train an ensemble, each member on its samples, and leave each at its best epoch."""
    torch.manual_seed(recipe.seed)
    data = tuple(torch.tensor(a) for a in (inputs.x, *targets))
    used, members, count = torch.tensor(inputs.trains).float(), *inputs.trains.shape
    model = Ensemble(members, inputs.x.shape[1], inputs.inner, prior, recipe)
    optimizer = torch.optim.AdamW(
        [
            {"params": [model.w1, model.w2], "weight_decay": recipe.weight_decay},
            {"params": [model.b1, model.b2], "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
    )
    # Falling to nothing by the last epoch: dropout keeps a constant rate from ever settling.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    best = torch.full((members,), float("inf"))
    since = torch.zeros(members)
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    curves = Curves()
    for epoch in range(recipe.epochs):
        model.train()
        seen = 0.0
        for rows in torch.randperm(count).split(recipe.batch):
            found = _masked(model, loss, data, rows, used[:, rows]).sum()
            optimizer.zero_grad()
            found.backward()
            optimizer.step()
            seen += float(found.detach()) * len(rows) / count / members
        schedule.step()
        model.eval()
        with torch.no_grad():
            left = _left_out_loss(model, loss, data, 1.0 - used)
        better = left < best
        best = torch.where(better, left, best)
        since = torch.where(better, 0.0, since + 1)
        for name, parameter in model.named_parameters():
            kept[name][better] = parameter.detach()[better]
        curves.train.append(seen)
        curves.held_out.append(float(left.mean()))
        if not quiet:
            print(
                f"\repoch {epoch + 1}: left-out loss {float(best.mean()):.4f}",
                end="",
                file=sys.stderr,
                flush=True,
            )
        if bool((since >= recipe.patience).all()):
            break
    if not quiet:
        print(file=sys.stderr)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(kept[name])
    return model.eval(), curves


def _left_out_loss(
    model: Ensemble, loss: Loss, data: tuple[Any, ...], mask: torch.Tensor, rows: int = 8192
) -> torch.Tensor:
    """:func:`_masked` over all rows, in slices."""
    weights = torch.stack([part.sum(dim=1) for part in mask.split(rows, dim=1)])
    chunks = torch.arange(mask.shape[1]).split(rows)
    losses = torch.stack([_masked(model, loss, data, part, mask[:, part]) for part in chunks])
    return (losses * weights).sum(dim=0) / weights.sum(dim=0)


def _masked(
    model: Ensemble,
    loss: Loss,
    data: tuple[Any, ...],
    rows: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Mean loss of each member over the rows of its mask, ``[members]``."""
    x, *targets = (part[rows] for part in data)
    losses = loss(model(x), *targets)
    return (losses * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)
