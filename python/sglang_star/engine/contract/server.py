"""The HTTP process: arguments, routes, the tokenizer manager, messages, and SGLang as a library."""

from __future__ import annotations

from typing import Final

from sglang_star.engine.contract.row import Attribute, Class, Field, Function, Module, Name, Row

_ARGS: Final = "sglang.srt.server_args.ServerArgs"
_IO: Final = "sglang.srt.managers.io_struct.TokenizedGenerateReqInput"
_TOKENIZERS: Final = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_ENGINE: Final = "sglang.srt.entrypoints.engine.Engine"
_CODEC: Final = "engine.codec"
_COLLECT: Final = "predictor.collect"
_LAYOUT: Final = "cluster_layout"

ROWS: Final[tuple[Row, ...]] = (
    Module("sglang", "found, and asked for its version", "hooks predictor.collect"),
    Name("sglang.__version__", "one release is supported", "hooks"),
    Module("sglang.launch_server", "what an engine is started with", "forkserver cluster_layout"),
    Module("sglang.srt.entrypoints.http_server", "imported before a fork", "platform.preloaded"),
    Module(
        "sglang.srt.managers.detokenizer_manager", "imported before a fork", "platform.preloaded"
    ),
    Name("sglang.srt.entrypoints.http_server.app", "our routes join it", "endpoints"),
    Attribute(
        "sglang.srt.utils.auth.AuthLevel.ADMIN_OPTIONAL", "which key our routes need", "endpoints"
    ),
    Function(
        "sglang.srt.utils.auth.auth_level", "which key our routes need", "endpoints", takes="level"
    ),
    # Arguments, most of them as flags.
    Class(_ARGS, "our configuration rides on it as _star_config", "launch predictor.collect"),
    Function(
        _ARGS,
        "starts an engine for collecting",
        _COLLECT,
        takes="*, model_path, log_level, max_running_requests, max_total_tokens, sleep_on_idle",
    ),
    Field(_ARGS + ".device", "cpu, where SGLang cannot guess it", "launch"),
    Field(_ARGS + ".attention_backend", "plain torch, where SGLang has no kernels", "launch"),
    Field(_ARGS + ".host", "an instance's name", "front cluster_layout"),
    Field(_ARGS + ".port", "an instance's name", "front cluster_layout"),
    Field(_ARGS + ".random_seed", "a flag of a cluster's engines", _LAYOUT),
    Field(_ARGS + ".grammar_backend", "part of the fingerprint", "identity"),
    Field(_ARGS + ".enable_dp_attention", "part of the fingerprint", "identity"),
    Field(_ARGS + ".ep_size", "part of the fingerprint", "identity"),
    Field(_ARGS + ".dcp_size", "part of the fingerprint", "identity"),
    Field(_ARGS + ".max_running_requests", "rows the predictor needs", "predictor.runner"),
    Field(
        _ARGS + ".startup_weight_load_mode",
        "whether weights come late",
        "predictor.runner engine.real",
    ),
    Field(_ARGS + ".tp_size", "ranks of an engine", "launch scheduler identity"),
    Field(_ARGS + ".pp_size", "refused beyond 1", "launch identity"),
    Field(_ARGS + ".dp_size", "refused beyond 1", "launch identity"),
    Field(_ARGS + ".nnodes", "refused beyond 1", "launch"),
    Field(_ARGS + ".tokenizer_worker_num", "refused beyond 1", "launch"),
    Field(_ARGS + ".speculative_algorithm", "refused", "launch"),
    Field(_ARGS + ".model_path", "a flag of every engine", _LAYOUT),
    Field(_ARGS + ".max_total_tokens", "a flag of every engine", _LAYOUT),
    Field(_ARGS + ".sleep_on_idle", "a flag of every engine on a CPU", _LAYOUT),
    Field(_ARGS + ".cuda_graph_config", "how large a batch graphs capture", "predictor.runner"),
    Field(_ARGS + ".dtype", "a flag of the demo's engines", "demo.comparison"),
    Field(
        _ARGS + ".enable_deterministic_inference", "as the demo's engines run", "demo.comparison"
    ),
    Field(
        _ARGS + ".weight_version", "the first version; get_serving() has the present", "engine.real"
    ),
    Function("sglang.srt.runtime_context.get_serving", "has the weights' version", "engine.real"),
    Function("sglang.srt.runtime_context.get_parallel", "which rank this is", "predictor.runner"),
    Field(_ARGS + ".num_reserved_decode_tokens", "a flag of the demo's engines", "demo.comparison"),
    Field(
        _ARGS + ".disaggregation_mode", "a flag of disaggregated engines", "cluster_layout launch"
    ),
    Field(_ARGS + ".disaggregation_transfer_backend", "a flag of disaggregated engines", _LAYOUT),
    Field(_ARGS + ".disaggregation_bootstrap_port", "a flag of disaggregated engines", _LAYOUT),
    Field(
        _ARGS + ".disaggregation_decode_retraction_backup",
        "a flag of decode engines; on a CPU one of its choices works",
        "cluster_layout launch",
    ),
    # The tokenized request, which travels.
    Class(_IO, "a move carries it; decoded by msgspec", _CODEC),
    Field(_IO + ".rid", "a guest has a name of its own", _CODEC),
    Field(_IO + ".input_ids", "travel apart", _CODEC),
    Field(_IO + ".input_text", "does not travel", _CODEC),
    Field(_IO + ".sampling_params", "as the request has them now", _CODEC),
    Field(_IO + ".http_worker_ipc", "does not travel", _CODEC),
    Field(_IO + ".mm_inputs", "never travels", _CODEC),
    Field(_IO + ".time_stats", "never travels", _CODEC),
    Field(_IO + ".kv_hints", "does not travel", _CODEC),
    Field(_IO + ".custom_logit_processor", "never travels", _CODEC),
    Field(_IO + ".positional_embed_overrides", "never travels", _CODEC),
    Field(_IO + ".input_embeds", "never travels", _CODEC),
    Field(_IO + ".session_params", "never travels", _CODEC),
    Field(_IO + ".bootstrap_room", "parallel samples need rooms of their own", "rooms"),
    # SGLang as a library.
    Name("sglang.Engine", "starts an engine for collecting", _COLLECT),
    Function(_ENGINE, "starts an engine for collecting", _COLLECT, takes="*, server_args"),
    Function(
        _ENGINE + ".async_generate",
        "answers a prompt",
        "predictor.collect predictor.resample",
        takes="*, input_ids, sampling_params, rid",
        awaited=True,
    ),
    Function(_ENGINE + ".shutdown", "ends it", _COLLECT),
    Attribute(_ENGINE + ".loop", "where its requests run", _COLLECT),
    Attribute(_ENGINE + ".tokenizer_manager", "tokens and aborts", _COLLECT),
    Attribute(_TOKENIZERS + ".tokenizer", "a prompt's tokens", _COLLECT),
    Attribute(_TOKENIZERS + ".context_len", "longer prompts are skipped", _COLLECT),
    Function(
        _TOKENIZERS + ".abort_request",
        "cuts running requests",
        _COLLECT,
        takes="*, abort_all",
    ),
    Function(_TOKENIZERS + ".auto_create_handle_loop", "takes SIGTERM before we do", _COLLECT),
)
