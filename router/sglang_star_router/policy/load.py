"""What instances carry now, as arrays: the measure every policy starts from."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from sglang_star_router.policy.snapshot import BoolArray, FleetSnapshot, FloatArray, IntArray


@lru_cache(maxsize=64)
def name_rank(ids: tuple[str, ...]) -> IntArray:
    """Position of every id in sorted order: breaks ties independently of input order."""
    rank = np.empty(len(ids), dtype=np.int64)
    rank[sorted(range(len(ids)), key=ids.__getitem__)] = np.arange(len(ids))
    return rank


def lowest(score: FloatArray, allowed: BoolArray, ids: tuple[str, ...]) -> int | None:
    """Row of the smallest score among ``allowed``, the first name among equals; None if none."""
    candidates = np.flatnonzero(allowed)
    if candidates.size == 0:
        return None
    scores = score[candidates]
    best = candidates[scores <= scores.min()]
    return int(best[np.argmin(name_rank(ids)[best])])


def context_tokens(snapshot: FleetSnapshot) -> IntArray:
    """Prompt plus output tokens of every request, shape ``[R]``."""
    return snapshot.requests.prompt_tokens + snapshot.requests.output_tokens


def _per_instance(snapshot: FleetSnapshot) -> tuple[FloatArray, FloatArray]:
    """Tokens and requests committed to every instance by its status, each ``[I]``."""
    if "load" not in snapshot.derived:
        inst, reqs = snapshot.instances, snapshot.requests
        waiting = np.bincount(
            reqs.instance[reqs.queued],
            weights=context_tokens(snapshot)[reqs.queued],
            minlength=len(inst.ids),
        )
        tokens = inst.kv_used + inst.kv_reserved + waiting
        snapshot.derived["load"] = (tokens, (inst.running + inst.queued + inst.retracted) * 1.0)
    tokens, count = snapshot.derived["load"]
    return tokens, count


def committed_tokens(snapshot: FleetSnapshot) -> FloatArray:
    """KV in use, reserved, and wanted by what waits or was placed since, ``[I]``, tokens."""
    placed = snapshot.placed
    tokens, _ = _per_instance(snapshot)
    if placed.instance.size == 0:
        return tokens
    return tokens + np.bincount(
        placed.instance, weights=placed.prompt_tokens, minlength=tokens.size
    )


def committed_requests(snapshot: FleetSnapshot) -> FloatArray:
    """Requests running, waiting, retracted and placed since, ``[I]``."""
    _, count = _per_instance(snapshot)
    if snapshot.placed.instance.size == 0:
        return count
    return count + np.bincount(snapshot.placed.instance, minlength=count.size)
