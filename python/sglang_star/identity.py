"""Which instances may exchange requests: those of equal kind, and for shared memory equal hosts."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

import orjson

from sglang_star import __version__, hooks
from sglang_star.engine.pages import KvPages
from sglang_star.engine.settings import setting
from sglang_star.migration.kind import Kind
from sglang_star.protocol import PROTOCOL_VERSION
from sglang_star.status import ROLES

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

UNTOLD = ("_name_or_path", "name_or_path", "transformers_version", "_commit_hash")
"""Entries of a model's configuration that say where it comes from, and not what it is."""


def kind_of(scheduler: Scheduler, pages: KvPages) -> Kind:
    """What must be equal of the engine that this scheduler belongs to, and of its KV."""
    server_args, model_config = scheduler.server_args, scheduler.model_config
    config = model_config.hf_config.to_dict()
    told = orjson.dumps(
        {name: value for name, value in config.items() if name not in UNTOLD},
        option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS,
        default=str,
    )
    return Kind(
        star=__version__,
        protocol=PROTOCOL_VERSION,
        sglang=hooks.release(),
        role=ROLES[scheduler.disaggregation_mode],
        model=hashlib.sha256(told).hexdigest()[:16],
        dtype=str(model_config.dtype),
        quantization=str(model_config.quantization),
        attention=model_config.attention_arch.name,
        context=int(model_config.context_len),
        overlap=bool(scheduler.enable_overlap),
        tp=int(setting(server_args, "tp_size")),
        pp=int(setting(server_args, "pp_size")),
        dp=int(setting(server_args, "dp_size")),
        ep=int(setting(server_args, "ep_size")),
        dcp=int(setting(server_args, "dcp_size")),
        dp_attention=bool(setting(server_args, "enable_dp_attention")),
        grammar=str(setting(server_args, "grammar_backend")),
        **pages.layout,  # type: ignore[arg-type]
    )


def host_token() -> str:
    """Equal between processes that can share memory: of one machine, and visible to each other."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        processes = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return ""
    return f"{boot}/{processes}"
