"""Prompt files in, prompts out: jsonl, jsonl.gz, ShareGPT-style JSON, plain text."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sglang_star.errors import ConfigError

_TEXT_KEYS: Final = ("prompt", "text", "question", "instruction", "input")
_SPLITS: Final = (("train", 0.70), ("validation", 0.85), ("test", 1.0))


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt.

    ``key`` names it everywhere: 16 hexadecimal digits of the hash of its text, behind those of its
    instance and a hyphen where the file says which instance it is a wording of.
    """

    key: str
    text: str
    source: str


def read_prompts(path: Path) -> list[Prompt]:
    """Read a prompt file, drop duplicates, and order it by hash: any prefix is a fair sample.

    Accepts one JSON object per line (the text under ``prompt``, ``text``, ``question``,
    ``instruction``, ``input``, or the first user turn of ``messages`` or ``conversations``), a
    JSON list of the same, or plain text with one prompt per line; any of them gzipped. Objects may
    have an ``instance``: prompts with the same one ask the same thing in other words, and whatever
    divides prompts keeps them together.

    Raises:
        ConfigError: naming the file, the line, and what was expected.
    """
    texts = dict.fromkeys(_read(path))
    if not texts:
        raise ConfigError(f"{path} holds no prompts", hint="give one prompt per line, or jsonl")
    prompts = {
        text: Prompt(f"{prompt_key(instance)}-" * bool(instance) + prompt_key(text), text, source)
        for text, source, instance in texts
    }
    return sorted(prompts.values(), key=lambda prompt: prompt.key)


def prompt_key(text: str) -> str:
    """Name a prompt by 16 hexadecimal digits of the hash of its text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def instance_of(rid: str) -> str:
    """Name what ``rid`` asks, whatever its wording and the number of the sample.

    Two requests of one instance have like lengths: neither may judge what the other taught.
    """
    return rid.partition("#")[0].partition("-")[0]


def split_of(rid: str) -> str:
    """``train``, ``validation`` or ``test`` (70/15/15) for the instance that ``rid`` samples."""
    key = instance_of(rid)
    place = int(hashlib.sha256(b"split " + key.encode()).hexdigest()[:8], 16) / 2**32
    return next(name for name, end in _SPLITS if place < end)


def _read(path: Path) -> Iterator[tuple[str, str, str]]:
    """Text, source and instance (or nothing) of every entry."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read prompts from {path}: {error}") from error
    stripped = text.lstrip()
    rows: Iterable[tuple[int, Any]]
    if stripped.startswith("["):
        rows = enumerate(_parse(stripped, path, 1), 1)
    elif stripped.startswith("{"):
        lines = enumerate(text.splitlines(), 1)
        rows = ((n, _parse(line, path, n)) for n, line in lines if line.strip())
    else:
        rows = ((n, line.strip()) for n, line in enumerate(text.splitlines(), 1) if line.strip())
    for number, row in rows:
        yield _prompt_of(row, path, number)


def _parse(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{path}, line {number}: not JSON ({error})") from error


def _prompt_of(row: Any, path: Path, number: int) -> tuple[str, str, str]:
    if isinstance(row, str):
        return row, path.name, ""
    if isinstance(row, dict):
        source, instance = str(row.get("source", path.name)), str(row.get("instance", ""))
        for key in _TEXT_KEYS:
            if isinstance(row.get(key), str) and row[key].strip():
                return row[key], source, instance
        for turn in row.get("messages") or row.get("conversations") or ():
            if isinstance(turn, dict) and turn.get("role", turn.get("from")) in ("user", "human"):
                content = turn.get("content", turn.get("value"))
                if isinstance(content, str) and content.strip():
                    return content, source, instance
    raise ConfigError(
        f"{path}, entry {number}: no prompt in it",
        hint=f"each entry needs one of {', '.join(_TEXT_KEYS)}, messages or conversations",
    )
