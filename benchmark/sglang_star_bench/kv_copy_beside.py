"""How much a copy of KV slows down what decodes beside it on the same GPU, by thread blocks.

``python -m sglang_star_bench.kv_copy_beside``. The decode step is one in shape only: per layer the
products of a 7 B model for a batch, and a read of as much KV as that batch has; a graph replays it.
Beside it a stream of lower priority gathers without a pause. Steps with and without take turns.
``--device cpu`` rehearses the program and measures nothing of interest.
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

import sgl_kernel_ext as kernels
from sgl_kernel_ext import native
from sglang_star.errors import ConfigError
from sglang_star_bench import kv_copy_pools

HIDDEN: Final = 3584
INNER: Final = 18944
KV_BYTES: Final = 2 * 4 * 128 * 2
"""Per token and layer, of a 7 B model with 4 KV heads of 128 in 16 bits."""

LOW, HIGH = 0, -1
"""Priorities of CUDA streams: the smaller number goes first."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="kv_copy_beside", description=__doc__)
    add = made.add_argument
    add("--device", default="cuda")
    add("--blocks", type=int, nargs="+", default=[4, 8, 16, 32], help="[4 8 16 32]")
    add("--batch", type=int, default=64, help="running requests [%(default)s]")
    add("--context", type=int, default=2000, help="tokens of each [%(default)s]")
    add("--layers", type=int, default=8, help="of the step [%(default)s]")
    add("--tokens", type=int, default=4096, help="of one copy [%(default)s]")
    add("--steps", type=int, default=200, help="pairs of steps [%(default)s]")
    add("--scale", type=int, default=1, help="divide the model's sizes by this, for a rehearsal")
    add("--json", type=Path, metavar="FILE", help="write results here")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Raises:
        ConfigError: there is no such device, or there are no kernels for it.
    """
    args = parser().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch sees no CUDA device", hint="--device cpu rehearses the program")
    if native.library(args.device).wait() is None:
        raise ConfigError("there are no kernels", hint="python -m sgl_kernel_ext says why")
    step = _step(args)
    pool = kv_copy_pools.make("7b", args.tokens // args.scale, 1, True, args.device)
    rows = [_measure(step, pool, blocks, args) for blocks in args.blocks]
    for row in rows:
        print(
            f"{row['blocks']:3} blocks: a step of {row['step_ms']:.3f} ms takes "
            f"x{row['slowdown']['p50']:.3f} (P99 x{row['slowdown']['p99']:.3f}) beside a copy at "
            f"{row['bytes_per_s'] / 1e9:.1f} GB/s",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def _step(args: argparse.Namespace) -> Callable[[], Any]:
    hidden, inner = HIDDEN // args.scale, INNER // args.scale
    like: dict[str, Any] = {"device": args.device, "dtype": torch.bfloat16}
    weights = [
        (torch.randn(hidden, inner, **like), torch.randn(inner, hidden, **like))
        for _ in range(args.layers)
    ]
    count = args.batch * args.context * KV_BYTES // args.scale // 4
    cached = torch.zeros(count, dtype=torch.float32, device=args.device)
    x = torch.randn(args.batch, hidden, **like)

    def run() -> None:
        for up, down in weights:
            cached.sum()
            torch.mm(torch.mm(x, up), down)

    run()
    if args.device == "cpu":
        return run
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _measure(
    step: Callable[[], Any], pool: kv_copy_pools.Pool, blocks: int, args: argparse.Namespace
) -> dict[str, Any]:
    def copy() -> None:
        kernels.gather(pool.source, pool.slots, pool.staging, workers=blocks)

    timed = _on_gpu if args.device == "cuda" else _on_host
    alone, beside, rates = timed(step, copy, pool.nbytes, args.steps)
    ratios = sorted(b / a for a, b in zip(alone, beside, strict=True))
    return {
        "blocks": blocks,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
        "batch": args.batch,
        "context": args.context,
        "layers": args.layers,
        "steps": args.steps,
        "step_ms": statistics.median(alone),
        "slowdown": {
            "p50": statistics.median(ratios),
            "p99": ratios[min(len(ratios) - 1, int(len(ratios) * 0.99))],
        },
        "bytes_per_s": statistics.median(rates),
    }


def _on_gpu(
    step: Callable[[], Any], copy: Callable[[], None], nbytes: int, steps: int
) -> tuple[list[float], list[float], list[float]]:
    """Times of steps alone and beside copies, ms, and bytes per second of the copies."""
    decode, side = torch.cuda.Stream(priority=HIGH), torch.cuda.Stream(priority=LOW)
    alone: list[float] = []
    beside: list[float] = []
    rates: list[float] = []
    for number in range(2 * steps + 2):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        torch.cuda.synchronize()
        copied = 0
        if number % 2:
            with torch.cuda.stream(side):
                events[2].record()
                for _ in range(8):  # enough to outlast the step
                    copy()
                    copied += nbytes
                events[3].record()
        with torch.cuda.stream(decode):
            events[0].record()
            step()
            events[1].record()
        torch.cuda.synchronize()
        if number < 2:
            continue
        (beside if copied else alone).append(events[0].elapsed_time(events[1]))
        if copied:
            rates.append(copied / events[2].elapsed_time(events[3]) * 1e3)
    return alone, beside, rates


def _on_host(
    step: Callable[[], Any], copy: Callable[[], None], nbytes: int, steps: int
) -> tuple[list[float], list[float], list[float]]:
    alone: list[float] = []
    beside: list[float] = []
    rates: list[float] = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        stepped = time.perf_counter()
        copy()
        copied = time.perf_counter()
        alone.append((stepped - began) * 1e3)
        beside.append((copied - began) * 1e3)
        rates.append(nbytes / (copied - stepped))
    return alone, beside, rates


if __name__ == "__main__":
    raise SystemExit(main())
