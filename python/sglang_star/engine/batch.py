"""Take a request out of SGLang's running batch and put it back, between two decode steps.

Under overlap scheduling one decode step is in flight whenever the scheduler is at a step boundary:
a request parked now still receives that step's token, and its KV is complete at the next boundary.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING

from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.schedule_batch import ScheduleBatch

from sglang_star.star_request import star_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler


def completed_tokens(req: Req) -> int:
    """Positions whose KV is written: all but the last token, which the next step feeds."""
    return len(req.origin_input_ids) + len(req.output_ids) - 1


def decoding(scheduler: Scheduler) -> list[Req]:
    """Requests that decode: in the running batch, or along with a prefill in the latest step."""
    mixed = _mixed(scheduler)
    if mixed is None:
        return list(scheduler.running_batch.reqs)
    riding = {id(req) for req in mixed.decoding_reqs or ()}
    return [*scheduler.running_batch.reqs, *(req for req in mixed.reqs if id(req) in riding)]


def _mixed(scheduler: Scheduler) -> ScheduleBatch | None:
    """The latest batch, if it prefilled and decoded at once (``--enable-mixed-chunk``).

    The running batch is empty then: its requests are in the prefill's, which becomes part of the
    running batch when SGLang prepares the next step.
    """
    last = scheduler.last_batch
    if last is None or last is scheduler.running_batch or not last.forward_mode.is_mixed():
        return None
    return last


def is_running(scheduler: Scheduler, req: Req) -> bool:
    """Whether the request decodes and will decode again."""
    return not req.finished() and any(req is other for other in decoding(scheduler))


def retracted(scheduler: Scheduler) -> list[Req]:
    """Requests of a decode instance that were retracted and wait for KV memory to resume."""
    queue = scheduler.disagg_decode_prealloc_queue
    return list(queue.retracted_queue) if queue is not None else []


def reserve_after(scheduler: Scheduler, guests: int) -> int:
    """KV tokens a decode instance wants free once ``guests`` more requests are there.

    SGLang admits and resumes nobody into so many tokens per active request, since those that run
    will grow into them. Zero elsewhere: an aggregated instance admits by another rule.
    """
    queue = scheduler.disagg_decode_prealloc_queue
    if queue is None:
        return 0
    transfers = len(scheduler.disagg_decode_transfer_queue.queue)
    active = len(scheduler.running_batch.reqs) + transfers + len(scheduler.waiting_queue) + guests
    return int(queue.num_reserved_decode_tokens) * active


def park(scheduler: Scheduler, req: Req) -> None:
    """Take the request out of the batch it decodes in; a step already in flight still counts."""
    for batch in (scheduler.running_batch, _mixed(scheduler)):
        if batch is not None and any(req is other for other in batch.reqs):
            batch.filter_batch(reqs_to_exclude=[req])
    scheduler.running_batch.batch_is_full = False


def is_settled(req: Req) -> bool:
    """Whether no step of the parked request is in flight any more."""
    return int(req.kv.kv_committed_len) == completed_tokens(req)


def unpark(scheduler: Scheduler, req: Req, penalty_log: Iterable[int]) -> None:
    """Put a request whose KV is complete into the running batch, without prefill.

    Args:
        scheduler: at a step boundary.
        req: holds a row and KV for :func:`completed_tokens` positions.
        penalty_log: tokens its penalties had accumulated, in order; it has them again here.
    """
    length = completed_tokens(req)
    assert req.kv.kv_committed_len == length, "unpark needs complete KV"
    star_of(req).penalty_log = array("q", penalty_log)
    req.refresh_fill_ids()
    req.extend_end = length
    batch = ScheduleBatch.init_new(
        [req],
        scheduler.req_to_token_pool,
        scheduler.token_to_kv_pool_allocator,
        scheduler.tree_cache,
        scheduler.model_config,
        scheduler.enable_overlap,
        scheduler.spec_algorithm,
    )
    batch.prepare_for_prebuilt()
    # A checkpoint here could swap the moved KV for an equal prefix computed in another batch
    # shape; the tree gets it when the request ends, as for any other request.
    barred, req.skip_radix_cache_insert = req.skip_radix_cache_insert, True
    batch.process_prebuilt(scheduler.future_map)
    req.skip_radix_cache_insert = barred
    running = scheduler.running_batch
    if running.is_empty():
        scheduler.running_batch = batch
    else:
        running.merge_batch(batch)


def requeue(scheduler: Scheduler, req: Req) -> None:
    """Let SGLang recompute a request whose KV was lost with another instance.

    An aggregated instance prefills prompt and output again (its own prefix cache often still has
    most of it); a PD-decode instance cannot prefill, so the prefill instance does.
    """
    req.reset_for_retract()
    if scheduler.disaggregation_mode == DisaggregationMode.DECODE:
        if req.output_ids:
            req.pd_rebootstrap_forced_output_id = req.output_ids.pop()
        req.pd_rebootstrap_in_progress = True
        req.time_stats.set_retract_time()
        if scheduler._engine_paused:
            scheduler.disagg_decode_prealloc_queue.hold_rebootstrap(req)
        else:
            scheduler.disagg_decode_prealloc_queue.add(req, is_rebootstrap=True)
    else:
        scheduler._add_request_to_queue(req, is_retracted=True)
