"""Run SGLang on any CPU with plain torch operators.

SGLang's own CPU platform needs kernels that its PyPI wheel does not carry. As an out-of-tree
platform with the ``native`` dispatch key, every fused operator falls back to its torch
implementation instead: slow, exact and available everywhere, which is what development, tests
and the demo need.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


class PortableCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """An out-of-tree CPU platform without compiled kernels or graph capture."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        """Attention by ``torch.nn.functional.scaled_dot_product_attention``."""
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        """Select ``forward_native`` of every fused operator."""
        return "native"

    def is_pin_memory_available(self, device: torch.device | None = None) -> bool:
        """There is no device to pin host memory for."""
        return False


def skip_batch_invariant_kernels(original: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND ``ModelRunner.maybe_enable_batch_invariant_mode``: plain torch runs instead.

    Seeds are honoured; that a result does not depend on the batch around it is not promised.
    """
