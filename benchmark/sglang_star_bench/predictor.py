"""``star bench predictor``: what the head adds to a decode step; what its parts are worth."""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from sglang_star.config import PREDICTOR_OFF
from sglang_star.predictor import head as heads
from sglang_star.predictor.recipe import Recipe
from sglang_star.predictor.timing import step_ms
from sglang_star_bench import ablations

WARM_TOKENS: Final = 8


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="star bench predictor", description=__doc__)
    result.add_argument("--head", type=Path, help="head to time [every packaged one]")
    result.add_argument(
        "--batch", type=int, nargs="+", default=[1, 8, 64, 256], help="[1 8 64 256]"
    )
    result.add_argument(
        "--model",
        help="also decode with this model, head on and off in turn; with --ablations, "
        "also try its other layers",
    )
    result.add_argument("--rounds", type=int, default=3, help="engine pairs [3]")
    result.add_argument("--tokens", type=int, default=64, help="decoded per request [64]")
    result.add_argument(
        "--ablations",
        type=Path,
        metavar="SAMPLES",
        help="instead: vary the recipe on this folder made by `star predictor collect`",
    )
    Recipe.add_flags(result, repeats=1, epochs=60)
    result.add_argument("--json", type=Path)
    result.add_argument("--plot", type=Path)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parser().parse_args(argv)
    if args.ablations:
        return _ablations(args)
    rows: list[dict[str, Any]] = []
    for path in [args.head] if args.head else sorted(heads.HEADS.glob("*.safetensors")):
        head = heads.load(path)
        for batch in args.batch:
            device, host = step_ms(head, batch)
            rows.append(
                {
                    "head": path.name,
                    "parameters": head.parameters,
                    "batch": batch,
                    "device_ms": device,
                    "host_ms": host,
                }
            )
    if args.model:
        _add_engine(rows, args)
    for row in rows:
        print(describe(row))
    _keep(args, rows)
    if args.plot:
        plot(rows, args.plot)
    return 0


def _ablations(args: argparse.Namespace) -> int:
    model = Path(args.model) if args.model else None
    report = ablations.run(
        args.ablations, Recipe.of(args), model, lambda report: _keep(args, report)
    )
    if args.plot:
        ablations.plot(report, args.plot)
    return 0


def _keep(args: argparse.Namespace, report: Any) -> None:
    """Write what is known so far: a run that is cut short has lost nothing."""
    if args.json:
        args.json.write_text(json.dumps(report, indent=2))


def _add_engine(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Add the median step of engines with the head on and off, booted in turn."""
    steps: dict[tuple[str, int], list[float]] = {}
    predictors = (str(args.head or "builtin"), PREDICTOR_OFF)
    for _ in range(args.rounds):
        for predictor in predictors:
            for batch, milliseconds in engine_step_ms(args, predictor).items():
                steps.setdefault((predictor, batch), []).append(milliseconds)
        for row in rows:
            on, off = (statistics.median(steps[which, row["batch"]]) for which in predictors)
            rounds = len(steps[predictors[0], row["batch"]])
            row |= {"step_on_ms": on, "step_off_ms": off, "added": on / off - 1.0, "pairs": rounds}
        _keep(args, rows)


def engine_step_ms(args: argparse.Namespace, predictor: str) -> dict[int, float]:
    """Boot one engine and return its mean decode step at every batch size, milliseconds."""
    import time

    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.server_args import ServerArgs

    from sglang_star.config import StarConfig
    from sglang_star.launch import enable

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    server_args = ServerArgs(
        model_path=args.model, log_level="error", sleep_on_idle=True, disable_radix_cache=True
    )
    engine = Engine(server_args=enable(server_args, StarConfig(predictor=predictor)))

    def decode(batch: int, tokens: int) -> float:
        sampling = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}
        prompts = [[100 + i] * 32 for i in range(batch)]
        started = time.perf_counter()
        engine.generate(input_ids=prompts, sampling_params=sampling)
        return time.perf_counter() - started

    try:
        decode(1, WARM_TOKENS)
        # The difference of two lengths leaves out prefill, tokenisation and transport.
        return {
            batch: (decode(batch, args.tokens + WARM_TOKENS) - decode(batch, WARM_TOKENS))
            / args.tokens
            * 1e3
            for batch in args.batch
        }
    finally:
        engine.shutdown()


def describe(row: dict[str, Any]) -> str:
    """One row as text."""
    text = (
        f"{row['head']}  batch {row['batch']:3}: device half {row['device_ms']:.3f} ms, "
        f"host half {row['host_ms']:.3f} ms"
    )
    if "added" in row:
        text += (
            f"; step {row['step_off_ms']:.1f} -> {row['step_on_ms']:.1f} ms ({row['added']:+.2%})"
        )
    return text


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw both halves against batch size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="requests in the batch", ylabel="CPU time per step (ms)")
    for name in sorted({row["head"] for row in rows}):
        mine = [row for row in rows if row["head"] == name]
        batches = [row["batch"] for row in mine]
        axes.plot(batches, [row["device_ms"] for row in mine], marker="o", label=f"{name}, device")
        axes.plot(batches, [row["host_ms"] for row in mine], marker="s", label=f"{name}, host")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path)
