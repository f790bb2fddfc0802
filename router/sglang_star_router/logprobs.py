"""Prompt logprobs are computed by prefill, the rest by decode; ``/generate`` answers with both."""

from __future__ import annotations

from typing import Any

import orjson

PROMPT_FIELDS = ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs")


def with_prompt_logprobs(prefill: bytes, decode: bytes) -> bytes:
    """Put the prompt's logprobs from prefill's answer before decode's.

    Returns ``decode`` unchanged if either is not an answer of ``/generate``.
    """
    try:
        ours, theirs = orjson.loads(decode), orjson.loads(prefill)
    except orjson.JSONDecodeError:
        return decode
    pairs = list(zip(_answers(ours), _answers(theirs), strict=False))
    if not pairs:
        return decode
    for answer, source in pairs:
        meta, found = answer.get("meta_info"), source.get("meta_info")
        if not isinstance(meta, dict) or not isinstance(found, dict):
            return decode
        for name in PROMPT_FIELDS:
            if isinstance(found.get(name), list):
                meta[name] = found[name] + (meta.get(name) or [])
    return orjson.dumps(ours)


def _answers(parsed: Any) -> list[dict[str, Any]]:
    items = parsed if isinstance(parsed, list) else [parsed]
    return [item for item in items if isinstance(item, dict)]
