"""Training samples on disk: shards of finished requests, and everything read back as arrays.

A collection is a folder with ``manifest.json`` (model, sampling, interval) and shards
``shard-*.safetensors``. A shard holds whole requests only and appears by an atomic rename, so an
interrupted collection loses the requests since the last shard and nothing else.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from sglang_star.errors import ConfigError
from sglang_star.predictor.fingerprint import ModelFingerprint
from sglang_star.predictor.prompts import instance_of

MANIFEST: Final = "manifest.json"
MODEL: Final = "model.json"
SOURCES: Final = "sources.json"
"""Where each prompt came from: its key to the name of a source."""

FORMAT: Final = 1

Array = NDArray[Any]


@dataclass(slots=True)
class RequestRecord:
    """One finished request and the hidden states seen on its way.

    Attributes:
        rid: ``<prompt id>#<sample>`` when `star predictor collect` sent it.
        prompt_ids, output_ids: token ids.
        max_new_tokens: the limit in force; censored: the limit, or the end of the collection,
            ended the output, not the model.
        tokens: output tokens so far at each sample, ascending, first 1.
        hidden: ``[samples, d]`` float16, last-token last-layer state that produced the latest
            token.
        pooled: ``[samples, d]`` float16, mean of these states since the sample before.
    """

    rid: str
    prompt_ids: Array
    output_ids: Array
    max_new_tokens: int
    censored: bool
    tokens: Array
    hidden: Array
    pooled: Array


@dataclass(slots=True)
class Samples:
    """A whole collection, request columns and sample columns.

    Attributes:
        request: for each sample, the index of its request; samples of a request are contiguous.
        remaining: for each sample, output tokens still to come (a lower bound where censored).
    """

    rids: list[str] = field(default_factory=list)
    prompt_ids: list[Array] = field(default_factory=list)
    output_ids: list[Array] = field(default_factory=list)
    max_new_tokens: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    censored: Array = field(default_factory=lambda: np.zeros(0, bool))
    request: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    tokens: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    hidden: Array = field(default_factory=lambda: np.zeros((0, 0), np.float16))
    pooled: Array = field(default_factory=lambda: np.zeros((0, 0), np.float16))

    @property
    def prompt_tokens(self) -> Array:
        """Prompt length of each request, tokens."""
        return np.array([len(ids) for ids in self.prompt_ids], np.int64)

    @property
    def output_tokens(self) -> Array:
        """Output length of each request, tokens."""
        return np.array([len(ids) for ids in self.output_ids], np.int64)

    @property
    def instance(self) -> Array:
        """Which instance each request is of, ``[requests]`` from 0 in order of appearance."""
        names = [instance_of(rid) for rid in self.rids]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        return np.array([numbers[name] for name in names], np.int64)

    @property
    def cut(self) -> Array:
        """Requests that the end of the collection cut short: their length is not known."""
        return self.censored & (self.output_tokens < self.max_new_tokens)

    @property
    def remaining(self) -> Array:
        """Output tokens still to come at each sample."""
        return self.output_tokens[self.request] - self.tokens

    def select(self, keep: Array) -> Samples:
        """Return the requests where boolean ``keep`` holds, renumbered."""
        chosen = np.flatnonzero(keep)
        number = np.cumsum(keep) - 1
        rows = keep[self.request]
        return Samples(
            rids=[self.rids[i] for i in chosen],
            prompt_ids=[self.prompt_ids[i] for i in chosen],
            output_ids=[self.output_ids[i] for i in chosen],
            max_new_tokens=self.max_new_tokens[keep],
            censored=self.censored[keep],
            request=number[self.request[rows]],
            tokens=self.tokens[rows],
            hidden=self.hidden[rows],
            pooled=self.pooled[rows],
        )

    def head(self, count: int) -> Samples:
        """Return the first requests that have ``count`` samples together, or all."""
        last = self.request[min(count, len(self.request)) - 1]
        return self.select(np.arange(len(self.rids)) <= last)


class ShardWriter:
    """Write requests to a folder, a few at a time.

    Args:
        folder: created if absent; shards of earlier runs are kept.
        requests_per_shard: how many finished requests to gather before writing.
    """

    def __init__(self, folder: Path, requests_per_shard: int = 32) -> None:
        self._folder = folder
        self._limit = requests_per_shard
        self._pending: list[RequestRecord] = []
        folder.mkdir(parents=True, exist_ok=True)
        numbers = [int(path.stem.partition("-")[2]) for path in shard_paths(folder)]
        self._next = max(numbers, default=-1) + 1

    def add(self, record: RequestRecord) -> None:
        """Queue one request, writing a shard when enough are queued."""
        self._pending.append(record)
        if len(self._pending) >= self._limit:
            self.flush()

    def flush(self) -> None:
        """Write what is queued as one shard."""
        if not self._pending:
            return
        write_shard(self._folder / f"shard-{self._next:06d}.safetensors", self._pending)
        self._next += 1
        self._pending = []


def write_shard(path: Path, records: Sequence[RequestRecord]) -> None:
    """Write ``records`` to ``path`` atomically."""
    from safetensors.numpy import save_file

    tensors = {
        "prompt_ids": _concatenate([r.prompt_ids for r in records], np.int32),
        "prompt_lengths": np.array([len(r.prompt_ids) for r in records], np.int64),
        "output_ids": _concatenate([r.output_ids for r in records], np.int32),
        "output_lengths": np.array([len(r.output_ids) for r in records], np.int64),
        "max_new_tokens": np.array([r.max_new_tokens for r in records], np.int64),
        "censored": np.array([r.censored for r in records], np.uint8),
        "samples": np.array([len(r.tokens) for r in records], np.int64),
        "tokens": _concatenate([r.tokens for r in records], np.int32),
        "hidden": np.concatenate([r.hidden for r in records]).astype(np.float16),
        "pooled": np.concatenate([r.pooled for r in records]).astype(np.float16),
    }
    metadata = {"format": str(FORMAT), "rids": json.dumps([r.rid for r in records])}
    scratch = path.with_suffix(".partial")
    save_file(tensors, scratch, metadata=metadata)
    os.replace(scratch, path)


def _concatenate(parts: Sequence[Array], dtype: Any) -> Array:
    return np.concatenate([np.asarray(part, dtype) for part in parts])


def shard_paths(folder: Path) -> list[Path]:
    """Complete shards of a collection, in the order they were written."""
    return sorted(folder.glob("shard-[0-9]*.safetensors"))


def collected_rids(folder: Path) -> Iterator[str]:
    """Yield the rid of every request on disk, reading shard headers only."""
    for path in shard_paths(folder):
        yield from json.loads(_header(path)["__metadata__"]["rids"])


def _header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(length))
        if header["__metadata__"]["format"] != str(FORMAT):
            raise ValueError(f"format {header['__metadata__']['format']}")
    except (OSError, ValueError, KeyError, TypeError, struct.error, MemoryError) as error:
        raise ConfigError(
            f"{path} is not a sample shard ({error})", hint="delete it and collect again"
        ) from error
    return dict(header)


def describe(folder: Path) -> tuple[ModelFingerprint, dict[str, Any]]:
    """Read which model a collection is of, and how it was made.

    Raises:
        ConfigError: the folder is no collection.
    """
    try:
        model = msgspec.json.decode((folder / MODEL).read_bytes(), type=ModelFingerprint)
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        raise ConfigError(
            f"{folder} is not a collection: {error}",
            hint="make one with `star predictor collect`",
        ) from error
    # Paths of the machine that collected say nothing to whoever reads the head.
    return model, manifest | {"model": Path(manifest["model"]).name}


def served_model(folder: Path) -> str:
    """Path of the model that a collection was made with, as it was given then."""
    return str(json.loads((folder / MANIFEST).read_text())["model"])


def read_sources(folder: Path) -> dict[str, str]:
    """The source of every prompt key, as far as the collection recorded it."""
    path = folder / SOURCES
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is damaged: {error}", hint="delete it") from error


def load_samples(folder: Path) -> Samples:
    """Read a whole collection.

    Raises:
        ConfigError: the folder holds no samples, or a shard is damaged.
    """
    paths = shard_paths(folder)
    if not paths:
        raise ConfigError(f"no samples in {folder}", hint="make some with `star predictor collect`")
    return _join(_read_shard(path) for path in paths)


def _read_shard(path: Path) -> tuple[list[str], dict[str, Array]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    rids = json.loads(_header(path)["__metadata__"]["rids"])
    try:
        return rids, load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"{path} is damaged ({error})", hint="delete it") from error


def _join(shards: Iterable[tuple[list[str], dict[str, Array]]]) -> Samples:
    rids: list[str] = []
    columns: dict[str, list[Array]] = {}
    for names, tensors in shards:
        rids += names
        for name, tensor in tensors.items():
            columns.setdefault(name, []).append(tensor)
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    return Samples(
        rids=rids,
        prompt_ids=_split(joined["prompt_ids"], joined["prompt_lengths"]),
        output_ids=_split(joined["output_ids"], joined["output_lengths"]),
        max_new_tokens=joined["max_new_tokens"],
        censored=joined["censored"].astype(bool),
        request=np.repeat(np.arange(len(rids)), joined["samples"]),
        tokens=joined["tokens"].astype(np.int64),
        hidden=joined["hidden"],
        pooled=joined["pooled"],
    )


def _split(flat: Array, lengths: Array) -> list[Array]:
    return np.split(flat, np.cumsum(lengths)[:-1])
