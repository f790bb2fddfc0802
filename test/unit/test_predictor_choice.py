"""Which head an engine takes: one named, a packaged one, one learned here, or none."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import pytest

from sglang_star.config import AUTO_HEAD, BUILTIN_HEAD
from sglang_star.errors import ConfigError, HeadError
from sglang_star.predictor import head as heads
from sglang_star.predictor import train
from sglang_star.predictor.choice import BY_AGE, choose
from sglang_star.predictor.head import HEADS
from sglang_star.predictor.store import HeadStore
from unit import predictor_cases as cases

OTHER = msgspec.structs.replace(cases.MODEL, norms="1" * 16)


def test_a_named_head_is_taken_for_its_model_only(tmp_path: Path) -> None:
    path = tmp_path / "h.safetensors"
    cases.head().save(path)
    taken = choose(str(path), cases.MODEL)
    assert taken.head is not None
    assert taken.name == f"{taken.head.card.model}@{heads.digest(path)}"
    with pytest.raises(HeadError, match="norms"):
        choose(str(path), OTHER)


def test_without_a_packaged_head_builtin_names_the_remedies() -> None:
    with pytest.raises(HeadError) as refused:
        choose(BUILTIN_HEAD, cases.MODEL)
    assert "--star-predictor auto or off" in refused.value.hint
    assert "star predictor train" in refused.value.hint


def test_the_packaged_head_goes_before_one_of_the_store(tmp_path: Path) -> None:
    path = next(HEADS.glob("*.safetensors"))
    model = heads.load(path).card.fingerprint
    for wanted in (AUTO_HEAD, BUILTIN_HEAD):
        assert choose(wanted, model, HeadStore(tmp_path)).name.endswith(heads.digest(path))


def test_the_newest_head_of_the_store_is_taken(tmp_path: Path) -> None:
    store = HeadStore(tmp_path / "heads")
    store.keep(cases.head(seed=1))
    newest = store.keep(cases.head(seed=2))
    assert choose(AUTO_HEAD, cases.MODEL, store).name.endswith(heads.digest(newest))
    assert not list(tmp_path.rglob(".head.*"))


def test_a_damaged_head_is_named_and_the_one_before_it_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = HeadStore(tmp_path)
    good = store.keep(cases.head(seed=1))
    cut = store.keep(cases.head(seed=2))
    cut.write_bytes(cut.read_bytes()[:-100])
    strange = store.keep(cases.head(seed=3))
    strange.write_bytes(b"no head")
    with caplog.at_level(logging.WARNING):
        assert choose(AUTO_HEAD, cases.MODEL, store).name.endswith(heads.digest(good))
    assert cut.name in caplog.text
    assert strange.name in caplog.text


def test_a_file_of_another_model_in_the_folder_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = HeadStore(tmp_path)
    wrong = store.keep(cases.head())
    moved = store._folder(OTHER) / wrong.name
    moved.parent.mkdir()
    wrong.rename(moved)
    with caplog.at_level(logging.WARNING):
        assert choose(AUTO_HEAD, OTHER, store).head is None
    assert "norms" in caplog.text


def test_without_any_head_it_says_once_what_that_means(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        taken = choose(AUTO_HEAD, cases.MODEL, HeadStore(tmp_path))
    assert (taken.head, taken.name) == (None, BY_AGE)
    [record] = caplog.records
    assert "star predictor collect" in record.getMessage()
    assert str(tmp_path) in record.getMessage()


def test_a_name_of_the_configuration_is_no_path(tmp_path: Path) -> None:
    odd = msgspec.structs.replace(cases.MODEL, architecture="../../Made")
    assert HeadStore(tmp_path)._folder(odd).parent == tmp_path


def test_training_keeps_the_head_where_auto_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAR_CACHE", str(tmp_path))
    path = train.keep(cases.head(), None)
    assert path.is_relative_to(tmp_path)
    assert choose(AUTO_HEAD, cases.MODEL).name.endswith(heads.digest(path))
    assert train.keep(cases.head(), tmp_path / "own.safetensors") == tmp_path / "own.safetensors"


def test_a_store_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "heads").write_text("in the way")
    with pytest.raises(ConfigError) as refused:
        HeadStore(tmp_path / "heads").keep(cases.head())
    assert "STAR_CACHE" in refused.value.hint
