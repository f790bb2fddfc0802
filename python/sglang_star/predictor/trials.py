"""How large a head should be and how much it must forget: the data say, by what each try left out.

No rule from the number of requests holds for every model. A chat model whose lengths are mostly
chance needs a narrow projection and much dropout to keep from learning requests by heart; a
reasoning model's lengths are all in its state, and a narrow one throws them away.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, Final

from sglang_star.predictor import fit
from sglang_star.predictor.recipe import Recipe
from sglang_star.predictor.samples import Samples

WIDTHS: Final = (24, 48, 96, 192)
"""Numbers per request that the device half may produce."""
LEAST_INNER: Final = 32
INNER: Final = (1, 2)
"""Inner layers tried, as multiples of the width. The largest of both keep a head of a model of
hidden size 8,192 under the parameter bar, and its host half to a few milliseconds per hundred
requests: still larger ones predict a little better and are felt in every step."""
DROPOUTS: Final = (0.5, 0.25, 0.125)

STEPS: Final = 3000
"""Optimiser steps that are enough to tell two recipes apart."""
REQUESTS: Final = 1500
"""Left-out requests that are: with more than that in a fold or two, the others are not trained."""


def widths(hidden_size: int) -> list[int]:
    """Widths there are to choose from for a model."""
    return sorted({min(width, hidden_size) for width in WIDTHS})


def choose(
    samples: Samples, recipe: Recipe, *, quiet: bool = False
) -> tuple[Recipe, dict[str, float]]:
    """Set what the recipe leaves open, by trial: its width, its inner layer, then its dropout.

    Sizes are tried from small to large, at the strongest dropout unless the recipe says, then
    dropouts from strong to weak; each until the next one does no better on what it left out.

    Args:
        samples: what the head will be fitted on; nothing else is looked at.
        recipe: hyperparameters and seed.
        quiet: no progress on stderr.

    Returns:
        The recipe with all set, and the left-out loss of everything tried, nats per sample.
    """
    tried: dict[str, float] = {}

    def loss(trial: Recipe) -> float:
        name = f"width {trial.width}, inner {trial.inner}, dropout {trial.dropout}"
        if name not in tried:
            if not quiet:
                print(name, file=sys.stderr)
            epochs = trial.epochs_of(len(samples.tokens), STEPS)
            trial = dataclasses.replace(trial, epochs=epochs)
            tried[name] = fit.trial(samples, trial, REQUESTS, quiet=quiet)
        return tried[name]

    def best(ways: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The first of these changes to the recipe that the one after it does not beat."""
        found, lowest = ways[0], float("inf")
        for way in ways:
            reached = loss(_filled(dataclasses.replace(recipe, **way)))
            if reached >= lowest:
                break
            found, lowest = way, reached
        return found

    if not recipe.width:
        ways = [{"width": width} for width in widths(samples.hidden.shape[1])]
        recipe = dataclasses.replace(recipe, **best(ways))
    if not recipe.inner:
        least = _filled(recipe).inner
        recipe = dataclasses.replace(recipe, **best([{"inner": least * k} for k in INNER]))
    if not recipe.dropout:
        recipe = dataclasses.replace(recipe, **best([{"dropout": share} for share in DROPOUTS]))
    return recipe, tried


def _filled(recipe: Recipe) -> Recipe:
    """With the smallest inner layer and the strongest dropout where they are open."""
    return dataclasses.replace(
        recipe,
        inner=recipe.inner or max(LEAST_INNER, recipe.width),
        dropout=recipe.dropout or DROPOUTS[0],
    )
