"""The kernels on a GPU against torch: every layout, many or few blocks, streams, graphs, peers."""

from __future__ import annotations

import pytest
import torch

import sgl_kernel_ext as kernels
from kernel.layouts import LAYOUTS, filled
from sgl_kernel_ext import KvBuffers, gather_kv, scatter_kv, transfer_kv

pytestmark = pytest.mark.usefixtures("_no_reference")


def on(device: str, buffers: list[torch.Tensor]) -> list[torch.Tensor]:
    """The buffers on a device, with their strides and their distance from a boundary."""
    moved = []
    for buffer in buffers:
        lead = buffer.storage_offset() * buffer.element_size() % 16
        extent = buffer.untyped_storage().nbytes()
        memory = torch.zeros(extent + 16, dtype=torch.uint8, device=device)
        memory[:extent].copy_(torch.tensor([], dtype=torch.uint8).set_(buffer.untyped_storage()))
        assert memory.data_ptr() % 16 == 0
        view = memory.as_strided(buffer.shape, buffer.stride(), buffer.storage_offset())
        assert view.data_ptr() % 16 == lead
        moved.append(view)
    return moved


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "no buffers"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_every_layout(device: str, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    for count in (0, 1, 7, 300):
        pool = KvBuffers(on(device, LAYOUTS[name](500)))
        other = KvBuffers(on(device, LAYOUTS[name](700)))
        slots = torch.randperm(500)[:count].to(device, dtype)
        there = torch.randperm(700)[:count].to(device, dtype)
        for blocks in (1, 3, 16, 132):
            out = filled(count * pool.slot_bytes + 7).to(device)
            expected = out.clone()
            gather_kv(pool.rows, slots, expected)
            kernels.gather(pool, slots, out, workers=blocks)
            assert torch.equal(out, expected)

            twin = [row.clone() for row in other.rows]
            transfer_kv(pool.rows, slots, twin, there)
            kernels.transfer(pool, slots, other, there, workers=blocks)
            assert all(map(torch.equal, other.rows, twin))

            source = filled(count * pool.slot_bytes + 7).to(device)
            scatter_kv(twin, there, source)
            kernels.scatter(other, there, source, workers=blocks)
            assert all(map(torch.equal, other.rows, twin))


@pytest.mark.parametrize("page_size", [16, 64])
def test_pages(device: str, page_size: int) -> None:
    pool = KvBuffers(on(device, LAYOUTS["fp8 with scales"](20 * page_size)), page_size=page_size)
    slots = torch.randperm(20)[:9].to(device)
    out = torch.zeros(9 * pool.slot_bytes, dtype=torch.uint8, device=device)
    expected = torch.zeros_like(out)
    gather_kv(pool.rows, slots, expected)
    kernels.gather(pool, slots, out)
    assert torch.equal(out, expected)


def test_offsets_past_four_gigabytes(device: str) -> None:
    if device == "cpu":
        pytest.skip("test/kernel has it for the host")
    slots = (5 << 30) // 1024
    pool = KvBuffers([torch.zeros(slots, 1024, dtype=torch.uint8, device=device)])
    named = torch.tensor([0, (1 << 31) // 1024 + 1, (1 << 32) // 1024 + 1, slots - 1]).to(device)
    source = filled(4 * 1024).to(device)
    out = torch.zeros_like(source)
    kernels.scatter(pool, named, source)
    kernels.gather(pool, named, out)
    assert torch.equal(out, source)


def test_pinned_host_memory_is_a_dense_side(cuda: str) -> None:
    pool = KvBuffers(on(cuda, LAYOUTS["mha"](100)))
    slots = torch.randperm(100)[:40].to(cuda)
    out = torch.zeros(40 * pool.slot_bytes, dtype=torch.uint8).pin_memory()
    kernels.gather(pool, slots, out)
    torch.cuda.synchronize()
    expected = torch.zeros_like(out, device=cuda)
    gather_kv(pool.rows, slots, expected)
    assert torch.equal(out, expected.cpu())
    fresh = KvBuffers([torch.zeros_like(buffer) for buffer in pool.buffers])
    kernels.scatter(fresh, slots, out)
    assert all(torch.equal(a[slots], b[slots]) for a, b in zip(pool.rows, fresh.rows, strict=True))


def test_a_copy_is_in_the_callers_stream_and_nobody_waits(cuda: str) -> None:
    pool = KvBuffers(on(cuda, LAYOUTS["mha"](100)))
    slots = torch.arange(40, device=cuda)
    out = torch.zeros(40 * pool.slot_bytes, dtype=torch.uint8, device=cuda)
    stream, done = torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)  # cycles: some tenths of a second
        for buffer in pool.buffers:
            buffer.fill_(7)
        kernels.gather(pool, slots, out)
        done.record()
    assert not done.query()
    done.synchronize()
    assert bool((out == 7).all())


def test_a_captured_copy_follows_its_slots(cuda: str) -> None:
    pool = KvBuffers(on(cuda, LAYOUTS["fp8 with scales"](100)))
    slots = torch.arange(40, device=cuda)
    out = torch.zeros(40 * pool.slot_bytes, dtype=torch.uint8, device=cuda)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.gather(pool, slots, out)
    for _ in range(3):
        slots.copy_(torch.randperm(100)[:40])
        expected = torch.zeros_like(out)
        gather_kv(pool.rows, slots, expected)
        graph.replay()
        assert torch.equal(out, expected)


def _write_into(buffers: list[torch.Tensor], slots: torch.Tensor) -> None:
    """In another process: write into the pool that was handed over."""
    device = slots.device
    mine = KvBuffers([torch.full_like(buffer, 5, device=device) for buffer in buffers])
    kernels.transfer(mine, slots, KvBuffers(buffers), slots)
    torch.cuda.synchronize()


@pytest.mark.parametrize("peer", [0, 1])
def test_into_the_mapped_memory_of_another_process(cuda: str, peer: int) -> None:
    if peer >= torch.cuda.device_count():
        pytest.skip("there is one GPU")
    if peer and not torch.cuda.can_device_access_peer(0, peer):
        pytest.skip("the GPUs cannot reach each other")
    pool = [torch.zeros(50, 256, dtype=torch.uint8, device=cuda) for _ in range(4)]
    slots = torch.arange(3, 30, 4, device=f"cuda:{peer}")
    process = torch.multiprocessing.get_context("spawn").Process(
        target=_write_into, args=(pool, slots)
    )
    process.start()
    process.join(120)
    assert process.exitcode == 0
    for buffer in pool:
        assert bool((buffer[slots.to(cuda)] == 5).all())
        assert int((buffer == 5).any(dim=1).sum()) == len(slots)


def test_the_operators(cuda: str) -> None:
    pool = KvBuffers(on(cuda, LAYOUTS["mha"](100)))
    slots = torch.randperm(100)[:8].to(cuda)
    out = torch.zeros(8 * pool.slot_bytes, dtype=torch.uint8, device=cuda)

    def gathered(slots: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        kernels.gather(pool, slots, out)
        return out ^ 255

    flipped = torch.compile(gathered, fullgraph=True)(slots, out)
    expected = torch.zeros_like(out)
    gather_kv(pool.rows, slots, expected)
    assert torch.equal(out, expected)
    assert torch.equal(flipped, expected ^ 255)
