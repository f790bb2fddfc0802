"""The host half of the predictor: one step's projections in, an estimate on every request out.

What a request's projections leave behind is updated with every token, for the whole batch at once.
Looking at it with the head costs a thousand times more arithmetic, so that of a large batch only
some requests are looked at in a step, and the others' estimates shrink by a token meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from sglang_star.predictor.hazard import Array
from sglang_star.predictor.head import Head
from sglang_star.predictor.memory import Memory
from sglang_star.predictor.state import Fusion
from sglang_star.star_request import StarRequest, star_of

LOOK_MULTIPLICATIONS: Final = 2_000_000
"""What a step of a large batch may spend on looking, on average: about 0.1 ms of a core."""

OVERHEAD: Final = 400_000
"""What a look takes besides the head's arithmetic, in the same unit: reading the output, mostly."""

GROUP: Final = 8
"""Requests to look at together at least: weights are read once for all of them."""

_ROWS: Final = 64
"""Requests that memory is made for at first."""


class Estimator:
    """Sets ``star_of(req).estimate``: remaining tokens at ``protocol.QUANTILE_LEVELS``.

    Attributes:
        fallbacks: estimates that came from the by-age table, because what the head was given or
            gave was not finite.
    """

    def __init__(self, head: Head, multiplications: int = LOOK_MULTIPLICATIONS) -> None:
        self._head = head
        self._memory = Memory(head.width, _ROWS)
        self._rate = max(1, multiplications // (head.multiplications + OVERHEAD))
        self._credit = 0
        self._steps = 0
        self._seated: list[Fusion | None] = []
        self._rows = np.zeros(0, np.int64)
        self.fallbacks = 0

    def step(self, rows: Array, reqs: Sequence[Any], visible: Sequence[int | None]) -> None:
        """Estimate every request that gained a token.

        Args:
            rows: ``[n, m]`` float32 projections, row i belongs to ``reqs[i]``.
            reqs: SGLang requests of the batch.
            visible: output tokens of each request after this step; None if it gained none.
        """
        now = rows[: len(reqs)]
        if None in visible:
            chosen = [i for i, gained in enumerate(visible) if gained is not None]
            if not chosen:
                return
            reqs, now = [reqs[i] for i in chosen], rows[chosen]
            visible = [visible[i] for i in chosen]
        tokens = np.array(visible, np.int64)
        stars = [star_of(req) for req in reqs]
        mine = self._seat(stars, reqs, tokens)
        self._steps += 1
        lost = self._fuse(now, mine, tokens)
        due = self._due(mine)
        if lost is not None:
            self._by_age(lost, mine, tokens)
            due = due[~lost[due]]
        if len(due):
            self._look(now, due, mine, reqs, stars, tokens)
        self._show(stars, mine, tokens)

    def _seat(self, stars: list[StarRequest], reqs: Sequence[Any], tokens: Array) -> Array:
        """The requests' rows of memory, ``[n]``; found again only if the batch has changed."""
        fusions = [star.fusion for star in stars]
        if fusions != self._seated:
            for i, fusion in enumerate(fusions):
                if fusion is None or fusion.memory is not self._memory:
                    fusions[i] = self._admit(stars[i], reqs[i], int(tokens[i]))
            self._seated = fusions
            self._rows = np.array([fusion.row for fusion in fusions if fusion], np.int64)
        return self._rows

    def _admit(self, star: StarRequest, req: Any, tokens: int) -> Fusion:
        memory, fusion = self._memory, star.fusion
        # A guest may bring the memory of another head: start again rather than mix the two.
        if fusion is None or fusion.memory.width != memory.width:
            fusion = star.fusion = Fusion(memory)
        else:
            fusion.move_to(memory)
        memory.prompt[fusion.row] = len(req.origin_input_ids)
        memory.limit[fusion.row] = req.sampling_params.max_new_tokens
        if len(star.estimate) == memory.base.shape[1]:
            # What it came with is good until it is looked at here.
            memory.base[fusion.row] = star.estimate
            memory.at[fusion.row] = max(tokens - 1, 1)
        return fusion

    def _fuse(self, now: Array, mine: Array, tokens: Array) -> Array | None:
        """Remember what is finite; returns which is not, ``[n]``, or None.

        The projection that gave the first output token is prefill's, which a decode instance never
        sees.
        """
        lost: Array | None = None
        decoded = tokens > 1
        finite = np.isfinite(now)
        if not finite.all():
            lost = np.logical_not(finite.all(axis=1))
            decoded &= ~lost
        if decoded.all():
            self._memory.add(mine, now)
        else:
            self._memory.add(mine[decoded], now[decoded])
        return lost

    def _due(self, mine: Array) -> Array:
        """Which to look at in this step: all if they are few, else those not looked at longest."""
        count = len(mine)
        if count <= self._rate:
            return np.arange(count)
        group = min(max(GROUP, self._rate), count)
        self._credit += self._rate
        if self._credit < group:
            return np.zeros(0, np.int64)
        self._credit -= group
        return np.argsort(self._memory.looked[mine], kind="stable")[:group]

    def _look(
        self,
        now: Array,
        due: Array,
        mine: Array,
        reqs: Sequence[Any],
        stars: Sequence[StarRequest],
        tokens: Array,
    ) -> None:
        """Have the head estimate those of the batch that are ``due``, indices ``[d]``."""
        memory = self._memory
        now, mine, tokens = now[due], mine[due], tokens[due]
        steps = memory.steps[mine]
        recent, mean = memory.recent[mine], memory.total[mine]
        mean /= np.maximum(steps, 1)[:, None].astype(np.float32)
        new = steps == 0
        recent[new] = mean[new] = now[new]
        echoes = [
            fusion.echo.share(reqs[i].output_ids, seen)
            for i, seen in zip(due.tolist(), tokens.tolist(), strict=True)
            if (fusion := stars[i].fusion)
        ]
        features = np.array([tokens, memory.prompt[mine], memory.limit[mine], echoes]).T
        estimates = self._head.quantiles(self._head.logits(now, recent, mean, features))
        memory.base[mine], memory.at[mine], memory.looked[mine] = estimates, tokens, self._steps
        lost = np.logical_not(np.isfinite(estimates).all(axis=1))
        if lost.any():
            self._by_age(lost, mine, tokens)

    def _show(self, stars: Sequence[StarRequest], mine: Array, tokens: Array) -> None:
        """Give the requests their latest estimates, less the tokens since."""
        memory = self._memory
        at = memory.at[mine]
        values = memory.base[mine]
        values -= (tokens - at)[:, None]
        room = np.maximum(memory.limit[mine] - tokens, 0.0)
        # Ascending by construction; the limits keep the order.
        np.minimum(np.maximum(values, 0.0, out=values), room[:, None], out=values)
        shown = zip(stars, map(tuple, values.tolist()), at.tolist(), strict=True)
        for star, estimate, known in shown:
            if known:
                star.estimate = estimate

    def _by_age(self, lost: Array, mine: Array, tokens: Array) -> None:
        """Fall back for those that are ``lost``, a mask ``[n]``."""
        self.fallbacks += int(lost.sum())
        self._memory.base[mine[lost]] = self._head.by_age(tokens[lost])
        self._memory.at[mine[lost]] = tokens[lost]
