"""The portable CPU platform, and execution paced to a modelled GPU."""

from __future__ import annotations


def activate() -> str | None:
    """SGLang's platform entry point: name our class where no accelerator is present.

    Returns:
        The class to use, or None wherever CUDA is available, so that a GPU machine with STAR
        installed behaves exactly as one without.
    """
    import torch

    if torch.cuda.is_available():
        return None
    return "sglang_star.platform.cpu.PortableCpuPlatform"


def is_portable_cpu(platform: object) -> bool:
    """Whether SGLang's current platform is ours."""
    return type(platform).__module__ == "sglang_star.platform.cpu"
