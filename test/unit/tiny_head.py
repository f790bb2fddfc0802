"""A random head for a checkpoint, so that engines can run the predictor without training one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from sglang_star.predictor.fingerprint import fingerprint
from unit import predictor_cases as cases


def head_for(model: Path, path: Path) -> Path:
    """Write a random head with the fingerprint of a checkpoint, read without SGLang."""
    from safetensors.torch import load_file

    config = json.loads((model / "config.json").read_text())
    weights = load_file(model / "model.safetensors")
    made = SimpleNamespace(named_parameters=lambda: weights.items())
    described = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=config["architectures"]),
        hidden_size=config["hidden_size"],
        num_hidden_layers=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
    )
    cases.head(fingerprint=fingerprint(made, described)).save(path)  # type: ignore[arg-type]
    return path
