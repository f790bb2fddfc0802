"""Which weights a model has: a checksum of all of them, kept up to date through updates.

A few samples would not do: an update in reinforcement learning changes few bits of a bfloat16
weight, and most not at all. A checksum reads everything once, at the speed of memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from sglang.srt.layers.radix_attention import RadixAttention

CHUNK: Final = 1 << 20
"""Words of four bytes that are multiplied and summed at once."""


class Weights:
    """The weights of a loaded model.

    Args:
        gather: of several ranks of one engine: from this rank's checksum to those of all of them,
            in order; a collective, so that all ranks have to ask at the same time.

    Attributes:
        model: SGLang's; its parameters may be written at any time between two :meth:`changed`.
    """

    def __init__(
        self, model: torch.nn.Module, gather: Callable[[str], list[str]] | None = None
    ) -> None:
        self.model = model
        self._gather = gather
        self._known = ""

    def changed(self) -> None:
        """They were written, or may have been."""
        self._known = ""

    def checksum(self) -> str:
        """16 hexadecimal digits, equal for equal weights; computed when it is not known.

        Ranks of one engine, each with a part of the weights, have one checksum together.
        """
        if not self._known:
            self._known = checksum(self.model)
            if self._gather is not None:
                together = " ".join(self._gather(self._known))
                self._known = hashlib.sha256(together.encode()).hexdigest()[:16]
        return self._known


@torch.no_grad()
def checksum(model: torch.nn.Module) -> str:
    """Over names, types, shapes and bytes in memory of all parameters, and the scales of KV.

    Each chunk of a parameter is summed with odd factors, so that one changed word always shows
    and two equal sums of different chunks are one in four thousand million.
    """
    total = hashlib.sha256()
    factors: dict[torch.device, torch.Tensor] = {}
    told: list[str] = []
    sums: dict[torch.device, list[torch.Tensor]] = {}
    for name, tensor in _tensors(model):
        told.append(f"{name} {tensor.dtype} {list(tensor.shape)} {list(tensor.stride())}")
        words, rest = _words(tensor)
        told.append(rest)
        if tensor.device not in factors:
            factors[tensor.device] = _factors().to(tensor.device)
        factor = factors[tensor.device]
        sums.setdefault(tensor.device, []).extend(
            (chunk * factor[: len(chunk)]).sum(dtype=torch.int64) for chunk in words.split(CHUNK)
        )
    for line in told:
        total.update(line.encode() + b"\n")
    for device in sorted(sums, key=str):
        total.update(torch.stack(sums[device]).cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, and what attention layers scale KV by.

    Not buffers: they follow from the configuration, and some are scratch memory.
    """
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta":
            yield name, parameter.data
    for name, module in model.named_modules():
        if isinstance(module, RadixAttention):
            for side, scale in (("k", module.k_scale_float), ("v", module.v_scale_float)):
                if scale is not None:
                    yield f"{name}.{side}_scale_float", torch.tensor(scale, dtype=torch.float64)


def _words(tensor: torch.Tensor) -> tuple[torch.Tensor, str]:
    """All its bytes in the order of memory, in words of four, and those left over."""
    order = sorted(range(tensor.dim()), key=lambda axis: -tensor.stride(axis))
    data = tensor.permute(order).contiguous().reshape(-1).view(torch.uint8)
    whole = len(data) // 4 * 4
    if data.data_ptr() % 4:
        data = data.clone()
    return data[:whole].view(torch.int32), bytes(data[whole:].tolist()).hex()


def _factors() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0x5747)
    drawn = torch.randint(-(2**31), 2**31, (CHUNK,), generator=generator, dtype=torch.int64)
    return (drawn | 1).to(torch.int32)


def of_scheduler(scheduler: Any) -> Weights:
    """The weights that a scheduler's requests run on."""
    group = scheduler.tp_cpu_group
    ranks = torch.distributed.get_world_size(group)

    def gather(own: str) -> list[str]:
        found: list[Any] = [None] * ranks
        torch.distributed.all_gather_object(found, own, group)
        return found

    return Weights(scheduler.tp_worker.model_runner.model, gather if ranks > 1 else None)
