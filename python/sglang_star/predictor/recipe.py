"""How a head is fitted: every number that may be chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

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
