"""NIXL on host memory, so that prefill/decode disaggregation runs without a GPU.

SGLang names its KV memory ``VRAM``; on the portable CPU platform it is ordinary memory, which
UCX moves just as well once it is called ``DRAM``.
"""

from __future__ import annotations

from typing import Any

_Call = tuple[tuple[Any, ...], dict[str, Any]]


def register_memory(
    agent: Any, reg_list: Any, mem_type: str | None = None, *args: Any, **kwargs: Any
) -> _Call:
    """BEFORE ``nixl_agent.register_memory``."""
    return (agent, reg_list, _host(mem_type), *args), kwargs


def get_descs(
    agent: Any, descs: Any, mem_type: str | None = None, *args: Any, **kwargs: Any
) -> _Call:
    """BEFORE ``nixl_agent.get_xfer_descs`` and ``get_reg_descs``."""
    return (agent, descs, _host(mem_type), *args), kwargs


def prep_xfer_dlist(
    agent: Any, name: str, xfer_list: Any, mem_type: str | None = None, *args: Any, **kwargs: Any
) -> _Call:
    """BEFORE ``nixl_agent.prep_xfer_dlist``."""
    return (agent, name, xfer_list, _host(mem_type), *args), kwargs


def maybe_send_cached_prefix_chunk(original: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND ``Scheduler.maybe_send_cached_prefix_chunk``: the regular send covers the prefix."""


def _host(mem_type: str | None) -> str | None:
    return "DRAM" if mem_type == "VRAM" else mem_type
