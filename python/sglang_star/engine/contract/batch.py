"""The running batch: how a request leaves it and joins it between two steps."""

from __future__ import annotations

from typing import Final

from sglang_star.engine.contract.row import Attribute, Class, Function, Row

_B: Final = "sglang.srt.managers.schedule_batch.ScheduleBatch"
_PENALTIES: Final = "sglang.srt.sampling.penaltylib.orchestrator.BatchedPenalizerOrchestrator"
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
    Attribute(_B + ".sampling_info", "holds the penalties", "engine.real"),
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
    Function(
        _PENALTIES + ".cumulate_output_tokens",
        "repeats what a penalised request had accumulated",
        "engine.real",
        takes="output_ids",
    ),
    Function(_MODE + ".is_decode", "step times are those of decode steps", "scheduler"),
    Function(_MODE + ".is_extend", "a modelled prefill takes another time", "platform.paced"),
)
