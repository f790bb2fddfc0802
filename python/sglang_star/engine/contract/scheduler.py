"""The scheduler: its state at a step boundary, and the parts of it that we call."""

from __future__ import annotations

from typing import Final

from sglang_star.engine.contract.row import Attribute, Class, Field, Function, Module, Name, Row

_MODULE: Final = "sglang.srt.managers.scheduler"
_S: Final = "sglang.srt.managers.scheduler.Scheduler"
_PARTS: Final = "sglang.srt.managers.scheduler_components"
_STREAMER: Final = _PARTS + ".output_streamer.SchedulerOutputStreamer"
_RESULTS: Final = _PARTS + ".batch_result_processor.SchedulerBatchResultProcessor"
_GRAMMARS: Final = "sglang.srt.constrained.grammar_manager.GrammarManager"
_RESULT: Final = "sglang.srt.managers.utils.GenerationBatchResult"
_PAUSE_REQ: Final = "sglang.srt.managers.io_struct.PauseGenerationReqInput"
_ABORT_REQ: Final = "sglang.srt.managers.io_struct.AbortReq"

ROWS: Final[tuple[Row, ...]] = (
    Module(_MODULE, "loaded in processes that schedule", "plugin platform.preloaded"),
    Class(_S, "ours rides on it as the attribute _star", "scheduler extension"),
    Attribute(_S + ".server_args", "the configuration; host and port", "front identity scheduler"),
    Attribute(_S + ".model_config", "the fingerprint; batches are made with it", "identity"),
    Attribute(
        _S + ".disaggregation_mode", "the instance's role", "status engine.real engine.batch"
    ),
    Attribute(_S + ".enable_overlap", "a step is in flight at a boundary", "engine.batch"),
    Attribute(_S + ".tp_worker", "holds the model runner", "predictor.runner engine.weights"),
    Attribute(_S + ".tp_cpu_group", "ranks agree over it", "ranks.member engine.weights"),
    Attribute(_S + "._engine_paused", "whether steps are made", "engine.real engine.batch"),
    Attribute(_S + ".max_running_requests", "most requests in a batch", "engine.real"),
    # The batch.
    Attribute(_S + ".running_batch", "requests leave it and join it", "engine.batch status"),
    Attribute(
        _S + ".last_batch", "its requests are reported, and may be running", "status engine.batch"
    ),
    Attribute(_S + ".waiting_queue", "requests that wait, or are to join", "status"),
    Attribute(_S + ".result_queue", "steps in flight under overlap", "extension"),
    Attribute(_S + ".future_map", "where a joining request's next input goes", "engine.batch"),
    Attribute(_S + ".spec_algorithm", "batches are made with it", "engine.batch"),
    # Memory.
    Attribute(_S + ".req_to_token_pool", "rows of requests", "engine.pages engine.batch"),
    Attribute(_S + ".token_to_kv_pool_allocator", "KV slots", "engine.pages engine.batch"),
    Attribute(_S + ".tree_cache", "the prefix cache", "engine.pages engine.batch"),
    # Streams of the device.
    Attribute(_S + ".forward_stream", "copies into KV follow its steps", "engine.real"),
    # Disaggregation.
    Attribute(
        _S + ".disagg_decode_prealloc_queue",
        "requests that wait for KV memory; None on other roles",
        "engine.batch status",
    ),
    Attribute(_S + ".disagg_decode_transfer_queue", "requests whose KV comes", "status"),
    Attribute(_S + ".disagg_prefill_bootstrap_queue", "requests before their prefill", "status"),
    # Parts.
    Attribute(_S + ".output_streamer", "a shadow's tokens leave by it", "engine.real"),
    Attribute(_S + ".batch_result_processor", "what a new token entails", "engine.real"),
    Attribute(_S + ".grammar_manager", "a guest may wait for its grammar", "engine.real"),
    Attribute(_S + ".idle_sleeper", "a message of ours wakes an idle scheduler", "front"),
    Attribute(
        _PARTS + ".idle_sleeper.IdleSleeper.poller",
        "a message of ours wakes an idle scheduler",
        "front",
    ),
    Attribute(_GRAMMARS + ".grammar_queue", "a guest may wait for its grammar", "engine.real"),
    # Calls.
    Function(
        _S + ".handle_generate_request",
        "rebuilds a guest's request from its message",
        "engine.real",
        takes="recv_req",
    ),
    Function(
        _S + ".abort_request",
        "ends a guest that nobody wants",
        "engine.real",
        takes="recv_req",
    ),
    Function(
        _S + "._add_request_to_queue",
        "queues a request whose KV was lost",
        "engine.batch",
        takes="req, *, is_retracted",
    ),
    # Output.
    Class(_STREAMER, "our subclass sends guests' tokens home", "scheduler"),
    Function(
        _STREAMER + ".stream_output",
        "overridden, and called for shadows",
        "scheduler engine.real",
        takes="reqs, return_logprob, skip_req",
    ),
    Function(
        _STREAMER + ".build_additional_customized_info",
        "overridden: estimates in meta_info",
        "scheduler",
        takes="reqs",
    ),
    Attribute(
        _STREAMER + ".has_additional_customized_info",
        "makes SGLang ask for it",
        "scheduler",
    ),
    Function(
        _RESULTS + "._maybe_update_reasoning_tokens",
        "counts a shadow's reasoning tokens",
        "engine.real",
        takes="req, next_token_id",
    ),
    Function(
        _RESULTS + "._accept_grammar_tokens",
        "a shadow's grammar takes its tokens",
        "engine.real",
        takes="req, tokens",
    ),
    # The result of a step.
    Field(
        _RESULT + ".copy_done", "the device's event: whether the step is done", "platform.device"
    ),
    Field(_RESULT + ".logits_output", "when a paced step is due", "platform.device platform.paced"),
    # Aborts.
    Function(
        _ABORT_REQ,
        "SGLang's timeout, for requests elsewhere too",
        "scheduler engine.real",
        takes="*, rid, abort_message",
    ),
    Field(_PAUSE_REQ + ".mode", "whether a pause gives all KV back", "scheduler"),
    Field(_ABORT_REQ + ".rid", "abort matches by prefix", "scheduler"),
    Field(_ABORT_REQ + ".abort_all", "every request", "scheduler"),
    Field(_ABORT_REQ + ".abort_message", "given if the server aborts", "scheduler"),
    Field(_ABORT_REQ + ".finished_reason", "how a guest ended here", "scheduler"),
    Name("sglang.srt.environ.envs", "SGLang's settings by environment variable", "scheduler"),
    Attribute(
        "sglang.srt.environ.Envs.SGLANG_REQ_RUNNING_TIMEOUT", "seconds; 0 is none", "scheduler"
    ),
    Function("sglang.srt.environ.EnvField.get", "reads a setting", "scheduler"),
)
