"""``star bench attention``: our decode attention on a CPU against SGLang's torch backend.

Random KV in random slots, as a pool looks after some time; both sides on the same data, in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from sglang_star.platform import attention

HEADS: Final = (9, 3, 64)
"""Query heads, KV heads and head size of SmolLM2-135M."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="star bench attention", description=__doc__)
    made.add_argument("--requests", type=int, nargs="+", default=[1, 8, 64], help="[1 8 64]")
    made.add_argument("--tokens", type=int, default=500, help="mean context [%(default)s]")
    made.add_argument("--rounds", type=int, default=9, help="pairs [%(default)s]")
    made.add_argument("--json", type=Path, metavar="FILE", help="write results here")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    args = parser().parse_args(argv)
    rows = [measure(requests, args.tokens, args.rounds) for requests in args.requests]
    for row in rows:
        low, high = row["ratio_spread"]
        print(
            f"{row['requests']:3} requests: SGLang {row['sglang_ms']:.2f} ms per layer, "
            f"STAR {row['star_ms']:.2f} ms, x{row['ratio']:.2f} [{low:.2f}, {high:.2f}]"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def measure(requests: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Time one layer's decode attention; lengths between 0.1 and 1.9 times ``tokens``."""
    generator = torch.Generator().manual_seed(requests)
    heads, kv_heads, size = HEADS
    longest = 2 * tokens
    lengths = torch.randint(max(1, tokens // 10), longest - tokens // 10, (requests,),
                            generator=generator)  # fmt: skip
    slots = torch.randperm(requests * longest, generator=generator).to(torch.int32)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    query = noise(requests, heads, size)
    inputs = (
        query,
        torch.empty_like(query),
        noise(requests * longest, kv_heads, size),
        noise(requests * longest, kv_heads, size),
        slots.view(requests, longest),
        torch.arange(requests),
        lengths,
    )
    backend = TorchNativeAttnBackend.__new__(TorchNativeAttnBackend)
    theirs = TorchNativeAttnBackend._run_sdpa_forward_decode
    times: dict[str, list[float]] = {"sglang": [], "star": []}
    for _ in range(rounds + 1):
        started = time.perf_counter()
        theirs(backend, *inputs, scaling=size**-0.5, enable_gqa=True)
        between = time.perf_counter()
        attention.decode(theirs, backend, *inputs, scaling=size**-0.5)
        times["sglang"].append(between - started)
        times["star"].append(time.perf_counter() - between)
    ratios = [a / b for a, b in zip(times["sglang"][1:], times["star"][1:], strict=True)]
    return {
        "requests": requests,
        "tokens": tokens,
        "threads": torch.get_num_threads(),
        "sglang_ms": statistics.median(times["sglang"][1:]) * 1e3,
        "star_ms": statistics.median(times["star"][1:]) * 1e3,
        "ratio": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
        "rounds": rounds,
    }
