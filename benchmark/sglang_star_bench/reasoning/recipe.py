"""What decides the weights: tokens, learning rates, lengths and families over the run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

MIXES: Final[dict[str, dict[str, float]]] = {
    "plain": {
        "gcd": 1.0,
        "sort": 1.5,
        "collatz": 1.0,
        "tree": 1.0,
        "subset": 1.5,
        "product": 1.5,
        "clock": 1.0,
        "base": 0.7,
    },
    # What is hard to learn, since the easy families write the most tokens.
    "hard": {
        "gcd": 1.0,
        "sort": 2.0,
        "collatz": 0.4,
        "tree": 4.0,
        "subset": 2.0,
        "product": 0.5,
        "clock": 1.5,
        "base": 3.0,
    },
}
"""How often each family comes."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Up to the share ``until`` of the run: sequences up to ``longest`` tokens from ``mix``."""

    until: float
    longest: int
    mix: str


_STAGES: Final = (
    Stage(0.3, 256, "plain"),
    Stage(0.5, 1024, "plain"),
    Stage(0.8, 1024, "hard"),
    Stage(1.0, 4224, "hard"),
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One run: ``tokens`` in steps of ``batch_tokens``, ``rate`` the peak learning rate."""

    seed: int = 0
    width: int = 192
    layers: int = 4
    tokens: int = 9_000_000
    batch_tokens: int = 4096
    rate: float = 4e-3
    warmup: float = 0.02
    weight_decay: float = 0.1
    stages: tuple[Stage, ...] = _STAGES

    def stage(self, done: float) -> Stage:
        """The stage at share ``done`` of the run."""
        return next((one for one in self.stages if done < one.until), self.stages[-1])

    def rate_at(self, done: float) -> float:
        """Learning rate: linear warm-up, then a cosine down to a fiftieth."""
        if done < self.warmup:
            return self.rate * (done / self.warmup + 0.01)
        along = (done - self.warmup) / (1 - self.warmup)
        return self.rate * (0.02 + 0.98 * (1 + math.cos(math.pi * min(along, 1))) / 2)
