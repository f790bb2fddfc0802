"""MurmurHash3 (x86, 32 bit) over (seed, position, column), in plain torch.

SGLang derives the noise of seeded sampling from this hash; its own CPU version is a compiled
operator that the wheel lacks. Reference: A. Appleby, MurmurHash3, public domain.
"""

from __future__ import annotations

from typing import Any

import torch

_MASK = 0xFFFFFFFF


def murmur_hash32(original: Any, seed: Any, positions: Any, col_indices: Any) -> torch.Tensor:
    """AROUND ``murmur_hash32``: ``[n]``, ``[n]``, ``[m]`` integers -> uint32 ``[n, m]``.

    The key is four 32-bit blocks: the seed's low and high word, the position, the column.
    """
    wide = seed.view(torch.int64)
    state = torch.zeros_like(wide)
    for block in (wide & _MASK, (wide >> 32) & _MASK, positions.to(torch.int64) & _MASK):
        state = _mix(state, block)
    hashed = _mix(state.unsqueeze(1), col_indices.to(torch.int64).unsqueeze(0) & _MASK)
    return _finish(hashed ^ 16).to(torch.uint32)


def _mix(state: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    block = _times(block, 0xCC9E2D51)
    block = _times(_rotate(block, 15), 0x1B873593)
    return (_rotate(state ^ block, 13) * 5 + 0xE6546B64) & _MASK


def _finish(state: torch.Tensor) -> torch.Tensor:
    state = _times(state ^ (state >> 16), 0x85EBCA6B)
    state = _times(state ^ (state >> 13), 0xC2B2AE35)
    return state ^ (state >> 16)


def _times(value: torch.Tensor, factor: int) -> torch.Tensor:
    """Product modulo 2^32 of values below 2^32; int64 wraps, which keeps the low bits right."""
    return (value * factor) & _MASK


def _rotate(value: torch.Tensor, bits: int) -> torch.Tensor:
    return ((value << bits) | (value >> (32 - bits))) & _MASK
