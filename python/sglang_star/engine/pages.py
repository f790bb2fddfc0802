"""A request's KV on this instance: rows, slots, and their bytes.

Everything here happens between decode steps, on the scheduler thread.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.common import evict_from_tree_cache, release_kv_cache

import sgl_kernel_ext as kernels
from sglang_star.engine import kv_format
from sglang_star.engine.copies import Begun, Lane
from sglang_star.platform import ballast

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler


class KvPages:
    """KV memory of one scheduler.

    Attributes:
        page_size: tokens per KV page; device: where it is.
        token_bytes: bytes of KV per token over all layers.
        layout: what must be equal between two instances for their KV to be interchangeable.
        unsupported: why KV of this pool cannot move; empty if it can.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._allocator = scheduler.token_to_kv_pool_allocator
        self._rows_of = scheduler.req_to_token_pool
        self._tree = scheduler.tree_cache
        self.page_size: int = self._allocator.page_size
        pool = self._allocator.get_kvcache()
        buffers = kv_format.buffers(pool)
        self.unsupported = kv_format.refusal(pool)
        own_bytes = sum(buffer[0].nbytes for buffer in buffers)
        buffers += ballast.beside(pool, own_bytes, scheduler.server_args) if buffers else []
        self._kv = kernels.KvBuffers(buffers)
        self.device = self._kv.device
        kernels.prepare(self.device.type)
        self._lane = Lane(self.device)
        self.token_bytes = self._kv.slot_bytes
        self.layout = kv_format.layout(pool)

    @property
    def capacity(self) -> int:
        """Tokens the pool holds in all."""
        return int(self._allocator.size)

    @property
    def free(self) -> int:
        """Tokens that could be allocated now, evicting cached prefixes if need be."""
        return int(self._allocator.available_size()) + int(self._tree.evictable_size())

    def gather(self, req: Req, start: int, end: int, out: torch.Tensor) -> Begun:
        """Begin to copy KV of positions ``[start, end)`` into ``out``.

        Args:
            req: holds them.
            start: first position.
            end: behind the last.
            out: uint8 ``[>= (end - start) * token_bytes]``, on the pool's device or the host; there
                it should be pinned.
        """
        slots, size = self._slots(req, start, end), (end - start) * self.token_bytes

        def work() -> None:
            if out.device == self.device:
                kernels.gather(self._kv, slots, out)
                return
            # Over the bus in one piece, and not buffer by buffer.
            dense = torch.empty(size, dtype=torch.uint8, device=self.device)
            kernels.gather(self._kv, slots, dense)
            out[:size].copy_(dense, non_blocking=True)

        return self._lane.run(work)

    def scatter(
        self, req: Req, start: int, end: int, after: Iterable[Any] = ()
    ) -> Callable[[torch.Tensor], Begun]:
        """Prepare to copy KV into positions ``[start, end)``, wherever the request is by then.

        Returns:
            What begins the copy; it takes the bytes, uint8 ``[(end - start) * token_bytes]``. The
            copy follows all that the streams ``after`` were given by then.
        """
        slots = self._slots(req, start, end)

        def begin(source: torch.Tensor) -> Begun:
            def work() -> None:
                dense = source
                if dense.device != self.device:
                    dense = dense.to(self.device, non_blocking=True)
                kernels.scatter(self._kv, slots, dense)

            return self._lane.run(work, after)

        return begin

    def reserve_row(self, req: Req) -> bool:
        """Give the request a row of the request table; False if none is free."""
        return self._rows_of.alloc([req]) is not None

    def extend(self, req: Req, length: int) -> bool:
        """Allocate KV so that the request holds positions ``[0, length)``; False if full.

        A request without KV but with a row is extended from nothing.
        """
        held = req.kv.kv_allocated_len
        delta = length - held
        if delta <= 0:
            return True
        evict_from_tree_cache(self._tree, delta + self.page_size)
        slots = self._allocate(req, held, length)
        if slots is None:
            return False
        self._rows_of.write((req.kv.req_pool_idx, slice(held, length)), slots.to(torch.int32))
        req.kv.kv_allocated_len = length
        return True

    def release(self, req: Req, *, keep_prefix: bool) -> None:
        """Free row and KV; ``keep_prefix`` leaves the KV evictable in the prefix cache."""
        if not req.kv.holds_kv:
            return
        if not req.kv.kv_allocated_len:
            self._rows_of.free(req)
            return
        if not keep_prefix:
            # Nothing of it is committed output; SGLang frees by committed length.
            req.kv.kv_committed_len = req.kv.kv_allocated_len
        release_kv_cache(req, self._tree, checkpoint=keep_prefix)

    def detach(self, req: Req) -> Req:
        """Take what the request holds from it; released with what is returned."""
        holder = copy.copy(req)
        holder.kv = req.detach_kv()
        req.lock = None
        return holder

    def bind_to_root(self, req: Req) -> None:
        """Make the request own its whole row, sharing no cached prefix."""
        req.prefix_len = 0
        req.last_node = self._tree.root_node_handle(req.extra_key)
        req.last_host_node = req.last_node
        req.best_match_node = req.last_node
        req.lock = None
        req.kv.cache_protected_len = 0
        req.kv.cache_inserted_len = 0
        req.num_matched_prefix_tokens = 0
        req.host_hit_length = 0

    def _slots(self, req: Req, start: int, end: int) -> torch.Tensor:
        return self._rows_of.req_to_token[req.kv.req_pool_idx, start:end].to(torch.int64)

    def _allocate(self, req: Req, held: int, length: int) -> torch.Tensor | None:
        if self.page_size == 1:
            return self._allocator.alloc(length - held)
        device = self._allocator.device
        last = self._slots(req, held - 1, held) if held else torch.tensor([-1], device=device)
        before, after = torch.tensor([held]), torch.tensor([length])
        return self._allocator.alloc_extend(
            prefix_lens=before.to(device),
            prefix_lens_cpu=before,
            seq_lens=after.to(device),
            seq_lens_cpu=after,
            last_loc=last.to(device),
            extend_num_tokens=length - held,
        )
