"""The load of the comparison: problems of unknown length, in bursts.

``problems.json`` holds prompts of the packaged reasoning model that it was not trained on, in the
order in which ``star bench reasoning prompts`` draws them, those left out whose worked solution
would exceed :data:`LONGEST` tokens and so outlast the run. Nothing else was chosen: what the model
makes of them, and how long it takes, comes out when they run.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

from sglang_star.demo.prompts import Prompt

LONGEST: Final = 600
_SEED: Final = 1


@dataclass(frozen=True, slots=True)
class Workload:
    """Bursts of ``size`` requests, one every ``gap_s`` seconds, each spread over ``spread_s``.

    ``max_tokens`` is every client's limit: above most answers, and the same for all.
    """

    bursts: int
    size: int
    gap_s: float
    max_tokens: int
    spread_s: float = 1.0

    @property
    def requests(self) -> int:
        """How many in all."""
        return self.bursts * self.size

    def prompts(self) -> list[Prompt]:
        """Return the requests in order of arrival; always the same ones."""
        chance = random.Random(_SEED)
        times = sorted(
            burst * self.gap_s + chance.random() * self.spread_s
            for burst in range(self.bursts)
            for _ in range(self.size)
        )
        return [
            Prompt(f"{family}-{number}", text, self.max_tokens, at_s=at_s, seed=number)
            for number, (at_s, (family, text)) in enumerate(zip(times, problems(), strict=False))
        ]


def problems() -> list[tuple[str, str]]:
    """Return (family, prompt) of every packaged problem."""
    text = (files(__package__) / "problems.json").read_text(encoding="utf-8")
    return [(family, prompt) for family, prompt in json.loads(text)]
