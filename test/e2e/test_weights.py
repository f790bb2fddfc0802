"""Weights that are changed while engines run: KV goes only where they are the same to the bit."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.conftest import COMMON, PATIENT_ROUTER
from e2e.fleet import Fleet, new_rid
from sglang_star.cluster import Cluster
from sglang_star.cluster_layout import ClusterSpec
from sglang_star.forkserver import ForkServer
from sglang_star.model import tiny_model

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in another folder."""
    return Path(shutil.copytree(tiny_model(), tmp_path_factory.mktemp("models") / "same"))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with one bit of one weight changed: no sample would find it."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_model(), tmp_path_factory.mktemp("models") / "tuned"))
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "down_proj" in name)
    weights[name].view(torch.uint8).view(-1)[1000] ^= 4
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, forks: ForkServer | None) -> Iterator[Cluster]:
    spec = ClusterSpec(
        model=str(tiny_model()),
        predictor="off",
        rescheduler="off",
        max_total_tokens=8192,
        aggregated=2,
        engine_arguments=COMMON,
        router_arguments=PATIENT_ROUTER,
    )
    with Cluster(spec, tmp_path_factory.mktemp("weights"), forks=forks) as running:
        yield running


async def load(fleet: Fleet, name: str, folder: Path) -> None:
    """As a trainer does it, but without a name for the version."""
    body = {"model_path": str(folder)}
    code, answer = await fleet.post(fleet.engines[name] + "/update_weights_from_disk", body)
    assert (code, answer["success"]) == (200, True), answer


async def moved(fleet: Fleet) -> list[dict[str, Any]]:
    """What became of two requests' moves."""
    reports = []
    for _ in range(2):
        rid = new_rid("weighed")
        async with fleet.endless(rid):
            here, _ = await fleet.found(rid)
            code, order = await fleet.order(rid, here, fleet.other(here))
            assert code == 202, order
            reports.append(await fleet.report(order["migration_id"]))
        await fleet.settle()
    return reports


def test_kv_moves_only_between_equal_weights(pair: Cluster, elsewhere: Path, tuned: Path) -> None:
    async def scenario() -> None:
        async with Fleet.connect(pair) as fleet:
            await fleet.settle()
            one, other = fleet.engines
            # The same weights from another folder are the same weights.
            await load(fleet, one, elsewhere)
            assert {report["outcome"] for report in await moved(fleet)} == {"moved"}
            await load(fleet, one, tuned)
            for report in await moved(fleet):
                assert report["outcome"] == "refused", report
                assert "is of no use here" in report["detail"]
            await load(fleet, other, tuned)
            assert {report["outcome"] for report in await moved(fleet)} == {"moved"}

    asyncio.run(scenario())
