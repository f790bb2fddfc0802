"""How many KV tokens an instance may hold: its memory, or its speed, whichever binds first.

Decode is bound by memory bandwidth, so a step takes as long as reading the weights and the KV:
``step(L) = step_now * (W + L) / (W + L_now)`` with the weights ``W`` counted in KV tokens. The
load at which that reaches the TPOT limit is a limit like the pool's size. It is what makes a slow
card among fast ones count as full while its memory is not.
"""

from __future__ import annotations

import numpy as np

from sglang_star_router.policy.params import StarParams
from sglang_star_router.policy.snapshot import (
    BoolArray,
    FleetSnapshot,
    FloatArray,
    Instances,
    IntArray,
)

GUEST_HEADROOM = 64
"""KV tokens a target keeps free beyond a guest's context in any case, so that it can decode."""


def token_limit(snapshot: FleetSnapshot, params: StarParams) -> FloatArray:
    """KV tokens each instance can hold within memory and TPOT limit, ``[I]``, at least 1."""
    inst = snapshot.instances
    measured = (inst.running > 0) & (inst.step_ms > 0)
    step = np.where(measured, inst.step_ms, np.inf)
    now = params.weight_tokens + inst.kv_used
    by_speed = np.where(measured, params.tpot_slo_ms / step * now - params.weight_tokens, np.inf)
    limit: FloatArray = np.maximum(np.minimum(inst.kv_capacity, by_speed), 1.0)
    return limit


def admits_now(
    snapshot: FleetSnapshot, prompt: int, max_new: int, spare: float, params: StarParams
) -> BoolArray:
    """Whether SGLang's decode admission would take the request without queueing, ``[I]``.

    SGLang reserves tokens for every active request and wants room for one more; nobody is
    admitted while retracted requests wait, and the queue is first come, first served.
    ``spare`` is the share of KV to stay free beyond that.
    """
    inst, placed = snapshot.instances, snapshot.placed
    n = len(inst.ids)
    placed_count = np.bincount(placed.instance, minlength=n)
    placed_tokens = np.bincount(placed.instance, placed.prompt_tokens, n)
    largest, held = _single_request_need(snapshot, params)
    reserve = np.maximum(inst.reserve_each * (inst.running + placed_count), largest - held)
    free = inst.kv_capacity - inst.kv_used - inst.kv_reserved - placed_tokens - reserve
    wanted = np.maximum(
        prompt + inst.reserve_each, prompt + min(max_new, params.clip_new_tokens) - held
    )
    admits: BoolArray = (
        inst.accepts
        & (inst.queued == 0)
        & (inst.retracted == 0)
        & (free >= wanted + spare * inst.kv_capacity)
    )
    return admits


def guest_room(snapshot: FleetSnapshot) -> IntArray:
    """Context in tokens that each instance would grant one more guest now, ``[I]``."""
    inst = snapshot.instances
    free = inst.kv_capacity - inst.kv_used - inst.kv_reserved
    return free - GUEST_HEADROOM - kept_free(inst)


def kept_free(inst: Instances) -> IntArray:
    """The reserve for every request an instance has, is promised, and one more, ``[I]``."""
    kept: IntArray = inst.guest_reserve * (inst.running + inst.moves_in + 1)
    return kept


def _single_request_need(
    snapshot: FleetSnapshot, params: StarParams
) -> tuple[FloatArray, FloatArray]:
    """Largest full length of a running request, and all running context, per instance."""
    if "single_need" not in snapshot.derived:
        reqs, n = snapshot.requests, len(snapshot.instances.ids)
        live = ~reqs.queued
        owner = reqs.instance[live]
        full = reqs.prompt_tokens + np.minimum(reqs.max_new_tokens, params.clip_new_tokens)
        largest = np.zeros(n)
        np.maximum.at(largest, owner, full[live])
        context = (reqs.prompt_tokens + reqs.output_tokens)[live]
        snapshot.derived["single_need"] = (largest, np.bincount(owner, context, n))
    largest, held = snapshot.derived["single_need"]
    return largest, held
