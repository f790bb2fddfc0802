"""What STAR attaches to the real SGLang, and that a hook which does not take stops the launch."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from sglang_star import SGLANG_RELEASES

pytestmark = pytest.mark.engine

# In a process of its own: hooks stay for the life of a process.
PROBE = """
import dataclasses, json, sys
import sglang, sglang.srt.managers.scheduler as scheduler
from sglang_star import hooks, plugin
from sglang_star.errors import HookError

def attempt(action):
    try:
        action()
    except HookError as error:
        return str(error)
    return ""

def wrapped():
    return {
        row.target for row in hooks.HOOKS
        if row.scope is hooks.Scope.SCHEDULER and row.is_for(sglang.__version__)
        and hasattr(hooks.pkgutil.resolve_name(row.target), "__wrapped__")
    }

before = wrapped()
plugin.install()
seen = {"wrapped_without_star": sorted(wrapped() - before)}
hooks.install(hooks.Scope.SERVER, hooks.Scope.SCHEDULER, hooks.Scope.RANKS)
seen["installed"] = len(hooks._registered)
others = [row.target for row in hooks._registered if not row.is_for(sglang.__version__)]
seen["of_other_releases"] = others
nowhere = "sglang.srt.managers.scheduler.Scheduler.no_such"
gone = dataclasses.replace(hooks.HOOKS[0], target=nowhere)
hooks.HOOKS = (gone,)
seen["gone"] = attempt(lambda: hooks.install(gone.scope))
hooks.HOOKS = (dataclasses.replace(gone, function="sglang_star.launch:no_such"),)
seen["unloadable"] = attempt(lambda: hooks.install(gone.scope))
sglang.__version__ = "0.5.99"
seen["version"] = attempt(hooks.verify_version)
print(json.dumps(seen))
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=240, check=False
    )


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    result = run("-c", PROBE)
    assert result.returncode == 0, result.stderr[-2000:]
    return dict(json.loads(result.stdout.splitlines()[-1]))


def test_without_star_no_scheduler_function_is_wrapped(seen: dict[str, Any]) -> None:
    assert seen["wrapped_without_star"] == []


def test_every_row_takes_effect(seen: dict[str, Any]) -> None:
    assert seen["installed"] > 20
    assert seen["of_other_releases"] == []


def test_a_target_that_is_gone_is_named(seen: dict[str, Any]) -> None:
    assert "Scheduler.no_such" in seen["gone"]
    assert "did not take effect" in seen["gone"]


def test_a_function_of_ours_that_is_gone_is_named(seen: dict[str, Any]) -> None:
    assert "sglang_star.launch:no_such" in seen["unloadable"]


def test_another_sglang_is_refused_by_both_versions(seen: dict[str, Any]) -> None:
    assert "0.5.99" in seen["version"]
    assert all(release in seen["version"] for release in SGLANG_RELEASES)


def test_help_shows_the_group() -> None:
    shown = run("-m", "sglang.launch_server", "--help").stdout
    assert "STAR" in shown
    assert "--star-predictor" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--star", "--star-predictor", "/no/such.safetensors"), "does not exist"),
        (("--star", "--pp-size", "2"), "--pp-size 2"),
        (("--star-max-moves", "2"), "needs --star"),
    ],
)
def test_a_wrong_flag_stops_the_launch_with_its_remedy(
    flags: tuple[str, ...], message: str
) -> None:
    result = run("-m", "sglang.launch_server", "--model-path", "nowhere", *flags)
    assert result.returncode == 2
    assert message in result.stderr
