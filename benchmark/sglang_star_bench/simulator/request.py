"""One request on its way through the fleet."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_star_bench.simulator.instance import Instance
    from sglang_star_bench.simulator.migration import Migration


class State(IntEnum):
    """Where a request is; the first two wait at the router or in an instance's queue."""

    HELD = 0
    QUEUED = 1
    PREFILLING = 2
    """Its KV is reserved on the decode instance while prefill and transfer run."""
    ARRIVED = 3
    """Its KV is there; it joins the batch at the next step boundary."""
    RUNNING = 4
    RETRACTED = 5
    PARKED = 6
    """Between two instances: left the source's batch, not yet in the target's."""
    FINISHED = 7
    FAILED = 8


class Request:
    """Lengths, progress and times of one request; times in seconds of simulated time.

    ``output`` counts tokens as of instance step ``joined_step``; while RUNNING, the tokens
    produced since are the instance's steps since then.
    """

    __slots__ = (
        "arrival_s",
        "finish_step",
        "first_token_s",
        "instance",
        "joined_step",
        "last_token_s",
        "length",
        "max_new",
        "migration",
        "moved_s",
        "output",
        "prompt",
        "rid",
        "slot",
        "state",
    )

    def __init__(
        self, rid: str, slot: int, arrival_s: float, prompt: int, length: int, max_new: int
    ) -> None:
        self.rid = rid
        self.slot = slot
        self.arrival_s = arrival_s
        self.prompt = prompt
        self.length = length
        self.max_new = max_new
        self.state = State.HELD
        self.output = 0
        self.joined_step = 0
        self.finish_step = 0
        self.first_token_s = -1.0
        self.last_token_s = -1.0
        self.moved_s = arrival_s
        self.instance: Instance | None = None
        self.migration: Migration | None = None

    def kv(self, steps: int) -> int:
        """KV tokens held when its instance has done ``steps`` steps: the newest token has none."""
        return self.prompt + max(self.tokens(steps) - 1, 0)

    def tokens(self, steps: int) -> int:
        """Output tokens produced by then."""
        if self.state == State.RUNNING:
            return self.output + steps - self.joined_step
        return self.output
