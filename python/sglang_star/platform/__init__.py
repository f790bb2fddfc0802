"""The portable CPU platform, and execution paced to a modelled GPU."""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from typing import Final

GROUP: Final = "sglang.srt.platforms"
NAME: Final = "star_cpu"
"""Our entry point in that group."""


def activate() -> str | None:
    """SGLang's platform entry point: name our class where nothing else could serve.

    Returns:
        The class to use, or None where an accelerator is present, where another platform plugin is
        installed, or where SGLang's own CPU engine is asked for, so that such a machine with STAR
        installed behaves exactly as one without. ``SGLANG_PLATFORM=star_cpu`` sets other plugins
        aside, as SGLang does for all of them.
    """
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    if os.environ.get("SGLANG_PLATFORM") != NAME and any(
        point.name != NAME for point in entry_points(group=GROUP)
    ):
        return None
    import torch

    # Moore Threads' own torch names itself here; its devices are no accelerator to plain torch.
    if torch.accelerator.is_available() or getattr(torch.version, "musa", None) is not None:
        return None
    return "sglang_star.platform.cpu.PortableCpuPlatform"


def is_portable_cpu(platform: object) -> bool:
    """Whether SGLang's current platform is ours."""
    return type(platform).__module__ == "sglang_star.platform.cpu"
