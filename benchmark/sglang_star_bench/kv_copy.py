"""``star bench kv-copy``: gathering and scattering the KV of a request, against a plain copy.

A pool of KV slots as SGLang keeps it, pages in random order. Every figure is the median over
paired rounds; ``share`` says how much of the speed of one contiguous copy of as many bytes on the
same device is reached.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from sgl_kernel_ext import as_token_rows, gather_kv, scatter_kv
from sglang_star.errors import ConfigError

SHAPES: Final = {"smollm2-135m": (30, 3 * 64), "7b": (28, 4 * 128)}
"""Layers, and values per token in each of K and V."""
ROOM: Final = 4
"""The pool holds this many times the tokens copied, so that its pages are well mixed."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result; ``gather`` and ``scatter`` in bytes per second."""

    device: str
    model: str
    tokens: int
    page_size: int
    nbytes: int
    gather: float
    gather_share: float
    scatter: float
    scatter_share: float
    rounds: int


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="star bench kv-copy", description=__doc__)
    add = made.add_argument
    add("--model", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="KV shapes [all]")
    add("--tokens", type=int, nargs="+", default=[256, 1024, 4096], help="[256 1024 4096]")
    add("--page-size", type=int, nargs="+", default=[1, 16, 64], help="[1 16 64]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[%(default)s]")
    add("--rounds", type=int, default=9, help="paired rounds per figure [%(default)s]")
    add("--json", type=Path, metavar="FILE", help="write results here")
    add("--plot", type=Path, metavar="FILE", help="write a figure here")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Raises:
        ConfigError: a number is not positive, or tokens are no whole pages.
    """
    args = parser().parse_args(argv)
    if min(*args.tokens, *args.page_size, args.rounds) < 1:
        raise ConfigError("--tokens, --page-size and --rounds must be positive")
    rows = []
    for model in args.model:
        for page_size in args.page_size:
            for tokens in args.tokens:
                if tokens % page_size:
                    raise ConfigError(f"{tokens} tokens are no whole pages of {page_size}")
                rows.append(measure(model, tokens, page_size, args.device, args.rounds))
                print(describe(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)
    return 0


def measure(model: str, tokens: int, page_size: int, device: str, rounds: int) -> Row:
    """Time one shape; the copy is verified before it is timed.

    Raises:
        RuntimeError: what came back is not what went in.
    """
    layers, values = SHAPES[model]
    generator = torch.Generator().manual_seed(tokens)
    pool = [
        torch.randn(ROOM * tokens, values, generator=generator).to(device, torch.bfloat16)
        for _ in range(2 * layers)
    ]
    rows = [as_token_rows(buffer) for buffer in pool]
    pages = torch.randperm(ROOM * tokens // page_size, generator=generator)
    first = pages[: tokens // page_size, None] * page_size
    slots = (first + torch.arange(page_size)).flatten().to(device)
    nbytes = sum(tokens * row.shape[1] for row in rows)
    staging = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    other = torch.zeros_like(staging)
    gather_kv(rows, slots, staging)
    fresh = [torch.zeros_like(row) for row in rows]
    scatter_kv(fresh, slots, staging)
    if not all(torch.equal(a[slots], b[slots]) for a, b in zip(rows, fresh, strict=True)):
        raise RuntimeError("scattered KV differs from what was gathered")

    gather, scatter, copy = [], [], []
    for _ in range(rounds):
        gather.append(seconds(lambda: gather_kv(rows, slots, staging), device))
        scatter.append(seconds(lambda: scatter_kv(fresh, slots, staging), device))
        copy.append(seconds(lambda: other.copy_(staging), device))
    return Row(
        device=device,
        model=model,
        tokens=tokens,
        page_size=page_size,
        nbytes=nbytes,
        gather=nbytes / statistics.median(gather),
        gather_share=statistics.median(c / g for c, g in zip(copy, gather, strict=True)),
        scatter=nbytes / statistics.median(scatter),
        scatter_share=statistics.median(c / s for c, s in zip(copy, scatter, strict=True)),
        rounds=rounds,
    )


def seconds(call: Callable[[], Any], device: str) -> float:
    """Wall time of one call, the device's queue included."""
    started = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


def describe(row: Row) -> str:
    """One line of text."""
    return (
        f"{row.device} {row.model:13} {row.tokens:5} tokens, pages of {row.page_size:2} "
        f"({row.nbytes / 1e6:6.1f} MB): gather {row.gather / 1e9:5.2f} GB/s "
        f"({row.gather_share:4.0%} of a copy), scatter {row.scatter / 1e9:5.2f} GB/s "
        f"({row.scatter_share:4.0%})"
    )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Share of a plain copy's speed against the number of tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for column, name in enumerate(("gather_share", "scatter_share"), start=1):
        axes = figure.add_subplot(1, 2, column, xscale="log", xlabel="tokens", ylim=(0, None))
        axes.set(title=name.partition("_")[0], ylabel="share of a contiguous copy's speed")
        for key in dict.fromkeys((row.model, row.page_size) for row in rows):
            mine = [row for row in rows if (row.model, row.page_size) == key]
            label = f"{key[0]}, page {key[1]}"
            axes.plot(
                [r.tokens for r in mine], [getattr(r, name) for r in mine], marker="o", label=label
            )
        counts = sorted({row.tokens for row in rows})
        axes.set_xticks(counts, map(str, counts))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
