"""Paced execution: a CPU instance that keeps the step times of a modelled GPU.

A GPU works through its queue while the scheduler prepares the next step. Here a forward computes
at once, and its result is held back until the modelled card, busy with one forward after the
other, would have had it. A forward that took longer than its modelled time is counted, since the
emulation is then no longer faithful.
"""

from __future__ import annotations

import time
from typing import Any

from sglang_star.launch import ATTRIBUTE
from sglang_star.platform import ballast
from sglang_star.platform.profile import Profile, find

DONE_AT = "_star_done_at"
"""Attribute of a forward's logits output: ``time.monotonic()`` when the card would be done."""

late: int = 0
"""Forwards that took longer than their modelled time."""

_free_at = 0.0


def forward(original: Any, runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``ModelRunner.forward``."""
    star = getattr(runner.server_args, ATTRIBUTE, None)
    if star is None or not star.paced:
        return original(runner, forward_batch, *args, **kwargs)
    global _free_at, late
    began = time.monotonic()
    output = original(runner, forward_batch, *args, **kwargs)
    if (beside := ballast.of(runner.token_to_kv_pool)) is not None:
        beside.write(forward_batch.out_cache_loc, forward_batch.input_ids, forward_batch.positions)
    took = modelled_s(find(star.paced), forward_batch)
    late += time.monotonic() - began > took
    _free_at = max(_free_at, began) + took
    setattr(output.logits_output, DONE_AT, _free_at)
    return output


def modelled_s(profile: Profile, forward_batch: Any) -> float:
    """Seconds this batch would take on the profile's card; 0 for an empty one."""
    mode = forward_batch.forward_mode
    if mode.is_decode():
        tokens = int(forward_batch.seq_lens_cpu.sum())
        return profile.step_ms(int(forward_batch.batch_size), tokens) / 1e3
    if mode.is_extend():
        return sum(profile.prefill_ms(int(n)) for n in forward_batch.extend_seq_lens_cpu) / 1e3
    return 0.0
