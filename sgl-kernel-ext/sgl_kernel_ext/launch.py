"""Calls of the compiled kernels on pointer tables; each tells whether there was one to call."""

from __future__ import annotations

from typing import Any, Final

import torch

from sgl_kernel_ext import native

STREAM_FROM: Final = 1 << 20
"""Bytes from which on a copy on the host is written past the cache (docs/kernels.md)."""

Tables = tuple[torch.Tensor, torch.Tensor]
"""A pointer table on the host and on the device that copies; on the host twice the same."""


def gather(
    tables: Tables, limit: int, slots: torch.Tensor, out: torch.Tensor, workers: int
) -> bool:
    """Pool to dense area; ``limit`` is the pool's number of slots."""
    return _dense("gather", tables, limit, slots, out, workers)


def scatter(
    tables: Tables, limit: int, slots: torch.Tensor, source: torch.Tensor, workers: int
) -> bool:
    """Dense area to pool."""
    return _dense("scatter", tables, limit, slots, source, workers)


def transfer(
    tables: Tables,
    limit: int,
    slots: torch.Tensor,
    target: Tables,
    target_limit: int,
    target_slots: torch.Tensor,
    workers: int,
) -> bool:
    """Pool to pool."""
    run = native.function(slots.device.type, "transfer")
    if run is None:
        return False
    if slots.device.type == "cpu":
        host, target_host = tables[0], target[0]
        run(host, limit, slots, target_host, target_limit, target_slots, workers, STREAM_FROM)
    else:
        run(*tables, slots, *target, target_slots, workers, _stream(slots))
    return True


def _dense(
    name: str, tables: Tables, limit: int, slots: torch.Tensor, dense: torch.Tensor, workers: int
) -> bool:
    run: Any = None
    if reachable(slots, dense):
        run = native.function(slots.device.type, name)
    if run is None:
        return False
    if slots.device.type == "cpu":
        run(tables[0], limit, slots, dense, workers, STREAM_FROM)
    else:
        run(*tables, slots, dense, workers, _stream(slots))
    return True


def reachable(slots: torch.Tensor, dense: torch.Tensor) -> bool:
    """Whether a kernel on the slots' device can address ``dense``."""
    if dense.device == slots.device:
        return True
    # CUDA maps pinned host memory into every device's address space.
    return slots.device.type == "cuda" and dense.device.type == "cpu" and dense.is_pinned()


def _stream(slots: torch.Tensor) -> int:
    return int(torch.cuda.current_stream(slots.device).cuda_stream)
