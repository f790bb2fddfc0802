"""Pools of KV as models have them, and every way there is to copy out of them and into them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

import sgl_kernel_ext as kernels
from sgl_kernel_ext import KvBuffers

SHAPES: Final[dict[str, list[int]]] = {
    "smollm2-135m": [3 * 64 * 2] * 60,
    "qwen2.5-0.5b": [2 * 64 * 2] * 48,
    "7b": [4 * 128 * 2] * 56,
    "7b-fp8": [4 * 128] * 56 + [4 * 4] * 56,
    "mla": [576 * 2] * 61,
}
"""Bytes per token of each buffer: K and V in bfloat16, 8 bits with a float32 scale per head, or
the latent KV of MLA."""

ROOM: Final = 4
"""The pool holds this many times the tokens copied, so that its pages are well mixed."""

Ways = dict[str, Callable[[], Any]]


@dataclass
class Pool:
    """A pool, a fresh one to copy into, slots in them, and the dense side."""

    source: KvBuffers
    target: KvBuffers
    slots: torch.Tensor
    staging: torch.Tensor
    other: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of one copy."""
        return self.staging.numel()


def make(shape: str, tokens: int, page_size: int, scattered: bool, device: str) -> Pool:
    """Pages of ``page_size`` tokens in random order, or all tokens in one run."""
    torch.manual_seed(tokens)
    sizes, room = SHAPES[shape], ROOM * tokens
    source = [torch.randint(0, 256, (room, n), dtype=torch.uint8, device=device) for n in sizes]
    pages = torch.randperm(room // page_size)[: tokens // page_size, None] * page_size
    slots = (pages + torch.arange(page_size)).flatten() if scattered else torch.arange(tokens)
    pool = KvBuffers(source)
    staging = torch.zeros(tokens * pool.slot_bytes, dtype=torch.uint8, device=device)
    fresh = KvBuffers([torch.zeros_like(buffer) for buffer in source])
    return Pool(pool, fresh, slots.to(device), staging, torch.zeros_like(staging))


def verify(pool: Pool, workers: int) -> None:
    """Copy out and in, and look.

    Raises:
        RuntimeError: what came back is not what went in.
    """
    kernels.gather(pool.source, pool.slots, pool.staging, workers=workers)
    kernels.scatter(pool.target, pool.slots, pool.staging, workers=workers)
    pairs = zip(pool.source.rows, pool.target.rows, strict=True)
    if not all(torch.equal(a[pool.slots], b[pool.slots]) for a, b in pairs):
        raise RuntimeError("scattered KV differs from what was gathered")


def gathers(pool: Pool, workers: list[int]) -> Ways:
    """Every way out of the pool, the plain copy first."""
    return _ways(pool, pool.source, kernels.gather, kernels.gather_kv, workers)


def scatters(pool: Pool, workers: list[int]) -> Ways:
    """Every way into the pool, the plain copy first."""
    return _ways(pool, pool.target, kernels.scatter, kernels.scatter_kv, workers)


def _ways(
    pool: Pool,
    buffers: KvBuffers,
    kernel: Callable[..., None],
    torch_copy: Callable[..., None],
    workers: list[int],
) -> Ways:
    layers = [KvBuffers([buffer]) for buffer in buffers.buffers]
    parts = _parts(pool)

    def per_layer() -> None:
        for layer, part in zip(layers, parts, strict=True):
            kernel(layer, pool.slots, part, workers=1)

    ways: Ways = {"copy x1": lambda: _copy(pool), **_copies(pool, workers)}
    for n in workers:
        ways[f"kernel x{n}"] = partial(kernel, buffers, pool.slots, pool.staging, workers=n)
    ways["per layer"] = per_layer
    ways["torch"] = partial(torch_copy, buffers.rows, pool.slots, pool.staging)
    return ways


def _parts(pool: Pool) -> list[torch.Tensor]:
    count = pool.slots.numel()
    return list(pool.staging.split([count * size for size in pool.source.row_bytes]))


def _copy(pool: Pool) -> None:
    if pool.staging.device.type == "cpu":
        ctypes.memmove(pool.other.data_ptr(), pool.staging.data_ptr(), pool.nbytes)
    else:
        pool.other.copy_(pool.staging)


def _copies(pool: Pool, workers: list[int]) -> Ways:
    """torch's plain copy on several threads of the host; on a GPU a copy takes what it likes."""
    if pool.staging.device.type != "cpu":
        return {}
    return {f"copy x{n}": _threaded(pool, n) for n in workers if n > 1}


def _threaded(pool: Pool, n: int) -> Callable[[], Any]:
    before = torch.get_num_threads()

    def copy() -> None:
        torch.set_num_threads(n)
        pool.other.copy_(pool.staging)
        torch.set_num_threads(before)

    return copy
