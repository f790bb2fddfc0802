"""What the GPU computes, lane by lane on the host, against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel.layouts import LAYOUTS, Case, bytes_of, cases, filled, same
from sgl_kernel_ext import KvBuffers, gather_kv, scatter_kv, transfer_kv

WORKERS = st.sampled_from([1, 2, 16, 64, 257, -3, -64])
OFFSETS = st.sampled_from([0, 0, 16, 8, 4, 1])


def counted() -> torch.Tensor:
    return torch.zeros(5, dtype=torch.int64)


def check_counts(counts: torch.Tensor, nbytes: int) -> None:
    """Every byte was stored once, and no access was one that a GPU refuses."""
    *stored, misaligned = counts.tolist()
    assert sum(n * width for n, width in zip(stored, (1, 4, 8, 16), strict=True)) == nbytes
    assert misaligned == 0


@settings(max_examples=150, deadline=None)
@given(case=cases(), workers=WORKERS, offset=OFFSETS)
def test_gather(grid: Any, case: Case, workers: int, offset: int) -> None:
    out, counts = case.dense(offset), counted()
    expected = out.clone()
    gather_kv(case.pool.rows, case.slots, expected)
    grid.gather(case.pool.host_table, case.slots, out, workers, counts)
    assert torch.equal(out, expected)
    check_counts(counts, case.nbytes)


@settings(max_examples=150, deadline=None)
@given(case=cases(), workers=WORKERS, offset=OFFSETS)
def test_scatter(grid: Any, case: Case, workers: int, offset: int) -> None:
    source, counts = case.dense(offset), counted()
    twin = KvBuffers(bytes_of(case.pool))
    scatter_kv(twin.rows, case.slots, source)
    grid.scatter(case.pool.host_table, case.slots, source, workers, counts)
    assert same(case.pool, twin.rows)
    check_counts(counts, case.nbytes)


@settings(max_examples=150, deadline=None)
@given(case=cases(), workers=WORKERS)
def test_transfer(grid: Any, case: Case, workers: int) -> None:
    counts = counted()
    twin = bytes_of(case.other)
    transfer_kv(case.pool.rows, case.slots, twin, case.other_slots)
    tables = (case.pool.host_table, case.slots, case.other.host_table, case.other_slots)
    grid.transfer(*tables, workers, counts)
    assert same(case.other, twin)
    check_counts(counts, case.nbytes)


@pytest.mark.parametrize("name", ["mha", "gqa, 7b", "mla", "mqa"])
@pytest.mark.parametrize("tokens", [1, 7, 100])
def test_rows_of_whole_vectors_are_copied_in_vectors(grid: Any, name: str, tokens: int) -> None:
    pool, counts = KvBuffers(LAYOUTS[name](100)), counted()
    out = torch.empty(tokens * pool.slot_bytes, dtype=torch.uint8)
    slots, expected = torch.randperm(100)[:tokens], torch.empty_like(out)
    gather_kv(pool.rows, slots, expected)
    grid.gather(pool.host_table, slots, out, 8, counts)
    assert torch.equal(out, expected)
    assert counts.tolist() == [0, 0, 0, out.numel() // 16, 0]


def test_small_rows_do_not_narrow_the_large_ones(grid: Any) -> None:
    pool, counts = (
        KvBuffers([filled(9, 256), filled(9, 256), filled(9, 8), filled(9, 3)]),
        counted(),
    )
    out = torch.empty(5 * pool.slot_bytes, dtype=torch.uint8)
    grid.gather(pool.host_table, torch.arange(5), out, 8, counts)
    assert counts.tolist() == [15, 0, 5, 160, 0]


@given(dividend=st.integers(0, 2**62), divisor=st.integers(1, 2**30))
def test_the_division_that_avoids_64_bits(grid: Any, dividend: int, divisor: int) -> None:
    for value in (dividend, dividend % 2**33, dividend % 2**32):
        assert grid.quotient(value, divisor) == value // divisor


def test_a_page_named_twice_is_gathered_twice(grid: Any) -> None:
    pool = KvBuffers([filled(12, 24)], page_size=4)
    out = torch.empty(3 * pool.slot_bytes, dtype=torch.uint8)
    grid.gather(pool.host_table, torch.tensor([2, 0, 2]), out, 4, counted())
    assert torch.equal(out.view(3, -1), pool.rows[0][[2, 0, 2]])
