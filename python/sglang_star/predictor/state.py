"""Temporal fusion: what is remembered of a request between steps, and how it moves with it.

The head sees not only the latest projection of the hidden state but also its mean over the whole
output and the one at prefill, so a request's memory is two short vectors and a count.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import numpy as np

from sglang_star.errors import MalformedMessage
from sglang_star.predictor.hazard import Array

ATTRIBUTE: Final = "_star_fusion"
ESTIMATE: Final = "_star_estimate"
MAX_WIDTH: Final = 4096


class Fusion:
    """Running mean of a request's projections, and its first one."""

    __slots__ = ("first", "steps", "total")

    def __init__(self, first: Array) -> None:
        self.first = first.copy()
        self.total = np.zeros_like(first)
        self.steps = 0

    def add(self, row: Array) -> None:
        """Take one step's projection, ``[m]``."""
        self.total += row
        self.steps += 1

    @property
    def mean(self) -> Array:
        """Mean of the projections so far, ``[m]``."""
        return self.total / self.steps


class _Wire(msgspec.Struct, array_like=True, frozen=True):
    steps: int
    first: bytes
    total: bytes
    estimate: tuple[float, ...]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Wire)


def export_state(req: Any) -> bytes:
    """Serialise the fusion of an SGLang request; empty if it has none."""
    fusion: Fusion | None = getattr(req, ATTRIBUTE, None)
    if fusion is None:
        return b""
    return _encoder.encode(
        _Wire(
            fusion.steps,
            fusion.first.astype("<f4").tobytes(),
            fusion.total.astype("<f4").tobytes(),
            getattr(req, ESTIMATE, ()),
        )
    )


def import_state(req: Any, data: bytes) -> None:
    """Give an SGLang request the fusion that :func:`export_state` wrote elsewhere.

    Raises:
        MalformedMessage: the bytes are not such a state; the request is unchanged.
    """
    if not data:
        return
    try:
        wire = _decoder.decode(data)
        first, total = (np.frombuffer(raw, "<f4") for raw in (wire.first, wire.total))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise MalformedMessage(f"predictor state does not decode: {error}") from error
    numbers = (*first, *total, *wire.estimate)
    if wire.steps < 1 or first.shape != total.shape or not 0 < len(first) <= MAX_WIDTH:
        raise MalformedMessage("predictor state has impossible sizes")
    if not np.isfinite(numbers).all():
        raise MalformedMessage("predictor state is not finite")
    fusion = Fusion(first.astype(np.float32))
    fusion.total, fusion.steps = total.astype(np.float32), wire.steps
    setattr(req, ATTRIBUTE, fusion)
    setattr(req, ESTIMATE, wire.estimate)
