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
from sglang_star.predictor.memory import Memory
from sglang_star.star_request import star_of

MAX_WIDTH: Final = 4096


class Fusion:
    """What is kept of a request's projections; nothing before its first decode step.

    Attributes:
        memory, row: where it is kept.
        echo: of the output's tokens; rebuilt from them wherever the request goes.
    """

    __slots__ = ("echo", "memory", "row")

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.row = memory.take()
        self.echo = Echo()

    def __del__(self) -> None:
        self.memory.give(self.row)

    def move_to(self, memory: Memory) -> None:
        """Be kept there from now on, where projections are of the same width."""
        row = memory.take()
        memory.recent[row], memory.total[row] = self.recent, self.total
        memory.steps[row] = self.steps
        self.memory.give(self.row)
        self.memory, self.row = memory, row

    @property
    def recent(self) -> Array:
        """Mean of the projections, in which older ones fade, ``[m]``."""
        return np.asarray(self.memory.recent[self.row])

    @property
    def total(self) -> Array:
        """Their sum, ``[m]``."""
        return np.asarray(self.memory.total[self.row])

    @property
    def steps(self) -> int:
        """How many there were."""
        return int(self.memory.steps[self.row])


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
    memory = Memory(len(total))
    fusion = Fusion(memory)
    memory.recent[fusion.row], memory.total[fusion.row] = recent, total
    memory.steps[fusion.row] = wire.steps
    star = star_of(req)
    star.fusion, star.estimate = fusion, wire.estimate
