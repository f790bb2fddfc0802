"""Whether the device has finished a forward: a GPU's event, or the clock of paced execution."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sglang_star.platform.paced import DONE_AT


def pending(result: Any) -> Callable[[], bool]:
    """Return a function that says whether SGLang's batch ``result`` is still being computed.

    Always False where that is not known without waiting, and on a plain CPU, which computes on
    the scheduler's own thread.
    """
    done_at = getattr(getattr(result, "logits_output", None), DONE_AT, 0.0)
    if done_at:
        return lambda: time.monotonic() < done_at
    event = getattr(result, "copy_done", None)
    query = getattr(event, "query", None)
    return (lambda: not query()) if query is not None else (lambda: False)


def settle(result: Any) -> None:
    """Block until a paced ``result`` is due; SGLang itself waits for a real device."""
    left = getattr(getattr(result, "logits_output", None), DONE_AT, 0.0) - time.monotonic()
    if left > 0:
        time.sleep(left)
