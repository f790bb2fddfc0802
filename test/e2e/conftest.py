"""Clusters shared by the end-to-end tests: one at a time, each started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sglang_star.cluster import Cluster
from sglang_star.cluster_layout import ClusterSpec
from sglang_star.model import tiny_model
from unit.tiny_head import head_for

COMMON = ("--dtype", "float32", "--max-running-requests", "48", "--skip-server-warmup")
TOOLS = ("--tool-call-parser", "qwen25")

# Between them: both modes, both page sizes, overlap on and off, chains over three instances.
LAYOUTS: dict[str, dict[str, object]] = {
    "aggregated-page1-overlap": {"aggregated": 3, "engine_arguments": (*COMMON, *TOOLS)},
    "aggregated-page16-sync-seeded": {
        "aggregated": 2,
        "engine_arguments": (
            *COMMON,
            *TOOLS,
            "--page-size",
            "16",
            "--disable-overlap-schedule",
            "--enable-deterministic-inference",
        ),
    },
    "disaggregated-page1-overlap": {
        "prefill": 1,
        "decode": 2,
        "engine_arguments": (*COMMON, *TOOLS),
    },
}


@pytest.fixture(scope="session", params=list(LAYOUTS))
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp(request.param)
    spec = ClusterSpec(
        model=str(tiny_model()),
        predictor=str(head_for(tiny_model(), folder / "tiny.safetensors")),
        rescheduler="off",
        max_total_tokens=16384,
        **LAYOUTS[request.param],  # type: ignore[arg-type]
    )
    with Cluster(spec, folder) as running:
        yield running
