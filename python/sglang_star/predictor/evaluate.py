"""``star predictor eval``: a head against the baselines, on prompts none of them was fitted on."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from sglang_star.errors import ConfigError
from sglang_star.predictor import collect, dataset, metrics
from sglang_star.predictor.baselines import BASELINES
from sglang_star.predictor.hazard import Array
from sglang_star.predictor.head import Head, load
from sglang_star.predictor.samples import describe, load_samples
from sglang_star.predictor.timing import step_ms
from sglang_star.predictor.train import predict

TIMED_BATCH: Final = 32
"""``ms_per_step`` is for this many requests, both halves, on this CPU."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Raises:
        ConfigError: the prompts, samples or head are unusable; HeadError for the head.
    """
    args = _parser().parse_args(argv)
    head = load(args.head)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.samples or _generate(args, args.work or Path(scratch))
        model, manifest = describe(folder)
        head.card.fingerprint.require(model, str(args.head))
        parts = dataset.split(load_samples(folder))
    results = compare(head, parts, args.seed, args.only)
    report = {
        "model": manifest["model"],
        "prompts": len({rid.partition("#")[0] for rid in parts.test.rids}),
        "requests": len(parts.test.rids),
        "samples": len(parts.test.tokens),
        "results": results,
    }
    print(table(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2))
    if args.plot:
        plot(report, args.plot)
    return 0


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__)
    source = result.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", type=Path, help="prompt file; outputs are generated first")
    source.add_argument("--samples", type=Path, help="folder made by `star predictor collect`")
    result.add_argument("--head", required=True, type=Path, help="head to judge")
    result.add_argument("--model", help="model path, needed with --prompts")
    result.add_argument("--work", type=Path, help="keep the generated samples here")
    result.add_argument("--limit", type=int, help="use this many prompts [all]")
    result.add_argument("--temperature", type=float, help="[the model's own]")
    result.add_argument("--top-p", type=float, help="[the model's own]")
    result.add_argument("--only", nargs="+", choices=sorted(BASELINES), help="these baselines")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--json", type=Path, help="write the report here")
    result.add_argument("--plot", type=Path, help="figure of error against progress")
    return result


def _generate(args: argparse.Namespace, folder: Path) -> Path:
    if not args.model:
        raise ConfigError("--prompts needs --model", hint="name the model the head is for")
    words = ["--model", args.model, "--prompts", str(args.prompts), "--out", str(folder)]
    for name in ("limit", "temperature", "top_p"):
        if (value := getattr(args, name)) is not None:
            words += ["--" + name.replace("_", "-"), str(value)]
    collect.main(words)
    return folder


def compare(
    head: Head, parts: dataset.Split, seed: int, only: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Fit every baseline on ``parts.fit`` and score all on ``parts.test``."""
    results = {"star": metrics.score(predict(head, parts.test), parts.test, seed)}
    results["star"] |= {
        "parameters": head.parameters,
        "ms_per_step": sum(step_ms(head, TIMED_BATCH)),
    }
    for name, baseline in BASELINES.items():
        if only and name not in only:
            continue
        fitted = baseline(parts.fit, seed)
        started = time.perf_counter()
        predicted: Array = fitted.predict(parts.test)
        per_sample = (time.perf_counter() - started) / len(parts.test.tokens)
        results[name] = metrics.score(predicted, parts.test, seed) | {
            "parameters": fitted.parameters,
            "ms_per_step": per_sample * TIMED_BATCH * 1e3,
        }
    return results


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [
        f"{report['model']}: {report['requests']} requests, {report['samples']} samples",
        f"{'':12}{'MAE':>8}{'95 % interval':>18}{'C-index':>9}{'P10-P90':>9}{'parameters':>12}"
        f"{'ms/step':>9}",
    ]
    for name, result in report["results"].items():
        low, high = result["mae_ci"]
        coverage = "" if result["coverage"] is None else f"{result['coverage']:.1%}"
        lines.append(
            f"{name:12}{result['mae']:8.1f}{f'{low:.1f} - {high:.1f}':>18}"
            f"{result['c_index']:9.3f}{coverage:>9}{result['parameters']:12,}"
            f"{result['ms_per_step']:9.2f}"
        )
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw MAE against progress through the output."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="share of the output generated", ylabel="MAE (tokens)")
    for name, result in report["results"].items():
        errors = [np.nan if e is None else e for e in result["mae_by_progress"]]
        axes.plot(np.arange(10) / 10 + 0.05, errors, label=name, lw=2.5 if name == "star" else 1)
    axes.legend()
    figure.savefig(path)
