"""A progress bar on a terminal, silence elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

_WIDTH = 30
_EVERY_S = 0.2


def bar(label: str, total: float) -> Callable[[float], None]:
    """Return a function to call with how much of ``total`` is done."""
    if not sys.stderr.isatty():
        return lambda done: None
    started = time.monotonic()
    shown = 0.0

    def update(done: float) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < _EVERY_S and done < total:
            return
        shown = now
        share = min(done / total, 1.0) if total > 0 else 1.0
        filled = int(share * _WIDTH)
        left = (now - started) * (1 - share) / share if share > 0 else 0.0
        sys.stderr.write(
            f"\r{label[:24]:24} [{'#' * filled}{'.' * (_WIDTH - filled)}] "
            f"{share:4.0%} {left:5.0f} s left"
        )
        sys.stderr.write("\n" if share >= 1.0 else "")
        sys.stderr.flush()

    return update
