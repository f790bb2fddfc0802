"""Clusters shared by the end-to-end tests: one at a time, each started once."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from sglang_star.cluster import Cluster
from sglang_star.cluster_layout import CPU_ENVIRONMENT, ClusterSpec
from sglang_star.forkserver import ForkServer
from sglang_star.machine import has_gpu
from sglang_star.model import tiny_model
from unit.tiny_head import head_for

EVERYTHING = "STAR_TEST_EVERYTHING" in os.environ
"""Leave out nothing that other cases hold as well; the run takes half as long again."""

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


in_one_layout = pytest.mark.parametrize(
    "cluster", ["disaggregated-page1-overlap"], indirect=True, scope="session"
)
"""For what page size, scheduling and roles cannot change."""


def _parameter(item: pytest.Item, name: str) -> str | None:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get(name) if callspec else None


def _held_by_others(item: pytest.Item) -> bool:
    """Whether it is one of the identity cases that two layouts run, and this is the third."""
    layout, case = _parameter(item, "cluster"), _parameter(item, "case")
    if layout is None or case is None or "test_moved_stream_equals_its_twin" not in item.name:
        return False
    from e2e.test_identity import CASES

    return list(CASES).index(case) % len(LAYOUTS) == list(LAYOUTS).index(layout)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """End-to-end tests come last: those with clusters of their own, then one layout at a time.

    Every identity case is run in two of the three layouts, unless everything is to be run.

    A shared cluster lives until another layout is wanted: nothing else is to run beside it, and
    SGLang's in-process engine, when it ends, kills every child of the test process.
    """

    def place(item: pytest.Item) -> int:
        if item.get_closest_marker("e2e") is None:
            return 0
        layout = _parameter(item, "cluster")
        return 2 + list(LAYOUTS).index(layout) if layout else 1

    items.sort(key=place)
    if not EVERYTHING and (left_out := [item for item in items if _held_by_others(item)]):
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


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
