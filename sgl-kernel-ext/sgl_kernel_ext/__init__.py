"""Copies of KV between paged pools and dense areas; see docs/kernels.md.

:class:`KvBuffers` is the pool, :func:`gather`, :func:`scatter` and :func:`transfer` are the copies,
:func:`prepare` has their kernels ready before the first one. ``gather_kv`` and ``scatter_kv`` are
the same in torch.
"""

from sgl_kernel_ext.buffers import KvBuffers
from sgl_kernel_ext.copies import gather, scatter, transfer
from sgl_kernel_ext.native import prepare
from sgl_kernel_ext.reference import as_token_rows, gather_kv, scatter_kv, transfer_kv

__all__ = [
    "KvBuffers",
    "as_token_rows",
    "gather",
    "gather_kv",
    "prepare",
    "scatter",
    "scatter_kv",
    "transfer",
    "transfer_kv",
]
