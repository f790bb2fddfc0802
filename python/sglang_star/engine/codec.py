"""What travels of a request, as bytes that need no unpickling.

The request message is SGLang's own ``TokenizedGenerateReqInput``, a msgspec struct, stripped of
every field that could carry an arbitrary object; a request that uses such a feature does not move
(:func:`pinned`).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import orjson
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput

from sglang_star.errors import MalformedMessage
from sglang_star.star_request import star_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class TokenDetails(msgspec.Struct, array_like=True, frozen=True):
    """Log-probabilities of newly decoded tokens, one entry per token where requested."""

    values: list[Any] = []
    indices: list[Any] = []
    top_values: list[Any] = []
    top_indices: list[Any] = []
    ids_values: list[Any] = []
    ids_indices: list[Any] = []


class Travelling(msgspec.Struct, array_like=True, frozen=True):
    """What a request is rebuilt from, beside its prompt.

    Attributes:
        message: its message, msgpack.
        output: token ids so far, little-endian int64; only for a grammar to take in.
    """

    message: bytes
    output: bytes = b""


_request_decoder = msgspec.msgpack.Decoder(TokenizedGenerateReqInput)
_travelling_decoder = msgspec.msgpack.Decoder(Travelling)
_details_decoder = msgspec.msgpack.Decoder(TokenDetails)


def pinned(req: Req) -> str:
    """Why this request cannot move; empty if it can."""
    origin = star_of(req).origin
    params = req.sampling_params
    reasons = (
        (origin is None, "its original message is unknown"),
        (req.multimodal_inputs is not None, "multimodal input"),
        (req.session is not None or req.session_id is not None, "session"),
        (req.beam_group is not None or (params.beam_width or 1) > 1, "beam search"),
        (req.input_embeds is not None, "input_embeds"),
        (req.positional_embed_overrides is not None, "embedding overrides"),
        (req.custom_logit_processor is not None, "custom logit processor"),
        (params.watermark is not None, "watermark"),
        (req.lora_id is not None, "LoRA adapter"),
        (bool(req.return_hidden_states), "return_hidden_states"),
        (req.return_routed_experts or req.return_indexer_topk, "routing capture"),
        (req.return_sampling_mask, "return_sampling_mask"),
        (req.kv.holds_mamba, "recurrent state"),
        (req.is_dllm(), "diffusion model"),
    )
    return next((text for condition, text in reasons if condition), "")


def encode_request(req: Req) -> tuple[bytes, bytes]:
    """Return the stripped message, with a :class:`Travelling` around it, and the prompt's ids."""
    origin = star_of(req).origin
    stripped = msgspec.structs.replace(
        origin,
        rid=None,
        http_worker_ipc=None,
        input_text=None,
        input_ids=None,
        mm_inputs=None,
        time_stats=None,
        kv_hints=None,
        sampling_params=req.sampling_params,
    )
    output = _to_bytes(req.output_ids) if req.grammar is not None else b""
    travelling = Travelling(msgspec.msgpack.encode(stripped), output)
    return msgspec.msgpack.encode(travelling), _to_bytes(req.origin_input_ids)


def decode_request(
    data: bytes, prompt: bytes, rid: str
) -> tuple[TokenizedGenerateReqInput, array[int]]:
    """Rebuild the message under a new rid, and what is known of its output.

    Raises:
        MalformedMessage: the bytes are not such a message, or carry what never travels.
    """
    try:
        travelling = _travelling_decoder.decode(data)
        message = _request_decoder.decode(travelling.message)
        ids = _from_bytes(prompt)
        output = _from_bytes(travelling.output)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MalformedMessage(f"not a tokenized request: {error}") from error
    forbidden = (
        message.time_stats,
        message.mm_inputs,
        message.custom_logit_processor,
        message.positional_embed_overrides,
        message.input_embeds,
        message.session_params,
    )
    if any(field is not None for field in forbidden) or not len(ids):
        raise MalformedMessage("the tokenized request carries a field that never travels")
    message.rid = rid
    message.input_ids = ids
    return message, output


def _to_bytes(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, dtype="<i8").tobytes()


def _from_bytes(data: bytes) -> array[int]:
    return array("q", np.frombuffer(data, dtype="<i8").tolist())


def encode_details(req: Req, start: int, end: int) -> bytes:
    """Log-probabilities of the tokens at list positions ``[start, end)``; empty if unwanted."""
    if not req.return_logprob:
        return b""
    log = req.logprob
    return msgspec.msgpack.encode(
        TokenDetails(
            log.output_token_logprobs_val[start:end],
            log.output_token_logprobs_idx[start:end],
            log.output_top_logprobs_val[start:end],
            log.output_top_logprobs_idx[start:end],
            log.output_token_ids_logprobs_val[start:end],
            log.output_token_ids_logprobs_idx[start:end],
        )
    )


def append_details(req: Req, data: bytes, tokens: int) -> None:
    """Append what :func:`encode_details` took of so many tokens, at home.

    Raises:
        MalformedMessage: not such bytes, or of another number of tokens.
    """
    if not req.return_logprob:
        return
    try:
        details = _details_decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(f"not token details: {error}") from error
    if len(details.values) != tokens or len(details.indices) != tokens:
        raise MalformedMessage(f"details of {len(details.values)} tokens, not of {tokens}")
    log = req.logprob
    log.output_token_logprobs_val.extend(details.values)
    log.output_token_logprobs_idx.extend(details.indices)
    log.output_top_logprobs_val.extend(details.top_values)
    log.output_top_logprobs_idx.extend(details.top_indices)
    log.output_token_ids_logprobs_val.extend(details.ids_values)
    log.output_token_ids_logprobs_idx.extend(details.ids_indices)


def encode_finish(req: Req) -> bytes:
    """SGLang's finish reason as JSON; empty while running."""
    return orjson.dumps(req.finished_reason.to_json()) if req.finished() else b""
