"""What the router has to know about a generation request, read without rebuilding its body.

Fields the router adds are spliced in before the closing brace, so that every byte the client wrote
reaches the engine as it was; where the client gave the same field, the last one wins in every JSON
reader the engines use.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from typing import Any, Final

import msgspec
import orjson

from sglang_star_router.paths import PATHS, RESPONSES, Path
from sglang_star_router.prompts import (
    ABSENT,
    Prompt,
    number_of_media,
    parts,
    prompts,
)

MEDIA_TOKENS: Final = 1000
"""What an image, a sound or a film is taken for until the engine has told the truth: an image of a
megapixel is 500 to 2,000 tokens in the common vision models."""


LONGEST_NAME: Final = 512
"""Characters of a name that the router looks at; it counts a request with a longer one as unnamed
by itself, and the engine may do with it what it likes."""


class _Fields(msgspec.Struct):
    """The parts looked at; each is decoded only if it is needed, and never trusted."""

    rid: msgspec.Raw = ABSENT
    request_id: msgspec.Raw = ABSENT
    previous_response_id: msgspec.Raw = ABSENT
    background: msgspec.Raw = ABSENT
    stream: msgspec.Raw = ABSENT
    n: msgspec.Raw = ABSENT
    prompt: msgspec.Raw = ABSENT
    text: msgspec.Raw = ABSENT
    input_ids: msgspec.Raw = ABSENT
    input_embeds: msgspec.Raw = ABSENT
    messages: msgspec.Raw = ABSENT
    input: msgspec.Raw = ABSENT
    instances: msgspec.Raw = ABSENT
    query: msgspec.Raw = ABSENT
    items: msgspec.Raw = ABSENT
    documents: msgspec.Raw = ABSENT
    system: msgspec.Raw = ABSENT
    instructions: msgspec.Raw = ABSENT
    tools: msgspec.Raw = ABSENT
    images: msgspec.Raw = ABSENT
    image_data: msgspec.Raw = ABSENT
    video_data: msgspec.Raw = ABSENT
    audio_data: msgspec.Raw = ABSENT
    max_tokens: msgspec.Raw = ABSENT
    max_completion_tokens: msgspec.Raw = ABSENT
    max_output_tokens: msgspec.Raw = ABSENT
    sampling_params: msgspec.Raw = ABSENT
    options: msgspec.Raw = ABSENT
    return_logprob: msgspec.Raw = ABSENT


_decoder = msgspec.json.Decoder(_Fields)
_NOTHING: Final = (ABSENT,) * len(_Fields.__struct_fields__)


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a body says.

    Attributes:
        batch: number of prompts; samples: completions wanted of each.
        rid: the client's own rid when it gave a single one, else empty.
        named: the body already has a name for its request, of whatever form.
        prompt_bytes: size of the prompt's text as JSON, over all prompts.
        prompt_ids: number of token ids or embeddings when the prompt came as such, else 0.
        media: images, sounds and films in the prompt.
        max_new_tokens: per sample; 0 when the request leaves it to the engine.
        streams: the client wants a stream.
        prompt_logprobs: the answer must carry logprobs of the prompt.
        previous: id of the stored response that this one goes on from; background: it is to be
            run, stored and asked for later. Both of the Responses API only.
    """

    batch: int = 1
    samples: int = 1
    rid: str = ""
    named: bool = False
    prompt_bytes: int = 0
    prompt_ids: int = 0
    media: int = 0
    max_new_tokens: int = 0
    streams: bool = False
    prompt_logprobs: bool = False
    previous: str = ""
    background: bool = False


class Call(Facts, frozen=True, kw_only=True):
    """One generation request as the router sees it.

    Attributes:
        body: as the client sent it, in pieces.
        avoid: URLs of instances that cannot serve it.
    """

    path: str
    body: tuple[bytes, ...]
    avoid: frozenset[str] = frozenset()

    @classmethod
    def of(cls, path: str, body: tuple[bytes, ...], facts: Facts) -> Call:
        """Put a body and what was read of it together."""
        return cls(path=path, body=body, **msgspec.structs.asdict(facts))

    @property
    def kind(self) -> Path:
        """What is known of its path."""
        return PATHS[self.path]

    @property
    def nameable(self) -> bool:
        """True if a name may be added without the client being able to tell.

        SGLang names a single request by a random 32-digit hexadecimal itself; of several it
        derives names from a given one, which would show in their ids.
        """
        return (
            bool(self.kind.name_field) and not self.named and self.batch == 1 and self.samples == 1
        )

    @property
    def learnable_bytes(self) -> int:
        """Size of the prompt if it is all text, so that its tokens tell of text; else 0."""
        return 0 if self.media or self.prompt_ids else self.prompt_bytes

    def name(self) -> str:
        """The request's name: its own, a new one of the form SGLang gives, or none."""
        return self.rid or (self.kind.name_prefix + _random_name() if self.nameable else "")

    def naming(self, rid: str) -> dict[str, Any]:
        """Fields that give it the name ``rid``."""
        return {self.kind.name_field: rid} if rid and not self.named else {}

    def prompt_tokens(self, tokens_of: Callable[[int], int]) -> int:
        """Estimate the prompt's tokens, over all prompts; ``tokens_of`` turns text into tokens."""
        media = self.media * MEDIA_TOKENS
        if self.prompt_ids:
            return self.prompt_ids + media
        return media + (tokens_of(self.prompt_bytes) if self.prompt_bytes or not media else 0)

    def with_fields(self, fields: dict[str, Any]) -> tuple[bytes, ...]:
        """Return the body with ``fields`` added, in pieces."""
        if not fields:
            return self.body
        *head, last = _without_end(self.body, b"}")
        comma = b"" if last.endswith(b"{") else b","
        return (*head, last + comma + orjson.dumps(fields)[1:])

    def bootstrap(self, host: str, port: int) -> dict[str, Any]:
        """Return the fields that pair this request's halves on prefill and decode.

        A batch gets one room per prompt, ``samples + 1`` apart, so that an engine that runs each
        sample, and the shared-prefix warm-up before them, in a room of its own stays clear of the
        next prompt's.
        """
        stride = self.samples + 1
        first = secrets.randbits(62)
        if self.batch == 1 and self.samples == 1:
            return {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": first}
        return {
            "bootstrap_host": [host] * self.batch,
            "bootstrap_port": [port] * self.batch,
            "bootstrap_room": [first + i * stride for i in range(self.batch)],
        }


def read_call(path: str, body: bytes) -> Call | None:
    """Read a request body; None if it is not a JSON object, which the engine shall refuse."""
    facts = read_facts(path, body)
    return None if facts is None else Call.of(path, (body,), facts)


def read_facts(path: str, body: bytes) -> Facts | None:
    """Read what matters of a body; None if it is not a JSON object."""
    kind = PATHS[path]
    if not kind.json:
        return Facts(media=1)
    try:
        fields = _decoder.decode(body)
        return _facts(path, kind, fields)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _facts(path: str, kind: Path, fields: _Fields) -> Facts:
    sampling = _value(fields.sampling_params)
    first = sampling[0] if isinstance(sampling, list) and sampling else sampling
    sampling = first if isinstance(first, dict) else {}
    options = _value(fields.options)
    options = options if isinstance(options, dict) else {}
    prompt = _prompt(fields)
    responses = path == RESPONSES
    rid = _value(fields.request_id if responses else fields.rid)
    samples = 1
    if not responses:
        samples = _count(sampling.get("n")) or _count(_value(fields.n)) or 1
    limit = (
        _count(_value(fields.max_completion_tokens))
        or _count(_value(fields.max_tokens))
        or _count(_value(fields.max_output_tokens))
        or _count(sampling.get("max_new_tokens"))
        or _count(options.get("num_predict"))
        or kind.new_tokens
    )
    alone = prompt.batch == 1 and samples == 1
    previous = _value(fields.previous_response_id) if responses else None
    return Facts(
        batch=prompt.batch,
        samples=samples,
        rid=_name(rid) if alone and kind.name_field else "",
        named=rid is not None,
        prompt_bytes=prompt.text,
        prompt_ids=prompt.ids,
        media=prompt.media,
        max_new_tokens=limit,
        streams=bytes(fields.stream) == b"true"
        or (kind.streams and bytes(fields.stream) != b"false"),
        prompt_logprobs=path == "/generate" and bytes(fields.return_logprob) == b"true",
        previous=previous[: LONGEST_NAME + 1] if isinstance(previous, str) else "",
        background=responses and bytes(fields.background) == b"true",
    )


def _prompt(fields: _Fields) -> Prompt:
    """Measure the prompt, wherever it stands."""
    found = Prompt()
    for raw in (fields.messages, fields.input, fields.instances):
        if raw is not ABSENT:
            found = parts(raw)
            break
    else:
        for raw, unit in (
            (fields.prompt, 1), (fields.text, 0), (fields.input_ids, 1), (fields.input_embeds, 2),
        ):  # fmt: skip
            if raw is not ABSENT and bytes(raw) != b"null":
                found = prompts(raw, unit)
                break
    # What templates put before and around the messages, and what is scored against what.
    around = (fields.system, fields.instructions, fields.tools,
              fields.query, fields.items, fields.documents)  # fmt: skip
    media = (fields.images, fields.image_data, fields.video_data, fields.audio_data)
    if around == _NOTHING[: len(around)] and media == _NOTHING[: len(media)]:
        return found
    return Prompt(
        text=found.text + sum(len(bytes(raw)) for raw in around),
        ids=found.ids,
        media=found.media + sum(number_of_media(raw) for raw in media),
        batch=found.batch,
    )


def _random_name() -> str:
    """``uuid.uuid4().hex`` without the object."""
    drawn = int.from_bytes(os.urandom(16), "big")
    return f"{drawn & ~(0xF << 76 | 0x3 << 62) | 0x4 << 76 | 0x2 << 62:032x}"


def _without_end(body: tuple[bytes, ...], end: bytes) -> list[bytes]:
    """The body without its last ``end`` and the blanks around that; at least one piece."""
    pieces = list(body)
    for strip in (b"", end):
        pieces[-1] = pieces[-1].removesuffix(strip).rstrip()
        while not pieces[-1] and len(pieces) > 1:
            pieces.pop()
            pieces[-1] = pieces[-1].rstrip()
    return pieces


def _value(raw: msgspec.Raw) -> Any:
    return msgspec.json.decode(raw) if raw is not ABSENT else None


def _name(value: Any) -> str:
    return value if isinstance(value, str) and len(value) <= LONGEST_NAME else ""


def _count(value: Any) -> int:
    """A positive whole number, else 0: the engine, not the router, refuses nonsense."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
