"""Head files: what is written is read, and what is damaged or foreign is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from sglang_star.errors import HeadError
from sglang_star.predictor import head as heads
from sglang_star.predictor import trials
from sglang_star.predictor.fingerprint import ModelFingerprint, fingerprint
from sglang_star.predictor.fit import FOLDS
from sglang_star.predictor.head import HEADS, Head
from sglang_star.predictor.recipe import Recipe
from unit import predictor_cases as cases

MOST_PARAMETERS = 0.0672 * 125.2e6
MOST_BYTES = 5 * 2**20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    cases.head().save(tmp_path / "head.safetensors")
    return tmp_path / "head.safetensors"


def test_a_head_survives_its_file(path: Path) -> None:
    written, read = cases.head(), heads.load(path)
    generator = np.random.default_rng(1)
    x = [generator.standard_normal((3, 4)).astype(np.float32) for _ in range(3)]
    features = np.array([[1.0, 10, 100, 0.5]] * 3)
    assert np.array_equal(written.logits(*x, features), read.logits(*x, features))
    assert read.card == written.card
    assert read.parameters == written.parameters


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(path: Path, keep: float) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep * len(raw)) if keep < 1 else int(keep)])
    with pytest.raises(HeadError, match="star predictor train"):
        heads.load(path)


@pytest.mark.parametrize("change", ["garbage", "foreign", "format", "shape", "nan", "missing"])
def test_what_is_no_head_is_refused(path: Path, change: str) -> None:
    head = cases.head()
    if change == "garbage":
        path.write_bytes(b"\xff" * 1000)
    elif change == "foreign":
        save_file({"weight": np.zeros(3, np.float32)}, path)
    elif change == "missing":
        path.unlink()
    else:
        if change == "format":
            head.card.format = 99
        elif change == "nan":
            head.weights.w1[0, 0, 0] = np.nan
        else:
            head = Head(head.card, dataclasses.replace(head.weights, levels=np.array([0.5])))
        head.save(path)
    with pytest.raises(HeadError):
        heads.load(path)


@pytest.mark.parametrize("field", ModelFingerprint.__struct_fields__)
def test_a_head_for_another_model_is_refused_by_name(field: str) -> None:
    value = getattr(cases.MODEL, field)
    other = msgspec.structs.replace(cases.MODEL, **{field: value * 2})
    with pytest.raises(HeadError, match=field) as refused:
        cases.MODEL.require(other, "some head")
    assert "--star-predictor off" in refused.value.hint
    cases.MODEL.require(cases.MODEL, "some head")


class Model(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = torch.nn.Linear(1, 1, bias=False)
        self.norm.weight = torch.nn.Parameter(torch.tensor([1.25, -0.5, 3.0]).to(dtype))
        self.proj = torch.nn.Linear(3, 3)


class Config:
    class hf_config:
        architectures = ("Made",)

    hidden_size, num_hidden_layers, vocab_size = 3, 1, 10


def test_the_fingerprint_ignores_dtype_and_sees_fine_tuning() -> None:
    prints = {
        fingerprint(Model(dtype), Config)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    }
    assert len(prints) == 1
    tuned = Model(torch.float32)
    with torch.no_grad():
        tuned.norm.weight[1] += 0.25
    assert fingerprint(tuned, Config) not in prints


@pytest.mark.parametrize("hidden", [576, 3584, 8192])
def test_the_automatic_size_stays_under_the_parameter_bar(hidden: int) -> None:
    width = max(trials.widths(hidden))
    inner = width * max(trials.INNER)
    inputs, bins, members = heads.BLOCKS * width + heads.FEATURES, 32, FOLDS * Recipe().repeats
    parameters = hidden * (width + 1) + members * (inputs * inner + inner + inner * bins + bins)
    assert parameters <= MOST_PARAMETERS


def test_packaged_heads_are_small_documented_and_usable() -> None:
    paths = list(HEADS.glob("*.safetensors"))
    assert paths
    for path in paths:
        head = heads.load(path)
        assert path.stat().st_size <= MOST_BYTES
        assert head.parameters <= MOST_PARAMETERS
        assert head.card.provenance["fit"]["requests"] > 0
        assert head.card.metrics["star"]["mae"] > 0
        found = heads.packaged(head.card.fingerprint)
        assert found is not None
        assert found[0] == path
