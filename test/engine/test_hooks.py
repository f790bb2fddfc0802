"""What STAR attaches to the real SGLang, and that a hook which does not take stops the launch."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import pytest

from sglang_star import SGLANG_RELEASES
from sglang_star.model import tiny_model

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


Launch: TypeAlias = "subprocess.CompletedProcess[str]"

WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "no file": (("--star", "--star-predictor", "/no/such.safetensors"), "does not exist"),
    "pp": (("--star", "--pp-size", "2"), "--pp-size 2"),
    "no star": (("--star-max-moves", "2"), "needs --star"),
}
LAUNCHES: dict[str, tuple[str, ...]] = {
    "probe": ("-c", PROBE),
    "help": ("-m", "sglang.launch_server", "--help"),
    "no head": (
        *("-m", "sglang.launch_server", "--model-path", str(tiny_model()), "--star"),
        *(
            "--star-predictor",
            "builtin",
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--log-level",
            "error",
        ),
    ),
    **{
        case: ("-m", "sglang.launch_server", "--model-path", "nowhere", *flags)
        for case, (flags, _) in WRONG.items()
    },
}


def run(command: tuple[str, ...]) -> Launch:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture(scope="module")
def launches() -> dict[str, Launch]:
    """How each launch ended; each is mostly an import of SGLang, so all run beside each other."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(LAUNCHES, pool.map(run, LAUNCHES.values()), strict=True))


@pytest.fixture(scope="module")
def seen(launches: dict[str, Launch]) -> dict[str, Any]:
    result = launches["probe"]
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


def test_help_shows_the_group(launches: dict[str, Launch]) -> None:
    shown = launches["help"].stdout
    assert "STAR" in shown
    assert "--star-predictor" in shown


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_flag_stops_the_launch_with_its_remedy(
    launches: dict[str, Launch], case: str
) -> None:
    assert launches[case].returncode == 2
    assert WRONG[case][1] in launches[case].stderr


def test_a_model_without_a_head_is_refused_with_the_remedy(launches: dict[str, Launch]) -> None:
    ended = launches["no head"]
    assert ended.returncode != 0
    assert "no packaged predictor head" in ended.stderr
    assert "--star-predictor auto or off" in ended.stderr
