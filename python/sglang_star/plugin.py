"""SGLang's general-plugin entry point: installs rows of ``hooks.HOOKS`` and nothing else."""

from __future__ import annotations

import sys

from sglang_star.errors import HookError
from sglang_star.hooks import Scope, install as install_hooks


def install() -> None:
    """Install the rows this process needs; SGLang calls this in every process it starts.

    Raises:
        SystemExit: a row did not take effect. SGLang swallows every ``Exception`` of a plugin;
            this is the one way to stop a launch.
    """
    scopes = [Scope.LAUNCHER]
    if "sglang.srt.managers.scheduler" in sys.modules:
        scopes.append(Scope.SCHEDULER_ENTRY)
        if _portable_cpu():
            scopes.append(Scope.CPU)
    try:
        install_hooks(*scopes)
    except HookError as error:
        raise SystemExit(f"STAR: {error}") from error


def _portable_cpu() -> bool:
    from sglang.srt.platforms import current_platform

    return type(current_platform).__module__ == "sglang_star.platform.cpu"
