"""The fleet as its instances' statuses show it: what the policies get to see."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from sglang_star_bench.simulator.emulated import EmulatedPredictor
from sglang_star_bench.simulator.instance import Instance
from sglang_star_bench.simulator.request import State
from sglang_star_bench.simulator.table import Table
from sglang_star_router.policy.calibration import LEVELS, Calibration
from sglang_star_router.policy.snapshot import (
    FleetSnapshot,
    FloatArray,
    Instances,
    IntArray,
    Requests,
)

_RECENT = 4096
_REFRESH = 64


class RecentLengths:
    """Output lengths of recently finished requests, and their quantiles."""

    def __init__(self) -> None:
        self._lengths: deque[int] = deque(maxlen=_RECENT)
        self._new = 0
        self._quantiles: FloatArray = np.full(5, np.nan)

    def add(self, length: int) -> None:
        """Note a finished request."""
        self._lengths.append(length)
        self._new += 1

    def quantiles(self) -> FloatArray:
        """At ``QUANTILE_LEVELS``; NaN until a first batch has finished."""
        if self._new >= _REFRESH:
            self._new = 0
            self._quantiles = np.quantile(np.array(self._lengths), LEVELS)
        return self._quantiles


class StatusView:
    """Builds :class:`FleetSnapshot` from the simulator's own state.

    Args:
        predictor: emulated estimates; None leaves them NaN.
        oracle: put the true remaining length into estimates and ``true_remaining``.
    """

    def __init__(
        self,
        instances: Sequence[Instance],
        table: Table,
        predictor: EmulatedPredictor | None,
        recent: RecentLengths,
        calibration: Calibration,
        *,
        oracle: bool,
    ) -> None:
        self.instances = instances
        self.table = table
        self.predictor = predictor
        self.recent = recent
        self.calibration = calibration
        self.oracle = oracle
        self.ids = tuple(i.name for i in instances)

    def take(self, now_s: float, age_s: float) -> FleetSnapshot:
        """The statuses as of ``now_s``, as the router will see them ``age_s`` later."""
        for instance in self.instances:
            instance.sync(now_s)
        return FleetSnapshot(
            now_s=now_s + age_s,
            instances=self._instances(age_s),
            requests=self._requests(now_s + age_s),
            prior_output=self.recent.quantiles(),
        )

    def _instances(self, age_s: float) -> Instances:
        rows = [
            (
                i.capacity,
                i.used_kv,
                i.reserved_kv,
                i.active,
                len(i.queue),
                len(i.retracted),
                i.draining,
                i.moves_out,
                i.moves_in,
                i.reserved,
            )
            for i in self.instances
        ]
        columns = np.array(rows, dtype=np.int64).T
        draining = columns[6].astype(bool)
        return Instances(
            ids=self.ids,
            kv_capacity=columns[0],
            kv_used=columns[1],
            kv_reserved=columns[2],
            reserve_each=columns[9],
            guest_reserve=columns[9],
            running=columns[3],
            queued=columns[4],
            retracted=columns[5],
            step_ms=np.array([i.step_s() * 1e3 for i in self.instances]),
            age_s=np.full(len(self.ids), age_s),
            accepts=~draining,
            draining=draining,
            group=np.zeros(len(self.ids), dtype=np.int64),
            moves_out=columns[7],
            moves_in=columns[8],
        )

    def _requests(self, now_s: float) -> Requests:
        table = self.table
        state = table.state
        live = np.flatnonzero((state >= State.QUEUED) & (state <= State.PARKED))
        state = state[live]
        owner = table.instance[live]
        output = table.output[live].copy()
        running = state == State.RUNNING
        steps = np.array([i.steps for i in self.instances], dtype=np.int64)
        output[running] += (steps[owner] - table.joined[live])[running]
        length = table.length[live]
        truth = np.full(live.size, np.nan)
        remaining = np.full((live.size, 5), np.nan)
        if self.oracle:
            truth = np.maximum(length - output, 0).astype(np.float64)
            remaining = np.repeat(np.maximum(truth, 1.0)[:, None], 5, axis=1)
        elif self.predictor is not None:
            seen = output > 0
            remaining[seen] = self.predictor.quantiles(
                output[seen].astype(np.float64),
                length[seen].astype(np.float64),
                table.noise[live[seen]],
            )
            self._note(live, output, remaining)
            remaining = self.calibration.corrected(remaining)
        return Requests(
            rids=tuple(table.rids[live]),
            instance=owner,
            prompt_tokens=table.prompt[live],
            output_tokens=output,
            max_new_tokens=table.max_new[live],
            remaining=remaining,
            true_remaining=truth,
            movable=running & ~table.busy[live],
            queued=(state == State.QUEUED) | (state == State.RETRACTED),
            since_move_s=now_s - table.moved_s[live],
        )

    def _note(self, live: IntArray, output: IntArray, remaining: FloatArray) -> None:
        """Let the calibration remember the estimates that are to be scored."""
        table = self.table
        for row in np.flatnonzero(output >= table.due[live]):
            slot, tokens = live[row], int(output[row])
            rid = str(table.rids[slot])
            left = int(table.max_new[slot]) - tokens
            self.calibration.note(rid, tokens, left, remaining[row])
            table.due[slot] = self.calibration.due(rid)
