"""What all ranks do their next step boundary with."""

from __future__ import annotations

import msgspec

from sglang_star.migration.mailbox import OrderEnvelope
from sglang_star.migration.post import PeerLost
from sglang_star.protocol import MoveMessage, PeerMessage


class StepInput(msgspec.Struct, frozen=True, kw_only=True):
    """What rank 0 alone can know, for one step boundary; rides SGLang's broadcast of requests.

    Attributes:
        items: what came since the last one, in the order in which it is to be handled.
        now: rank 0's monotonic clock, seconds; wall: seconds since the epoch.
        seed: random bytes, from which all ranks derive the same new names.
        step_ms: rank 0's mean decode step time.
    """

    items: tuple[PeerMessage | PeerLost | OrderEnvelope, ...]
    now: float
    wall: float
    seed: bytes
    step_ms: float

    @property
    def moves(self) -> bool:
        """Whether anything in it is about a move, or may begin one."""
        return any(isinstance(item, MoveMessage | OrderEnvelope) for item in self.items)
