"""Which code and which data a simulated result came from."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import sglang_star.platform.profile
import sglang_star_router.policy
from sglang_star_bench.traces import Trace

_MODULES = ("runs.py", "traces.py", "scenarios.py", "baselines.py", "simulator")
"""Of this package, all that a simulated number depends on."""


@lru_cache(maxsize=1)
def of_code() -> str:
    """Hash of the simulator, the policies and the latency model as they are on disk."""
    here = Path(__file__).parent
    roots = [here / name for name in _MODULES]
    roots += [Path(str(sglang_star.platform.profile.__file__))]
    roots += [Path(str(sglang_star_router.policy.__file__)).parent]
    digest = hashlib.sha256()
    for root in roots:
        files = (
            [root] if root.is_file() else sorted(root.glob("*.py")) + sorted(root.glob("*.json"))
        )
        for file in files:
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def of_trace(trace: Trace) -> str:
    """Hash of a trace's rows."""
    digest = hashlib.sha256()
    for column in (trace.arrival_s, trace.input_len, trace.output_len):
        digest.update(column.tobytes())
    return digest.hexdigest()[:12]
