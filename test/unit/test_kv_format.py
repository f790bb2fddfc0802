"""Which pools of SGLang's can move, and what two of them must have in common."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.layers.quantization import fp4_kv_cache_quant_method as quantised
from sglang.srt.mem_cache import memory_pool

from sglang_star.engine import kv_format

HEADS, DIM, LAYERS, SLOTS = 2, 8, 3, 16


def mha(dtype: torch.dtype = torch.bfloat16, kind: Any = None, **changed: Any) -> Any:
    """SGLang's own pool."""
    pool = (kind or memory_pool.MHATokenToKVPool)(
        size=SLOTS,
        page_size=changed.pop("page_size", 1),
        dtype=dtype,
        head_num=changed.pop("heads", HEADS),
        head_dim=DIM,
        layer_num=changed.pop("layers", LAYERS),
        start_layer=changed.pop("start_layer", None),
        device="cpu",
        enable_memory_saver=False,
        enable_alt_stream=False,
        kv_cache_layout=changed.pop("layout", None),
    )
    for name, value in changed.items():
        setattr(pool, name, value)
    return pool


def mla(**changed: Any) -> Any:
    pool = memory_pool.MLATokenToKVPool(
        size=SLOTS,
        page_size=1,
        dtype=torch.bfloat16,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )
    for name, value in changed.items():
        setattr(pool, name, value)
    return pool


@pytest.mark.parametrize(
    ("pool", "tensors"),
    [
        (mha(), 2 * LAYERS),
        (mha(torch.float8_e4m3fn), 2 * LAYERS),
        (mha(page_size=4), 2 * LAYERS),
        (mla(), LAYERS),
    ],
    ids=["mha", "fp8", "pages", "mla"],
)
def test_plain_pools_move(pool: Any, tensors: int) -> None:
    assert kv_format.refusal(pool) == ""
    assert len(kv_format.buffers(pool)) == tensors
    assert kv_format.layout(pool)["kv_tensors"] == tensors


REFUSED = {
    "hnd layout": (lambda: mha(kv_cache_layout="hnd"), "layout hnd"),
    "aiter layout": (lambda: mha(kv_cache_layout="vectorized_5d"), "layout vectorized_5d"),
    "fp4, own class": (lambda: mha(kind=memory_pool.MHATokenToKVPoolFP4), "TokenToKVPoolFP4"),
    "fp4, by method": (
        lambda: mha(
            quant_method=object.__new__(quantised.NVFP4KVCacheMethod),
            k_scale_buffer=[torch.zeros(1)],
        ),
        "NVFP4KVCacheMethod",
    ),
    "scales": (lambda: mha(k_scale_buffer=[torch.zeros(1)]), "scales in buffers of their own"),
    "page-major": (
        lambda: object.__new__(memory_pool.PageMajorMHATokenToKVPool),
        "PageMajorMHATokenToKVPool",
    ),
    "mxfp8": (lambda: object.__new__(memory_pool.MHATokenToKVPoolMXFP8), "MXFP8"),
    "no KV": (lambda: object.__new__(memory_pool.NoOpMHATokenToKVPool), "NoOpMHATokenToKVPool"),
    "fp4 latents": (lambda: object.__new__(memory_pool.MLATokenToKVPoolFP4), "PoolFP4"),
    "sparse attention": (lambda: object.__new__(memory_pool.DSATokenToKVPool), "DSATokenToKVPool"),
    "sparse attention, by flag": (lambda: mla(use_dsa=True), "DSA"),
    "layers divided": (lambda: mla(layer_shard_enabled=True), "divided among ranks"),
    "hybrid": (lambda: object.__new__(memory_pool.HybridLinearKVPool), "HybridLinearKVPool"),
    "unknown": (lambda: SimpleNamespace(), "SimpleNamespace"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_every_other_pool_is_refused_with_its_reason(case: str) -> None:
    make, reason = REFUSED[case]
    pool = make()
    assert reason in kv_format.refusal(pool)
    assert "cannot move" in kv_format.refusal(pool)
    assert kv_format.buffers(pool) == []


def test_encoder_decoder_models_are_refused() -> None:
    assert kv_format.model_refusal(SimpleNamespace(is_encoder_decoder=False)) == ""
    told = kv_format.model_refusal(SimpleNamespace(is_encoder_decoder=True))
    assert "encoder-decoder" in told
    assert "cannot move" in told


def test_a_pool_of_sliding_windows_is_refused() -> None:
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    assert "SWAKVPool" in kv_format.refusal(object.__new__(SWAKVPool))


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"dtype": torch.float8_e5m2}, "kv_dtype"),  # stored as the same bytes
        ({"page_size": 4}, "kv_page_size"),
        ({"heads": 4}, "kv_rows"),
        ({"layers": 4}, "kv_tensors"),
        ({"start_layer": 3}, "kv_first_layer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pools_that_differ_have_different_layouts(changed: dict[str, Any], field: str) -> None:
    plain = kv_format.layout(mha(torch.float8_e4m3fn))
    other = kv_format.layout(mha(**{"dtype": torch.float8_e4m3fn, **changed}))
    assert {name for name in plain if plain[name] != other[name]} == {field}
