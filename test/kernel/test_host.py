"""The copies on host pools against torch, through the public functions."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sgl_kernel_ext as kernels
from kernel.layouts import Case, bytes_of, cases, filled, same
from sgl_kernel_ext import KvBuffers, gather_kv, launch, scatter_kv, transfer_kv

THREADS = st.sampled_from([1, 2, 5])


@pytest.fixture(autouse=True)
def _built(host: Any) -> None:
    """Every test here is of the kernels, not of what stands in for them."""


@pytest.fixture(params=[0, 1 << 62], ids=["past the cache", "through the cache"])
def _stores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "STREAM_FROM", request.param)


@settings(max_examples=100, deadline=None)
@given(case=cases(), threads=THREADS, offset=st.integers(0, 70), stream=st.booleans())
def test_equals_torch(case: Case, threads: int, offset: int, stream: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "STREAM_FROM", 0 if stream else 1 << 62)
        out = case.dense(offset)
        expected = out.clone()
        gather_kv(case.pool.rows, case.slots, expected)
        kernels.gather(case.pool, case.slots, out, workers=threads)
        assert torch.equal(out, expected)

        twin = bytes_of(case.other)
        transfer_kv(case.pool.rows, case.slots, twin, case.other_slots)
        kernels.transfer(case.pool, case.slots, case.other, case.other_slots, workers=threads)
        assert same(case.other, twin)

        twin = bytes_of(case.pool)
        source = case.dense(offset)
        scatter_kv(twin, case.slots, source)
        kernels.scatter(case.pool, case.slots, source, workers=threads)
        assert same(case.pool, twin)


@pytest.mark.usefixtures("_stores")
@pytest.mark.parametrize("rows", [(1024,) * 6 + (8,), (1152, 7, 2000)])
def test_large_copies_are_shared_out_among_threads(rows: tuple[int, ...]) -> None:
    pool = KvBuffers([filled(6000, row) for row in rows])
    slots = torch.randperm(6000)[:3000]
    out = torch.zeros(3000 * pool.slot_bytes, dtype=torch.uint8)
    expected = torch.empty_like(out)
    gather_kv(pool.rows, slots, expected)
    kernels.gather(pool, slots, out, workers=4)
    assert torch.equal(out, expected)
    fresh = KvBuffers([torch.zeros_like(buffer) for buffer in pool.buffers])
    kernels.scatter(fresh, slots, out, workers=4)
    assert all(torch.equal(a[slots], b[slots]) for a, b in zip(pool.rows, fresh.rows, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("page_size", [1, 16])
def test_values_and_their_scales_travel_together(dtype: torch.dtype, page_size: int) -> None:
    def pool() -> KvBuffers:
        values = [torch.randn(64, 2, 64).to(dtype) for _ in range(4)]
        scales = [torch.randn(64, 2) for _ in range(4)]
        return KvBuffers([*values, *scales], page_size=page_size)

    source, target = pool(), pool()
    assert source.slots == 64 // page_size
    here, there = torch.tensor([3, 0]), torch.tensor([1, 2])
    staging = torch.empty(2 * source.slot_bytes, dtype=torch.uint8)
    kernels.gather(source, here, staging)
    kernels.scatter(target, there, staging)
    for a, b in zip(source.rows, target.rows, strict=True):
        assert torch.equal(a[here], b[there])
        assert not torch.equal(a[1], b[1])


def test_within_one_pool() -> None:
    pool = KvBuffers([filled(20, 96), filled(20, 8)])
    before = bytes_of(pool)
    kernels.transfer(pool, torch.tensor([4, 5, 6]), pool, torch.tensor([0, 9, 1]))
    for row, kept in zip(pool.rows, before, strict=True):
        kept[[0, 9, 1]] = kept[[4, 5, 6]]
        assert torch.equal(row, kept)


MAP_NORESERVE = 0x4000
"""Of Linux; Python's mmap has no name for it."""


@pytest.fixture
def sparse() -> torch.Tensor:
    """5 GiB of memory of which only touched pages exist."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    area = mmap.mmap(-1, 5 << 30, flags=flags)
    return torch.frombuffer(area, dtype=torch.uint8)


@pytest.mark.parametrize("row", [1024, 1000, 999])
def test_offsets_past_two_and_four_gigabytes(sparse: torch.Tensor, grid: Any, row: int) -> None:
    slots = (5 << 30) // row
    pool = KvBuffers([sparse[: slots * row].view(slots, row), filled(slots, 1)])
    named = torch.tensor(
        [0, (1 << 31) // row + 1, (1 << 32) // row - 1, (1 << 32) // row + 1, slots - 1]
    )
    wanted = filled(5 * pool.slot_bytes)
    kernels.scatter(pool, named, wanted)
    assert torch.equal(
        sparse[: slots * row].view(slots, row)[named], wanted[: 5 * row].view(5, row)
    )
    for copy in (
        lambda out: kernels.gather(pool, named, out),
        lambda out: grid.gather(pool.host_table, named, out, 4, torch.zeros(5, dtype=torch.int64)),
    ):
        out = torch.zeros_like(wanted)
        copy(out)
        assert torch.equal(out, wanted)


def test_a_dense_area_past_four_gigabytes(sparse: torch.Tensor, grid: Any, host: Any) -> None:
    pool = KvBuffers([filled(9, 64)])
    # As if buffers with 1 GiB per row came before this one.
    table = pool.host_table.clone()
    table[0, 3] = 1 << 30
    slots, counts = torch.tensor([8, 3, 0, 5]), torch.zeros(5, dtype=torch.int64)
    arrived = sparse[4 << 30 : (4 << 30) + 256]
    for copy in (
        lambda: grid.gather(table, slots, sparse, 4, counts),
        lambda: host.gather(table, 9, slots, sparse, 1, 0),
    ):
        copy()
        assert torch.equal(arrived.view(4, 64), pool.rows[0][slots])
        arrived.zero_()


@pytest.mark.parametrize("slot", [-1, 10, 1 << 40])
def test_a_slot_outside_of_the_pool_is_refused(slot: int) -> None:
    pool = KvBuffers([filled(10, 32)])
    out = torch.zeros(64, dtype=torch.uint8)
    with pytest.raises(IndexError, match=rf"slot {slot} at position 1 .* 10"):
        kernels.gather(pool, torch.tensor([3, slot]), out)
    with pytest.raises(IndexError):
        kernels.scatter(pool, torch.tensor([3, slot]), out)
    with pytest.raises(IndexError):
        kernels.transfer(pool, torch.tensor([3]), pool, torch.tensor([slot]))
    assert not out.any()
