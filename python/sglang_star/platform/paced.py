"""Paced execution: a CPU instance that keeps the step times of a modelled GPU."""

from __future__ import annotations

from typing import Any


def forward(original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``ModelRunner.forward``."""
    return original(runner, *args, **kwargs)
