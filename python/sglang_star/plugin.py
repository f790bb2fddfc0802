"""SGLang's general-plugin entry point: installs rows of ``hooks.HOOKS`` and nothing else."""

from __future__ import annotations

import sys

from sglang_star.errors import HookError
from sglang_star.hooks import Scope
from sglang_star.hooks import install as install_hooks
from sglang_star.platform import is_portable_cpu


def install() -> None:
    """Install the rows this process needs; SGLang calls this in every process it starts.

    Raises:
        SystemExit: a row did not take effect. SGLang swallows every ``Exception`` of a plugin;
            this is the one way to stop a launch.
    """
    scopes = [Scope.LAUNCHER]
    if "sglang.srt.managers.scheduler" in sys.modules:
        scopes.append(Scope.SCHEDULER_ENTRY)
        from sglang.srt.platforms import current_platform

        if is_portable_cpu(current_platform):
            scopes.append(Scope.CPU)
    try:
        install_hooks(*scopes)
    except HookError as error:
        raise SystemExit(f"STAR: {error}") from error
