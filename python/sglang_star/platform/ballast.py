"""KV as wide as a paced card's model has it, beside the small model's own.

A paced engine computes with a small model, whose KV is a hundredth of a real one's, so that its
moves would tell nothing of what bytes cost. Ballast adds rows to every slot of its KV pool, in
buffers of the size that a layer of a grouped-query model has. They are written whenever a forward
writes KV and moved with it; attention does not read them. Each row says throughout which token,
position and buffer it is of, so that one in the wrong place shows (:class:`Inspector`).
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

import torch

from sglang_star.engine.batch import completed_tokens
from sglang_star.errors import ConfigError
from sglang_star.launch import ATTRIBUTE

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

ROW_BYTES: Final = 1024
"""K or V of one layer: 4 heads of 128 in 16 bits."""
PER_STEP: Final = 1024
"""Positions of each request that are inspected in one step."""
_WORD: Final = 8
_BELONGS: Final = "_star_ballast"


class Ballast:
    """Rows beside a KV pool.

    Memory is taken from the machine as slots are first written.

    Attributes:
        buffers: int64 ``[slots, words]`` each, one after the other in memory.
    """

    def __init__(self, slots: int, token_bytes: int) -> None:
        whole, rest = divmod(token_bytes, ROW_BYTES)
        self._memory = mmap.mmap(-1, slots * token_bytes)
        # Rows of one token lie far apart: with small pages each would miss the address cache.
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        words = torch.frombuffer(self._memory, dtype=torch.int64)
        split = whole * slots * ROW_BYTES // _WORD
        # Writing is one operation over all buffers of a width.
        self._groups = [words[:split].view(whole, slots, -1)] if whole else []
        self._groups += [words[split:].view(1, slots, -1)] if rest else []
        self.buffers = [buffer for group in self._groups for buffer in group]

    def write(self, slots: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor) -> None:
        """A forward writes KV of ``tokens`` at ``positions`` to ``slots``, each int64 ``[n]``."""
        first = 0
        for group in self._groups:
            numbers = torch.arange(first, first + len(group))[:, None]
            group[:, slots] = _content(tokens, positions, numbers)[..., None]
            first += len(group)

    def wrong(
        self, slots: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor
    ) -> list[int]:
        """Which of ``positions`` hold something else than was written for them.

        The last one is compared in full, of the others a word of a buffer of each width.
        """
        differs = torch.zeros(len(slots), dtype=torch.bool)
        first = 0
        for group in self._groups:
            some = torch.randint(len(group), (len(slots),))
            found = group[some, slots, torch.randint(group.shape[2], (len(slots),))]
            differs |= found != _content(tokens, positions, some + first)
            every = torch.arange(len(group))
            whole = _content(tokens[-1], positions[-1], every + first)[:, None]
            differs[-1] |= (group[:, slots[-1]] != whole).any()
            first += len(group)
        return [int(position) for position in positions[differs]]


def beside(pool: Any, own_bytes: int, server_args: Any) -> list[torch.Tensor]:
    """Give a KV pool the ballast that ``--star-paced-kv-bytes`` asks for.

    Args:
        pool: SGLang's, whose buffers have ``size + page_size`` slots.
        own_bytes: KV per token that it has by itself.
        server_args: SGLang's.

    Returns:
        Buffers ``[slots, words]``; none without the flag.

    Raises:
        ConfigError: the pool is as wide by itself, or belongs to half of a disaggregated pair.
    """
    star = getattr(server_args, ATTRIBUTE, None)
    if star is None or not star.paced_kv_bytes:
        return []
    missing = star.paced_kv_bytes - own_bytes
    if missing <= 0 or missing % _WORD:
        raise ConfigError(
            f"--star-paced-kv-bytes {star.paced_kv_bytes} with a model that has {own_bytes}",
            hint=f"give more than {own_bytes}, a multiple of {_WORD}",
        )
    if server_args.disaggregation_mode != "null":
        raise ConfigError(
            "--star-paced-kv-bytes needs instances that do both phases",
            hint="SGLang hands only the model's own KV from prefill to decode",
        )
    ballast = Ballast(pool.size + pool.page_size, missing)
    setattr(pool, _BELONGS, ballast)
    return ballast.buffers


def of(pool: Any) -> Ballast | None:
    """The ballast of a pool, if it has one."""
    return getattr(pool, _BELONGS, None)


class Inspector:
    """Looks through the ballast of what decodes, again and again, a part at each step."""

    def __init__(self, ballast: Ballast, req_to_token: torch.Tensor) -> None:
        self._ballast = ballast
        self._req_to_token = req_to_token
        self._next: dict[int, int] = {}

    def step(self, reqs: Sequence[Req]) -> None:
        """Inspect the next positions of each request.

        Raises:
            ValueError: one holds something else than was written for it.
        """
        cursors = {id(req): self._next.get(id(req), 0) for req in reqs}
        self._next = {}
        for req in reqs:
            if req.finished():  # its KV is given back
                continue
            length, start = completed_tokens(req), cursors[id(req)]
            start = start if start < length else 0
            end = min(length, start + PER_STEP)
            self._next[id(req)] = end
            prompt = len(req.origin_input_ids)
            tokens = chain(
                req.origin_input_ids[start:end],
                req.output_ids[max(0, start - prompt) : max(0, end - prompt)],
            )
            wrong = self._ballast.wrong(
                self._req_to_token[req.kv.req_pool_idx, start:end].to(torch.int64),
                torch.tensor(list(tokens)),
                torch.arange(start, end),
            )
            if wrong:
                raise ValueError(
                    f"{req.rid}: KV of {len(wrong)} of positions {start}-{end - 1} is not theirs, "
                    f"first {wrong[0]}"
                )


def inspector(scheduler: Scheduler) -> Inspector | None:
    """An inspector of the scheduler's KV pool, if that has ballast."""
    ballast = of(scheduler.token_to_kv_pool_allocator.get_kvcache())
    return Inspector(ballast, scheduler.req_to_token_pool.req_to_token) if ballast else None


def _content(tokens: torch.Tensor, positions: torch.Tensor, buffers: torch.Tensor) -> torch.Tensor:
    """The word that fills a row, never zero: the three numbers side by side."""
    return (tokens << 40) | ((buffers + 1) << 24) | positions
