"""The CPU's decode attention against SGLang's own."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from sglang_star.platform import attention

CONTEXT = 90
LENGTHS = [1, 7, 64, 33]


def case(heads: int, kv_heads: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    pool = len(LENGTHS) + 2
    order = torch.randperm(pool * CONTEXT, generator=generator).to(torch.int32)
    return {
        "query": noise(len(LENGTHS), heads, 16),
        "output": torch.zeros(len(LENGTHS), heads, 16, dtype=dtype),
        "k_cache": noise(pool * CONTEXT, kv_heads, 16),
        "v_cache": noise(pool * CONTEXT, kv_heads, 16),
        "req_to_token": order.view(pool, CONTEXT),
        "req_pool_indices": torch.tensor([4, 0, 3, 1]),
        "seq_lens": torch.tensor(LENGTHS),
    }


def original(*args: object, **kwargs: object) -> torch.Tensor:
    backend = TorchNativeAttnBackend.__new__(TorchNativeAttnBackend)
    return TorchNativeAttnBackend._run_sdpa_forward_decode(backend, *args, **kwargs)


def refuse(*args: object, **kwargs: object) -> torch.Tensor:
    raise AssertionError("our own implementation covers this")


@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (4, 4), (8, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_sglang(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    theirs, ours = case(heads, kv_heads, dtype), case(heads, kv_heads, dtype)
    original(*theirs.values(), scaling=0.25, enable_gqa=heads != kv_heads)
    attention.decode(refuse, None, *ours.values(), scaling=0.25, enable_gqa=heads != kv_heads)
    torch.testing.assert_close(ours["output"], theirs["output"])


def test_does_not_depend_on_the_batch_around_it() -> None:
    together = case(9, 3, torch.bfloat16)
    attention.decode(refuse, None, *together.values(), scaling=0.25)
    for i in range(len(LENGTHS)):
        alone = case(9, 3, torch.bfloat16)
        for name in ("query", "output", "req_pool_indices", "seq_lens"):
            alone[name] = alone[name][i : i + 1]
        attention.decode(refuse, None, *alone.values(), scaling=0.25)
        assert torch.equal(alone["output"][0], together["output"][i])


def test_leaves_sliding_windows_to_sglang() -> None:
    called = []
    attention.decode(
        lambda *a, **k: called.append(k) or torch.zeros(0),
        None,
        *case(4, 4, torch.float32).values(),
        sliding_window_size=8,
    )
    assert called[0]["sliding_window_size"] == 8
