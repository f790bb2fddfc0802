"""A cluster that has nothing to do uses next to no processor time.

Processor time is what is compared, not time on the clock: other work on the machine makes an idle
process wait, and so use less of it.
"""

from __future__ import annotations

import asyncio
import time
from urllib.parse import urlsplit

import psutil
import pytest

from e2e.fleet import Fleet
from sglang_star.cluster import Cluster

pytestmark = pytest.mark.e2e

WATCHED_S = 5.0
MOST_OF_A_CORE = 0.03


def listener(url: str) -> psutil.Process:
    """The process that serves ``url``."""
    port = urlsplit(url).port
    for process in psutil.process_iter():
        try:
            connections = process.net_connections("tcp")
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
        if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections):
            return process
    raise AssertionError(f"nothing listens on {url}")


def processor_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def test_an_idle_cluster_is_idle(cluster: Cluster) -> None:
    async def scenario() -> None:
        async with Fleet.connect(cluster) as fleet:
            # A connection between prefill and decode comes with the first transfer, and stays.
            body = {"text": "hello", "sampling_params": {"max_new_tokens": 4}}
            code, _ = await fleet.post(fleet.router + "/generate", body)
            assert code == 200
            await fleet.settle()

    asyncio.run(scenario())
    servers = {engine.name: listener(engine.url) for engine in cluster.engines}
    everyone = {
        f"{name}, {member.name()} {member.pid}": member
        for name, server in servers.items()
        for member in (server, *server.children(recursive=True))
    }
    assert len(everyone) >= 3 * len(servers), "server, scheduler and detokenizer of each engine"
    everyone["router"] = listener(cluster.url)
    before = {name: processor_s(process) for name, process in everyone.items()}
    began = time.monotonic()
    time.sleep(WATCHED_S)
    used = {name: processor_s(process) - before[name] for name, process in everyone.items()}
    watched_s = time.monotonic() - began
    busy = {
        name: f"{seconds / watched_s:.1%}"
        for name, seconds in used.items()
        if seconds > MOST_OF_A_CORE * watched_s
    }
    assert not busy, "of a core, by processes with nothing to do"
