"""``star predictor eval``: a head against the baselines, on prompts none of them was fitted on."""

from __future__ import annotations

import argparse
import functools
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from sglang_star.errors import ConfigError
from sglang_star.predictor import (
    baselines,
    collect,
    dataset,
    errorcurve,
    figures,
    floor,
    metrics,
    resample,
    samples,
)
from sglang_star.predictor.hazard import Array
from sglang_star.predictor.head import Head, load
from sglang_star.predictor.timing import step_ms
from sglang_star.predictor.train import load_split, predict

TIMED_BATCH: Final = 32
"""``ms_per_step`` is for this many requests, both halves, on this CPU."""
TIMED_SAMPLES: Final = 256


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Raises:
        ConfigError: the prompts, samples or head are unusable; HeadError for the head.
        SetupError: a baseline needs a package that is not installed.
    """
    args = _parser().parse_args(argv)
    head = load(args.head)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.samples or _generate(args, args.work or Path(scratch))
        model, _ = samples.describe(folder)
        head.card.fingerprint.require(model, str(args.head))
        _check_held_out(head, args)
        parts, sources = load_split(folder, args.sources or args.prompts, args.hold_out_source)
        served = args.model or samples.served_model(folder)
    resamples = resample.read(args.floor) if args.floor else {}
    test = parts.test
    names = [n for n in baselines.BASELINES if not args.only or n in {*args.only, "by_age"}]
    make = functools.partial(
        baselines.make, seed=args.seed, served=served, minutes=args.auxiliary_minutes
    )
    predicted, costs = predictions(head, parts, names, make)
    report = {
        "model": head.card.model,
        "prompts": len({rid.partition("#")[0] for rid in test.rids}),
        "requests": len(test.rids),
        "instances": int(test.instance.max()) + 1,
        "samples": len(test.tokens),
        "at_limit": float(test.censored.mean()),
        "held_out_sources": args.hold_out_source,
        "results": judge(predicted, costs, parts, sources, args.seed),
        "floor": None,
    }
    if args.floor:
        report["floor"] = floor.of(test, resamples).report(test, predicted, args.seed)
    print(table(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2, allow_nan=False))
    if args.plot:
        figures.report(
            report, {k: metrics.clip(v, test) for k, v in predicted.items()}, test, args.plot
        )
    if args.error_curve:
        curve = errorcurve.measure(predicted["star"], predicted["by_age"], test, head.card.model)
        args.error_curve.write_text(json.dumps(curve, indent=2))
    return 0


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__)
    source = result.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", type=Path, help="prompt file; outputs are generated first")
    source.add_argument("--samples", type=Path, help="folder made by `star predictor collect`")
    result.add_argument("--head", required=True, type=Path, help="head to judge")
    result.add_argument("--model", help="model path [the collection's]; needed with --prompts")
    result.add_argument("--work", type=Path, help="keep the generated samples here")
    result.add_argument("--limit", type=int, help="use this many prompts [all]")
    result.add_argument("--temperature", type=float, help="[the model's own]")
    result.add_argument("--top-p", type=float, help="[the model's own]")
    result.add_argument("--top-k", type=int, help="[the model's own]")
    result.add_argument(
        "--only", nargs="+", choices=sorted(baselines.BASELINES), help="these baselines and by_age"
    )
    result.add_argument(
        "--hold-out-source",
        nargs="+",
        default=[],
        metavar="NAME",
        help="judge by these sources, which nothing was fitted on, the head included",
    )
    result.add_argument(
        "--sources", type=Path, metavar="FILE", help="prompt file with sources [the collection's]"
    )
    result.add_argument(
        "--floor", type=Path, metavar="FOLDER", help="made by `star predictor collect --resample`"
    )
    result.add_argument(
        "--auxiliary-minutes",
        type=float,
        default=math.inf,
        metavar="N",
        help="processor time for training an auxiliary model [until it has converged]",
    )
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--json", type=Path, help="write the report here")
    result.add_argument("--plot", type=Path, help="figure of errors and calibration")
    result.add_argument(
        "--error-curve", type=Path, metavar="FILE", help="error against progress, for the simulator"
    )
    return result


def _generate(args: argparse.Namespace, folder: Path) -> Path:
    if not args.model:
        raise ConfigError("--prompts needs --model", hint="name the model the head is for")
    words = ["--model", args.model, "--prompts", str(args.prompts), "--out", str(folder)]
    for name in ("limit", "temperature", "top_p", "top_k"):
        if (value := getattr(args, name)) is not None:
            words += ["--" + name.replace("_", "-"), str(value)]
    collect.main(words)
    return folder


def _check_held_out(head: Head, args: argparse.Namespace) -> None:
    """Refuse to judge a head by sources that it was trained on."""
    trained_without = head.card.provenance.get("held_out_sources", [])
    if seen := sorted(set(args.hold_out_source) - set(trained_without)):
        raise ConfigError(
            f"{args.head} was trained on prompts from {', '.join(seen)}",
            hint="train it with the same --hold-out-source",
        )


def predictions(
    head: Head,
    parts: dataset.Split,
    names: Sequence[str],
    make: Callable[[str, samples.Samples], baselines.Baseline],
) -> tuple[dict[str, Array], dict[str, dict[str, Any]]]:
    """What the head and every baseline, fitted on ``parts.fit``, say about ``parts.test``.

    Returns:
        By name the predictions, and ``parameters``, ``ms_per_step`` and, of those that choose
        or may not have come to their end, ``training``.
    """
    predicted = {"star": predict(head, parts.test)}
    costs: dict[str, dict[str, Any]] = {
        "star": {"parameters": head.parameters, "ms_per_step": sum(step_ms(head, TIMED_BATCH))}
    }
    for name in names:
        print(f"fitting {name}", flush=True)
        fitted = make(name, parts.fit)
        predicted[name] = fitted.predict(parts.test)
        costs[name] = {
            "parameters": fitted.parameters,
            "ms_per_step": _step_ms(fitted, parts.test),
            "training": getattr(fitted, "notes", {}),
        }
    return predicted, costs


def _step_ms(fitted: baselines.Baseline, test: samples.Samples) -> float:
    """Processor time of a step of ``TIMED_BATCH`` requests, from predicting a few at once."""
    few = test.head(TIMED_SAMPLES)
    started = time.thread_time()
    fitted.predict(few)
    return (time.thread_time() - started) / len(few.tokens) * TIMED_BATCH * 1e3


def judge(
    predicted: dict[str, Array],
    costs: dict[str, dict[str, Any]],
    parts: dataset.Split,
    sources: Sequence[str],
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Score everything, and every baseline's error paired with the head's."""
    test = parts.test
    error = {name: metrics.errors(values, test) for name, values in predicted.items()}
    results = {}
    for name, values in predicted.items():
        results[name] = metrics.score(values, test, seed, sources) | costs[name]
        if name != "star":
            results[name]["star_minus"] = metrics.paired(
                error["star"], error[name], metrics.drawn_as(test), seed
            )
    mean = baselines.AgeMean(parts.fit).predict(test)
    results["by_age"]["mae_of_mean"] = float(metrics.errors(mean, test).mean())
    return results


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [
        f"{report['model']}: {report['requests']} requests never fitted on, {report['samples']} "
        f"samples, {report['at_limit']:.0%} of the outputs cut by max_new_tokens",
        f"{'':12}{'MAE':>8}{'95 % interval':>18}{'star minus it':>26}{'C-index':>9}{'P10-P90':>9}"
        f"{'where open (expected)':>23}{'parameters':>12}{'ms/step':>9}",
    ]
    for name, result in report["results"].items():
        low, high = result["mae_ci"]
        difference = ""
        if "star_minus" in result:
            less, more = result["star_minus"]["ci"]
            difference = f"{result['star_minus']['difference']:.1f} ({less:.1f} to {more:.1f})"
        lines.append(
            f"{name:12}{result['mae']:8.1f}{f'{low:.1f} - {high:.1f}':>18}{difference:>26}"
            f"{result['c_index']:9.3f}{_share(result['coverage']):>9}"
            f"{_open(result):>23}{result['parameters']:12,}"
            f"{result['ms_per_step']:9.2f}"
        )
    by_age = report["results"]["by_age"]
    lines.append(f"by_age with the mean instead of the median: {by_age['mae_of_mean']:.1f}")
    star = report["results"]["star"]
    if star["mae_by_source"]:
        lines.append("star by source: " + _by_source(star["mae_by_source"]))
    if report["floor"]:
        lines += _floor_lines(report["floor"])
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _open(result: dict[str, Any]) -> str:
    """Coverage of the band where the limit leaves it a meaning, and what it should be."""
    if result.get("coverage_open") is None:
        return ""
    return f"{_share(result['coverage_open'])} ({_share(result['coverage_open_expected'])})"


def _by_source(rows: dict[str, dict[str, Any]]) -> str:
    return ", ".join(f"{name} {row['mae']:.0f} ({row['requests']})" for name, row in rows.items())


def _floor_lines(found: dict[str, Any]) -> list[str]:
    low, high = found["mae_ci"]
    quarters = ", ".join("-" if q is None else f"{q:.0f}" for q in found["mae_by_quarter"])
    lines = [
        f"floor {found['mae']:.1f} ({low:.1f} - {high:.1f}) from {found['points']} prefixes of "
        f"{found['requests']} requests, {found['draws']} draws; by quarter of progress {quarters}"
    ]
    for name, row in found["predictors"].items():
        if row["removed"] is None:
            lines.append(f"  {name:12}{row['mae']:8.1f}")
            continue
        low, high = row["removed_ci"]
        lines.append(
            f"  {name:12}{row['mae']:8.1f}   removes {row['removed']:.0%} of what can be removed "
            f"({low:.0%} - {high:.0%})"
        )
    return lines
