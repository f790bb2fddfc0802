"""How much of the latest output was said before: the mark of a model going in circles.

Reads token ids alone and depends on the latest ``MEMORY + WINDOW`` of them, so any instance that
has the output computes the same number, and nothing of it travels with a moved request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

import numpy as np

from sglang_star.predictor.hazard import Array

GRAM: Final = 4
"""Tokens in a row that must be the same."""

MEMORY: Final = 1024
"""Output tokens back to which they are looked for."""

WINDOW: Final = 64
"""Latest output tokens over which the share is taken."""


class Echo:
    """Share of the latest ``WINDOW`` tokens that end a repeated run of ``GRAM``.

    Its memory is bounded: at most ``2 * MEMORY`` runs, whatever the output's length.
    """

    __slots__ = ("_hits", "_last", "_read")

    def __init__(self) -> None:
        self._last: dict[tuple[int, ...], int] = {}
        self._hits: deque[bool] = deque(maxlen=WINDOW)
        self._read = 0

    def share(self, ids: Sequence[int], visible: int) -> float:
        """Read on to ``visible`` output tokens and return the share, 0 to 1.

        Args:
            ids: output of the request; what was read of it stays the same.
        """
        visible = min(visible, len(ids))
        # What lies further back cannot matter any more.
        begin = max(self._read, visible - WINDOW - MEMORY - GRAM, GRAM - 1)
        last, before, hear = self._last, self._last.get, self._hits.append
        new = ids[begin - GRAM + 1 : visible]
        for end, run in enumerate(zip(*(new[i:] for i in range(GRAM)), strict=False), begin + 1):
            hear(end - before(run, -MEMORY) <= MEMORY)
            last[run] = end
        self._read = max(self._read, visible)
        if len(self._last) > 2 * MEMORY:
            oldest = visible - MEMORY
            self._last = {run: end for run, end in self._last.items() if end > oldest}
        return sum(self._hits) / WINDOW


def shares(ids: Array, tokens: Array) -> Array:
    """:meth:`Echo.share` of one output at several ascending lengths, ``[n]``."""
    echo, listed = Echo(), ids.tolist()
    return np.array([echo.share(listed, int(visible)) for visible in tokens])
