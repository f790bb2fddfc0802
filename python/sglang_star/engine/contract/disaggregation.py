"""Disaggregated serving: the role of an instance, and the queues of a decode instance."""

from __future__ import annotations

from typing import Final

from sglang_star.engine.contract.row import Attribute, Class, Field, Function, Module, Row

_MODE: Final = "sglang.srt.disaggregation.utils.DisaggregationMode"
_PREALLOC: Final = "sglang.srt.disaggregation.decode.DecodePreallocQueue"

ROWS: Final[tuple[Row, ...]] = (
    Class(_MODE, "the role of an extension", "status orders engine.batch"),
    Attribute(_MODE + ".NULL", "prefill and decode", "status"),
    Attribute(_MODE + ".PREFILL", "prefill only", "status engine.real"),
    Attribute(_MODE + ".DECODE", "decode only", "status engine.batch"),
    Attribute(_PREALLOC + ".queue", "requests without KV memory", "status"),
    Attribute(_PREALLOC + ".retracted_queue", "requests that lost theirs", "engine.batch"),
    Attribute(
        _PREALLOC + ".num_reserved_decode_tokens",
        "KV kept free for each request that decodes",
        "engine.batch",
    ),
    Function(
        _PREALLOC + ".add",
        "lets the prefill instance compute lost KV again",
        "engine.batch",
        takes="req, *, is_rebootstrap",
    ),
    Function(
        _PREALLOC + ".hold_rebootstrap",
        "the same, once a pause is over",
        "engine.batch",
        takes="req",
    ),
    Field("sglang.srt.disaggregation.decode.DecodeRequest.req", "the request in a queue", "status"),
    Attribute(
        "sglang.srt.disaggregation.decode.DecodeTransferQueue.queue",
        "requests whose KV comes",
        "status engine.batch",
    ),
    Attribute(
        "sglang.srt.disaggregation.prefill.PrefillBootstrapQueue.queue",
        "requests before their prefill",
        "status",
    ),
    Module("sglang.srt.disaggregation.nixl.conn", "imported before a fork", "platform.preloaded"),
)
