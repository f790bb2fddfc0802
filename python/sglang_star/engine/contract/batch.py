"""The running batch: how a request leaves it and joins it between two steps."""

from __future__ import annotations

from typing import Final

from sglang_star.engine.contract.row import Attribute, Class, Function, Row

_B: Final = "sglang.srt.managers.schedule_batch.ScheduleBatch"
_PENALTIES: Final = "sglang.srt.sampling.penaltylib.orchestrator.BatchedPenalizerOrchestrator"
_KINDS: Final = "sglang.srt.sampling.penaltylib."
_MODE: Final = "sglang.srt.model_executor.forward_batch_info.ForwardMode"
_HERE: Final = "engine.batch"

ROWS: Final[tuple[Row, ...]] = (
    Class(_B, "a batch of requests", _HERE),
    Attribute(
        _B + ".reqs",
        "its requests",
        "engine.batch status predictor.runner engine.real engine.penalties",
    ),
    Attribute(_B + ".batch_is_full", "there is room again once a request left", _HERE),
    Attribute(_B + ".device", "where penalties are kept", "engine.penalties engine.pages"),
    Attribute(_B + ".forward_mode", "whether a step was a decode step", "scheduler"),
    Attribute(_B + ".enable_overlap", "penalties lag by a token then", "engine.penalties"),
    Function(_B + ".is_empty", "whether there is a batch to join", _HERE),
    Function(_B + ".filter_batch", "takes a parked request out", _HERE, takes="*, reqs_to_exclude"),
    Function(_B + ".merge_batch", "lets a request join", _HERE, takes="other"),
    Function(
        _B + ".init_new",
        "a batch of one, to join the running one",
        _HERE,
        takes="reqs, req_to_token_pool, token_to_kv_pool_allocator, tree_cache, model_config, "
        "enable_overlap, spec_algorithm",
    ),
    Function(_B + ".prepare_for_prebuilt", "... whose KV is there already", _HERE),
    Function(
        _B + ".process_prebuilt", "... and whose last token is the input", _HERE, takes="future_map"
    ),
    Attribute(
        "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.penalizer_orchestrator",
        "accumulates penalties over output tokens",
        "engine.penalties",
    ),
    Attribute(_PENALTIES + ".is_required", "whether any request has penalties", "engine.penalties"),
    Attribute(_PENALTIES + ".penalizers", "one per kind of penalty", "engine.penalties"),
    Attribute(_PENALTIES + ".device", "where they accumulate", "engine.penalties"),
    Function(_PENALTIES + ".reqs", "whose penalties they are, by row", "engine.penalties"),
    Class(_KINDS + "BatchedFrequencyPenalizer", "counts each token", "engine.penalties"),
    Attribute(
        _KINDS + "frequency_penalty.BatchedFrequencyPenalizer.cumulated_frequency_penalties",
        "written for a request that has output already",
        "engine.penalties",
    ),
    Class(_KINDS + "BatchedPresencePenalizer", "notes each token", "engine.penalties"),
    Attribute(
        _KINDS + "presence_penalty.BatchedPresencePenalizer.cumulated_presence_penalties",
        "written for a request that has output already",
        "engine.penalties",
    ),
    Attribute(
        _KINDS + "presence_penalty.BatchedPresencePenalizer.presence_penalties",
        "what is noted for a token",
        "engine.penalties",
    ),
    Class(_KINDS + "BatchedRepetitionPenalizer", "notes each token", "engine.penalties"),
    Attribute(
        _KINDS + "repetition_penalty.BatchedRepetitionPenalizer.cumulated_repetition_penalties",
        "written for a request that has output already",
        "engine.penalties",
    ),
    Attribute(
        _KINDS + "repetition_penalty.BatchedRepetitionPenalizer.repetition_penalties",
        "what is noted for a token",
        "engine.penalties",
    ),
    Class(_KINDS + "BatchedMinNewTokensPenalizer", "counts the output", "engine.penalties"),
    Attribute(
        _KINDS + "min_new_tokens.BatchedMinNewTokensPenalizer.len_output_tokens",
        "written for a request that has output already",
        "engine.penalties",
    ),
    Function(
        _KINDS + "orchestrator._BatchedPenalizer.is_prepared",
        "whether any request has this kind",
        "engine.penalties",
    ),
    Class(_KINDS + "BatchedPenalizerOrchestrator", "all kinds together", "engine.penalties"),
    Function(_MODE + ".is_decode", "step times are those of decode steps", "scheduler"),
    Function(_MODE + ".is_extend", "a modelled prefill takes another time", "platform.paced"),
)
