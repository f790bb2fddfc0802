"""Which head an engine serves with, of those that there are for its model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sglang_star.config import AUTO_HEAD, BUILTIN_HEAD
from sglang_star.errors import HeadError
from sglang_star.predictor import head as heads
from sglang_star.predictor.fingerprint import ModelFingerprint
from sglang_star.predictor.head import Head
from sglang_star.predictor.store import HeadStore

log = logging.getLogger(__name__)

BY_AGE: Final = "by-age"
"""Told of an instance that has no head: the router goes by the lengths of what has ended."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A head, or none.

    Attributes:
        head: what estimates; none: nothing does.
        name: what the instance tells of it: the model it was trained on and its file's digest.
    """

    head: Head | None
    name: str


def choose(wanted: str, model: ModelFingerprint, store: HeadStore | None = None) -> Choice:
    """The head that ``--star-predictor`` asks for.

    ``auto`` takes the packaged head of the model, else the newest of the store, else none.

    Raises:
        HeadError: it asks for one that does not exist, is damaged or is of another model.
    """
    if wanted == AUTO_HEAD:
        return _found(model, HeadStore() if store is None else store)
    if wanted == BUILTIN_HEAD:
        found = heads.packaged(model)
        if found is None:
            raise HeadError(
                f"no packaged predictor head for {model.text}",
                hint="launch with --star-predictor auto or off, or make one with `star predictor "
                "collect` and `star predictor train` and name it with --star-predictor",
            )
        return _named(*found)
    head = heads.load(Path(wanted))
    head.card.fingerprint.require(model, wanted)
    return _named(Path(wanted), head)


def _found(model: ModelFingerprint, store: HeadStore) -> Choice:
    if found := heads.packaged(model):
        return _named(*found)
    if kept := store.newest(model):
        log.info("STAR: predictor head %s of the store", kept[0].name)
        return _named(*kept)
    log.warning(
        "STAR: no predictor head for %s: forecasts go by the lengths of requests that have ended. "
        "`star predictor collect` and `star predictor train` make a head and keep it in %s",
        model.text,
        store.root,
    )
    return Choice(None, BY_AGE)


def _named(path: Path, head: Head) -> Choice:
    return Choice(head, f"{head.card.model}@{heads.digest(path)}")
