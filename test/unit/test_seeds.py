from __future__ import annotations

import struct

import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_star.platform.seeds import murmur_hash32

MASK = 0xFFFFFFFF


def reference(data: bytes) -> int:
    """MurmurHash3 x86_32 with seed 0, after its published description."""
    state = 0
    for (block,) in struct.iter_unpack("<I", data):
        k = block * 0xCC9E2D51 & MASK
        k = (k << 15 | k >> 17) & MASK
        state ^= k * 0x1B873593 & MASK
        state = (state << 13 | state >> 19) & MASK
        state = (state * 5 + 0xE6546B64) & MASK
    state ^= len(data)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = (state ^ state >> shift) * factor & MASK
    return state ^ state >> 16


@given(
    st.lists(
        st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**31 - 1)), min_size=1, max_size=4
    ),
    st.integers(1, 9),
)
def test_it_is_murmur3(rows: list[tuple[int, int]], columns: int) -> None:
    seeds = torch.tensor([seed for seed, _ in rows], dtype=torch.uint64)
    positions = torch.tensor([position for _, position in rows])
    hashed = murmur_hash32(None, seeds, positions, torch.arange(columns))
    assert hashed.dtype == torch.uint32
    assert hashed.tolist() == [
        [reference(struct.pack("<QII", seed, position, column)) for column in range(columns)]
        for seed, position in rows
    ]
