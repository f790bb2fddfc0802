"""The reserve of an instance set by forecast: what its own requests will still grow by.

SGLang keeps ``num_reserved_decode_tokens`` free for every active request, whatever these will do.
With the remaining lengths forecast, the memory that the batch will want at its peak is known, as a
mean and a spread; what that is beyond the memory in use, a request, is the reserve that makes an
overflow as improbable as the number of standard deviations says.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Final

import numpy as np

from sglang_star_bench.simulator.emulated import EmulatedPredictor
from sglang_star_bench.simulator.table import Table
from sglang_star_router.policy.forecast import forecast, instants
from sglang_star_router.policy.snapshot import FleetSnapshot, IntArray, Requests

POINTS: Final = 8
LEAST: Final = 1


class Foresight:
    """What an engine knows of its requests' remaining lengths, whatever the router's policy knows.

    Args:
        predictor: None knows the truth.
    """

    def __init__(self, table: Table, predictor: EmulatedPredictor | None) -> None:
        self._table = table
        self._predictor = predictor

    def of(self, snapshot: FleetSnapshot) -> FleetSnapshot:
        """The snapshot with these estimates in place of the policy's."""
        reqs, table = snapshot.requests, self._table
        slots = np.array([table.slot_of[rid] for rid in reqs.rids], dtype=np.int64)
        length = table.length[slots].astype(np.float64)
        output = reqs.output_tokens.astype(np.float64)
        if self._predictor is None:
            remaining = np.repeat(np.maximum(length - output, 1.0)[:, None], 5, axis=1)
        else:
            remaining = self._predictor.quantiles(output, length, table.noise[slots])
            remaining[output < 1] = np.nan  # what still prefills has no estimate yet
        return replace(snapshot, requests=replace(reqs, remaining=remaining), derived={})


def by_forecast(snapshot: FleetSnapshot, horizon_steps: int, sigma: float) -> IntArray:
    """Tokens to keep free for every active request, ``[I]``, at least :data:`LEAST`.

    Args:
        horizon_steps: how far ahead the peak is looked for.
        sigma: standard deviations of the forecast kept free beyond its mean.
    """
    inst, reqs = snapshot.instances, snapshot.requests
    rows = np.flatnonzero(~reqs.queued)
    held = {f.name: getattr(reqs, f.name)[rows] for f in fields(reqs) if f.name != "rids"}
    running = Requests(rids=tuple(reqs.rids[row] for row in rows), **held)
    ahead = forecast(
        replace(snapshot, requests=running, derived={}), instants(horizon_steps, POINTS)
    )
    growth = ahead.need(sigma).max(axis=1) - ahead.mean[:, 0]
    each = np.ceil(growth / np.maximum(inst.running, 1)).astype(np.int64)
    reserve: IntArray = np.maximum(each, LEAST)
    return reserve
