"""What a request's penalties have accumulated, kept through moves, reclaims and retractions.

SGLang accumulates one token per decode step and forgets all of them whenever it puts a request
into a new batch: after a retraction, and so after a reclaim or a move. We log what it accumulated
and give a new batch what the request would have had in the old one.

Without overlap the k-th entry of a log is the k-th output token, and k of them are accumulated
when the k-th token (counted from 0) is sampled. Under overlap scheduling the latest token is still
in flight then, so SGLang takes the one before it: the entries lag by one, and the first is taken
twice, or is the prompt's last token. Their number is the same, so minimum lengths do not lag.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.sampling.penaltylib import (
    BatchedFrequencyPenalizer,
    BatchedMinNewTokensPenalizer,
    BatchedPenalizerOrchestrator,
    BatchedPresencePenalizer,
    BatchedRepetitionPenalizer,
)

from sglang_star.star_request import star_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo


def cumulate_penalty_output_tokens(original: Any, batch: ScheduleBatch) -> None:
    """AROUND ``ScheduleBatch.cumulate_penalty_output_tokens``: same, logged per request.

    Under overlap SGLang takes the last token it knows for the one before that in flight. A
    request that joined the batch with nothing in flight has its last token hidden for this one
    call: what it accumulates is then what it would have without the interruption.
    """
    hidden: list[tuple[Req, int]] = []
    for req in batch.reqs:
        star = star_of(req)
        if star.nothing_in_flight:
            star.nothing_in_flight = False
            hidden.append((req, req.output_ids.pop()))
    try:
        for req in batch.reqs:
            if _is_penalised(req):
                star = star_of(req)
                if star.penalty_log is None:
                    star.penalty_log = array("q")
                star.penalty_log.append(
                    req.output_ids[-1] if req.output_ids else req.origin_input_ids[-1]
                )
        original(batch)
    finally:
        for req, token in hidden:
            req.output_ids.append(token)


def from_schedule_batch(
    info: SamplingBatchInfo, _cls: type, batch: ScheduleBatch, _vocab_size: int
) -> None:
    """AFTER ``SamplingBatchInfo.from_schedule_batch``: requests keep what they accumulated.

    A batch that prefills samples a token at once, with a penalty entry for each token before it.
    Any other batch decodes first, and the entry for its last token is accumulated there.
    """
    orchestrator = info.penalizer_orchestrator
    if not orchestrator.is_required:
        return
    prefills = batch.forward_mode is not None and batch.forward_mode.is_extend()
    logs: dict[int, array[int]] = {}
    for row, req in enumerate(batch.reqs):
        if _is_penalised(req):
            count = max(0, len(req.output_ids) - (not prefills))
            log = accumulated(req, count, lags=batch.enable_overlap)
            star = star_of(req)
            star.penalty_log = log
            star.nothing_in_flight = batch.enable_overlap and not prefills and count > 0
            if log:
                logs[row] = log
    if logs:
        write(orchestrator, logs)


def accumulated(req: Req, count: int, *, lags: bool) -> array[int]:
    """The first ``count`` entries of a request's log, with those that are missing made up.

    Entries are missing when the request decoded elsewhere until it was reclaimed, and when its
    latest token is known before the step that would have accumulated it.

    Args:
        req: has at least ``count`` output tokens.
        count: entries wanted.
        lags: whether SGLang takes the token before the latest, as under overlap.
    """
    log = array("q", (star_of(req).penalty_log or ())[:count])
    if lags and not log and count:
        log.append(req.output_ids[0])
    log.extend(req.output_ids[len(log) - lags : count - lags])
    return log


def write(orchestrator: BatchedPenalizerOrchestrator, logs: Mapping[int, array[int]]) -> None:
    """Put logs into penalizers that have accumulated nothing for these rows yet.

    The result is what ``cumulate_output_tokens`` makes of the same tokens one by one, to the bit.

    Args:
        orchestrator: of a batch just built.
        logs: by batch row; none is empty.
    """
    counted = [np.unique(np.asarray(log), return_counts=True) for log in logs.values()]
    sizes = [len(tokens) for tokens, _ in counted]
    rows = _on(orchestrator, np.repeat(np.array(list(logs), np.int64), sizes))
    tokens = _on(orchestrator, np.concatenate([tokens for tokens, _ in counted]))
    penalizers = orchestrator.penalizers
    frequency = penalizers[BatchedFrequencyPenalizer]
    if frequency.is_prepared():
        reqs = orchestrator.reqs()
        sums = [
            _repeated(reqs[row].sampling_params.frequency_penalty, counts)
            for row, (_, counts) in zip(logs, counted, strict=True)
        ]
        frequency.cumulated_frequency_penalties[rows, tokens] = _on(
            orchestrator, np.concatenate(sums)
        )
    presence = penalizers[BatchedPresencePenalizer]
    if presence.is_prepared():
        presence.cumulated_presence_penalties[rows, tokens] = presence.presence_penalties[rows, 0]
    repetition = penalizers[BatchedRepetitionPenalizer]
    if repetition.is_prepared():
        repetition.cumulated_repetition_penalties[rows, tokens] = repetition.repetition_penalties[
            rows, 0
        ]
    minimum = penalizers[BatchedMinNewTokensPenalizer]
    if minimum.is_prepared():
        lengths = np.array([len(log) for log in logs.values()], np.int32)
        at = _on(orchestrator, np.array(list(logs), np.int64))
        minimum.len_output_tokens[at, 0] = _on(orchestrator, lengths)


def _repeated(penalty: float, counts: np.ndarray) -> np.ndarray:
    """``penalty`` added ``counts`` times to nothing in float32, where sums are not products."""
    sums = np.add.accumulate(np.full(int(counts.max()), penalty, np.float32))
    return sums[counts - 1]


def _on(orchestrator: BatchedPenalizerOrchestrator, values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).to(orchestrator.device)


def _is_penalised(req: Req) -> bool:
    params = req.sampling_params
    return bool(
        params.frequency_penalty
        or params.presence_penalty
        or params.repetition_penalty != 1.0
        or params.min_new_tokens
    )
