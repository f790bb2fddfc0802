"""What a policy does about a snapshot that cannot be right: it drops the part, never the round.

Statuses come from many processes at different times, so a snapshot may contradict itself. Rows
that point at no instance are dropped; estimates that are no positive numbers become "no estimate";
negative counts become 0; an instance without KV accepts nothing.
"""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np

from sglang_star_router.policy.snapshot import FleetSnapshot, Instances, Requests


def sane(snapshot: FleetSnapshot) -> FleetSnapshot:
    """The snapshot, or a repaired copy; looked at once per snapshot."""
    if "sane" not in snapshot.derived:
        instances = _instances(snapshot.instances)
        requests = _requests(snapshot.requests, len(instances.ids))
        changed = instances is not snapshot.instances or requests is not snapshot.requests
        snapshot.derived["sane"] = (instances, requests, {"sane": None}) if changed else None
    repaired = snapshot.derived["sane"]
    if repaired is None:
        return snapshot
    instances, requests, derived = repaired
    return replace(snapshot, instances=instances, requests=requests, derived=derived)


def _instances(inst: Instances) -> Instances:
    counts = (inst.kv_used, inst.kv_reserved, inst.running, inst.queued, inst.retracted)
    wrong = any((c < 0).any() for c in counts) or not np.isfinite(inst.step_ms).all()
    useless = inst.accepts & (inst.kv_capacity <= 0)
    if not wrong and not useless.any():
        return inst
    return replace(
        inst,
        kv_used=np.maximum(inst.kv_used, 0),
        kv_reserved=np.maximum(inst.kv_reserved, 0),
        running=np.maximum(inst.running, 0),
        queued=np.maximum(inst.queued, 0),
        retracted=np.maximum(inst.retracted, 0),
        step_ms=np.where(np.isfinite(inst.step_ms), np.maximum(inst.step_ms, 0.0), 0.0),
        accepts=inst.accepts & (inst.kv_capacity > 0),
    )


def _requests(reqs: Requests, instances: int) -> Requests:
    known = (reqs.instance >= 0) & (reqs.instance < instances)
    if not known.all():
        rows = np.flatnonzero(known)
        kept = {f.name: getattr(reqs, f.name)[rows] for f in fields(reqs) if f.name != "rids"}
        reqs = Requests(rids=tuple(reqs.rids[r] for r in rows), **kept)
    if (reqs.prompt_tokens < 0).any() or (reqs.output_tokens < 0).any():
        reqs = replace(
            reqs,
            prompt_tokens=np.maximum(reqs.prompt_tokens, 0),
            output_tokens=np.maximum(reqs.output_tokens, 0),
        )
    # A NaN row is an honest "no estimate"; anything else must be finite and not negative.
    wrong = np.isinf(reqs.remaining).any(axis=1) | (reqs.remaining < 0).any(axis=1)
    if wrong.any():
        remaining = reqs.remaining.copy()
        remaining[wrong] = np.nan
        reqs = replace(reqs, remaining=remaining)
    return reqs
