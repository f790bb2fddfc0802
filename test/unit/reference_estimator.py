"""What the estimator computes, request by request and with every token: slow, and plain to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sglang_star.predictor.echo import Echo
from sglang_star.predictor.hazard import Array
from sglang_star.predictor.head import Head
from sglang_star.predictor.memory import FADE


class Kept:
    """One request's projections, as they are remembered."""

    def __init__(self, width: int) -> None:
        self.recent = np.zeros(width, np.float32)
        self.total = np.zeros(width, np.float32)
        self.steps = 0
        self.echo = Echo()

    def add(self, row: Array) -> None:
        self.steps += 1
        self.recent += np.float32((1.0 - FADE) / (1.0 - FADE**self.steps)) * (row - self.recent)
        self.total += row

    @property
    def mean(self) -> Array:
        return self.total / self.steps


def fuse(req: Any, row: Array, tokens: int) -> Kept:
    """Add one projection to what is kept of the request; prefill's, the first, is not."""
    kept = req.kept = getattr(req, "kept", None) or Kept(len(row))
    if tokens > 1:
        kept.add(row)
    return kept


class Reference:
    """Estimates in ``req.wanted``."""

    def __init__(self, head: Head) -> None:
        self.head = head

    def step(self, rows: Array, reqs: Sequence[Any], visible: Sequence[int | None]) -> None:
        for row, req, tokens in zip(rows, reqs, visible, strict=False):
            if tokens is not None:
                req.wanted = self.estimate(row, req, tokens)

    def estimate(self, row: Array, req: Any, tokens: int) -> Array:
        limit = req.sampling_params.max_new_tokens
        if np.isfinite(row).all():
            kept = fuse(req, row, tokens)
            recent, mean = (kept.recent, kept.mean) if kept.steps else (row, row)
            echo = kept.echo.share(req.output_ids, tokens)
            features = np.array([[tokens, len(req.origin_input_ids), limit, echo]])
            found = self.head.quantiles(self.logits(np.concatenate([row, recent, mean]), features))
        else:
            found = self.head.by_age(np.array([tokens]))
        return np.clip(found[0], 0.0, max(limit - tokens, 0))

    def logits(self, projections: Array, features: Array) -> Array:
        """Member by member, as the ensemble was trained."""
        w = self.head.weights
        inputs = np.concatenate([projections, np.log1p(features[0])]).astype(np.float32)
        members = [
            np.maximum(inputs @ w1 + b1, 0.0) @ w2 + b2
            for w1, b1, w2, b2 in zip(w.w1, w.b1, w.w2, w.b2, strict=True)
        ]
        return np.asarray(np.mean(members, axis=0))
