"""What the head is compared with; each is fitted on the same requests and sees the same samples.

A baseline is fitted by its constructor and then predicts remaining tokens, ``[n]`` or ``[n, q]``.
An output cut by ``max_new_tokens`` counts with that length, since predictions are limited to what
it leaves when they are judged; one cut by the end of the collection is a lower bound to those that
can use one and is left out by the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Final, Protocol, cast

import numpy as np
import torch
from torch import nn

from sglang_star.predictor import dataset
from sglang_star.predictor.hazard import Array
from sglang_star.predictor.samples import Samples
from sglang_star.protocol import QUANTILE_LEVELS

PATIENCE: Final = 6
"""Epochs without improvement on validation that end the training of a network."""

EPOCHS: Final = 30
TRIAL_EPOCHS: Final = 4
SCHEDULES: Final = ((1e-3, 0.0), (3e-3, 0.0), (3e-4, 0.0), (1e-3, 0.1))
"""Learning rates and weight decays that are tried for the paper's head."""

RIDGES: Final = tuple(10.0**k for k in range(-1, 8))


class Baseline(Protocol):
    """A fitted predictor."""

    parameters: int

    def predict(self, samples: Samples) -> Array:
        """Remaining tokens of every sample."""


class ConstantMedian:
    """The median remaining length of all samples."""

    parameters = len(QUANTILE_LEVELS)

    def __init__(self, fit: Samples, seed: int) -> None:
        censored = fit.censored[fit.request]
        levels = np.array(QUANTILE_LEVELS)
        self._quantiles = dataset.survival_quantiles(fit.remaining, censored, levels)

    def predict(self, samples: Samples) -> Array:
        """The same quantiles for every sample."""
        return np.tile(self._quantiles, (len(samples.tokens), 1))


class ByAge:
    """Quantiles of remaining length given only tokens so far; the point estimate is the median."""

    def __init__(self, fit: Samples, seed: int) -> None:
        self._edges, self._table = dataset.by_age(fit, np.array(QUANTILE_LEVELS))
        self.parameters = self._table.size

    def predict(self, samples: Samples) -> Array:
        """The row of each sample's age group."""
        index = np.searchsorted(self._edges, samples.tokens, side="right") - 1
        return np.asarray(self._table[np.maximum(index, 0)])


class AgeMean:
    """Mean remaining length given only tokens so far, in the groups of :class:`ByAge`."""

    def __init__(self, fit: Samples) -> None:
        fit = dataset.known(fit)
        self._edges, _ = dataset.by_age(fit, np.array(QUANTILE_LEVELS))
        group = self._group(fit)
        counts = np.bincount(group, minlength=len(self._edges))
        sums = np.bincount(group, fit.remaining, minlength=len(self._edges))
        self._mean = sums / np.maximum(counts, 1)

    def predict(self, samples: Samples) -> Array:
        """The mean of each sample's age group."""
        return np.asarray(self._mean[self._group(samples)])

    def _group(self, samples: Samples) -> Array:
        return np.maximum(np.searchsorted(self._edges, samples.tokens, side="right") - 1, 0)


class LinearProbe:
    """Ridge regression from the hidden state to the remaining length or its logarithm."""

    def __init__(self, fit: Samples, seed: int) -> None:
        fit = dataset.known(fit)
        x, y = _hidden(fit), fit.remaining.astype(np.float64)
        self._model = _best_ridge(x, y, dataset.validation(fit)[fit.request])
        self.parameters = x.shape[1] + 1

    def predict(self, samples: Samples) -> Array:
        """One product per sample."""
        return self._model(_hidden(samples))


class PromptOnly:
    """Ridge regression on the state at prefill and the tokens so far, to the remaining length."""

    def __init__(self, fit: Samples, seed: int) -> None:
        fit = dataset.known(fit)
        x, y = self._inputs(fit), fit.remaining.astype(np.float64)
        self._model = _best_ridge(x, y, dataset.validation(fit)[fit.request])
        self.parameters = x.shape[1] + 1

    def predict(self, samples: Samples) -> Array:
        """One product per sample."""
        return self._model(self._inputs(samples))

    @staticmethod
    def _inputs(samples: Samples) -> Array:
        first = samples.hidden[dataset.starts(samples)].astype(np.float64)
        counts = [samples.prompt_tokens[samples.request], samples.tokens]
        return np.column_stack(
            [first[samples.request], np.log1p(np.stack(counts, axis=1)), samples.tokens]
        )


class PaperHead:
    """The paper's head: ``d -> 2048 -> 512 -> 64 -> 1``, ReLU, L1 loss.

    Its schedule is tuned as the head's is: rate and weight decay by trial on the validation
    requests, the rate falling to nothing, the best epoch kept.

    Attributes:
        notes: what was ``tried``, with its error on validation, tokens.
    """

    def __init__(self, fit: Samples, seed: int) -> None:
        fit = dataset.known(fit)
        sizes = (fit.hidden.shape[1], 2048, 512, 64, 1)
        self._norm = _Normal(_hidden(fit))
        self._unit = float(fit.remaining.mean())
        target = torch.tensor(fit.remaining / self._unit, dtype=torch.float32)
        x = torch.tensor(self._norm(_hidden(fit)), dtype=torch.float32)
        left = dataset.validation(fit)[fit.request]

        def trained(schedule: tuple[float, float], epochs: int) -> tuple[nn.Module, float]:
            torch.manual_seed(seed)
            layers: list[nn.Module] = []
            for wide, narrow in itertools.pairwise(sizes):
                layers += [nn.Linear(wide, narrow), nn.ReLU()]
            net = nn.Sequential(*layers[:-1])
            error = _falling(
                net, x, lambda out, rows: (out[:, 0] - target[rows]).abs(), left, schedule, epochs
            )
            return net, error * self._unit

        tried = {way: trained(way, TRIAL_EPOCHS)[1] for way in SCHEDULES}
        self._net, _ = trained(min(tried, key=lambda way: tried[way]), EPOCHS)
        self.parameters = sum(p.numel() for p in self._net.parameters())
        self.notes = {
            "tried": {f"rate {rate}, weight decay {d}": mae for (rate, d), mae in tried.items()}
        }

    def predict(self, samples: Samples) -> Array:
        """One forward per sample."""
        return _forward(self._net, self._norm(_hidden(samples)))[:, 0] * self._unit


class Trail:
    """TRAIL: a classifier over ten equal bins, smoothed over a request by Bayes' rule."""

    BINS: Final = 10

    def __init__(self, fit: Samples, seed: int) -> None:
        torch.manual_seed(seed)
        fit = dataset.known(fit)
        width = fit.hidden.shape[1]
        self._net = nn.Sequential(nn.Linear(width, 512), nn.ReLU(), nn.Linear(512, self.BINS))
        self.parameters = sum(p.numel() for p in self._net.parameters())
        self._norm = _Normal(_hidden(fit))
        self._bin = (float(fit.remaining.max()) + 1.0) / self.BINS
        target = torch.tensor(fit.remaining // self._bin, dtype=torch.long)
        _train(
            self._net,
            torch.tensor(self._norm(_hidden(fit)), dtype=torch.float32),
            lambda out, rows: nn.functional.cross_entropy(out, target[rows], reduction="none"),
            dataset.validation(fit)[fit.request],
        )

        left = fit.select(dataset.validation(fit))
        self._median = False
        errors = [np.abs(self.predict(left) - left.remaining).mean()]
        self._median = True
        errors.append(np.abs(self.predict(left) - left.remaining).mean())
        self._median = bool(errors[1] < errors[0])

    def predict(self, samples: Samples) -> Array:
        """Mean or median of the smoothed distribution, whichever validated better."""
        belief = self._smoothed(samples)
        if not self._median:
            return np.asarray(belief @ ((np.arange(self.BINS) + 0.5) * self._bin))
        below = np.cumsum(belief, axis=1)
        index = (below < 0.5).sum(axis=1).clip(max=self.BINS - 1)
        rows = np.arange(len(belief))
        share = (0.5 - below[rows, index]) / np.maximum(belief[rows, index], 1e-9) + 1.0
        return np.asarray((index + share.clip(0.0, 1.0)) * self._bin)

    def _smoothed(self, samples: Samples) -> Array:
        """Belief over the bins at every sample, ``[n, BINS]``."""
        logits = _forward(self._net, self._norm(_hidden(samples)))
        likelihood = np.exp(logits - logits.max(axis=1, keepdims=True))
        likelihood /= likelihood.sum(axis=1, keepdims=True)
        begins = set(dataset.starts(samples).tolist())
        belief = np.zeros_like(likelihood)
        for i, row in enumerate(likelihood):
            belief[i] = row
            if i not in begins:
                # In so many tokens a request leaves its bin for the next lower one this often.
                share = min((samples.tokens[i] - samples.tokens[i - 1]) / self._bin, 1.0)
                moved = (1.0 - share) * belief[i - 1]
                moved[:-1] += share * belief[i - 1, 1:]
                moved[0] += share * belief[i - 1, 0]
                belief[i] = moved * row + 1e-12
                belief[i] /= belief[i].sum()
        return belief


BASELINES: Final[dict[str, Any]] = {
    "paper": PaperHead,
    "linear": LinearProbe,
    "median": ConstantMedian,
    "by_age": ByAge,
    "prompt_only": PromptOnly,
    "auxiliary": None,
    "auxiliary_small": None,
    "trail": Trail,
}


AUXILIARY: Final = {"auxiliary": "pretrained", "auxiliary_small": "small"}
"""Encoders of the auxiliary model."""


def make(name: str, fit: Samples, seed: int, served: str, minutes: float) -> Baseline:
    """Fit one of ``BASELINES``.

    Args:
        name: which; fit: the requests to fit on; seed: of everything random.
        served: path of the served model, whose tokens the auxiliary models read.
        minutes: processor time that each auxiliary model may train for at most.

    Raises:
        ConfigError: too few requests, or no tokenizer; SetupError: no text encoder.
    """
    if name not in AUXILIARY:
        return cast("Baseline", BASELINES[name](fit, seed))
    # Imported late: it needs transformers, which nothing else here does.
    from sglang_star.predictor.auxiliary import Auxiliary

    return Auxiliary(fit, seed, served, AUXILIARY[name], minutes)


class _Normal:
    """Standardisation learnt on one set and applied to others."""

    def __init__(self, x: Array) -> None:
        self._mean, self._scale = x.mean(axis=0), x.std(axis=0) + 1e-6

    def __call__(self, x: Array) -> Array:
        return np.asarray((x - self._mean) / self._scale)


class _Ridge:
    """Closed-form ridge regressions of several targets with several penalties on one input."""

    def __init__(self, x: Array) -> None:
        self._norm = _Normal(x)
        self._z = self._norm(x)
        self._values, self._vectors = np.linalg.eigh(self._z.T @ self._z)

    def fit(self, y: Array, ridge: float) -> Callable[[Array], Array]:
        """Return the predictor of ``y`` that this penalty gives."""
        mean, norm = y.mean(), self._norm
        along = self._vectors.T @ (self._z.T @ (y - mean))
        weights = self._vectors @ (along / (self._values + ridge))
        return lambda x: np.asarray(norm(x) @ weights + mean)


def _best_ridge(x: Array, y: Array, validation: Array) -> Callable[[Array], Array]:
    """Choose penalty and scale of the target on validation requests, then fit on everything."""

    def model(inputs: _Ridge, y: Array, ridge: float, log: bool) -> Callable[[Array], Array]:
        if not log:
            return inputs.fit(y, ridge)
        fitted = inputs.fit(np.log1p(y), ridge)
        return lambda x: np.expm1(np.clip(fitted(x), 0.0, 20.0))

    some = _Ridge(x[~validation])

    def loss(choice: tuple[float, bool]) -> float:
        fitted = model(some, y[~validation], *choice)
        return float(np.abs(fitted(x[validation]) - y[validation]).mean())

    best = min(itertools.product(RIDGES, (False, True)), key=loss)
    return model(_Ridge(x), y, *best)


def _hidden(samples: Samples) -> Array:
    return samples.hidden.astype(np.float64)


def _forward(net: nn.Module, x: Array) -> Array:
    with torch.no_grad():
        return np.asarray(net(torch.tensor(x, dtype=torch.float32)).numpy(), np.float64)


def _falling(
    net: nn.Module,
    x: torch.Tensor,
    loss: Any,
    validation: Array,
    schedule: tuple[float, float],
    epochs: int,
) -> float:
    """AdamW with a rate that falls to nothing; leaves the best epoch and returns its loss.

    The loss is that on the validation requests, at which no epoch has trained.
    """
    rate, decay = schedule
    rows, left = (torch.tensor(np.flatnonzero(part)) for part in (~validation, validation))
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=decay)
    falls = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    best, kept = float("inf"), dict(net.state_dict())
    for _ in range(epochs):
        for part in rows[torch.randperm(len(rows))].split(256):
            optimizer.zero_grad()
            loss(net(x[part]), part).mean().backward()
            optimizer.step()
        falls.step()
        with torch.no_grad():
            found = float(loss(net(x[left]), left).mean())
        if found < best:
            best, kept = found, {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(kept)
    return best


def _train(net: nn.Module, x: torch.Tensor, loss: Any, validation: Array) -> None:
    """Adam with early stopping on the validation requests; leaves the best epoch."""
    train_rows = torch.tensor(np.flatnonzero(~validation))
    left_rows = torch.tensor(np.flatnonzero(validation))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-4)
    best, since, kept = float("inf"), 0, {k: v.clone() for k, v in net.state_dict().items()}
    while since < PATIENCE:
        for rows in train_rows[torch.randperm(len(train_rows))].split(256):
            optimizer.zero_grad()
            loss(net(x[rows]), rows).mean().backward()
            optimizer.step()
        with torch.no_grad():
            left = float(loss(net(x[left_rows]), left_rows).mean())
        since += 1
        if left < best:
            best, since, kept = left, 0, {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(kept)
