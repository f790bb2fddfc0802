"""The host half of the predictor: one step's projections in, an estimate on every request out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sglang_star.predictor.hazard import Array
from sglang_star.predictor.head import Head
from sglang_star.predictor.state import Fusion
from sglang_star.star_request import star_of


class Estimator:
    """Sets ``star_of(req).estimate``: remaining tokens at ``protocol.QUANTILE_LEVELS``.

    Attributes:
        fallbacks: estimates that came from the by-age table, because what the head was given or
            gave was not finite.
    """

    def __init__(self, head: Head) -> None:
        self._head = head
        self.fallbacks = 0

    def step(self, rows: Array, reqs: Sequence[Any], visible: Sequence[int | None]) -> None:
        """Estimate every request that gained a token.

        Args:
            rows: ``[n, m]`` float32 projections, row i belongs to ``reqs[i]``.
            reqs: SGLang requests of the batch.
            visible: output tokens of each request after this step; None if it gained none.
        """
        chosen = [i for i, tokens in enumerate(visible) if tokens is not None]
        if not chosen:
            return
        grown = [reqs[i] for i in chosen]
        now = rows[chosen]
        features = np.array(
            [
                (visible[i], len(req.origin_input_ids), req.sampling_params.max_new_tokens, 0.0)
                for i, req in zip(chosen, grown, strict=True)
            ],
            np.float64,
        )
        estimates = self._estimate(now, grown, features)
        room = np.maximum(features[:, 2] - features[:, 0], 0.0)
        # Ascending by construction; the limit keeps the order.
        for req, values in zip(grown, np.clip(estimates, 0.0, room[:, None]).tolist(), strict=True):
            star_of(req).estimate = tuple(values)

    def _estimate(self, now: Array, reqs: Sequence[Any], features: Array) -> Array:
        sound = np.asarray(np.isfinite(now).all(axis=1))
        if not sound.all():
            now = np.where(sound[:, None], now, np.float32(0.0))
        recent, mean = now.copy(), now.copy()
        for i in np.flatnonzero(sound):
            fusion = fuse(reqs[i], now[i], int(features[i, 0]))
            if fusion.steps:
                recent[i], mean[i] = fusion.recent, fusion.mean
            features[i, 3] = fusion.echo.share(reqs[i].output_ids, int(features[i, 0]))
        logits = self._head.logits(now, recent, mean, features)
        estimates = self._head.quantiles(logits)
        lost = ~(sound & np.asarray(np.isfinite(estimates).all(axis=1)))
        if lost.any():
            self.fallbacks += int(lost.sum())
            estimates[lost] = self._head.by_age(features[lost, 0])
        return estimates


def fuse(req: Any, row: Array, tokens: int) -> Fusion:
    """Add one finite projection to the request's memory and return it.

    The one that gave the first output token is prefill's, which a decode instance never sees.
    """
    star = star_of(req)
    fusion = star.fusion
    # A guest may bring the memory of another head: start again rather than mix the two.
    if fusion is None or fusion.total.shape != row.shape:
        fusion = star.fusion = Fusion(len(row))
    if tokens > 1:
        fusion.add(row)
    return fusion
