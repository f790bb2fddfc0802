"""What a policy sees: the whole fleet as arrays, at one moment.

Arrays rather than objects, so that 256 instances with 64 requests each are decided in
milliseconds. The router builds one from the latest statuses, the simulator from its own state;
the policy cannot tell them apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

RESERVE_EACH = 512
"""SGLang's default of ``--num-reserved-decode-tokens``."""


@dataclass(frozen=True, slots=True)
class Instances:
    """Decode (or aggregated) instances; every array has shape ``[I]``.

    Attributes:
        ids: stable names.
        kv_capacity, kv_used, kv_reserved: tokens.
        reserve_each: tokens its admission keeps free for every active request
            (``--num-reserved-decode-tokens``).
        guest_reserve: of these, what it keeps free when a guest comes: nothing on an aggregated
            instance, whose admission knows no such reserve.
        running, queued, retracted: requests now.
        step_ms: recent decode step time.
        age_s: how old the status behind this row is.
        accepts: healthy, fresh enough and not draining: may receive requests.
        draining: should be emptied.
        group: only instances with equal numbers can hand requests to each other.
        moves_out, moves_in: migrations under way from and to it.
    """

    ids: tuple[str, ...]
    kv_capacity: IntArray
    kv_used: IntArray
    kv_reserved: IntArray
    reserve_each: IntArray
    guest_reserve: IntArray
    running: IntArray
    queued: IntArray
    retracted: IntArray
    step_ms: FloatArray
    age_s: FloatArray
    accepts: BoolArray
    draining: BoolArray
    group: IntArray
    moves_out: IntArray
    moves_in: IntArray


@dataclass(frozen=True, slots=True)
class Requests:
    """Requests in decode; every array has length ``R`` in its first dimension.

    Attributes:
        rids: names, unique per instance.
        instance: row of :class:`Instances` whose KV pool holds the request.
        prompt_tokens, output_tokens, max_new_tokens: tokens.
        remaining: remaining output tokens at ``QUANTILE_LEVELS``, shape ``[R, 5]``; NaN where
            there is no estimate.
        true_remaining: for the oracle only; NaN in production.
        movable: may be ordered to move now (no move under way, no pinning feature).
        queued: waiting for admission, holds no KV.
        since_move_s: seconds since its last move ended, or since it started.
    """

    rids: tuple[str, ...]
    instance: IntArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    max_new_tokens: IntArray
    remaining: FloatArray
    true_remaining: FloatArray
    movable: BoolArray
    queued: BoolArray
    since_move_s: FloatArray


def _no_rows() -> IntArray:
    return np.zeros(0, dtype=np.int64)


def _unknown_quantiles() -> FloatArray:
    return np.full(5, np.nan)


@dataclass(frozen=True, slots=True)
class Placed:
    """Requests sent to an instance since its status was taken; both arrays have shape ``[P]``.

    Attributes:
        instance: row of :class:`Instances`.
        prompt_tokens: KV each will take on arrival, tokens.
    """

    instance: IntArray = field(default_factory=_no_rows)
    prompt_tokens: IntArray = field(default_factory=_no_rows)


@dataclass(frozen=True, slots=True)
class FleetSnapshot:
    """The fleet at ``now_s`` (seconds, any monotonic clock).

    Attributes:
        prior_output: output length in tokens of recently finished requests at
            ``QUANTILE_LEVELS``, shape ``[5]``: what is known of a request before the predictor has
            seen it. NaN where nothing has finished yet.
        placed: what went out since the statuses were taken. Without it every arrival between two
            statuses would see the same least loaded instance.
        held: requests waiting at the router, the arrival being placed included.
        derived: arrays computed from the other fields, kept so that many arrivals can be placed
            on one snapshot. ``dataclasses.replace(snapshot, placed=…)`` may share it: nothing in
            it depends on ``now_s``, ``placed`` or ``held``.
    """

    now_s: float
    instances: Instances
    requests: Requests
    prior_output: FloatArray = field(default_factory=_unknown_quantiles)
    placed: Placed = field(default_factory=Placed)
    held: int = 0
    derived: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request the router is about to place."""

    rid: str
    prompt_tokens: int
    max_new_tokens: int
    arrived_s: float
    true_output_tokens: float = float("nan")


@dataclass(frozen=True, slots=True)
class MoveOrder:
    """Move ``rid`` from one instance to another.

    Attributes:
        reason: one word for the trigger, e.g. ``overflow``, ``imbalance``, ``drain``.
        mode: ``copy`` (send the KV) or ``recompute`` (prefill the context again at the target).
        expected_gain: what the policy thinks it buys, in the unit its ``explain`` names.
        explain: the numbers behind the decision.
    """

    rid: str
    source: str
    target: str
    reason: str
    expected_gain: float
    explain: dict[str, float] = field(default_factory=dict)
    mode: str = "copy"


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an arrival goes.

    Attributes:
        instance: chosen instance id, or None to hold the request at the router for now.
        reason, explain: as in :class:`MoveOrder`.
        reject: answer 429 now; ``instance`` is None.
    """

    instance: str | None
    reason: str
    explain: dict[str, float] = field(default_factory=dict)
    reject: bool = False
