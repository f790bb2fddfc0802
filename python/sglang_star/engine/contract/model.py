"""The model runner: what the predictor sees of a forward, and how its rows reach the host."""

from __future__ import annotations

from typing import Final

from sglang_star.engine.contract.row import Attribute, Class, Field, Function, Module, Row

_RUNNER: Final = "sglang.srt.model_executor.model_runner.ModelRunner"
_CONFIG: Final = "sglang.srt.configs.model_config.ModelConfig"
_LOGITS: Final = "sglang.srt.layers.logits_processor.LogitsProcessorOutput"
_AUX: Final = "sglang.srt.managers.auxiliary_output"
_FORWARD: Final = "sglang.srt.model_executor.forward_batch_info.ForwardBatch"
_GRAPHS: Final = "sglang.srt.model_executor.cuda_graph_config"
_ATTENTION: Final = "sglang.srt.layers.radix_attention.RadixAttention"
_PRED: Final = "predictor.runner"

ROWS: Final[tuple[Row, ...]] = (
    Attribute(
        "sglang.srt.managers.tp_worker.TpModelWorker.model_runner", "the model's runner", _PRED
    ),
    Attribute(_RUNNER + ".model", "a head belongs to its norms; its weights", _PRED),
    Attribute(_RUNNER + ".model_config", "a head belongs to a model's shape", _PRED),
    Attribute(_RUNNER + ".device", "where the predictor's buffers go", _PRED),
    Attribute(_RUNNER + ".server_args", "whether execution is paced", "platform.paced"),
    Class(_CONFIG, "a model's shape", "predictor.fingerprint identity"),
    Attribute(_CONFIG + ".hf_config", "architecture; part of the fingerprint", "identity"),
    Attribute(
        _CONFIG + ".hidden_size", "width of what the predictor sees", "predictor.fingerprint"
    ),
    Attribute(_CONFIG + ".num_hidden_layers", "shape", "predictor.fingerprint"),
    Attribute(_CONFIG + ".vocab_size", "shape", "predictor.fingerprint"),
    Attribute(_CONFIG + ".dtype", "part of the fingerprint", "identity"),
    Attribute(_CONFIG + ".context_len", "part of the fingerprint", "identity"),
    Attribute(_CONFIG + ".quantization", "part of the fingerprint", "identity"),
    Attribute(_CONFIG + ".attention_arch", "part of the fingerprint", "identity"),
    Attribute(_CONFIG + ".is_encoder_decoder", "its KV cannot move", "engine.kv_format"),
    # Weights.
    Class(_ATTENTION, "its scales of KV are weights, too", "engine.weights"),
    Attribute(_ATTENTION + ".k_scale_float", "what keys are scaled by", "engine.weights"),
    Attribute(_ATTENTION + ".v_scale_float", "what values are scaled by", "engine.weights"),
    # The predictor's rows.
    Function(
        "sglang.srt.arg_groups.overrides.resolution_result",
        "how large a batch graphs capture; arguments in force",
        "predictor.runner engine.settings",
        takes="server_args, field",
    ),
    Field(_GRAPHS + ".CudaGraphConfig.decode", "the graphs of decode steps", _PRED),
    Field(_GRAPHS + ".CudaGraphConfig.prefill", "the graphs of prefills", _PRED),
    Field(_GRAPHS + ".PhaseConfig.max_bs", "requests in the largest of them", _PRED),
    Field(_GRAPHS + ".PhaseConfig.bs", "requests in each, where they were listed", _PRED),
    Field(_GRAPHS + ".PhaseConfig.full_prefill_max_req", "requests in a prefill's", _PRED),
    Field(_LOGITS + ".next_token_logits", "requests in the step", _PRED),
    Field(_LOGITS + ".auxiliary_device_output", "rows leave the device with the step", _PRED),
    Function(
        _AUX + ".append_auxiliary_output",
        "rows leave the device with the step's results",
        _PRED,
        takes="current, output",
    ),
    Function(
        _AUX + ".DeviceAuxiliaryOutput.copy_to_host",
        "ours has this method",
        _PRED,
        takes="copy_tensor",
    ),
    Function(
        _AUX + ".HostAuxiliaryOutput.consume",
        "ours has this method, called once per step",
        _PRED,
        takes="batch, commits",
    ),
    Field(_AUX + ".CommittedTokens.output_index", "where a request's new tokens begin", _PRED),
    Field(_AUX + ".CommittedTokens.token_ids", "how many are visible", _PRED),
    # Paced execution.
    Field(_FORWARD + ".forward_mode", "decode and prefill take other times", "platform.paced"),
    Field(_FORWARD + ".batch_size", "requests in a decode step", "platform.paced"),
    Field(_FORWARD + ".seq_lens_cpu", "KV read by a decode step", "platform.paced"),
    Field(_FORWARD + ".extend_seq_lens_cpu", "tokens of a prefill", "platform.paced"),
    Attribute(_RUNNER + ".token_to_kv_pool", "whose rows may have ballast", "platform.paced"),
    Field(_FORWARD + ".input_ids", "tokens whose KV a forward writes", "platform.paced"),
    Field(_FORWARD + ".positions", "their places", "platform.paced"),
    Field(_FORWARD + ".out_cache_loc", "their KV slots", "platform.paced"),
    Attribute(
        "sglang.srt.model_executor.model_runner.ModelRunnerOutput.logits_output",
        "carries when a paced step is due",
        "platform.paced",
    ),
    # Imported before a fork.
    Module("sglang.srt.models.registry", "imports every model", "platform.preloaded"),
    Module("sglang.srt.models.llama", "the default model's", "platform.preloaded"),
    Module(
        "sglang.srt.layers.attention.torch_native_backend",
        "attention on a CPU",
        "platform.preloaded",
    ),
)
