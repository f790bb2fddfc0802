"""``star bench predictor --ablations SAMPLES``: what each part of the head's recipe is worth.

Every variant is fitted on the head's training requests, or fewer, and judged on its validation
ones: what is read off here decides the next recipe, so no test request may take part in it. The
recorder sees the last layer only; with the model at hand, :mod:`layers` gives the states of others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from sglang_star.predictor import dataset, ensemble, fit, metrics, trials
from sglang_star.predictor.hazard import Array
from sglang_star.predictor.head import Head, HeadCard
from sglang_star.predictor.recipe import PARTS, Recipe
from sglang_star.predictor.samples import Samples, describe, load_samples
from sglang_star.predictor.train import predict
from sglang_star_bench import layers

FULL: Final = "full"
NAME: Final = "ablation"
LAYERS: Final = (0.25, 0.5, 0.75)
"""Depths at which states are tried, as a share of all layers."""
KEPT: Final = ("mae", "mae_ci", "c_index", "coverage", "coverage_open", "coverage_open_expected")
WIDTHS: Final = (8, 16, 32, 64, 128, 192, 256)

Predict = Callable[[Samples], Array]
Keep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Variant:
    """One change to the recipe.

    Attributes:
        group: what is varied; name: how.
        recipe: hyperparameters; interval: output tokens between two labels.
        share: every how many-th instance is fitted on; point: absolute error instead of survival.
    """

    group: str
    name: str
    recipe: Recipe
    interval: int = 0
    share: int = 1
    point: bool = False

    def samples(self, samples: Samples) -> Samples:
        """What this variant is fitted on."""
        chosen = samples.select(samples.instance % self.share == 0)
        return dataset.thinned(chosen, self.interval) if self.interval else chosen


def variants(base: Recipe, hidden: int) -> Iterator[Variant]:
    """The recipe as it is, then every change to it, for states of so many numbers."""

    def change(group: str, name: str, **changes: Any) -> Variant:
        return Variant(group, name, dataclasses.replace(base, **changes))

    yield Variant("", FULL, base)
    for width in WIDTHS:
        if width != base.width and width <= hidden:
            yield change("width", f"projection to {width}", width=width)
    for factor in (0.25, 0.5, 2):
        inner = max(1, round(base.inner * factor))
        yield change("width", f"inner layer of {inner}", inner=inner)
    yield change("features", "no hidden state", parts=("counts", "echo"))
    yield change("features", "no counts", parts=tuple(p for p in PARTS if p != "counts"))
    yield change("features", "no echo", parts=tuple(p for p in PARTS if p != "echo"))
    yield change("fusion", "latest state only", parts=("now", "counts", "echo"))
    yield change("fusion", "recent mean only", parts=("recent", "counts", "echo"))
    for part in ("now", "recent", "mean"):
        yield change("fusion", f"without {part}", parts=tuple(p for p in PARTS if p != part))
    yield Variant("loss", "absolute error of a point", base, point=True)
    for divisor, name in ((0.625, "1.6 times"), (2, "half of it"), (4, "a quarter of it")):
        yield change("dropout", name, dropout=base.dropout / divisor)
    for interval in (40, 80):
        yield Variant("interval", f"a label every {interval}", base, interval=interval)
    for share in (8, 4, 2):
        yield Variant("size", f"1/{share} of the requests", base, share=share)


def run(
    folder: Path, recipe: Recipe, model: Path | None = None, keep: Keep | None = None
) -> dict[str, Any]:
    """Fit and judge every variant; a line on the terminal for each.

    Args:
        folder: a collection.
        recipe: the whole recipe; what it leaves open is chosen by trial.
        model: the collection's model, to try its other layers; None leaves them out.
        keep: called with the report so far after every variant: all of them take hours.

    Raises:
        ConfigError: the folder holds no usable collection, or the model is not the one of it.
    """
    fingerprint, manifest = describe(folder)
    parts = dataset.choice(dataset.split(load_samples(folder)).fit)
    recipe, _ = trials.choose(parts.fit, recipe)
    rows: list[dict[str, Any]] = []
    report = {
        "model": manifest["model"],
        "fit_requests": len(parts.fit.rids),
        "validation_requests": len(parts.test.rids),
        "recipe": dataclasses.asdict(recipe),
        "rows": rows,
    }
    reference = np.zeros(0)
    card = HeadCard(model=NAME, fingerprint=fingerprint, provenance={}, metrics={})

    def judge(variant: Variant, parts: dataset.Split) -> None:
        nonlocal reference
        samples = variant.samples(parts.fit)
        fitted = _point(samples, variant.recipe) if variant.point else _head(samples, variant, card)
        predicted = fitted(parts.test)
        error = metrics.errors(predicted, parts.test)
        if variant.name == FULL:
            reference = error
        result = metrics.score(predicted, parts.test)
        rows.append(
            {"group": variant.group, "name": variant.name, "requests": len(samples.rids)}
            | {name: result.get(name) for name in KEPT}
            | {"minus_full": metrics.paired(error, reference, metrics.drawn_as(parts.test))}
        )
        print(describe_row(rows[-1]), flush=True)
        if keep is not None:
            keep(report)

    for variant in variants(recipe, parts.fit.hidden.shape[1]):
        judge(variant, parts)
    if model is not None:
        last = layers.count(model)
        chosen = sorted({round(last * share) for share in LAYERS} - {last})
        fits, tests = (layers.reread(part, model, chosen) for part in (parts.fit, parts.test))
        for layer in chosen:
            other = dataset.Split(fits[layer], tests[layer])
            judge(Variant("layer", f"after layer {layer} of {last}", recipe), other)
    return report


def _head(samples: Samples, variant: Variant, card: HeadCard) -> Predict:
    """The head as `star predictor train` fits it."""
    weights, _ = fit.fit(samples, variant.recipe, quiet=True)
    head = Head(card, weights)
    return lambda test: predict(head, test)


def _point(samples: Samples, recipe: Recipe) -> Predict:
    """The same inputs and networks, fitted to the length itself by its absolute error."""
    samples = dataset.known(samples)
    inputs = fit.Inputs.of(samples, recipe)
    unit = float(samples.remaining.mean())
    target = (samples.remaining / unit).astype(np.float32)
    prior = np.array([np.log(np.median(target))])
    model, _ = ensemble.train(
        inputs.x, inputs.trains, prior, _absolute, (target,), recipe, quiet=True
    )

    def predict_point(test: Samples) -> Array:
        with torch.no_grad():
            out = _length(model(inputs.again(test))).mean(dim=0)
        return np.asarray(out.numpy() * unit, np.float64)

    return predict_point


def _length(out: torch.Tensor) -> torch.Tensor:
    return out[..., 0].clamp(max=8.0).exp()


def _absolute(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (_length(out) - target).abs()


def describe_row(row: dict[str, Any]) -> str:
    """One variant as text."""
    low, high = row["minus_full"]["ci"]
    change = f"{row['minus_full']['difference']:+7.1f} ({low:+.1f} to {high:+.1f})"
    return (
        f"{row['group']:9} {row['name']:26} {row['requests']:5} requests  MAE {row['mae']:6.1f}"
        f"{'' if row['name'] == FULL else '  ' + change}"
    )


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw the error of every variant less that of the whole recipe, with paired intervals."""
    from matplotlib.figure import Figure

    rows: Sequence[dict[str, Any]] = [row for row in report["rows"] if row["name"] != FULL]
    figure = Figure(figsize=(8, 0.3 * len(rows) + 1.5), layout="constrained")
    axes = figure.add_subplot(xlabel="MAE less the whole recipe's (tokens), paired 95 % interval")
    for place, row in enumerate(reversed(rows)):
        low, high = row["minus_full"]["ci"]
        axes.plot([low, high], [place, place], color="C0")
        axes.plot(row["minus_full"]["difference"], place, "o", color="C0")
    labels = [f"{row['group']}: {row['name']}" for row in reversed(rows)]
    axes.set_yticks(range(len(rows)), labels)
    axes.axvline(0, color="grey", lw=0.8)
    full = report["rows"][0]
    axes.set_title(f"{report['model']}: whole recipe {full['mae']:.1f} tokens")
    figure.savefig(path, dpi=110)
