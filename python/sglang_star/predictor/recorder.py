"""The collecting side of the engine hook: hidden states of each request, written when it ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from sglang_star.predictor.samples import Array, RequestRecord, ShardWriter
from sglang_star.star_request import star_of

INTERVAL: Final = 20
"""Output tokens between two samples of a request, as in the paper."""

FLUSH_S: Final = 60.0
"""A finished request is on disk after at most this long, as long as the engine is decoding."""

_HALF_MAX: Final = float(np.finfo(np.float16).max)


class Track:
    """What has been seen of one running request."""

    __slots__ = ("hidden", "pooled", "seen", "sum", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.hidden: list[Array] = []
        self.pooled: list[Array] = []
        self.sum: Array | float = 0.0
        self.seen = 0


class Recorder:
    """Turns per-step hidden states into :class:`RequestRecord`.

    Memory is bounded by the live requests: two half-precision rows per ``interval`` tokens each.
    """

    def __init__(self, folder: Path, interval: int = INTERVAL) -> None:
        self._writer = ShardWriter(folder)
        self._interval = interval
        self._flushed_at = time.monotonic()

    def step(self, hidden: Array, reqs: Sequence[Any], visible: Sequence[int | None]) -> None:
        """Take one step's rows.

        Args:
            hidden: ``[rows, d]`` float32, row i belongs to ``reqs[i]``.
            reqs: SGLang requests of the batch.
            visible: output tokens of each request after this step; None if it gained none.
        """
        for row, req, tokens in zip(hidden, reqs, visible, strict=False):
            if tokens is None:
                continue
            if req.finished():
                self._finish(req)
            else:
                self._see(req, row, tokens)
        idle = all(req.finished() for req in reqs)
        if idle or time.monotonic() - self._flushed_at > FLUSH_S:
            self._writer.flush()
            self._flushed_at = time.monotonic()

    def _see(self, req: Any, row: Array, tokens: int) -> None:
        star = star_of(req)
        track = star.track
        if track is None:
            if tokens != 1:
                return  # seen from the middle on: its pooled states would be wrong
            track = star.track = Track()
        track.sum = track.sum + row
        track.seen += 1
        if (tokens - 1) % self._interval == 0:
            track.tokens.append(tokens)
            track.hidden.append(_half(row))
            track.pooled.append(_half(track.sum / track.seen))
            track.sum, track.seen = 0.0, 0

    def _finish(self, req: Any) -> None:
        star = star_of(req)
        track = star.track
        if track is None or not track.tokens:
            return
        star.track = None
        reason = req.finished_reason.to_json()["type"]
        output = req.output_ids[: req.finished_len] if req.finished_len else req.output_ids
        self._writer.add(
            RequestRecord(
                rid=req.rid,
                prompt_ids=np.array(req.origin_input_ids, np.int32),
                output_ids=np.array(output, np.int32),
                max_new_tokens=int(req.sampling_params.max_new_tokens),
                # Aborts come from the end of the collection, which knows nothing of lengths.
                censored=reason in ("length", "abort"),
                tokens=np.array(track.tokens, np.int32),
                hidden=np.stack(track.hidden),
                pooled=np.stack(track.pooled),
            )
        )


def _half(row: Any) -> Array:
    return np.clip(row, -_HALF_MAX, _HALF_MAX).astype(np.float16)
