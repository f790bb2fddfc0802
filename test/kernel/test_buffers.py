"""What a pointer table says, and which arguments of a copy are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sgl_kernel_ext as kernels
from kernel.layouts import filled
from sgl_kernel_ext import KvBuffers


def test_the_table() -> None:
    first, second = filled(10, 6).view(10, 2, 3), torch.zeros(12, 4)
    pool = KvBuffers([first, second])
    assert pool.host_table.tolist() == [
        [first.data_ptr(), 6, 6, 0],
        [second.data_ptr(), 16, 16, 6],
    ]
    assert (pool.slots, pool.slot_bytes, pool.row_bytes) == (10, 22, [6, 16])


def test_a_page_is_a_longer_row() -> None:
    pool = KvBuffers([filled(10, 6), filled(12, 8)], page_size=4)
    assert pool.host_table[:, 1:].tolist() == [[24, 24, 0], [32, 32, 24]]
    assert pool.slots == 2


def test_entries_may_lie_apart() -> None:
    memory = filled(5, 3, 16)
    pool = KvBuffers([memory[:, 1]])
    assert pool.host_table.tolist() == [[memory.data_ptr() + 16, 48, 16, 0]]


@pytest.mark.parametrize(
    ("buffers", "page_size", "why"),
    [
        ([torch.zeros(4, 8).t()], 1, "not contiguous"),
        ([torch.zeros(1, 8).expand(4, 8)], 1, "not contiguous"),
        ([torch.zeros(4, 3, 8)[:, 0]], 2, "pages"),
        ([torch.zeros(())], 1, "first dimension"),
        ([torch.zeros(4, 8)], 0, "page_size"),
        ([torch.zeros(4, 8), torch.zeros(4, 8, device="meta")], 1, "several devices"),
    ],
)
def test_pools_that_are_refused(buffers: list[torch.Tensor], page_size: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        KvBuffers(buffers, page_size=page_size)


SLOTS = torch.tensor([1, 2])
OUT = torch.zeros(64, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"slots": SLOTS.float()}, "int32 or int64"),
        ({"slots": SLOTS[None]}, "int32 or int64"),
        ({"slots": torch.arange(8)[::4]}, "not contiguous"),
        ({"slots": SLOTS.to("meta")}, "the pool is on cpu"),
        ({"out": OUT.view(torch.int32)}, "uint8"),
        ({"out": OUT.view(2, 32)}, "uint8"),
        ({"out": OUT[::2]}, "contiguous"),
        ({"out": OUT[:31]}, "32 bytes are copied, and the dense side has 31"),
        ({"workers": 0}, "workers"),
    ],
)
def test_arguments_that_are_refused(changed: dict[str, Any], why: str) -> None:
    pool = KvBuffers([filled(10, 16)])
    arguments = {"slots": SLOTS, "out": OUT, "workers": None, **changed}
    slots, dense, workers = arguments.values()
    for copy in (kernels.gather, kernels.scatter):
        with pytest.raises(ValueError, match=why):
            copy(pool, slots, dense, workers=workers)


def test_a_dense_side_inside_of_the_pool_is_refused() -> None:
    memory = filled(160)
    pool = KvBuffers([memory[:80].view(5, 16)])
    with pytest.raises(ValueError, match="lies in the pool"):
        kernels.gather(pool, SLOTS, memory[64:])
    kernels.gather(pool, SLOTS, memory[80:])
    kernels.gather(pool, SLOTS[:0], memory)


@pytest.mark.parametrize(
    ("other", "there", "why"),
    [
        (KvBuffers([filled(9, 8), filled(9, 8)]), SLOTS, "different sizes"),
        (KvBuffers([torch.zeros(9, 16, dtype=torch.uint8, device="meta")]), SLOTS, "no transfer"),
        (KvBuffers([filled(9, 16)]), SLOTS.int(), "differ"),
        (KvBuffers([filled(9, 16)]), SLOTS[:1], "differ"),
    ],
)
def test_transfers_that_are_refused(other: KvBuffers, there: torch.Tensor, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        kernels.transfer(KvBuffers([filled(10, 16)]), SLOTS, other, there)
