"""Workload traces: one request per row, arrival time, prompt length, output length.

The native format is parquet with the columns ``arrival_s, input_len, output_len`` (others are
ignored). The loaders below read what the public traces are published as; :func:`synthetic` draws
one from a seed, so that nothing has to be downloaded.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sglang_star.errors import ConfigError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
COLUMNS = ("arrival_s", "input_len", "output_len")
PAST = 8192
"""Requests before a window whose lengths may be known when it begins."""


def _nothing() -> IntArray:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival.

    Attributes:
        arrival_s: seconds since the start of the trace, ascending; input_len, output_len: tokens,
            at least 1.
        past: output lengths of the requests before the first one, at most :data:`PAST`: all that
            anybody may know of lengths when it begins.
    """

    name: str
    arrival_s: FloatArray
    input_len: IntArray
    output_len: IntArray
    past: IntArray = field(default_factory=_nothing)

    @property
    def span_s(self) -> float:
        """Time from 0 to the last arrival."""
        return float(self.arrival_s[-1])

    @property
    def rate(self) -> float:
        """Mean arrivals per second."""
        return self.arrival_s.size / max(self.span_s, 1e-9)

    def window(self, rate_scale: float, duration_s: float, seed: int) -> Trace:
        """Play the trace ``rate_scale`` times as fast, from a place the seed picks, going round.

        Seed 0 starts at the beginning. Going round keeps the rate when the scaled trace is
        shorter than ``duration_s``; ``past`` goes round too, and has nothing of the window in it.
        """
        _check_scale(rate_scale)
        span = (self.span_s + 1.0 / max(self.rate, 1e-9)) / rate_scale
        offset = 0.0 if seed == 0 else float(np.random.default_rng(seed).uniform(0.0, span))
        times = self.arrival_s / rate_scale
        first = int(np.searchsorted(times, offset))
        rounds = int(np.ceil((duration_s + offset) / span)) + 1
        unrolled = np.concatenate([times + k * span for k in range(rounds)])[first:] - offset
        count = int(np.searchsorted(unrolled, duration_s, side="right"))
        rows = (np.arange(count) + first) % times.size
        before = (first - 1 - np.arange(min(PAST, max(times.size - count, 0)))) % times.size
        window = Trace(self.name, unrolled[:count], self.input_len[rows], self.output_len[rows])
        return replace(window, past=self.output_len[before])

    def part(self, rate_scale: float, duration_s: float, index: int) -> Trace:
        """Play the ``index``-th of the disjoint stretches of ``duration_s`` the trace divides into.

        The very first stretch is nobody's window: it is the past of window 0.

        Raises:
            ConfigError: the trace ends before the window does.
        """
        _check_scale(rate_scale)
        times = self.arrival_s / rate_scale
        begin = (index + 1) * duration_s
        if begin + duration_s > times[-1] + 1e-6:
            count = max(int(times[-1] / duration_s) - 1, 0)
            raise ConfigError(
                f"{self.name} has {count} windows of {duration_s:g} s at this rate, "
                f"not {index + 1}",
                hint="use a shorter --duration, fewer instances or fewer --windows",
            )
        first, last = np.searchsorted(times, [begin, begin + duration_s])
        return Trace(
            self.name,
            times[first:last] - begin,
            self.input_len[first:last],
            self.output_len[first:last],
            self.output_len[max(first - PAST, 0) : first],
        )


def _check_scale(rate_scale: float) -> None:
    if not 0 < rate_scale < float("inf"):
        raise ConfigError(f"rate scale must be positive, not {rate_scale}")


def checked(name: str, arrival: Any, prompt: Any, output: Any) -> Trace:
    """Make a trace of three columns.

    Raises:
        ConfigError: empty, unequal lengths, times that are negative, unordered or not finite, or
            lengths below 1.
    """
    try:
        arrival_s = np.asarray(arrival, dtype=np.float64)
        lengths = [np.asarray(c, dtype=np.float64) for c in (prompt, output)]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"trace {name}: columns must be numbers: {error}") from error
    if arrival_s.size == 0:
        raise ConfigError(f"trace {name} has no requests")
    if any(c.shape != arrival_s.shape for c in lengths):
        raise ConfigError(f"trace {name}: columns differ in length")
    if not np.isfinite(arrival_s).all() or (arrival_s < 0).any():
        raise ConfigError(f"trace {name}: arrival times must be finite and not negative")
    if (np.diff(arrival_s) < 0).any():
        row = int(np.argmax(np.diff(arrival_s) < 0)) + 1
        raise ConfigError(
            f"trace {name}: row {row} arrives before the row above it",
            hint="sort the trace by arrival_s",
        )
    for label, column in zip(COLUMNS[1:], lengths, strict=True):
        if not (np.isfinite(column) & (column >= 1)).all():
            raise ConfigError(f"trace {name}: {label} must be at least 1 in every row")
    return Trace(name, arrival_s, lengths[0].astype(np.int64), lengths[1].astype(np.int64))


def load(path: Path | str) -> Trace:
    """Read a trace in any known format, told apart by suffix and column names.

    Raises:
        ConfigError: no such file, unknown format, or :func:`checked` refuses the content.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no trace file {path}")
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix == ".jsonl":
        return _mooncake(path)
    if path.suffix == ".csv":
        return _csv(path)
    raise ConfigError(
        f"{path.name}: unknown trace format",
        hint="use .parquet, .csv (Azure, BurstGPT, ServeGen) or .jsonl (Mooncake)",
    )


def _parquet(path: Path) -> Trace:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=list(COLUMNS))
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ConfigError(
            f"{path.name} is not a trace: {error}",
            hint=f"it needs the columns {', '.join(COLUMNS)}",
        ) from error
    return checked(path.stem, *(table[c].to_numpy() for c in COLUMNS))


def save(trace: Trace, path: Path | str) -> None:
    """Write the native format."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = (trace.arrival_s, trace.input_len, trace.output_len)
    pq.write_table(pa.table(dict(zip(COLUMNS, columns, strict=True))), path)


def _mooncake(path: Path) -> Trace:
    """Mooncake: JSON per line with ``timestamp`` (ms), ``input_length``, ``output_length``."""
    with path.open(encoding="utf-8") as lines:
        try:
            rows = [json.loads(line) for line in lines if line.strip()]
            found = [(r["timestamp"] / 1e3, r["input_length"], r["output_length"]) for r in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path.name} is not a Mooncake trace: {error!r}") from error
    return _from_rows(path.stem, found)


def _azure_time(text: str) -> float:
    return datetime.fromisoformat(text.strip()).timestamp()


_CSV_FORMATS: dict[frozenset[str], tuple[str, str, str, Callable[[str], float]]] = {
    # Azure LLM inference traces 2023 and 2024.
    frozenset({"TIMESTAMP", "ContextTokens", "GeneratedTokens"}): (
        "TIMESTAMP",
        "ContextTokens",
        "GeneratedTokens",
        _azure_time,
    ),
    # BurstGPT: seconds since the start; failed requests have no response tokens.
    frozenset({"Timestamp", "Request tokens", "Response tokens"}): (
        "Timestamp",
        "Request tokens",
        "Response tokens",
        float,
    ),
    # ServeGen's generated workloads, and the native columns as CSV.
    frozenset({"timestamp", "input_tokens", "output_tokens"}): (
        "timestamp",
        "input_tokens",
        "output_tokens",
        float,
    ),
    frozenset(COLUMNS): (*COLUMNS, float),
}


def _csv(path: Path) -> Trace:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        header = frozenset(reader.fieldnames or ())
        known = next((f for f in _CSV_FORMATS if f <= header), None)
        if known is None:
            raise ConfigError(
                f"{path.name}: unknown columns {', '.join(sorted(header)) or '(none)'}",
                hint="known: Azure, BurstGPT, ServeGen, or " + ", ".join(COLUMNS),
            )
        when, prompt, output, parse = _CSV_FORMATS[known]
        try:
            rows = [(parse(r[when]), float(r[prompt]), float(r[output])) for r in reader]
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path.name}: a row does not parse: {error}") from error
    return _from_rows(path.stem, rows)


def _from_rows(name: str, rows: Iterable[tuple[float, float, float]]) -> Trace:
    """Sort, start at 0, and drop requests that produced nothing (failures in the origin)."""
    kept = sorted(r for r in rows if r[2] >= 1)
    if not kept:
        raise ConfigError(f"trace {name} has no requests with output")
    columns = np.array(kept, dtype=np.float64)
    return checked(name, columns[:, 0] - columns[0, 0], np.maximum(columns[:, 1], 1), columns[:, 2])


def synthetic(
    seed: int,
    *,
    rate: float = 4.0,
    duration_s: float = 3600.0,
    prompt_median: float = 200.0,
    prompt_sigma: float = 1.2,
    output_median: float = 2500.0,
    output_sigma: float = 0.9,
    max_prompt: int = 32_768,
    max_output: int = 32_768,
    burstiness: float = 1.0,
) -> Trace:
    """Draw a reasoning-like trace.

    Prompt and output lengths are independent and log-normal (median, sigma of the logarithm),
    clipped to their maxima; gaps between arrivals are gamma with coefficient of variation
    ``burstiness`` (1 is Poisson).
    """
    if not (rate > 0 and duration_s > 0 and burstiness > 0):
        raise ConfigError("rate, duration and burstiness must be positive")
    rng = np.random.default_rng(seed)
    count = max(int(rate * duration_s * 1.2) + 64, 1)
    shape = 1.0 / burstiness**2
    arrival = np.cumsum(rng.gamma(shape, 1.0 / (rate * shape), count))
    prompt = np.clip(rng.lognormal(np.log(prompt_median), prompt_sigma, count), 1, max_prompt)
    output = np.clip(rng.lognormal(np.log(output_median), output_sigma, count), 1, max_output)
    keep = max(int(np.searchsorted(arrival, duration_s)), 1)
    before = np.clip(rng.lognormal(np.log(output_median), output_sigma, PAST), 1, max_output)
    trace = checked(
        f"synthetic-{seed}",
        arrival[:keep],
        prompt[:keep].astype(np.int64),
        output[:keep].astype(np.int64),
    )
    return replace(trace, past=before.astype(np.int64))
