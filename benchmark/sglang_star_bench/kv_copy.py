"""``star bench kv-copy``: gathering and scattering the KV of a request, against a plain copy.

Pools as SGLang keeps them, pages in random order or in one run. Every way is tried in every round,
one after another; a figure is the median over the rounds. A ``share`` is the median of the paired
ratios to one contiguous copy of as many bytes, by as many threads, on the same device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from sgl_kernel_ext import native
from sglang_star.errors import ConfigError
from sglang_star_bench import kv_copy_pools
from sglang_star_bench.kv_copy_pools import SHAPES, Pool, Ways

WARM_UP: Final = 1
"""Rounds that are not counted."""

Row = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="star bench kv-copy", description=__doc__)
    add = made.add_argument
    add("--model", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="KV shapes [all]")
    add("--tokens", type=int, nargs="+", default=[64, 256, 1024], help="[64 256 1024]")
    add("--page-size", type=int, nargs="+", default=[1, 16, 64], help="[1 16 64]")
    add("--slots", nargs="+", choices=["scattered", "run"], default=["scattered"],
        help="pages in random order, or all tokens in one run [scattered]")  # fmt: skip
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[%(default)s]")
    add("--workers", type=int, nargs="+", help="threads, or thread blocks [1 2; 4 8 16 32]")
    add("--rounds", type=int, default=15, help="paired rounds per figure [%(default)s]")
    add("--processor-time", action="store_true",
        help="of this thread instead of the clock, on a busy host; with --workers 1")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write results here")
    add("--plot", type=Path, metavar="FILE", help="write a figure here")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Raises:
        ConfigError: a number is not positive, tokens are no whole pages, or there are no kernels.
    """
    args = parser().parse_args(argv)
    workers = args.workers or ([1, 2] if args.device == "cpu" else [4, 8, 16, 32])
    if args.processor_time and args.workers is None:
        workers = [1]
    if min(*args.tokens, *args.page_size, *workers, args.rounds) < 1:
        raise ConfigError("--tokens, --page-size, --workers and --rounds must be positive")
    if args.processor_time and (workers != [1] or args.device != "cpu"):
        raise ConfigError("--processor-time is that of one thread of the host: --workers 1")
    for tokens in args.tokens:
        if bad := [size for size in args.page_size if tokens % size]:
            raise ConfigError(f"{tokens} tokens are no whole pages of {bad[0]}")
    if native.library(torch.device(args.device).type).wait() is None:
        raise ConfigError(
            f"there are no kernels for {args.device} to measure",
            hint="python -m sgl_kernel_ext says why",
        )
    clock = time.thread_time if args.processor_time else time.perf_counter
    rows = []
    for model in args.model:
        for order in args.slots:
            for page_size in args.page_size if order == "scattered" else [1]:
                for tokens in args.tokens:
                    pool = kv_copy_pools.make(
                        model, tokens, page_size, order == "scattered", args.device
                    )
                    kv_copy_pools.verify(pool, workers[0])
                    about: Row = {
                        "device": args.device,
                        "model": model,
                        "slots": order,
                        "page_size": page_size,
                        "tokens": tokens,
                    }
                    rows.append(about | measure(pool, workers, args.rounds, clock))
                    print(describe(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)
    return 0


def measure(pool: Pool, workers: list[int], rounds: int, clock: Callable[[], float]) -> Row:
    """Time every way of one pool: bytes per second, and shares of a plain copy."""
    row: Row = {
        "nbytes": pool.nbytes,
        "row_bytes": sorted(set(pool.source.row_bytes)),
        "buffers": len(pool.source.buffers),
        "rounds": rounds,
    }
    device = pool.staging.device
    for name, ways in (
        ("gather", kv_copy_pools.gathers(pool, workers)),
        ("scatter", kv_copy_pools.scatters(pool, workers)),
    ):
        times = _times(ways, rounds, clock, device)
        rates = {way: pool.nbytes / statistics.median(taken) for way, taken in times.items()}
        row[name] = rates[f"kernel x{workers[0]}"]
        row[f"{name}_bytes_per_s"] = rates
        row[f"{name}_share"] = {
            way: statistics.median(
                c / t for c, t in zip(times[_peer(way, times)], taken, strict=True)
            )
            for way, taken in times.items()
        }
    return row


def _peer(way: str, times: dict[str, list[float]]) -> str:
    """The plain copy that a way is held against: the one of as many threads."""
    same = f"copy x{way.rpartition('x')[2]}"
    return same if same in times else "copy x1"


def _times(
    ways: Ways, rounds: int, clock: Callable[[], float], device: torch.device
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(WARM_UP + rounds):
        for way, call in ways.items():
            started = clock()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number >= WARM_UP:
                times[way].append(clock() - started)
    return times


def describe(row: Row) -> str:
    """One line of text."""
    shares = "; ".join(
        f"{name} "
        + ", ".join(
            f"{way} {share:.0%}" for way, share in row[f"{name}_share"].items() if "copy" not in way
        )
        for name in ("gather", "scatter")
    )
    order = f"pages of {row['page_size']:2}" if row["slots"] == "scattered" else "one run    "
    copy = row["gather_bytes_per_s"]["copy x1"]
    return (
        f"{row['device']} {row['model']:12} {row['tokens']:5} tokens, {order} "
        f"({row['nbytes'] / 1e6:5.1f} MB, copy {copy / 1e9:4.1f} GB/s): {shares}"
    )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Share of a plain copy's speed against the number of tokens, kernel and torch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    kernel = next(way for way in rows[0]["gather_share"] if way.startswith("kernel"))
    for column, name in enumerate(("gather", "scatter"), start=1):
        axes = figure.add_subplot(1, 2, column, xscale="log", xlabel="tokens")
        axes.set(title=name, ylabel="share of a contiguous copy's speed")
        keys = dict.fromkeys((row["model"], row["slots"], row["page_size"]) for row in rows)
        for number, key in enumerate(keys):
            mine = [row for row in rows if (row["model"], row["slots"], row["page_size"]) == key]
            label = f"{key[0]}, " + (f"page {key[2]}" if key[1] == "scattered" else "one run")
            for way, style in ((kernel, "o-"), ("torch", "x:")):
                axes.plot(
                    [row["tokens"] for row in mine],
                    [row[f"{name}_share"][way] for row in mine],
                    style,
                    color=f"C{number % 10}",
                    label=label if way == kernel else None,
                )
        axes.axhline(0.8, color="black", linewidth=0.8)
        axes.set_ylim(bottom=0)
        counts = sorted({row["tokens"] for row in rows})
        axes.set_xticks(counts, map(str, counts))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.legend(fontsize=6, title=f"{kernel}; dotted: torch", title_fontsize=7)
    figure.savefig(path, dpi=120)
