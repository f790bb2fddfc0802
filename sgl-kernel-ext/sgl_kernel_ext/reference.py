"""The copies written with torch: what the kernels are tested against, and what works everywhere.

A *row* is the KV of one token (or page) in one buffer, such as one layer's K, as raw bytes. Working
on bytes keeps every dtype exact, quantised caches included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def as_token_rows(buffer: torch.Tensor) -> torch.Tensor:
    """View a KV buffer ``[slots, ...]`` as bytes ``[slots, row_bytes]``, without copying.

    Raises:
        ValueError: the buffer is not contiguous, so that a row is not one piece of memory.
    """
    if not buffer.is_contiguous():
        raise ValueError("KV buffer is not contiguous")
    return buffer.view(torch.uint8).view(buffer.shape[0], -1)


def gather_kv(rows: Sequence[torch.Tensor], slots: torch.Tensor, out: torch.Tensor) -> None:
    """Copy rows out of the pool.

    Args:
        rows: the pool's buffers as rows, each uint8 ``[pool_slots, row_bytes_i]``.
        slots: int64 or int32 ``[n]`` on the pool's device, the rows' slots in order.
        out: uint8 ``[>= n * sum(row_bytes_i)]``, contiguous, on any device; filled buffer by
            buffer, each ``[n, row_bytes_i]``.
    """
    offset = 0
    for row in rows:
        size = slots.numel() * row.shape[1]
        target = out[offset : offset + size].view(slots.numel(), row.shape[1])
        if out.device == row.device:
            torch.index_select(row, 0, slots, out=target)
        else:
            target.copy_(row.index_select(0, slots))
        offset += size


def scatter_kv(rows: Sequence[torch.Tensor], slots: torch.Tensor, source: torch.Tensor) -> None:
    """Copy rows into the pool; the inverse of :func:`gather_kv`, same layout."""
    offset = 0
    for row in rows:
        size = slots.numel() * row.shape[1]
        _write(row, slots, source[offset : offset + size].view(slots.numel(), row.shape[1]))
        offset += size


def transfer_kv(
    rows: Sequence[torch.Tensor],
    slots: torch.Tensor,
    target: Sequence[torch.Tensor],
    target_slots: torch.Tensor,
) -> None:
    """Copy rows of one pool into another one of equal row sizes."""
    for source, row in zip(rows, target, strict=True):
        _write(row, target_slots, source.index_select(0, slots.to(source.device)))


def _write(row: torch.Tensor, slots: torch.Tensor, data: torch.Tensor) -> None:
    if not data.numel():
        return
    lane = _lane(row, data)
    arrived = data.view(lane).to(row.device, non_blocking=True)
    row.view(lane).index_copy_(0, slots.to(row.device, torch.int64), arrived)


def _lane(row: torch.Tensor, data: torch.Tensor) -> torch.dtype:
    """The widest integer both can be seen as: torch scatters element by element."""
    strides = (row.shape[1], row.stride(0), data.stride(0))
    aligned = (*strides, row.storage_offset(), data.storage_offset())
    return torch.int64 if not any(n % 8 for n in aligned) else torch.uint8
