"""Pools as models have them, small, and random cases over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from sgl_kernel_ext import KvBuffers

Make = Callable[[int], list[torch.Tensor]]


def filled(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8).view(dtype)


def of(*rows: int) -> Make:
    """Buffers of these row sizes in bytes."""
    return lambda slots: [filled(slots, row) for row in rows]


def shifted(row: int, by: int) -> Make:
    """A buffer that begins ``by`` bytes after a boundary."""
    return lambda slots: [filled(slots * row + by + 16)[by : by + slots * row].view(slots, row)]


def interleaved(layers: int, row: int) -> Make:
    """Layers beside each other in one memory, as in a pool that is laid out page first."""

    def make(slots: int) -> list[torch.Tensor]:
        memory = filled(slots, layers, row)
        return [memory[:, layer] for layer in range(layers)]

    return make


LAYOUTS: dict[str, Make] = {
    "mha": of(*[512] * 4),
    "gqa, 7b": of(*[1024] * 6),
    "mqa": of(*[64] * 4),
    "mla": of(*[1152] * 3),
    "fp8 with scales": of(256, 256, 8, 8),
    "fp4 with scales": of(288, 18, 288, 18),
    "scales only": of(8, 8),
    "ragged": of(1, 2, 3, 5, 7, 13, 103),
    "ends of 1 to 7": of(*(64 + end for end in range(1, 8))),
    "longer than a tile": of(5000, 4096),
    "one byte off": shifted(64, 1),
    "four bytes off": shifted(48, 4),
    "eight bytes off": shifted(48, 8),
    "interleaved": interleaved(3, 48),
    "empty rows": lambda slots: [filled(slots, 0), filled(slots, 16), filled(slots, 0)],
    "no buffers": lambda slots: [],
}


@dataclass
class Case:
    """Two pools of one layout, and slots in them that a copy may name."""

    pool: KvBuffers
    other: KvBuffers
    slots: torch.Tensor
    other_slots: torch.Tensor

    @property
    def nbytes(self) -> int:
        return len(self.slots) * self.pool.slot_bytes

    def dense(self, offset: int = 0) -> torch.Tensor:
        """Random bytes for the dense side, ``offset`` after a boundary, and some behind."""
        return filled(offset + self.nbytes + 33)[offset:]


def slots_of(count: int, of: int, runs: bool) -> torch.Tensor:
    """Different slots in random order, or several runs of neighbours."""
    if not runs:
        return torch.randperm(of)[:count]
    begins = torch.randperm(of // 8)[: -(-count // 8)] * 8
    return (begins[:, None] + torch.arange(8)).flatten()[:count]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    make = LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))]
    page_size = draw(st.sampled_from([1, 1, 4]))
    pages = draw(st.integers(1, 160))
    count = draw(st.integers(0, pages))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    buffers = [make(pages * page_size), make((pages + 16) * page_size)]
    if any(b.stride(0) != b[0].numel() for b in buffers[0] if b.dim()):
        page_size = 1  # pages that are not one piece are refused
    pool, other = (KvBuffers(b, page_size=page_size) for b in buffers)
    here = slots_of(count, pages, draw(st.booleans()))[: pool.slots]
    there = slots_of(len(here), pages + 16, draw(st.booleans()))
    count = min(len(here), len(there))
    return Case(pool, other, here[:count].to(dtype), there[:count].to(dtype))


def bytes_of(pool: KvBuffers) -> list[torch.Tensor]:
    """A copy of all that a pool's slots hold."""
    return [row.clone() for row in pool.rows]


def same(pool: KvBuffers, rows: list[torch.Tensor]) -> bool:
    return all(torch.equal(row, kept) for row, kept in zip(pool.rows, rows, strict=True))
