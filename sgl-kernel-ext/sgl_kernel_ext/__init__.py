"""Gather and scatter of KV tokens between a paged pool and a dense staging buffer."""

from sgl_kernel_ext.kv_copy import as_token_rows, gather_kv, scatter_kv

__all__ = ["as_token_rows", "gather_kv", "scatter_kv"]
