from __future__ import annotations

import pytest
import torch

from sgl_kernel_ext import as_token_rows, gather_kv, scatter_kv


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_gather_then_scatter_moves_exactly_the_named_tokens(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    source = [torch.randn(50, 2, 8).to(dtype) for _ in range(4)]
    target = [torch.randn(70, 2, 8).to(dtype) for _ in range(4)]
    untouched = [buffer.clone() for buffer in target]
    here, there = torch.randperm(50)[:13], torch.randperm(70)[:13]
    rows = [as_token_rows(buffer) for buffer in source]
    staging = torch.full((13 * sum(r.shape[1] for r in rows) + 5,), 99, dtype=torch.uint8)
    gather_kv(rows, here, staging)
    scatter_kv([as_token_rows(buffer) for buffer in target], there, staging)
    assert staging[-5:].tolist() == [99] * 5
    others = torch.tensor(sorted(set(range(70)) - set(there.tolist())))
    for moved, original, before in zip(target, source, untouched, strict=True):
        raw = lambda t: t.view(torch.uint8)  # noqa: E731
        assert torch.equal(raw(moved)[there], raw(original)[here])
        assert torch.equal(raw(moved)[others], raw(before)[others])


def test_buffers_of_different_widths_share_one_staging_area() -> None:
    buffers = [torch.arange(40, dtype=torch.float32).view(10, 4), torch.ones(10, 1, 3)]
    rows = [as_token_rows(buffer) for buffer in buffers]
    staging = torch.empty(2 * (16 + 12), dtype=torch.uint8)
    gather_kv(rows, torch.tensor([9, 0]), staging)
    assert torch.equal(
        staging[:32].view(torch.float32), torch.tensor([36.0, 37, 38, 39, 0, 1, 2, 3])
    )


def test_a_strided_buffer_is_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        as_token_rows(torch.zeros(4, 8).t())
