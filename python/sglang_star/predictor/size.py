"""How large a head should be: the data say, by the loss of what each size left out.

No rule from the number of requests holds for every model. A chat model whose lengths are mostly
chance needs a narrow projection to keep from learning requests by heart; a reasoning model's
lengths are all in its state and a narrow one throws them away.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Final

from sglang_star.predictor import fit
from sglang_star.predictor.recipe import Recipe
from sglang_star.predictor.samples import Samples

WIDTHS: Final = (24, 48, 96, 192)
"""Numbers per request that the device half may produce; the largest keeps a head of a model of
hidden size 8,192 under the parameter bar."""

TRIAL_EPOCHS: Final = 60


def widths(hidden_size: int) -> list[int]:
    """What there is to choose from for a model."""
    return sorted({min(width, hidden_size) for width in WIDTHS})


def choose(
    samples: Samples, recipe: Recipe, *, quiet: bool = False
) -> tuple[Recipe, dict[int, float]]:
    """Set the recipe's width by trial, unless it has one.

    One draw of the folds is trained at every width, from narrow to wide, until a wider one does
    no better on what its members left out.

    Args:
        samples: what the head will be fitted on; nothing else is looked at.
        recipe: hyperparameters and seed.
        quiet: no progress on stderr.

    Returns:
        The recipe with its width, and the left-out loss of every width tried, nats per sample.
    """
    if recipe.width:
        return recipe, {}
    tried: dict[int, float] = {}
    for width in widths(samples.hidden.shape[1]):
        trial = dataclasses.replace(
            recipe, width=width, repeats=1, epochs=min(recipe.epochs, TRIAL_EPOCHS)
        )
        if not quiet:
            print(f"width {width}", file=sys.stderr)
        tried[width] = fit.trial(samples, trial, quiet=quiet)
        if tried[width] > min(tried.values()):
            break
    best = min(tried, key=lambda width: tried[width])
    return dataclasses.replace(recipe, width=best), tried
