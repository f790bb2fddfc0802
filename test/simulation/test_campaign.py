"""Campaigns go on where they stopped, and a seed is one history in every process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from simulation.campaign import campaign
from simulation.history import History
from simulation.plan import Allowed, draw
from simulation.run import quiet, run

TRACE = """
from simulation.history import History
from simulation.plan import Allowed, draw
from simulation.run import quiet
quiet()
for seed in range(8):
    history = History(draw(seed, Allowed()))
    history.run()
    print(history.trace)
"""


def test_a_campaign_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    first = campaign(path, 3, 5, Allowed(), stop=True)
    whole = campaign(path, 3, 12, Allowed(), stop=True)
    assert (first.histories, whole.histories) == (5, 12)
    assert whole.failures == []
    assert whole.counts == dict(sorted(run(range(3, 15), Allowed()).counts.items()))
    with pytest.raises(ValueError, match="begins at seed 3"):
        campaign(path, 4, 12, Allowed(), stop=True)


def test_a_seed_is_one_history_in_every_process() -> None:
    traces = {
        subprocess.run(
            [sys.executable, "-c", TRACE],
            env={
                **os.environ,
                "PYTHONHASHSEED": seed,
                "PYTHONPATH": str(Path(__file__).parents[1]),
            },
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(traces) == 1


def test_all_that_is_counted_happens() -> None:
    """Chains, reclaims and the like; a kind of fault that no longer comes to pass is missed."""
    counts = run(range(150), Allowed()).counts
    kinds = ("abort", "cut_off", "delay", "duplicate", "fill", "flush", "follow", "freeze", "kill")
    kinds += ("blind", "lose", "pause", "reset", "scatter", "slow", "stick")
    for what in (*(f"plan: {kind}" for kind in kinds), "chains of three", "moves reclaimed"):
        assert counts[what], what


def test_new_weights_are_told_from_old_ones() -> None:
    """Without moves SGLang's own order of an update keeps every request's KV of one version."""
    quiet()
    for seed in range(60):
        plan = draw(seed, Allowed(updated=True))
        for index in reversed(range(len(plan.events))):
            if plan.events[index].what in ("move", "arm", "follow", "drain"):
                plan = plan.without(event=index)
        history = History(plan)
        assert not history.run(), seed
