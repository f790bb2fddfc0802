"""Real engines behind keys: every API is served through the router, and orders need the admin's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

from e2e.conftest import COMMON, PATIENT, PATIENT_ROUTER
from sglang_star.cluster import Cluster
from sglang_star.cluster_layout import ClusterSpec
from sglang_star.forkserver import ForkServer
from sglang_star.model import tiny_model

pytestmark = pytest.mark.e2e

KEYS = ("--api-key", "client", "--admin-api-key", "admin")
CLIENT = {"Authorization": "Bearer client"}
ADMIN = {"Authorization": "Bearer admin"}
MESSAGES = [{"role": "user", "content": "Count to five."}]
SERVED: dict[str, dict[str, Any]] = {
    "/generate": {"text": "one", "sampling_params": {"max_new_tokens": 4}},
    "/v1/completions": {"model": "default", "prompt": "one", "max_tokens": 4},
    "/v1/chat/completions": {"model": "default", "messages": MESSAGES, "max_tokens": 4},
    "/invocations": {"model": "default", "messages": MESSAGES, "max_tokens": 4},
    "/v1/messages": {"model": "default", "messages": MESSAGES, "max_tokens": 4},
    "/v1/responses": {
        "model": str(tiny_model()),
        "input": "Count to five.",
        "max_output_tokens": 4,
    },
}


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory, forks: ForkServer | None) -> Iterator[Cluster]:
    spec = ClusterSpec(
        model=str(tiny_model()),
        prefill=1,
        decode=1,
        predictor="off",
        rescheduler="off",
        max_total_tokens=8192,
        engine_arguments=(*COMMON, *PATIENT, *KEYS),
        router_arguments=(*PATIENT_ROUTER, *KEYS),
    )
    with Cluster(spec, tmp_path_factory.mktemp("door"), forks=forks) as running:
        yield running


def test_every_api_is_served_by_prefill_and_decode_behind_keys(locked: Cluster) -> None:
    async def check() -> None:
        async with aiohttp.ClientSession(headers=CLIENT) as session:
            for path, body in SERVED.items():
                for stream in (False, True):
                    asked = {**body, "stream": stream}
                    async with session.post(locked.url + path, json=asked) as answer:
                        said = await answer.text()
                        assert answer.status == 200, (path, said)
                        assert "error" not in said.replace('"error":null', ""), (path, said)
                        assert len(said) > 50, (path, said)

    asyncio.run(check())


def test_orders_need_the_admins_key_at_the_router_and_at_engines(locked: Cluster) -> None:
    async def check() -> None:
        async with aiohttp.ClientSession() as session:
            urls = [locked.url + "/star/cluster", locked.url + "/flush_cache"]
            urls += [one.url + "/star/status" for one in locked.engines if one.role == "decode"]
            for url in urls:
                for headers, expected in (({}, 401), (CLIENT, 401), (ADMIN, 200)):
                    async with session.get(url, headers=headers) as answer:
                        assert answer.status == expected, (url, headers)
            for one in locked.engines:
                async with session.get(one.url + "/server_info", headers=CLIENT) as answer:
                    info = await answer.json()
                assert info["api_key"] == info["admin_api_key"] == "***"
                assert "--admin-api-key" in info["launch_command"]
                assert "admin" not in info["launch_command"].replace("--admin-api-key", "")
            name = next(one.name for one in locked.engines if one.role == "decode")
            for order in ("drain", "undrain"):
                async with session.post(
                    f"{locked.url}/star/{order}", json={"instance": name}, headers=ADMIN
                ) as answer:
                    assert answer.status == 200, await answer.text()

    asyncio.run(check())
