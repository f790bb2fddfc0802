"""The verbs on SGLang: the one engine that serves."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.runtime_context import get_serving

from sglang_star.engine import batch, codec, replay, weights
from sglang_star.engine.bounds import Bounds
from sglang_star.engine.clock import Clock, RealClock
from sglang_star.engine.copies import Unloading
from sglang_star.engine.kv_format import model_refusal
from sglang_star.engine.pages import KvPages
from sglang_star.engine.tickets import Tickets
from sglang_star.errors import MalformedMessage, OrderRefused
from sglang_star.migration.transport.base import Fetch
from sglang_star.predictor.state import export_state, import_state
from sglang_star.star_request import star_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler


class SglangEngine:
    """See :class:`~sglang_star.engine.verbs.Engine`.

    Args:
        clock: its time and its new names; several ranks have one in common.
        agree: see :class:`Tickets`; with several ranks.

    Attributes:
        pages: its KV memory; loaded: the weights of its model; tickets: copies of KV.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        clock: Clock | None = None,
        agree: Callable[[Sequence[int]], Sequence[int]] | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._clock = clock or RealClock()
        self._outputs: dict[str, array[int]] = {}
        model = scheduler.model_config
        self._bounds = Bounds(model.vocab_size, model.context_len)
        self.tickets = Tickets(agree)
        self._draining: list[tuple[Collection[int], Req]] = []
        self.pages = KvPages(scheduler)
        self.loaded = weights.of_scheduler(scheduler)
        server_args = scheduler.server_args
        if server_args.startup_weight_load_mode != "overlap":  # else they are not all here yet
            self.loaded.checksum()
        self.unsupported = self.pages.unsupported or model_refusal(scheduler.model_config)
        self.page_size = self.pages.page_size
        self.token_bytes = self.pages.token_bytes
        self.serves_decode = scheduler.disaggregation_mode != DisaggregationMode.PREFILL

    # ------------------------------------------------------------------ time and names

    def now(self) -> float:
        """See :class:`Engine`."""
        return self._clock.now()

    def wall(self) -> float:
        """See :class:`Engine`."""
        return self._clock.wall()

    def new_id(self) -> str:
        """See :class:`Engine`."""
        return self._clock.new_id()

    def weights(self) -> str:
        """See :class:`Engine`."""
        return f"{get_serving().weight_version}@{self.loaded.checksum()}"

    def is_paused(self) -> bool:
        """See :class:`Engine`."""
        return self._scheduler._engine_paused

    # ------------------------------------------------------------------ room

    def free_tokens(self) -> int:
        """See :class:`Engine`."""
        return self.pages.free

    def has_slot(self, arriving: int) -> bool:
        """See :class:`Engine`."""
        scheduler = self._scheduler
        busy = len(batch.decoding(scheduler)) + arriving
        return busy < scheduler.max_running_requests and bool(
            scheduler.req_to_token_pool.free_slots
        )

    def retracted(self) -> int:
        """See :class:`Engine`."""
        return len(batch.retracted(self._scheduler))

    def kept_free(self, guests: int) -> int:
        """See :class:`Engine`."""
        return batch.reserve_after(self._scheduler, guests)

    # ------------------------------------------------------------------ requests

    def running(self) -> Sequence[Req]:
        """See :class:`Engine`."""
        return batch.decoding(self._scheduler)

    def is_running(self, req: Req) -> bool:
        """See :class:`Engine`."""
        return batch.is_running(self._scheduler, req)

    def is_ending(self, req: Req) -> bool:
        """See :class:`Engine`."""
        return req.to_finish is not None

    def pinned(self, req: Req) -> str:
        """See :class:`Engine`."""
        return codec.pinned(req)

    def tokens(self, req: Req) -> int:
        """See :class:`Engine`."""
        return int(req.seqlen)

    def max_new_tokens(self, req: Req) -> int:
        """See :class:`Engine`."""
        return int(req.sampling_params.max_new_tokens)

    def written(self, req: Req) -> int:
        """See :class:`Engine`."""
        return batch.completed_tokens(req)

    def is_settled(self, req: Req) -> bool:
        """See :class:`Engine`."""
        return batch.is_settled(req)

    # ------------------------------------------------------------------ leaving

    def park(self, req: Req) -> None:
        """See :class:`Engine`."""
        batch.park(self._scheduler, req)

    def unpark(self, req: Req) -> None:
        """See :class:`Engine`."""
        batch.unpark(self._scheduler, req, star_of(req).penalty_log or ())

    def describe(self, req: Req) -> tuple[bytes, bytes]:
        """See :class:`Engine`."""
        return codec.encode_request(req)

    def state(self, req: Req) -> tuple[tuple[int, ...], bytes]:
        """See :class:`Engine`."""
        return tuple(star_of(req).penalty_log or ()), export_state(req)

    def gather(self, req: Req, start: int, end: int, slot: torch.Tensor) -> int:
        """See :class:`Engine`; ``slot`` is uint8 ``[slot_bytes]``."""
        # Written by steps whose results are in: there is nothing to wait for.
        return self.tickets.begin(self.pages.gather(req, start, end, slot))

    def release(self, req: Req, *, keep_prefix: bool, after: Collection[int] = ()) -> None:
        """See :class:`Engine`."""
        if all(map(self.copied, after)):
            self.pages.release(req, keep_prefix=keep_prefix)
        elif req.kv.holds_kv:
            self._draining.append((after, self.pages.detach(req)))

    # ------------------------------------------------------------------ copies

    def poll(self) -> None:
        """See :class:`Engine`."""
        if self.tickets:
            self.tickets.poll()
        if self._draining:
            waiting, self._draining = self._draining, []
            for after, holder in waiting:
                if all(map(self.copied, after)):
                    self.pages.release(holder, keep_prefix=False)
                else:
                    self._draining.append((after, holder))

    def copied(self, ticket: int) -> bool:
        """See :class:`Engine`."""
        return self.tickets.is_over(ticket)

    def failure(self, ticket: int) -> str:
        """See :class:`Engine`."""
        return self.tickets.failure(ticket)

    def draining(self) -> bool:
        """See :class:`Engine`."""
        return bool(self._draining)

    # ------------------------------------------------------------------ arriving

    def rebuild(self, message: bytes, prompt: bytes, rid: str) -> None:
        """See :class:`Engine`: SGLang is given it as if a client of its own had sent it."""
        request, output = codec.decode_request(message, prompt, rid)
        self._bounds.check(request.input_ids)
        self._bounds.check(output, beside=len(request.input_ids))
        # It is seated now, or when its grammar is compiled, or, if nobody wants it then, never.
        self._outputs = {r: o for r, o in self._outputs.items() if self.compiles(r)}
        self._outputs[rid] = output
        self._scheduler.handle_generate_request(request)

    def compiles(self, rid: str) -> bool:
        """See :class:`Engine`."""
        return any(req.rid == rid for req in self._scheduler.grammar_manager.grammar_queue)

    def refusal(self, req: Req) -> str:
        """See :class:`Engine`."""
        if req.to_finish is None and not req.finished():
            return ""
        reason = req.to_finish or req.finished_reason
        return str(reason.to_json().get("message"))

    def seat(self, req: Req, max_new_tokens: int) -> bool:
        """See :class:`Engine`."""
        if max_new_tokens < 1:
            raise MalformedMessage(f"a request with room for {max_new_tokens} tokens")
        self._bounds.check_length(len(req.origin_input_ids) + max_new_tokens)
        if not self.pages.reserve_row(req):
            return False
        self.pages.bind_to_root(req)
        replay.begin(req, self._outputs.pop(req.rid, ()))
        req.sampling_params.max_new_tokens = max_new_tokens
        return True

    def held(self, req: Req) -> int:
        """See :class:`Engine`."""
        return int(req.kv.kv_allocated_len)

    def extend(self, req: Req, length: int) -> bool:
        """See :class:`Engine`."""
        if not self.pages.extend(req, length):
            return False
        replay.follow(req, length)
        return True

    def scatter(self, req: Req, start: int, end: int, fetch: Fetch) -> int:
        """See :class:`Engine`."""
        # A finished request's redundant last step may still write pages we just got.
        after = [self._scheduler.forward_stream] if self._scheduler.enable_overlap else []
        return self.tickets.begin(
            Unloading(fetch, self.pages.scatter(req, start, end, after=after))
        )

    def adopt(self, req: Req, output_ids: Sequence[int]) -> None:
        """See :class:`Engine`."""
        self._bounds.check(output_ids, beside=len(req.origin_input_ids))
        if len(output_ids) >= req.sampling_params.max_new_tokens:
            raise MalformedMessage("the output that was committed is over")
        replay.finish(req, output_ids)
        req.output_ids = array("q", output_ids)

    def join(self, req: Req, length: int, penalty_log: Sequence[int], predictor: bytes) -> None:
        """See :class:`Engine`."""
        if not batch.completed_tokens(req) == length == req.kv.kv_allocated_len:
            raise OrderRefused("the committed length does not match the KV received")
        self._bounds.check(penalty_log)
        import_state(req, predictor)
        req.kv.kv_committed_len = length
        batch.unpark(self._scheduler, req, penalty_log)

    # ------------------------------------------------------------------ the client's stream

    def append(self, req: Req, tokens: Sequence[int], details: bytes) -> None:
        """See :class:`Engine`."""
        processor = self._scheduler.batch_result_processor
        self._bounds.check(tokens, beside=int(req.seqlen))
        codec.append_details(req, details, len(tokens))
        for token in tokens:
            req.output_ids.append(token)
            req.time_stats.set_last_decode_finish_time()
            processor._maybe_update_reasoning_tokens(req, [token])
            req.update_finish_state(1)
            if req.grammar is not None:
                processor._accept_grammar_tokens(req, [token])
                req.grammar.finished = req.finished()

    def end(self, req: Req, reason: dict[str, Any] | None = None) -> None:
        """See :class:`Engine`."""
        if reason is not None:
            req.finished_reason = FINISH_ABORT(
                reason.get("message"), reason.get("status_code"), reason.get("err_type")
            )
        req.time_stats.set_completion_time()

    def emit(self, reqs: Sequence[Req]) -> None:
        """See :class:`Engine`."""
        self._scheduler.output_streamer.stream_output(
            list(reqs), any(req.return_logprob for req in reqs)
        )

    def details(self, req: Req, start: int, end: int) -> bytes:
        """See :class:`Engine`."""
        return codec.encode_details(req, start, end)

    def finish_reason(self, req: Req) -> bytes:
        """See :class:`Engine`."""
        return codec.encode_finish(req)

    # ------------------------------------------------------------------ endings

    def abort(self, rid: str) -> None:
        """See :class:`Engine`."""
        self._scheduler.abort_request(AbortReq(rid=rid))

    def requeue(self, req: Req) -> None:
        """See :class:`Engine`."""
        batch.requeue(self._scheduler, req)
