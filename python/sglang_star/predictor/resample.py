"""The same prefix many times: the data for the floor below which no predictor can get.

A *point* is a sample of a collection's test split: a prompt and the output so far. Points are taken
in the order of a hash, so any number of them is a uniform draw of the samples that predictors are
judged by, with the weights they have there. Each is continued several times with the sampling of
the collection; only the lengths are kept, a line of JSON per point.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from sglang_star.errors import ConfigError
from sglang_star.predictor import dataset
from sglang_star.predictor.samples import Array, Samples, load_samples

FILE: Final = "resamples.jsonl"
REPEATS: Final = 16
POINTS: Final = 100


@dataclass(frozen=True, slots=True)
class Point:
    """A prefix to continue.

    Attributes:
        rid, tokens: name the sample: its request, and its output tokens so far.
        ids: prompt and output so far; limit: output tokens still allowed.
    """

    rid: str
    tokens: int
    ids: Array
    limit: int


def place(rid: str, tokens: int) -> int:
    """Where a sample stands in the order in which points are taken."""
    return int(hashlib.sha256(f"point {rid} {tokens}".encode()).hexdigest()[:16], 16)


def plan(folder: Path, count: int, done: set[tuple[str, int]]) -> list[Point]:
    """The first ``count`` points of a collection, less those already done.

    Raises:
        ConfigError: the folder is no collection, or too small to be split.
    """
    test = dataset.split(load_samples(folder)).test
    rows = sorted(
        range(len(test.tokens)),
        key=lambda row: place(test.rids[test.request[row]], int(test.tokens[row])),
    )
    chosen = (_point(test, row) for row in rows[:count])
    return [point for point in chosen if (point.rid, point.tokens) not in done]


def _point(samples: Samples, row: int) -> Point:
    request, tokens = samples.request[row], int(samples.tokens[row])
    return Point(
        rid=samples.rids[request],
        tokens=tokens,
        ids=np.concatenate([samples.prompt_ids[request], samples.output_ids[request][:tokens]]),
        limit=int(samples.max_new_tokens[request]) - tokens,
    )


def read(folder: Path) -> dict[tuple[str, int], list[int]]:
    """Remaining lengths of every point on disk, by rid and output tokens so far.

    A last line without an end, left by an interruption, is not there.

    Raises:
        ConfigError: the file is damaged.
    """
    path = folder / FILE
    return {(row["rid"], row["tokens"]): row["remaining"] for row in _rows(path)}


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            return
        try:
            row = json.loads(line)
            if not (isinstance(row["rid"], str) and len(row["remaining"]) > 1):
                raise ValueError("not a point")
            row["tokens"] = int(row["tokens"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}, line {number} is no point ({error})", hint="delete that line"
            ) from error
        yield row


def continuer(
    engine: Any, sampling: dict[str, Any], repeats: int, folder: Path
) -> Callable[[Point], Awaitable[int]]:
    """Bind an engine and a folder into one coroutine that continues a point and writes its line."""
    path = folder / FILE
    if path.exists():
        # What an interruption left of a line would spoil the next one.
        text = path.read_text()
        path.write_text(text[: text.rfind("\n") + 1])

    async def continue_point(point: Point) -> int:
        results = await engine.async_generate(
            input_ids=point.ids.tolist(),
            sampling_params=sampling | {"max_new_tokens": point.limit, "n": repeats},
        )
        ends = [result["meta_info"] for result in results]
        lengths = [int(end["completion_tokens"]) for end in ends]
        if not any(end["finish_reason"]["type"] == "abort" for end in ends):
            row = {"rid": point.rid, "tokens": point.tokens, "remaining": lengths}
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        return sum(lengths)

    return continue_point
