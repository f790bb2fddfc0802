"""SGLang's arguments as it resolved them: what it was given, or what it chose in its place."""

from __future__ import annotations

from typing import Any

from sglang.srt.arg_groups.overrides import resolution_result


def setting(server_args: Any, name: str) -> Any:
    """The value in force of the argument called ``name``."""
    return resolution_result(server_args, name)
