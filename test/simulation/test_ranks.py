"""Engines of two ranks: both do the same, whatever happens and however sets are ordered."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from simulation import ranks
from simulation.plan import Allowed
from simulation.ranks import RankEngine

HISTORIES = int(os.environ.get("STAR_RANK_HISTORIES", "600"))


def sums(hash_seed: str) -> subprocess.Popen[str]:
    """Histories in a process whose sets have an order of their own."""
    return subprocess.Popen(
        [sys.executable, "-m", "simulation.ranks", "--sums", "--histories", str(HISTORIES)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_both_ranks_do_the_same_in_whatever_order_sets_are() -> None:
    processes = [sums("1"), sums("2")]
    told = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert len(told[0]) == HISTORIES
    assert [n for n, (one, other) in enumerate(zip(*told, strict=True)) if one != other] == []


def a_clock_of_its_own(self: RankEngine) -> float:
    return self.clock.now() + 0.5 * random.random()


def dice_of_its_own(self: RankEngine) -> str:
    return uuid.uuid4().hex


def much_to_keep_now_and_then(self: RankEngine, guests: int) -> int:
    return random.choice((0, 10**6))


@pytest.mark.parametrize(
    ("name", "defect"),
    [
        ("now", a_clock_of_its_own),
        ("new_id", dice_of_its_own),
        ("kept_free", much_to_keep_now_and_then),
    ],
)
def test_a_rank_that_goes_another_way_stops_its_engine(
    name: str, defect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RankEngine, name, defect)
    _, found, _ = ranks.run(range(40), Allowed())
    assert any("RankDivergence" in failure for _, failure in found)
