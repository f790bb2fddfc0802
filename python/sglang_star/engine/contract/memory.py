"""KV memory: rows of requests, slots of tokens, the tensors behind them, the prefix cache."""

from __future__ import annotations

from typing import Final

from sglang_star.engine.contract.row import Attribute, Class, Function, Row

_COMMON: Final = "sglang.srt.mem_cache.common"
_POOLS: Final = "sglang.srt.mem_cache.memory_pool"
_ROWS: Final = "sglang.srt.mem_cache.memory_pool.ReqToTokenPool"
_SLOTS: Final = "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator"
_PAGED: Final = "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator"
_TREE: Final = "sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache"
_MHA: Final = "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool"
_MLA: Final = "sglang.srt.mem_cache.memory_pool.MLATokenToKVPool"
_UNQUANTISED: Final = (
    "sglang.srt.layers.quantization.fp4_kv_cache_quant_method.UnquantizedKVCacheMethod"
)
_PAGES: Final = "engine.pages"
_FORMAT: Final = "engine.kv_format"

ROWS: Final[tuple[Row, ...]] = (
    Function(
        _COMMON + ".evict_from_tree_cache",
        "makes room for a guest's KV",
        _PAGES,
        takes="tree_cache, num_tokens",
    ),
    Function(
        _COMMON + ".release_kv_cache",
        "gives row and KV of a request back",
        _PAGES,
        takes="req, tree_cache, *, checkpoint",
    ),
    # Rows.
    Function(_ROWS + ".alloc", "a row for a guest", _PAGES, takes="reqs"),
    Function(_ROWS + ".free", "gives back a row without KV", _PAGES, takes="req"),
    Function(_ROWS + ".write", "puts new slots into a row", _PAGES, takes="indices, values"),
    Attribute(
        _ROWS + ".req_to_token",
        "the slots of a request's positions",
        "engine.pages platform.ballast",
    ),
    Attribute(_ROWS + ".free_slots", "whether a row is free", "engine.real"),
    # Slots.
    Attribute(_SLOTS + ".page_size", "KV moves in whole pages", _PAGES),
    Attribute(_SLOTS + ".size", "tokens in all", _PAGES),
    Attribute(_SLOTS + ".device", "where slot numbers are", _PAGES),
    Function(_SLOTS + ".get_kvcache", "the pool behind it", "engine.pages platform.ballast"),
    Function(_SLOTS + ".available_size", "free slots", _PAGES),
    Function(
        _SLOTS + ".alloc", "slots for a guest, where a page is one token", _PAGES, takes="need_size"
    ),
    Function(
        _PAGED + ".alloc_extend",
        "slots for a guest, in pages",
        _PAGES,
        takes="*, prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, last_loc, "
        "extend_num_tokens",
    ),
    # Tensors.
    Class(_MHA, "its KV can move: keys and values by layer", _FORMAT),
    Attribute(_MHA + ".k_buffer", "[slots, heads, d] by layer", _FORMAT),
    Attribute(_MHA + ".v_buffer", "[slots, heads, d] by layer", _FORMAT),
    Attribute(_MHA + ".kv_cache_layout", "only nhd can move", _FORMAT),
    Attribute(_MHA + ".quant_method", "quantised KV has scales beside it", _FORMAT),
    Attribute(_MHA + ".k_scale_buffer", "scales beside the keys, which do not move", _FORMAT),
    Attribute(_MHA + ".v_scale_buffer", "scales beside the values, which do not move", _FORMAT),
    Class(_UNQUANTISED, "what KV without such scales has", _FORMAT),
    Class(_MLA, "its KV can move: one latent by layer", _FORMAT),
    Attribute(_MLA + ".kv_buffer", "[slots, 1, d] by layer", _FORMAT),
    Attribute(_MLA + ".use_dsa", "an indexer's keys do not move", _FORMAT),
    Attribute(_MLA + ".layer_shard_enabled", "not all layers are here", _FORMAT),
    Attribute(_POOLS + ".KVCache.dtype", "fp8 of which kind: both are stored as bytes", _FORMAT),
    Attribute(_POOLS + ".KVCache.store_dtype", "what is stored", _FORMAT),
    Attribute(_POOLS + ".KVCache.page_size", "must be equal", _FORMAT),
    Attribute(_POOLS + ".KVCache.start_layer", "must be equal", _FORMAT),
    # The prefix cache.
    Function(_TREE + ".evictable_size", "slots that could be free", _PAGES),
    Function(_TREE + ".root_node_handle", "a guest begins at the root", _PAGES, takes="extra_key"),
)
