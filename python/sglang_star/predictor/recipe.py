"""How a head is fitted: every number that may be chosen."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Final

MOST_STEPS: Final = 6000
MOST_EPOCHS: Final = 120

PARTS: Final = ("now", "recent", "mean", "counts", "echo")
"""Parts of a member's input: projection now, its recent mean and its mean so far; what is known for
free, and how much of the output repeats."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Hyperparameters.

    Attributes:
        width: numbers per request from the device half; 0 leaves it open.
        dropout: share of the inner layer's outputs, and 4/5 of it the share of the inputs, hidden
            from a member at every step; 0 leaves it open. What is open, :mod:`trials` chooses.
        inner: width of a member's inner layer; 0 leaves it open.
        epochs: at most; 0 is as many as make ``MOST_STEPS`` steps, at most ``MOST_EPOCHS``.
        repeats: how often the folds are drawn; five members each.
        parts: of ``PARTS``, what the members may use.
        weight_decay: like the dropout, keeps a few hundred requests from being learnt by heart.
        patience: epochs without improvement of its left-out fold after which a member stops.
    """

    seed: int = 0
    width: int = 0
    dropout: float = 0.0
    inner: int = 0
    learning_rate: float = 3e-3
    batch: int = 1024
    epochs: int = 0
    patience: int = 12
    weight_decay: float = 0.1
    repeats: int = 2
    parts: tuple[str, ...] = PARTS

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser, *, repeats: int, epochs: int = 0) -> None:
        """Add the flags that :meth:`of` reads, with these defaults."""
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--width", type=int, default=0, help="projected size [by trial]")
        parser.add_argument("--inner", type=int, default=0, help="inner layers' size [by trial]")
        parser.add_argument("--dropout", type=_share, default=0.0, help="strength [by trial]")
        parser.add_argument(
            "--repeats",
            type=int,
            default=repeats,
            help=f"draws of the folds, five networks each [{repeats}]",
        )
        said = epochs or "by the number of samples"
        parser.add_argument("--epochs", type=int, default=epochs, help=f"at most [{said}]")

    @classmethod
    def of(cls, args: argparse.Namespace) -> Recipe:
        """What the flags say."""
        return cls(
            seed=args.seed,
            width=args.width,
            inner=args.inner,
            dropout=args.dropout,
            repeats=args.repeats,
            epochs=args.epochs,
        )

    def epochs_of(self, samples: int, steps: int = MOST_STEPS) -> int:
        """Epochs over so many samples."""
        per_epoch = math.ceil(samples / self.batch)
        return self.epochs or min(MOST_EPOCHS, math.ceil(steps / per_epoch))

    @property
    def settled(self) -> bool:
        """Whether nothing is open but the epochs."""
        return bool(self.width and self.inner and self.dropout)

    @property
    def input_dropout(self) -> float:
        """Share of the inputs hidden from a member at every step."""
        return 0.8 * self.dropout


def _share(word: str) -> float:
    share = float(word)
    if not 0.0 <= share < 1.0:
        raise ValueError(word)
    return share
