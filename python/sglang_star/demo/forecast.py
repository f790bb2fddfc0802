"""How full an instance will be, from what its requests are estimated to have left.

The rescheduler's own forecast lives in the router; this is the same sum, for the eye.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

LEVELS: Final = (0.1, 0.25, 0.5, 0.75, 0.9)
"""What share of outputs ends within each of a request's five estimates."""

HORIZON_STEPS: Final = 256
_POINTS: Final = 9


def alive(remaining: Sequence[float], steps: float) -> float:
    """Return the probability that a request runs longer than ``steps`` more tokens.

    Linear between the quantiles; beyond the last as far as from the first to it.
    """
    if not remaining:
        return 1.0
    end = remaining[-1] + max(remaining[-1] - remaining[0], 1.0)
    ends_within = np.interp(steps, (0.0, *remaining, end), (0.0, *LEVELS, 1.0))
    return 1.0 - float(ends_within)


def peak_tokens(requests: Iterable[tuple[int, Sequence[float]]]) -> float:
    """Return the largest expected KV within the horizon.

    Args:
        requests: context tokens and estimated remaining tokens (five quantiles, or none) of each.
    """
    running = list(requests)
    return max(
        sum(alive(remaining, steps) * (context + steps) for context, remaining in running)
        for steps in np.linspace(0, HORIZON_STEPS, _POINTS)
    )
