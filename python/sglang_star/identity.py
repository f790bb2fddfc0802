"""Which instances may exchange requests: equal fingerprints, and for shared memory equal hosts."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

import orjson

from sglang_star import __version__, hooks
from sglang_star.engine.pages import KvPages
from sglang_star.status import ROLES

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler


def fingerprint_of(scheduler: Scheduler, pages: KvPages) -> str:
    """Equal between instances that may exchange requests."""
    args, config = scheduler.server_args, scheduler.model_config
    parts = [
        __version__,
        hooks.release(),
        ROLES[scheduler.disaggregation_mode],
        orjson.dumps(
            config.hf_config.to_dict(),
            option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS,
            default=str,
        ).decode(),
        str(config.dtype),
        str(args.quantization),
        str(args.load_format),
        str(args.random_seed) if args.load_format == "dummy" else "",
        str(config.context_len),
        str(scheduler.enable_overlap),
        f"tp={args.tp_size}",  # heads of a cache that every rank has whole do not show it
        *pages.layout,
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def host_token() -> str:
    """Equal between processes that can share memory: of one machine, and visible to each other."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        processes = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return ""
    return f"{boot}/{processes}"
