"""The copies as torch operators, ``torch.ops.sgl_kernel_ext.*``, with what they change declared.

torch.compile keeps and orders them so, and they run on tensors that only stand for others. A
compiler may hand over a clone of a buffer, to put it back afterwards: then the pool's table is not
of these tensors, and torch copies. Called eagerly a copy takes the short way, in ``copies``: the
dispatcher's through a hundred mutable arguments takes longer than a small copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sgl_kernel_ext import launch, reference
from sgl_kernel_ext.buffers import as_rows


@torch.library.custom_op("sgl_kernel_ext::gather_kv", mutates_args=("out",))
def gather_kv(
    buffers: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    slots: torch.Tensor,
    out: torch.Tensor,
    limit: int,
    page_size: int,
    workers: int,
) -> None:
    """:func:`sgl_kernel_ext.gather`; ``tables``, ``limit``, ``page_size`` as in a KvBuffers."""
    here = (tables[0], tables[1])
    if not (_of(tables, buffers) and launch.gather(here, limit, slots, out, workers)):
        reference.gather_kv([as_rows(b, page_size) for b in buffers], slots, out)


@torch.library.custom_op("sgl_kernel_ext::scatter_kv", mutates_args=("buffers",))
def scatter_kv(
    buffers: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    slots: torch.Tensor,
    source: torch.Tensor,
    limit: int,
    page_size: int,
    workers: int,
) -> None:
    """:func:`sgl_kernel_ext.scatter`."""
    here = (tables[0], tables[1])
    if not (_of(tables, buffers) and launch.scatter(here, limit, slots, source, workers)):
        reference.scatter_kv([as_rows(b, page_size) for b in buffers], slots, source)


@torch.library.custom_op("sgl_kernel_ext::transfer_kv", mutates_args=("target",))
def transfer_kv(
    buffers: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    slots: torch.Tensor,
    limit: int,
    target: Sequence[torch.Tensor],
    target_tables: Sequence[torch.Tensor],
    target_slots: torch.Tensor,
    target_limit: int,
    page_size: int,
    target_page_size: int,
    workers: int,
) -> None:
    """:func:`sgl_kernel_ext.transfer` between two different pools."""
    here, there = (tables[0], tables[1]), (target_tables[0], target_tables[1])
    known = _of(tables, buffers) and _of(target_tables, target)
    if not (
        known and launch.transfer(here, limit, slots, there, target_limit, target_slots, workers)
    ):
        reference.transfer_kv(
            [as_rows(b, page_size) for b in buffers],
            slots,
            [as_rows(b, target_page_size) for b in target],
            target_slots,
        )


def _of(tables: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor]) -> bool:
    """Whether a table points to these very tensors."""
    return bool(tables[0][:, 0].tolist() == [buffer.data_ptr() for buffer in buffers])


@gather_kv.register_fake
def _(*args: object) -> None:
    """Nothing is returned, so there is no shape to tell."""


@scatter_kv.register_fake
def _(*args: object) -> None: ...


@transfer_kv.register_fake
def _(*args: object) -> None: ...
