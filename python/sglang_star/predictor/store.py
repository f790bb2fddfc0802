"""Heads that were learned on this machine, one folder for every model they belong to.

A head is found by its model's fingerprint, the newest first. Files are written under another name
and renamed, so that an engine that starts meanwhile reads a whole head or none.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Final

from sglang_star.errors import ConfigError, HeadError
from sglang_star.model import cache_root
from sglang_star.predictor import head as heads
from sglang_star.predictor.fingerprint import ModelFingerprint
from sglang_star.predictor.head import Head

log = logging.getLogger(__name__)

SUFFIX: Final = ".safetensors"


class HeadStore:
    """A folder of heads.

    Args:
        root: the folder; need not exist.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = cache_root() / "heads" if root is None else root

    def newest(self, model: ModelFingerprint) -> tuple[Path, Head] | None:
        """The latest head for a model, or none; damaged files are passed over and named."""
        for path in sorted(self._folder(model).glob("*" + SUFFIX), reverse=True):
            try:
                head = heads.load(path)
                head.card.fingerprint.require(model, str(path))
            except HeadError as error:
                log.warning("STAR: %s", error.message)
                continue
            return path, head
        return None

    def keep(self, head: Head) -> Path:
        """Add a head; it is the newest of its model from now on.

        Raises:
            ConfigError: it cannot be written.
        """
        folder = self._folder(head.card.fingerprint)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".head.", dir=folder) as scratch:
                fresh = Path(scratch) / ("head" + SUFFIX)
                head.save(fresh)
                fresh.chmod(0o644)
                path = folder / f"{time.time_ns():020d}-{heads.digest(fresh)}{SUFFIX}"
                os.replace(fresh, path)
        except OSError as error:
            raise ConfigError(
                f"cannot keep a head in {folder}: {error.strerror or error}",
                hint="free some space, or set STAR_CACHE to a directory you can write to",
            ) from error
        return path

    def _folder(self, model: ModelFingerprint) -> Path:
        # Architectures are names of classes; whatever else a configuration says stays out of paths.
        name = "".join(c for c in model.architecture if c.isalnum()) or "model"
        return self.root / f"{name}-{model.hidden_size}-{model.layers}-{model.norms}"
