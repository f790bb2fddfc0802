"""Paced execution: a CPU instance that keeps the step times of a modelled GPU.

Each forward is padded by sleeping to the time its profile gives for this batch. A forward that
took longer than that by itself is counted, since the emulation is then no longer faithful.
"""

from __future__ import annotations

import time
from typing import Any

from sglang_star.launch import ATTRIBUTE
from sglang_star.platform.profile import Profile, find

late: int = 0
"""Forwards that took longer than their modelled time."""


def forward(original: Any, runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``ModelRunner.forward``."""
    star = getattr(runner.server_args, ATTRIBUTE, None)
    if star is None or not star.paced:
        return original(runner, forward_batch, *args, **kwargs)
    began = time.perf_counter()
    result = original(runner, forward_batch, *args, **kwargs)
    left = modelled_s(find(star.paced), forward_batch) - (time.perf_counter() - began)
    if left > 0:
        time.sleep(left)
    else:
        global late
        late += 1
    return result


def modelled_s(profile: Profile, forward_batch: Any) -> float:
    """Seconds this batch would take on the profile's card; 0 for an empty one."""
    mode = forward_batch.forward_mode
    if mode.is_decode():
        tokens = int(forward_batch.seq_lens_cpu.sum())
        return profile.step_ms(int(forward_batch.batch_size), tokens) / 1e3
    if mode.is_extend():
        return sum(profile.prefill_ms(int(n)) for n in forward_batch.extend_seq_lens_cpu) / 1e3
    return 0.0
