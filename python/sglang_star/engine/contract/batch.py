"""The running batch: how a request leaves it and joins it between two steps."""

from __future__ import annotations

from typing import Final

from sglang_star.engine.contract.row import Attribute, Class, Function, Row

_B: Final = "sglang.srt.managers.schedule_batch.ScheduleBatch"
_PENALTIES: Final = "sglang.srt.sampling.penaltylib.orchestrator.BatchedPenalizerOrchestrator"
_LIB: Final = "sglang.srt.sampling.penaltylib"
_BASE: Final = "sglang.srt.sampling.penaltylib.orchestrator._BatchedPenalizer"
_PEN: Final = "engine.penalties"
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
    Attribute(_B + ".forward_mode", "whether a step was a decode step", "scheduler engine.batch"),
    Attribute(_B + ".decoding_reqs", "requests that decode beside a prefill", _HERE),
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
    Function(_MODE + ".is_decode", "step times are those of decode steps", "scheduler"),
    Function(_MODE + ".is_mixed", "a prefill's batch may decode the running requests", _HERE),
    Function(_MODE + ".is_extend", "a modelled prefill takes another time", "platform.paced"),
    # Penalties, written at once instead of token by token.
    Attribute(_B + ".enable_overlap", "penalties lag one token behind then", _PEN),
    Attribute(_PENALTIES + ".penalizers", "one for each kind of penalty, by class", _PEN),
    Attribute(_PENALTIES + ".device", "where penalties are kept", _PEN),
    Function(_PENALTIES + ".reqs", "requests in the order of their rows", _PEN),
    Class(_LIB + ".BatchedPenalizerOrchestrator", "holds the penalizers", _PEN),
    Class(_LIB + ".BatchedFrequencyPenalizer", "sums by token", _PEN),
    Class(_LIB + ".BatchedPresencePenalizer", "which tokens there were", _PEN),
    Class(_LIB + ".BatchedRepetitionPenalizer", "which tokens there were", _PEN),
    Class(_LIB + ".BatchedMinNewTokensPenalizer", "how many tokens there were", _PEN),
    Function(_BASE + ".is_prepared", "whether any request has this penalty", _PEN),
    Attribute(_LIB + ".BatchedFrequencyPenalizer.cumulated_frequency_penalties", "written", _PEN),
    Attribute(_LIB + ".BatchedPresencePenalizer.cumulated_presence_penalties", "written", _PEN),
    Attribute(_LIB + ".BatchedPresencePenalizer.presence_penalties", "a request's own", _PEN),
    Attribute(_LIB + ".BatchedRepetitionPenalizer.cumulated_repetition_penalties", "written", _PEN),
    Attribute(_LIB + ".BatchedRepetitionPenalizer.repetition_penalties", "a request's own", _PEN),
    Attribute(_LIB + ".BatchedMinNewTokensPenalizer.len_output_tokens", "written", _PEN),
)
