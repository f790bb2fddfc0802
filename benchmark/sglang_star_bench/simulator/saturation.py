"""The arrival rate at which a fleet's KV memory is full on average.

Each decode step of a request occupies its context; summed over its life that is
``p * o + o**2 / 2`` token-steps for ``p`` prompt and ``o`` output tokens. A fleet offers its usable
KV tokens for as many steps per second as it makes with full memory. Load is the quotient.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sglang_star.platform.profile import Profile
from sglang_star_bench.traces import Trace

USABLE = 0.9
"""Share of KV that can be in use on average: the rest is SGLang's reserve per active request."""
PREFILL_USE = 0.3
"""Utilisation an automatically sized prefill pool is sized for: decode is what is studied."""


def saturation_rate(trace: Trace, decode: Sequence[Profile]) -> float:
    """Requests per second of this trace's lengths that fill the fleet's memory."""
    prompt = trace.input_len.astype(np.float64)
    output = trace.output_len.astype(np.float64)
    token_steps = float((prompt * output + output * output / 2.0).mean())
    context = token_steps / float(output.mean())
    rate = 0.0
    for profile in decode:
        tokens = USABLE * profile.kv_capacity
        step_s = profile.step_ms(max(int(tokens / context), 1), tokens) / 1e3
        rate += tokens / (token_steps * step_s)
    return rate


def scale_for_load(
    trace: Trace, decode: Sequence[Profile], load: float, duration_s: float, seed: int
) -> float:
    """Rate scale at which the seed's window offers ``load`` times the saturation rate.

    Traces are not stationary, so the window's own rate and lengths count; a few rounds settle it.
    """
    scale = load * saturation_rate(trace, decode) / trace.rate
    for _ in range(6):
        window = trace.window(scale, duration_s, seed)
        offered = window.arrival_s.size / duration_s
        scale *= load * saturation_rate(window, decode) / offered
    return scale


def prefill_needed(trace: Trace, prefill: Profile, duration_s: float) -> int:
    """Prefill instances that keep the pool at :data:`PREFILL_USE`, at least 2."""
    busy_s = sum(prefill.prefill_ms(int(p)) for p in trace.input_len) / 1e3
    return max(2, int(np.ceil(busy_s / duration_s / PREFILL_USE)))
