"""Every path of SGLang's HTTP server that runs the model, and what the router must know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Path:
    """One path that runs the model.

    Attributes:
        paired: takes a bootstrap room, so that prefill and decode instances can serve it.
        name_field: field by which a request may be given its name; empty if there is none.
        name_prefix: what SGLang begins such names with.
        new_tokens: output tokens when the request names no limit; 0 leaves it to the context.
        streams: answers with a stream unless told not to.
        json: the body is JSON.
        methods: HTTP methods.
    """

    paired: bool = False
    name_field: str = ""
    name_prefix: str = ""
    new_tokens: int = 0
    streams: bool = False
    json: bool = True
    methods: tuple[str, ...] = ("POST",)


_BOTH: Final = ("POST", "PUT")
_SCORING: Final = Path(new_tokens=1)
"""One forward pass: it scores or embeds its input and generates nothing."""

RESPONSES: Final = "/v1/responses"
PATHS: Final[dict[str, Path]] = {
    "/generate": Path(paired=True, name_field="rid", new_tokens=128, methods=_BOTH),
    "/v1/completions": Path(paired=True, name_field="rid", new_tokens=16),
    "/v1/chat/completions": Path(paired=True, name_field="rid"),
    "/invocations": Path(paired=True, name_field="rid"),
    RESPONSES: Path(paired=True, name_field="request_id", name_prefix="resp_"),
    "/v1/messages": Path(paired=True),
    "/api/chat": Path(streams=True),
    "/api/generate": Path(streams=True),
    "/vertex_generate": Path(new_tokens=128),
    "/v1/audio/transcriptions": Path(json=False),
    "/v1/score": _SCORING,
    "/v1/decisions": _SCORING,
    "/v1/systemone": _SCORING,
    "/v1/embeddings": _SCORING,
    "/v1/classify": _SCORING,
    "/v1/rerank": Path(new_tokens=1, methods=_BOTH),
    "/encode": Path(new_tokens=1, methods=_BOTH),
    "/classify": Path(new_tokens=1, methods=_BOTH),
}
