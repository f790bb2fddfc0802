"""The folder of a collection: one writer at a time, and a manifest that every run agrees with."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sglang_star.errors import ConfigError
from sglang_star.predictor.prompts import Prompt
from sglang_star.predictor.samples import MANIFEST, SOURCES

AGREED = ("format", "model", "chat_template", "max_new_tokens", "sampling")
"""What every run that adds to a collection must have in common."""


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold the folder for one run, making it if need be; the lock ends with the process.

    Two runs at once would answer the same prompts twice and write over each other's shards.

    Raises:
        ConfigError: another run holds it, or it cannot be used.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _unusable(folder, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another run is collecting into {folder}",
                hint="wait until it has stopped, or choose another --out",
            ) from error
        yield
    finally:
        os.close(descriptor)


def write_manifest(folder: Path, fresh: dict[str, Any]) -> None:
    """Write the manifest, or check that the one there describes the same collection.

    Raises:
        ConfigError: another model, template, cap or sampling was used so far.
    """
    path = folder / MANIFEST
    try:
        old = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise _unusable(folder, error) from error
    for name in AGREED:
        if old and old.get(name) != fresh[name]:
            raise ConfigError(
                f"{folder} was collected with {name} {old.get(name)}, not {fresh[name]}",
                hint="repeat the old options, or choose another --out",
            )
    path.write_text(json.dumps(old | fresh, indent=2))


def write_sources(folder: Path, prompts: Sequence[Prompt]) -> None:
    """Note the source of every prompt by its key, so that whole sources can be held out."""
    sources = {prompt.key: prompt.source for prompt in prompts}
    (folder / SOURCES).write_text(json.dumps(sources, indent=0))


def _unusable(folder: Path, error: Exception) -> ConfigError:
    return ConfigError(f"cannot use {folder}: {error}", hint="choose another --out")
