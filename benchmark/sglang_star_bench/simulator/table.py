"""Live requests as columns, so that a status of the fleet is a handful of array operations."""

from __future__ import annotations

import numpy as np

from sglang_star_bench.simulator.request import Request, State
from sglang_star_router.policy.calibration import FIRST_TOKENS


class Table:
    """One row per live request; rows are reused, so memory follows what is live.

    ``output`` is as of instance step ``joined``, as in :class:`Request`; ``due`` is the output at
    which its estimate is scored next.
    """

    def __init__(self, rng: np.random.Generator, rows: int = 256) -> None:
        self._rng = rng
        self.state = np.full(rows, -1, dtype=np.int64)
        self.instance = np.zeros(rows, dtype=np.int64)
        self.prompt = np.zeros(rows, dtype=np.int64)
        self.output = np.zeros(rows, dtype=np.int64)
        self.joined = np.zeros(rows, dtype=np.int64)
        self.length = np.zeros(rows, dtype=np.int64)
        self.max_new = np.zeros(rows, dtype=np.int64)
        self.moved_s = np.zeros(rows)
        self.busy = np.zeros(rows, dtype=bool)
        self.due = np.zeros(rows)
        self.noise = np.zeros((rows, 2))
        self.requests: np.ndarray[tuple[int], np.dtype[np.object_]] = np.full(
            rows, None, dtype=object
        )
        self.rids: np.ndarray[tuple[int], np.dtype[np.object_]] = np.full(rows, "", dtype=object)
        self.slot_of: dict[str, int] = {}
        self._free = list(range(rows - 1, -1, -1))

    def add(self, rid: str, arrival_s: float, prompt: int, length: int, max_new: int) -> Request:
        """Make a request and give it a row."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        request = Request(rid, slot, arrival_s, prompt, length, max_new)
        self.state[slot] = State.HELD
        self.prompt[slot] = prompt
        self.output[slot] = 0
        self.length[slot] = length
        self.max_new[slot] = max_new
        self.moved_s[slot] = arrival_s
        self.busy[slot] = False
        self.due[slot] = FIRST_TOKENS
        self.noise[slot] = self._rng.standard_normal(2)
        self.requests[slot] = request
        self.rids[slot] = rid
        self.slot_of[rid] = slot
        return request

    def remove(self, request: Request) -> None:
        """Free the row."""
        self.state[request.slot] = -1
        self.requests[request.slot] = None
        del self.slot_of[request.rid]
        self._free.append(request.slot)

    def note(self, request: Request) -> None:
        """Copy a request's state, place and progress into its row."""
        slot = request.slot
        self.state[slot] = request.state
        self.output[slot] = request.output
        self.joined[slot] = request.joined_step
        self.moved_s[slot] = request.moved_s
        self.busy[slot] = request.migration is not None
        if request.instance is not None:
            self.instance[slot] = request.instance.row

    @property
    def live(self) -> int:
        """Requests in the table."""
        return int(self.state.size - len(self._free))

    def _grow(self) -> None:
        old = self.state.size
        for name in [
            "instance",
            "prompt",
            "output",
            "joined",
            "length",
            "max_new",
            "moved_s",
            "busy",
            "due",
            "noise",
            "requests",
            "rids",
        ]:
            column = getattr(self, name)
            setattr(self, name, np.concatenate([column, np.zeros_like(column)]))
        self.state = np.concatenate([self.state, np.full(old, -1, dtype=np.int64)])
        self._free.extend(range(2 * old - 1, old - 1, -1))
