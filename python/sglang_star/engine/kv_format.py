"""What a KV pool is made of: the tensors that move, or why none does, and what must be equal.

A pool moves if it is exactly one of the classes whose tensors we know, in the layout we know, and
if these tensors are all there is to a token. A subclass may keep more, and is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.quantization.fp4_kv_cache_quant_method import UnquantizedKVCacheMethod
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool


def refusal(pool: Any) -> str:
    """Why KV of this pool cannot move; empty if it can."""
    name = type(pool).__name__
    if type(pool) is MHATokenToKVPool:
        if pool.kv_cache_layout != "nhd":
            return f"KV layout {pool.kv_cache_layout} cannot move, only nhd"
        if type(pool.quant_method) is not UnquantizedKVCacheMethod:
            return (
                f"KV quantised by {type(pool.quant_method).__name__} cannot move: its scales are "
                "kept beside it"
            )
        if pool.k_scale_buffer is not None or pool.v_scale_buffer is not None:
            return "KV with scales in buffers of their own cannot move"
        return ""
    if type(pool) is MLATokenToKVPool:
        if pool.use_dsa:
            return "KV of sparse attention (DSA) cannot move: its indexer keeps keys of its own"
        if pool.layer_shard_enabled:
            return "KV whose layers are divided among ranks cannot move"
        return ""
    return f"KV pool {name} cannot move"


def model_refusal(model_config: Any) -> str:
    """Why KV of this model cannot move, whatever pool it is in; empty if it can."""
    if model_config.is_encoder_decoder:
        return "KV of an encoder-decoder model cannot move: its encoder's part is not known here"
    return ""


def buffers(pool: Any) -> list[torch.Tensor]:
    """The per-layer tensors ``[slots, ...]`` of a pool that can move, else nothing."""
    if refusal(pool):
        return []
    if type(pool) is MHATokenToKVPool:
        return [*pool.k_buffer, *pool.v_buffer]
    return list(pool.kv_buffer)


def layout(pool: Any) -> dict[str, str | int]:
    """What must be equal between two pools for the bytes of a token to mean the same.

    The data type is the one that is computed with: pools store both kinds of fp8 as bytes.
    """
    tensors = buffers(pool)
    rows = sorted({f"{tensor.dtype}{list(tensor.shape[1:])}" for tensor in tensors})
    return {
        "kv_pool": type(pool).__name__,
        "kv_dtype": str(pool.dtype),
        "kv_storage": str(pool.store_dtype),
        "kv_page_size": int(pool.page_size),
        "kv_first_layer": int(pool.start_layer),
        "kv_tensors": len(tensors),
        "kv_rows": " ".join(rows),
    }
