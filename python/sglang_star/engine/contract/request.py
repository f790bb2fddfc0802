"""The request, and what hangs on it: KV, sampling, log-probabilities, times, grammar, its end."""

from __future__ import annotations

from typing import Final

from sglang_star.engine.contract.row import Attribute, Class, Field, Function, Row

_REQ: Final = "sglang.srt.managers.schedule_batch.Req"
_KV: Final = "sglang.srt.managers.schedule_batch.ReqKvInfo"
_LOG: Final = "sglang.srt.managers.schedule_batch.ReqLogprob"
_ABORT: Final = "sglang.srt.managers.schedule_batch.FINISH_ABORT"
_PARAMS: Final = "sglang.srt.sampling.sampling_params.SamplingParams"
_TIMES: Final = "sglang.srt.observability.req_time_stats.SchedulerReqTimeStats"
_GRAMMAR: Final = "sglang.srt.constrained.base_grammar_backend.BaseGrammarObject"

_CODEC: Final = "engine.codec"
_TOKENS: Final = "migration.target engine.batch migration.host migration.home status"
_PINS: Final = "a request that uses it cannot move"

ROWS: Final[tuple[Row, ...]] = (
    Class(
        _REQ,
        "a request; what we keep of it is one attribute, _star",
        "engine.batch engine.codec",
    ),
    Attribute(_REQ + ".rid", "its name here; a guest's begins with star-guest-", "status orders"),
    Attribute(
        _REQ + ".origin_input_ids",
        "the prompt's tokens",
        "engine.batch engine.codec predictor.estimator",
    ),
    Attribute(_REQ + ".output_ids", "the output's tokens; tokens from elsewhere join", _TOKENS),
    Attribute(_REQ + ".seqlen", "tokens that a target has to hold", "engine.real"),
    Attribute(_REQ + ".kv", "where its KV is", "engine.batch engine.pages status"),
    Attribute(_REQ + ".sampling_params", "travels; limits and penalties", "engine.codec status"),
    Attribute(_REQ + ".logprob", "log-probabilities of a guest's tokens go home", _CODEC),
    Attribute(_REQ + ".return_logprob", "whether there are any", "engine.codec engine.real"),
    Attribute(
        _REQ + ".time_stats",
        "SGLang's times of a shadow go on",
        "extension engine.real engine.batch engine.codec",
    ),
    Attribute(_REQ + ".grammar", "its state is repeated at a target", "engine.real"),
    # The end of a request.
    Function(_REQ + ".finished", "whether it is over", "migration.sender status orders"),
    Attribute(
        _REQ + ".finished_reason",
        "how it ended; we set it for a shadow",
        "engine.real engine.codec",
    ),
    Attribute(_REQ + ".finished_len", "output up to its stop string", "predictor.recorder"),
    Attribute(_REQ + ".to_finish", "an end that SGLang has decided upon", "engine.real"),
    Function(
        _REQ + ".update_finish_state",
        "looks for an end in a shadow's new token",
        "engine.real",
        takes="new_accepted_len",
    ),
    Function(_ABORT, "an end without tokens", "engine.real", takes="message, status_code"),
    Function(
        _ABORT,
        "the end that a guest's host reports",
        "engine.real",
        takes="message, status_code, err_type",
    ),
    Function(_ABORT + ".to_json", "an end travels as JSON", "engine.codec engine.real"),
    # Into the batch without prefill, or back to the queue.
    Function(
        _REQ + ".refresh_fill_ids", "before it joins the batch without prefill", "engine.batch"
    ),
    Attribute(
        _REQ + ".extend_end",
        "all its positions are filled when it joins the batch",
        "engine.batch",
    ),
    Attribute(_REQ + ".skip_radix_cache_insert", "no checkpoint of moved KV", "engine.batch"),
    Function(_REQ + ".reset_for_retract", "its KV was lost elsewhere", "engine.batch"),
    Attribute(
        _REQ + ".pd_rebootstrap_in_progress",
        "the prefill instance computes lost KV again",
        "engine.batch",
        read_in="sglang.srt.disaggregation.decode_schedule_batch_mixin",
    ),
    Attribute(
        _REQ + ".pd_rebootstrap_forced_output_id",
        "... and samples no other token in the last one's place",
        "engine.batch",
    ),
    # A guest shares no cached prefix.
    Attribute(_REQ + ".prefix_len", "none of a guest's row is the prefix cache's", "engine.pages"),
    Attribute(_REQ + ".last_node", "bound to the root of the prefix cache", "engine.pages"),
    Attribute(_REQ + ".last_host_node", "bound to the root of the prefix cache", "engine.pages"),
    Attribute(_REQ + ".best_match_node", "bound to the root of the prefix cache", "engine.pages"),
    Attribute(_REQ + ".lock", "it holds none in the prefix cache", "engine.pages"),
    Attribute(
        _REQ + ".num_matched_prefix_tokens", "a guest matches no cached prefix", "engine.pages"
    ),
    Attribute(_REQ + ".host_hit_length", "a guest matches no cached prefix", "engine.pages"),
    Attribute(_REQ + ".extra_key", "which root of the prefix cache is its", "engine.pages"),
    # What keeps a request where it is.
    Attribute(_REQ + ".multimodal_inputs", _PINS, _CODEC),
    Attribute(_REQ + ".session", _PINS, _CODEC),
    Attribute(_REQ + ".session_id", _PINS, _CODEC),
    Attribute(_REQ + ".beam_group", _PINS, _CODEC),
    Attribute(_REQ + ".input_embeds", _PINS, _CODEC),
    Attribute(_REQ + ".positional_embed_overrides", _PINS, _CODEC),
    Attribute(_REQ + ".custom_logit_processor", _PINS, _CODEC),
    Attribute(_REQ + ".lora_id", _PINS, _CODEC),
    Attribute(_REQ + ".return_hidden_states", _PINS, _CODEC),
    Attribute(_REQ + ".return_routed_experts", _PINS, _CODEC),
    Attribute(_REQ + ".return_indexer_topk", _PINS, _CODEC),
    Attribute(_REQ + ".return_sampling_mask", _PINS, _CODEC),
    Function(_REQ + ".is_dllm", "a diffusion model cannot move", _CODEC),
    # KV.
    Attribute(_KV + ".holds_kv", "whether it has a row", "engine.pages status"),
    Attribute(_KV + ".holds_mamba", "recurrent state cannot move", _CODEC),
    Function(_REQ + ".detach_kv", "KV that waits for a copy outlives it", "engine.pages"),
    Field(_KV + ".req_pool_idx", "its row in the request table", "engine.pages"),
    Field(_KV + ".kv_allocated_len", "positions with a slot", "engine.pages engine.real"),
    Field(_KV + ".kv_committed_len", "positions whose KV is written", "engine.batch"),
    Field(_KV + ".cache_protected_len", "positions the prefix cache owns", "engine.pages"),
    Field(_KV + ".cache_inserted_len", "positions the prefix cache has", "engine.pages"),
    # Log-probabilities.
    Field(_LOG + ".output_token_logprobs_val", "a guest's go home", _CODEC),
    Field(_LOG + ".output_token_logprobs_idx", "a guest's go home", _CODEC),
    Field(_LOG + ".output_top_logprobs_val", "a guest's go home", _CODEC),
    Field(_LOG + ".output_top_logprobs_idx", "a guest's go home", _CODEC),
    Field(_LOG + ".output_token_ids_logprobs_val", "a guest's go home", _CODEC),
    Field(_LOG + ".output_token_ids_logprobs_idx", "a guest's go home", _CODEC),
    # Sampling.
    Field(_PARAMS + ".max_new_tokens", "the limit SGLang worked out at home", "migration.target"),
    Field(_PARAMS + ".n", "parallel samples need rooms of their own", "rooms"),
    Field(_PARAMS + ".beam_width", "beam search cannot move", _CODEC),
    Field(_PARAMS + ".watermark", _PINS, _CODEC),
    Field(_PARAMS + ".frequency_penalty", "its sums are repeated at a target", "engine.penalties"),
    Field(_PARAMS + ".presence_penalty", "its sums are repeated at a target", "engine.penalties"),
    Field(_PARAMS + ".repetition_penalty", "its sums are repeated at a target", "engine.penalties"),
    Field(_PARAMS + ".min_new_tokens", "counted anew at a target", "engine.penalties"),
    # Times.
    Attribute(_TIMES + ".forward_entry_time", "the running timeout of a shadow", "extension"),
    Function(_TIMES + ".set_last_decode_finish_time", "a shadow's token", "engine.real"),
    Function(_TIMES + ".set_completion_time", "a shadow's end", "engine.real"),
    Function(_TIMES + ".set_retract_time", "it is queued again", "engine.batch"),
    # Grammar.
    Function(
        _GRAMMAR + ".accept_token",
        "a target's grammar repeats the output",
        "engine.replay",
        takes="token",
    ),
    Attribute(_GRAMMAR + ".finished", "as SGLang sets it with each token", "migration.home"),
)
