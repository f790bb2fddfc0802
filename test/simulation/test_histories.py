"""Histories by seed, and those that once failed."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from simulation.history import History
from simulation.plan import Allowed, Plan, draw
from simulation.run import many, quiet
from simulation.shrink import kind, shrink, story

KEPT = sorted((Path(__file__).parent / "kept").glob("*.json"))
HISTORIES = int(os.environ.get("STAR_HISTORIES", "20000"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_what_once_failed_holds(path: Path) -> None:
    plan = msgspec.json.decode(path.read_bytes(), type=Plan)
    quiet()
    history = History(plan)
    assert not history.run(), story(plan, history)


def test_histories_hold() -> None:
    found = many(0, HISTORIES, Allowed()).found
    if not found:
        return
    seed, failure = found[0]
    plan = shrink(draw(seed, Allowed()), failure)
    history = History(plan)
    history.run()
    kinds = {kind(failure) for _, failure in found}
    pytest.fail(
        f"{len(found)} of {HISTORIES} histories fail, in {len(kinds)} ways; the first:\n"
        f"{story(plan, history)}\n{failure}\n"
        f"replay it: PYTHONPATH=test python -m simulation --seed {seed}"
    )
