"""Clusters shared by the end-to-end tests: one at a time, each started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sglang_star.cluster import Cluster
from sglang_star.cluster_layout import CPU_ENVIRONMENT, ClusterSpec
from sglang_star.forkserver import ForkServer
from sglang_star.machine import has_gpu
from sglang_star.model import tiny_model
from unit.tiny_head import head_for

COMMON = ("--dtype", "float32", "--max-running-requests", "48", "--skip-server-warmup")
# Nobody dies in these clusters, so nobody is to be taken for dead because the machine is busy.
PATIENT = (
    *("--star-peer-timeout-s", "120", "--star-move-deadline-s", "240"),
    # Moves armed for the same token start together.
    *("--star-max-moves", "16"),
)
PATIENT_ROUTER = (
    *("--health-check-timeout-secs", "120", "--health-failure-threshold", "100"),
    *("--status-stale-secs", "120", "--queue-timeout-secs", "240"),
)
TOOLS = ("--tool-call-parser", "qwen25")

# Between them: both modes, both page sizes, overlap on and off, chains over three instances,
# prefills alone and together with what decodes, KV by shared memory and over a network.
LAYOUTS: dict[str, dict[str, object]] = {
    "aggregated-page1-overlap-mixed": {
        "aggregated": 3,
        "engine_arguments": (*COMMON, *PATIENT, *TOOLS, "--enable-mixed-chunk"),
    },
    "aggregated-page16-sync-seeded": {
        "aggregated": 2,
        "engine_arguments": (
            *COMMON,
            *PATIENT,
            *TOOLS,
            "--page-size",
            "16",
            "--disable-overlap-schedule",
            "--enable-deterministic-inference",
            "--star-transport",
            "nixl",
        ),
    },
    "disaggregated-page1-overlap": {
        "prefill": 1,
        "decode": 2,
        "engine_arguments": (*COMMON, *PATIENT, *TOOLS),
    },
}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """End-to-end tests come last: those with clusters of their own, then one layout at a time.

    A shared cluster lives until another layout is wanted: nothing else is to run beside it, and
    SGLang's in-process engine, when it ends, kills every child of the test process.
    """

    def place(item: pytest.Item) -> int:
        if item.get_closest_marker("e2e") is None:
            return 0
        layout = getattr(item, "callspec", None) and item.callspec.params.get("cluster")  # type: ignore[attr-defined]
        return 2 + list(LAYOUTS).index(layout) if layout else 1

    items.sort(key=place)


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer | None]:
    """SGLang imported once for all clusters of the session, where engines can be forks."""
    if has_gpu():
        yield None
        return
    with ForkServer(tmp_path_factory.mktemp("forks") / "imports.log", CPU_ENVIRONMENT) as server:
        yield server


@pytest.fixture(scope="session", params=list(LAYOUTS))
def cluster(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    forks: ForkServer | None,
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp(request.param)
    spec = ClusterSpec(
        model=str(tiny_model()),
        predictor=str(head_for(tiny_model(), folder / "tiny.safetensors")),
        rescheduler="off",
        max_total_tokens=16384,
        router_arguments=PATIENT_ROUTER,
        **LAYOUTS[request.param],  # type: ignore[arg-type]
    )
    with Cluster(spec, folder, forks=forks) as running:
        yield running
