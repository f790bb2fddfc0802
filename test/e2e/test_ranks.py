"""Engines of two ranks each: what moves is every rank's share of the KV, in the same step."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from e2e.conftest import COMMON, PATIENT, PATIENT_ROUTER, TOOLS
from e2e.test_identity import CASES, check
from sglang_star.cluster import Cluster
from sglang_star.cluster_layout import ClusterSpec
from sglang_star.forkserver import ForkServer
from sglang_star.model import tiny_model
from unit.tiny_head import head_for

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, forks: ForkServer | None) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("ranks")
    spec = ClusterSpec(
        model=str(tiny_model()),
        aggregated=2,
        predictor=str(head_for(tiny_model(), folder / "tiny.safetensors")),
        rescheduler="off",
        max_total_tokens=8192,
        router_arguments=PATIENT_ROUTER,
        engine_arguments=(*COMMON, *PATIENT, *TOOLS, "--tp-size", "2"),
    )
    with Cluster(spec, folder, forks=forks) as running:
        yield running


@pytest.mark.parametrize("case", ["greedy-streamed", "json-schema-streamed"])
def test_moved_stream_equals_its_twin(pair: Cluster, case: str) -> None:
    asyncio.run(check(pair, CASES[case]))
