"""The copies under torch.compile and on tensors without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import sgl_kernel_ext as kernels
from kernel.layouts import filled
from sgl_kernel_ext import KvBuffers, native

OPS = torch.ops.sgl_kernel_ext
SLOTS = torch.tensor([4, 0, 7])


@pytest.fixture(params=["kernels", "torch"])
def pool(request: pytest.FixtureRequest, host: Any, monkeypatch: pytest.MonkeyPatch) -> KvBuffers:
    if request.param == "torch":
        monkeypatch.setattr(native, "function", lambda device, name: None)
    return KvBuffers([filled(16, 24), filled(16, 8)], page_size=2)


def arguments(pool: KvBuffers, slots: torch.Tensor, dense: torch.Tensor) -> tuple[Any, ...]:
    return (pool.buffers, pool.tables(slots.device), slots, dense, pool.slots, pool.page_size, 1)


def test_a_compiled_function_keeps_and_orders_the_copies(pool: KvBuffers) -> None:
    other = KvBuffers([torch.zeros_like(b) for b in pool.buffers], page_size=2)
    there = torch.tensor([1, 2, 3])

    def move(slots: torch.Tensor, there: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        kernels.gather(pool, slots, out)
        doubled = out ^ 255
        kernels.scatter(pool, slots, doubled)
        kernels.transfer(pool, slots, other, there)
        return doubled

    before = [row.clone() for row in pool.rows]
    out = torch.zeros(3 * pool.slot_bytes, dtype=torch.uint8)
    doubled = torch.compile(move, fullgraph=True, backend="aot_eager")(SLOTS, there, out)
    assert torch.equal(doubled, out ^ 255)
    for was, row, moved in zip(before, pool.rows, other.rows, strict=True):
        assert torch.equal(row[SLOTS], was[SLOTS] ^ 255)
        assert torch.equal(moved[there], row[SLOTS])
        assert not moved[0].any()


def test_the_operators_are_registered_as_torch_wants_it(pool: KvBuffers) -> None:
    out = torch.zeros(3 * pool.slot_bytes, dtype=torch.uint8)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.gather_kv.default, arguments(pool, SLOTS, out), test_utils=checks)
    torch.library.opcheck(OPS.scatter_kv.default, arguments(pool, SLOTS, out), test_utils=checks)


def test_nothing_is_touched_on_fake_tensors(pool: KvBuffers) -> None:
    with FakeTensorMode() as mode:
        buffers = [mode.from_tensor(buffer) for buffer in pool.buffers]
        tables = [mode.from_tensor(table) for table in pool.tables(pool.device)]
        slots = mode.from_tensor(SLOTS)
        out = torch.empty(96, dtype=torch.uint8)
        assert OPS.gather_kv(buffers, tables, slots, out, 8, 2, 1) is None
        assert OPS.scatter_kv(buffers, tables, slots, out, 8, 2, 1) is None
        transfer = (buffers, tables, slots, 8, buffers, tables, slots, 8, 2, 2, 1)
        assert OPS.transfer_kv(*transfer) is None
