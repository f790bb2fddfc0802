"""``star bench overhead``: what STAR costs while it moves nothing, against plain SGLang.

All variants run at once, one at a time under load. A round asks each for the same tokens, in an
order that changes from round to round, and is compared within itself: what slows the machine for
longer than a round cancels out. Processor time is compared as well, because other programs on the
machine lengthen the wall time of a step but hardly its work.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import numpy as np
import psutil  # type: ignore[import-untyped]

from sglang_star.cluster_layout import ClusterSpec
from sglang_star.config import PREDICTOR_OFF
from sglang_star.errors import ConfigError
from sglang_star.model import default_model
from sglang_star_bench.engines import cpu_s, family, greedy, post, running, warm_up

PLAIN: Final = "plain"
OFF: Final = "star, predictor off"
HEAD: Final = "star, head"
PROMPT_TOKENS: Final = 16
RESAMPLES: Final = 4000


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement: output tokens per second, and processor milliseconds per output token."""

    tokens_per_s: float
    cpu_ms_per_token: float


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="star bench overhead", description=__doc__)
    add = made.add_argument
    add("--model", default="", help="directory or hub name [the packaged SmolLM2-135M-Instruct]")
    add("--head", default="builtin", help="builtin, a .safetensors head, or off: leave it out")
    add("--batch", type=int, nargs="+", default=[1, 16], help="[1 16]")
    add("--tokens", type=int, default=48, help="output tokens per request [%(default)s]")
    add("--minutes", type=float, default=10.0, help="measure for this long [%(default)s]")
    add("--engine-args", default="", metavar="'...'", help="more flags for every engine")
    add("--json", type=Path, metavar="FILE", help="write results here")
    add("--plot", type=Path, metavar="FILE", help="write a figure here")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    args = parser().parse_args(argv)
    if min(args.batch) < 1 or args.tokens < 2 or args.minutes <= 0:
        raise ConfigError("--batch, --minutes must be positive and --tokens at least 2")
    model = args.model or str(default_model())
    specs = variants(model, args.head, tuple(args.engine_args.split()))
    rounds: dict[int, list[dict[str, Sample]]] = {batch: [] for batch in args.batch}
    with (
        tempfile.TemporaryDirectory() as logs,
        running(list(specs.values()), Path(logs)) as engines,
    ):
        members = dict(zip(specs, engines, strict=True))
        urls = {name: engine.url for name, engine in members.items()}
        families = {name: family(engine) for name, engine in members.items()}
        # Ctrl-C ends the measurement, not the report of what was measured.
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(measure(urls, families, args, rounds))
    rows = [row for batch in args.batch if rounds[batch] for row in summarise(rounds[batch], batch)]
    for row in rows:
        print(describe(row))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n")
    if args.plot:
        plot(rows, args.plot)
    return 0


def variants(model: str, head: str, engine_arguments: tuple[str, ...]) -> dict[str, ClusterSpec]:
    """What is compared: name -> a single engine."""
    wanted: dict[str, dict[str, Any]] = {PLAIN: {"star": False}, OFF: {"predictor": PREDICTOR_OFF}}
    if head != PREDICTOR_OFF:
        wanted[HEAD] = {"predictor": head}
    return {
        name: ClusterSpec(
            model=model, aggregated=1, engine_arguments=engine_arguments, **differences
        )
        for name, differences in wanted.items()
    }


async def measure(
    urls: dict[str, str],
    families: dict[str, list[psutil.Process]],
    args: argparse.Namespace,
    rounds: dict[int, list[dict[str, Sample]]],
) -> None:
    """Add rounds of samples by batch size until the time is up; at least one round."""
    order = list(urls)
    deadline = time.monotonic() + 60 * args.minutes
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        for batch in args.batch:
            for url in urls.values():
                await warm_up(session, url, batch)
        for number in itertools.count():
            for batch in args.batch:
                samples = {}
                for name in order:
                    samples[name] = await sample(
                        session, urls[name], families[name], batch, args.tokens, number
                    )
                rounds[batch].append(samples)
                rates = ", ".join(f"{name} {samples[name].tokens_per_s:.1f}" for name in urls)
                print(f"round {number + 1}, batch {batch}: {rates} tokens/s", flush=True)
            # Every variant comes first, and after every other one, equally often.
            order = [*order[1:], order[0]] if number % 2 else order[::-1]
            if time.monotonic() > deadline:
                return


async def sample(
    session: aiohttp.ClientSession,
    url: str,
    processes: list[psutil.Process],
    batch: int,
    tokens: int,
    seed: int,
) -> Sample:
    """Ask one engine for ``batch`` x ``tokens`` output tokens, after prompts it has not seen."""
    chance = random.Random(f"{seed}/{batch}")
    prompts = [[chance.randrange(100, 30000) for _ in range(PROMPT_TOKENS)] for _ in range(batch)]
    body = {"input_ids": prompts, "sampling_params": greedy(tokens)}
    used, began = cpu_s(processes), time.perf_counter()
    await post(session, url + "/generate", body)
    wall_s, worked_s = time.perf_counter() - began, cpu_s(processes) - used
    made = batch * tokens
    return Sample(made / wall_s, 1e3 * worked_s / made)


def summarise(rounds: list[dict[str, Sample]], batch: int) -> list[dict[str, Any]]:
    """One row per variant: medians, and ratios to plain SGLang paired by round.

    ``throughput`` above 1 is faster than plain, ``cpu`` above 1 more work per token. Each ratio is
    given as median, 95 % bootstrap interval of the median, and quartiles of the pairs.
    """
    rows = []
    for name in rounds[0]:
        row: dict[str, Any] = {
            "variant": name,
            "batch": batch,
            "pairs": len(rounds),
            "tokens_per_s": statistics.median(r[name].tokens_per_s for r in rounds),
            "cpu_ms_per_token": statistics.median(r[name].cpu_ms_per_token for r in rounds),
        }
        if name != PLAIN:
            row["throughput"] = spread(
                [r[name].tokens_per_s / r[PLAIN].tokens_per_s for r in rounds]
            )
            row["cpu"] = spread(
                [r[name].cpu_ms_per_token / r[PLAIN].cpu_ms_per_token for r in rounds]
            )
        rows.append(row)
    return rows


def spread(ratios: list[float]) -> dict[str, Any]:
    """Median of paired ratios, its 95 % bootstrap interval, and the pairs' quartiles."""
    values = np.array(ratios)
    drawn = np.random.default_rng(0).choice(values, (RESAMPLES, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    first, third = np.quantile(values, [0.25, 0.75])
    return {
        "median": float(np.median(values)),
        "ci": [float(low), float(high)],
        "quartiles": [float(first), float(third)],
        "pairs": [round(ratio, 4) for ratio in ratios],
    }


def describe(row: dict[str, Any]) -> str:
    """One row as text."""
    text = (
        f"batch {row['batch']:3} {row['variant']:20} {row['tokens_per_s']:7.1f} tokens/s, "
        f"{row['cpu_ms_per_token']:6.2f} CPU ms/token"
    )
    for key in ("throughput", "cpu"):
        if key in row:
            one = row[key]
            text += f"; {key} x{one['median']:.4f} [{one['ci'][0]:.4f}, {one['ci'][1]:.4f}]"
    return text


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw every pair's ratio, throughput left and processor time right, medians as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    compared = [row for row in rows if row["variant"] != PLAIN]
    labels = [f"{row['variant']}\nbatch {row['batch']}" for row in compared]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for axis, key, title in zip(
        axes, ("throughput", "cpu"), ("tokens/s", "CPU time per token"), strict=True
    ):
        for place, row in enumerate(compared):
            pairs = row[key]["pairs"]
            axis.plot([place] * len(pairs), pairs, "o", alpha=0.4)
            axis.hlines(row[key]["median"], place - 0.3, place + 0.3, color="black")
        axis.axhline(1.0, linewidth=0.8, linestyle=":")
        axis.set(title=f"{title}, ratio to plain SGLang")
        axis.set_xticks(range(len(labels)), labels, fontsize=8)
    figure.savefig(path)
