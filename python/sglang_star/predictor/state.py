"""Temporal fusion: what is remembered of a request between steps, and how it moves with it.

The head sees not only the latest projection of the hidden state, most of which is the token it
belongs to, but also its means over the last fifty tokens or so and over the whole output. Both are
of decode steps alone: what prefill left may have been seen by another instance.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import numpy as np

from sglang_star.errors import MalformedMessage
from sglang_star.predictor.echo import Echo
from sglang_star.predictor.hazard import Array
from sglang_star.star_request import star_of

MAX_WIDTH: Final = 4096


FADE: Final = 0.98
"""What is left of a projection's weight in ``recent`` with every further token."""


class Fusion:
    """What is kept of a request's projections; nothing before its first decode step.

    Attributes:
        recent: their mean, in which older ones fade; total: their sum. ``[m]`` each.
        steps: how many there were.
        echo: of the output's tokens; rebuilt from them wherever the request goes.
    """

    __slots__ = ("echo", "recent", "steps", "total")

    def __init__(self, width: int) -> None:
        self.recent = np.zeros(width, np.float32)
        self.total = np.zeros(width, np.float32)
        self.steps = 0
        self.echo = Echo()

    def add(self, row: Array) -> None:
        """Take one decode step's projection, ``[m]``."""
        self.steps += 1
        self.recent += np.float32((1.0 - FADE) / (1.0 - FADE**self.steps)) * (row - self.recent)
        self.total += row

    @property
    def mean(self) -> Array:
        """Mean of the projections so far, ``[m]``."""
        return self.total / self.steps


class _Wire(msgspec.Struct, array_like=True, frozen=True):
    steps: int
    recent: bytes
    total: bytes
    estimate: tuple[float, ...]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Wire)


def export_state(req: Any) -> bytes:
    """Serialise the fusion of an SGLang request; empty if nothing was fused yet."""
    star = star_of(req)
    fusion = star.fusion
    if fusion is None or not fusion.steps:
        return b""
    return _encoder.encode(
        _Wire(
            fusion.steps,
            fusion.recent.astype("<f4").tobytes(),
            fusion.total.astype("<f4").tobytes(),
            star.estimate,
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
        recent, total = (np.frombuffer(raw, "<f4") for raw in (wire.recent, wire.total))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise MalformedMessage(f"predictor state does not decode: {error}") from error
    numbers = (*recent, *total, *wire.estimate)
    if wire.steps < 1 or len(recent) != len(total) or not 0 < len(total) <= MAX_WIDTH:
        raise MalformedMessage("predictor state has impossible sizes")
    if not np.isfinite(numbers).all():
        raise MalformedMessage("predictor state is not finite")
    fusion = Fusion(len(total))
    fusion.recent, fusion.total = recent.astype(np.float32), total.astype(np.float32)
    fusion.steps = wire.steps
    star = star_of(req)
    star.fusion, star.estimate = fusion, wire.estimate
