"""What the router has to know about a generation request, read without rebuilding its body.

Fields the router adds are spliced in before the closing brace, so that every byte the client wrote
reaches the engine as it was; where the client gave the same field, the last one wins in every JSON
reader the engines use.
"""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import orjson

GENERATION_PATHS: Final = frozenset(
    {"/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses"}
)
"""Endpoints whose requests decode, and in a disaggregated fleet need a bootstrap room."""

_DEFAULT_NEW_TOKENS: Final = {"/generate": 128, "/v1/completions": 16}
_ABSENT: Final = msgspec.Raw(b"")


class _Fields(msgspec.Struct):
    """The parts looked at; each is decoded only if it is needed, and never trusted."""

    rid: msgspec.Raw = _ABSENT
    stream: msgspec.Raw = _ABSENT
    n: msgspec.Raw = _ABSENT
    prompt: msgspec.Raw = _ABSENT
    text: msgspec.Raw = _ABSENT
    input_ids: msgspec.Raw = _ABSENT
    input_embeds: msgspec.Raw = _ABSENT
    messages: msgspec.Raw = _ABSENT
    input: msgspec.Raw = _ABSENT
    max_tokens: msgspec.Raw = _ABSENT
    max_completion_tokens: msgspec.Raw = _ABSENT
    max_output_tokens: msgspec.Raw = _ABSENT
    sampling_params: msgspec.Raw = _ABSENT
    return_logprob: msgspec.Raw = _ABSENT


_decoder = msgspec.json.Decoder(_Fields)


@dataclass(frozen=True, slots=True)
class Call:
    """One generation request as the router sees it.

    Attributes:
        body: as the client sent it.
        batch: number of prompts; samples: completions wanted of each.
        rid: the client's own rid when it gave a single one, else empty.
        named: the body already has a ``rid``, of whatever form.
        prompt_bytes: size of the prompt as JSON, over all prompts.
        prompt_ids: number of token ids when the prompt came as ids, else 0.
        max_new_tokens: per sample; 0 when the request leaves it to the engine.
        streams: the client wants server-sent events.
        prompt_logprobs: the answer must carry logprobs of the prompt.
    """

    path: str
    body: bytes
    batch: int
    samples: int
    rid: str
    named: bool
    prompt_bytes: int
    prompt_ids: int
    max_new_tokens: int
    streams: bool
    prompt_logprobs: bool = False

    @property
    def nameable(self) -> bool:
        """True if a rid may be added without the client being able to tell.

        SGLang names a single request by a random 32-digit hexadecimal itself; of several it
        derives names from a given one, which would show in their ids, and the Responses API has
        its own names.
        """
        return (
            not self.named
            and self.batch == 1
            and self.samples == 1
            and self.path != "/v1/responses"
        )

    def with_fields(self, fields: dict[str, Any]) -> bytes:
        """Return the body with ``fields`` added."""
        if not fields:
            return self.body
        head = self.body.rstrip()[:-1].rstrip()
        comma = b"" if head.endswith(b"{") else b","
        return head + comma + orjson.dumps(fields)[1:]

    def bootstrap(self, host: str, port: int) -> dict[str, Any]:
        """Return the fields that pair this request's halves on prefill and decode.

        A batch gets one room per prompt, ``samples + 1`` apart, so that an engine that runs each
        sample, and the shared-prefix warm-up before them, in a room of its own stays clear of the
        next prompt's.
        """
        stride = self.samples + 1
        first = random.getrandbits(62)
        if self.batch == 1 and self.samples == 1:
            return {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": first}
        return {
            "bootstrap_host": [host] * self.batch,
            "bootstrap_port": [port] * self.batch,
            "bootstrap_room": [first + i * stride for i in range(self.batch)],
        }


def new_rid() -> str:
    """Return a name of the form SGLang gives requests itself."""
    return uuid.uuid4().hex


def read_call(path: str, body: bytes) -> Call | None:
    """Read a request body; None if it is not a JSON object, which the engine shall refuse."""
    try:
        fields = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    sampling = _value(fields.sampling_params)
    first = sampling[0] if isinstance(sampling, list) and sampling else sampling
    sampling = first if isinstance(first, dict) else {}
    prompt, batch, ids = _prompt(fields)
    rid = _value(fields.rid)
    samples = _count(sampling.get("n")) or _count(_value(fields.n)) or 1
    if path == "/v1/responses":
        samples = 1
    limit = (
        _count(_value(fields.max_completion_tokens))
        or _count(_value(fields.max_tokens))
        or _count(_value(fields.max_output_tokens))
        or _count(sampling.get("max_new_tokens"))
        or _DEFAULT_NEW_TOKENS.get(path, 0)
    )
    return Call(
        path=path,
        body=body,
        batch=batch,
        samples=samples,
        rid=rid if isinstance(rid, str) and batch == 1 and samples == 1 else "",
        named=rid is not None,
        prompt_bytes=len(prompt),
        prompt_ids=ids,
        max_new_tokens=limit,
        streams=bytes(fields.stream) == b"true",
        prompt_logprobs=path == "/generate" and bytes(fields.return_logprob) == b"true",
    )


def _prompt(fields: _Fields) -> tuple[bytes, int, int]:
    """Return the raw prompt, how many prompts it is, and how many token ids."""
    for raw in (fields.messages, fields.input):
        if raw != _ABSENT:
            return bytes(raw), 1, 0
    for raw, scalar_depth in (
        (fields.prompt, 1), (fields.text, 0), (fields.input_ids, 1), (fields.input_embeds, 2),
    ):  # fmt: skip
        prompt = bytes(raw)
        if not prompt.startswith(b"["):
            if prompt and prompt != b"null":
                return prompt, 1, 0
            continue
        items = _value(raw)
        depth, inner = 0, items
        while isinstance(inner, list) and inner:
            depth, inner = depth + 1, inner[0]
        if isinstance(inner, str) or depth > scalar_depth:
            ids = (
                0
                if isinstance(inner, str)
                else sum(len(item) for item in items if isinstance(item, list))
            )
            return prompt, max(1, len(items)), ids
        return prompt, 1, len(items)
    return b"", 1, 0


def _value(raw: msgspec.Raw) -> Any:
    return msgspec.json.decode(raw) if raw != _ABSENT else None


def _count(value: Any) -> int:
    """A positive whole number, else 0: the engine, not the router, refuses nonsense."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
