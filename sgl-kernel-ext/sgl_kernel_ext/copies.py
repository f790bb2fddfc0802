"""Gather, scatter and transfer of KV: all buffers of a pool in one launch.

On a CUDA pool the copy is queued on the current stream and the call returns at once; on a host pool
it is done when the call returns. Where no compiled kernel is to be had, torch does the same
(:mod:`sgl_kernel_ext.reference`).
"""

from __future__ import annotations

from typing import Final

import torch

from sgl_kernel_ext import launch, ops, reference
from sgl_kernel_ext.buffers import KvBuffers

BLOCKS: Final = 16
"""Thread blocks of a copy on a GPU by default: most multiprocessors stay with decode."""

THREADS: Final = 2
"""Threads of a copy on the host by default."""


def gather(
    pool: KvBuffers, slots: torch.Tensor, out: torch.Tensor, *, workers: int | None = None
) -> None:
    """Copy what ``slots`` name out of a pool.

    Args:
        pool: where from.
        slots: int32 or int64 ``[n]``, contiguous, on the pool's device; each in
            ``[0, pool.slots)``. On the host that is checked, on a GPU it is not.
        out: uint8 ``[>= n * pool.slot_bytes]``, contiguous; filled buffer by buffer, each
            ``[n, row_bytes_i]``. On the pool's device, or, for a CUDA pool, in pinned host memory;
            other places work and take a detour.
        workers: thread blocks on a GPU, threads at most on the host.

    Raises:
        ValueError: an argument has a type, shape or place other than said, or ``out`` lies in the
            pool.
        IndexError: a slot is not one of the pool's (host pools).
    """
    _check_slots(slots, pool.device)
    _check_dense(pool, slots, out)
    workers, tables = _workers(slots, workers), pool.tables(slots.device)
    if _traced(slots):
        ops.gather_kv(pool.buffers, tables, slots, out, pool.slots, pool.page_size, workers)
    elif not launch.gather(tables, pool.slots, slots, out, workers):
        reference.gather_kv(pool.rows, slots, out)


def scatter(
    pool: KvBuffers, slots: torch.Tensor, source: torch.Tensor, *, workers: int | None = None
) -> None:
    """Copy into what ``slots`` name; the inverse of :func:`gather`, with the same arguments.

    No slot may be named twice: which of two rows stays is undefined.
    """
    _check_slots(slots, pool.device)
    _check_dense(pool, slots, source)
    workers, tables = _workers(slots, workers), pool.tables(slots.device)
    if _traced(slots):
        ops.scatter_kv(pool.buffers, tables, slots, source, pool.slots, pool.page_size, workers)
    elif not launch.scatter(tables, pool.slots, slots, source, workers):
        reference.scatter_kv(pool.rows, slots, source)


def transfer(
    source: KvBuffers,
    slots: torch.Tensor,
    target: KvBuffers,
    target_slots: torch.Tensor,
    *,
    workers: int | None = None,
) -> None:
    """Copy from pool to pool, with nothing in between.

    On GPUs it runs on the device of the slots, which must be able to reach both pools: a peer's
    memory, mapped by CUDA IPC or peer access, is as good as its own.

    Args:
        source, target: pools of equal ``row_bytes``, both on the host or both on GPUs. They may be
            one pool if no slot is read that is also written.
        slots, target_slots: of one type and length, on one device; else as for :func:`gather`.
        workers: as for :func:`gather`.

    Raises:
        ValueError, IndexError: as for :func:`gather`; also if the pools' rows differ.
    """
    if source.row_bytes != target.row_bytes:
        raise ValueError("the pools have rows of different sizes")
    if source.device.type != target.device.type:
        raise ValueError(f"no transfer from {source.device} to {target.device}; gather instead")
    _check_slots(slots, source.device if source.device.type == "cpu" else slots.device)
    _check_slots(target_slots, slots.device)
    if slots.device.type != source.device.type:
        raise ValueError(f"slots are on {slots.device}, the pools on {source.device}")
    if (slots.dtype, slots.shape) != (target_slots.dtype, target_slots.shape):
        raise ValueError("slots and target_slots differ in type or length")
    workers = _workers(slots, workers)
    here, there = source.tables(slots.device), target.tables(slots.device)
    if _traced(slots):
        ops.transfer_kv(
            source.buffers,
            here,
            slots,
            source.slots,
            target.buffers,
            there,
            target_slots,
            target.slots,
            source.page_size,
            target.page_size,
            workers,
        )
    elif not launch.transfer(here, source.slots, slots, there, target.slots, target_slots, workers):
        reference.transfer_kv(source.rows, slots, target.rows, target_slots)


def _check_slots(slots: torch.Tensor, device: torch.device) -> None:
    if slots.dim() != 1 or slots.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"slots must be int32 or int64 [n], not {slots.dtype} {[*slots.shape]}")
    if slots.device != device:
        raise ValueError(f"slots are on {slots.device}, the pool is on {device}")
    if not slots.is_contiguous():
        raise ValueError("slots are not contiguous")
    if slots.shape[0] >= 1 << 31:
        raise ValueError("more than 2^31 slots in one copy")


def _check_dense(pool: KvBuffers, slots: torch.Tensor, dense: torch.Tensor) -> None:
    if dense.dtype != torch.uint8 or not dense.is_contiguous() or dense.dim() != 1:
        raise ValueError(f"the dense side must be contiguous uint8 [bytes], not {dense.dtype}")
    size = slots.shape[0] * pool.slot_bytes
    if dense.shape[0] < size:
        raise ValueError(f"{size} bytes are copied, and the dense side has {dense.shape[0]}")
    if not _traced(slots) and pool.overlaps(dense.data_ptr(), dense.data_ptr() + size):
        raise ValueError("the dense side lies in the pool")


def _traced(slots: torch.Tensor) -> bool:
    # A kernel takes addresses, and what stands for a tensor has none.
    return torch.compiler.is_compiling() or type(slots) is not torch.Tensor


def _workers(slots: torch.Tensor, workers: int | None) -> int:
    if workers is None:
        return THREADS if slots.device.type == "cpu" else BLOCKS
    if workers < 1:
        raise ValueError(f"workers is {workers}")
    return workers
