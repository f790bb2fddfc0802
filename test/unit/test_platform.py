"""The portable CPU platform steps in only where nothing else could serve."""

from __future__ import annotations

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from sglang_star import platform
from sglang_star.platform import GROUP, NAME, activate, is_portable_cpu

OURS = EntryPoint(NAME, "sglang_star.platform:activate", GROUP)
OTHER = EntryPoint("accelerator", "somebody.platform:activate", GROUP)


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(platform, "entry_points", lambda group: [OURS])


def test_on_a_bare_cpu_it_serves() -> None:
    name = activate()
    assert name is not None
    module, _, class_name = name.rpartition(".")
    assert module == "sglang_star.platform.cpu"
    assert class_name == "PortableCpuPlatform"
    assert not is_portable_cpu(object())


def test_any_accelerator_of_torch_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert activate() is None


def test_a_torch_of_another_vendor_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "musa", "4.0", raising=False)
    assert activate() is None


def test_sglangs_own_cpu_engine_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert activate() is None


def test_another_plugin_comes_first_unless_ours_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "entry_points", lambda group: [OURS, OTHER])
    assert activate() is None
    monkeypatch.setenv("SGLANG_PLATFORM", NAME)
    assert activate() is not None


def test_its_name_is_the_one_in_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][GROUP] == {NAME: OURS.value}
