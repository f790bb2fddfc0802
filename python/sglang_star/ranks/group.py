"""The ranks of one engine, and the two things they ask each other."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist


class Ranks(Protocol):
    """Who runs this engine together.

    Every rank has to call the same methods in the same order: what decides about a call is the
    same on all of them.

    Attributes:
        rank: this one, from 0; size: how many there are.
    """

    rank: int
    size: int

    def gather(self, data: bytes) -> tuple[bytes, ...]:
        """What each rank gives, by rank, to all of them."""

    def least(self, *values: int) -> tuple[int, ...]:
        """The least of what each rank gives, place by place."""


class Group:
    """Ranks in a process group of torch, over the host's network.

    Args:
        group: one that carries tensors of the CPU, such as gloo's.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def gather(self, data: bytes) -> tuple[bytes, ...]:
        """See :class:`Ranks`."""
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(data)]), group=self._group)
        longest = max(max(int(size) for size in sizes), 1)
        padded = torch.zeros(longest, dtype=torch.uint8)
        if data:
            padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        found = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(found, padded, group=self._group)
        return tuple(
            one[: int(size)].numpy().tobytes() for one, size in zip(found, sizes, strict=True)
        )

    def least(self, *values: int) -> tuple[int, ...]:
        """See :class:`Ranks`."""
        agreed = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=self._group)
        return tuple(agreed.tolist())
