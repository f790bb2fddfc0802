"""NIXL on host memory, so that prefill/decode disaggregation runs without a GPU.

SGLang names its KV memory ``VRAM``; on the portable CPU platform it is ordinary memory, which
UCX moves just as well once it is called ``DRAM``. A machine without a GPU has no core to spare for
a thread that spins, either.
"""

from __future__ import annotations

from typing import Any, Final

import nixl._api

PROGRESS_DELAY_US: Final = 1000
"""Pause of NIXL's progress thread between two looks. It adds so much at most to a KV transfer from
prefill to decode; NIXL's own 0 keeps one core per agent busy, also when nothing is transferred."""

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
    agent: Any,
    agent_name: str,
    xfer_list: Any,
    mem_type: str | None = None,
    *args: Any,
    **kwargs: Any,
) -> _Call:
    """BEFORE ``nixl_agent.prep_xfer_dlist``."""
    return (agent, agent_name, xfer_list, _host(mem_type), *args), kwargs


def maybe_send_cached_prefix_chunk(original: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND ``Scheduler.maybe_send_cached_prefix_chunk``: the regular send covers the prefix."""


class AgentConfig(nixl._api.nixlBind.nixlAgentConfig):
    """REPLACES the configuration that ``nixl_agent`` fills in, with the delay fixed at 0 there."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; a progress thread is never told to spin."""
        super().__setattr__(name, PROGRESS_DELAY_US if name == "pthrDelay" else value)


def _host(mem_type: str | None) -> str | None:
    return "DRAM" if mem_type == "VRAM" else mem_type
