"""Flags the simulator's command lines share."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_star.errors import ConfigError
from sglang_star.platform.profile import PROFILES
from sglang_star_bench import scenarios, traces
from sglang_star_bench.runs import POLICIES, TOLD
from sglang_star_bench.scenarios import SCENARIOS
from sglang_star_bench.simulator.emulated import SHIPPED_CURVE, ErrorCurve
from sglang_star_bench.traces import Trace


def add_common(parser: argparse.ArgumentParser) -> None:
    """Trace, fleet, predictor and output."""
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="parquet (arrival_s, input_len, output_len), or an Azure, BurstGPT, ServeGen or "
        "Mooncake file; default: a synthetic reasoning trace",
    )
    parser.add_argument(
        "--scenario",
        metavar="NAME",
        help=f"rewrite the trace into what could break a policy: {', '.join(SCENARIOS)}",
    )
    parser.add_argument(
        "--profile",
        default="24gb-7b",
        help=f"{', '.join(PROFILES)}; NAME*F is F times slower; a comma list mixes the fleet",
    )
    parser.add_argument("--prefill", type=int, default=0, help="prefill instances; 0 = enough")
    parser.add_argument("--prefill-profile", default="80gb-7b")
    parser.add_argument("--duration", type=float, default=600.0, help="seconds of arrivals")
    parser.add_argument("--warmup", type=float, default=0.0, help="seconds not judged")
    parser.add_argument("--ttft-slo", type=float, default=2000.0, metavar="MS")
    parser.add_argument("--tpot-slo", type=float, default=50.0, metavar="MS")
    parser.add_argument("--link-gbps", type=float, metavar="G", help="decode links, Gb/s")
    parser.add_argument(
        "--told",
        metavar="NAME=F,...",
        default="",
        help="what policies are told as a multiple of the truth: "
        + ", ".join(f"{name} [{factor:g}]" for name, factor in TOLD.items()),
    )
    parser.add_argument(
        "--error-scale",
        type=float,
        default=1.0,
        help="times the predictor's error curve; 0 perfect, inf useless",
    )
    parser.add_argument("--error-curve", type=Path, default=SHIPPED_CURVE, metavar="FILE")
    parser.add_argument("--status-delay", type=float, default=0.02, metavar="S")
    parser.add_argument("--status-interval", type=float, default=0.25, metavar="S")
    parser.add_argument("--decision-interval", type=float, default=1.0, metavar="S")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="GROUP.NAME=VALUE",
        help="a policy parameter (star, reactive, star_point, freeness) or a simulator one "
        "(config), e.g. star.risk_sigma=0.5",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a figure here")


def common_run(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of :class:`Run` that the shared flags give.

    Raises:
        ConfigError: a flag has a value that makes no sense.
    """
    for flag in ("duration", "ttft_slo", "tpot_slo", "status_interval", "decision_interval"):
        value = getattr(args, flag)
        if not 0 < value < math.inf:
            raise ConfigError(f"--{flag.replace('_', '-')} must be positive, not {value}")
    if not 0 <= args.warmup < args.duration:
        raise ConfigError("--warmup must lie between 0 and --duration")
    if args.status_delay < 0 or args.prefill < 0:
        raise ConfigError("--status-delay and --prefill must not be negative")
    groups = _groups(args.set)
    config = {
        "ttft_slo_ms": args.ttft_slo,
        "tpot_slo_ms": args.tpot_slo,
        "status_delay_s": args.status_delay,
        "status_interval_s": args.status_interval,
        "decision_interval_s": args.decision_interval,
    } | groups["config"]
    star = {"tpot_slo_ms": args.tpot_slo} | groups["star"]
    return {
        "profile": args.profile,
        "prefill": args.prefill,
        "prefill_profile": args.prefill_profile,
        "duration_s": args.duration,
        "warmup_s": args.warmup,
        "link_gbps": args.link_gbps,
        "error_scale": args.error_scale,
        "curve": ErrorCurve.read(args.error_curve),
        "told": TOLD | _told(args.told),
        "config": config,
        "star": star,
        "reactive": groups["reactive"],
        "star_point": groups["star_point"],
        "freeness": groups["freeness"],
    }


def _told(text: str) -> dict[str, float]:
    told = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            told[name] = float(value)
        except ValueError:
            told[name] = 0.0
        if name not in TOLD or not 0 < told[name] < math.inf:
            raise ConfigError(
                f"--told {part!r} is not NAME=FACTOR", hint=f"names: {', '.join(TOLD)}"
            )
    return told


def _groups(settings: list[str]) -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {
        name: {} for name in ("config", "star", "reactive", "star_point", "freeness")
    }
    for setting in settings:
        path, equals, value = setting.partition("=")
        group, dot, name = path.partition(".")
        if not (equals and dot) or group not in groups:
            raise ConfigError(
                f"--set {setting!r} is not GROUP.NAME=VALUE",
                hint=f"groups: {', '.join(groups)}",
            )
        try:
            groups[group][name] = json.loads(value)
        except ValueError as error:
            raise ConfigError(f"--set {setting!r}: the value is no number") from error
    return groups


def read_trace(path: str | None, scenario: str | None = None) -> Trace:
    """The trace asked for, or the synthetic one, rewritten if a scenario is named."""
    trace = traces.load(path) if path else traces.synthetic(0)
    return scenarios.apply(scenario, trace) if scenario else trace


def policy_names(given: list[str] | None) -> list[str]:
    """Policies of repeated or comma-separated flags; all by default."""
    if not given:
        return list(POLICIES)
    return [name for item in given for name in item.split(",") if name]


def write_json(path: Path | None, rows: Any) -> None:
    """Write results; the JSON has no NaN in it."""
    if path is not None:
        path.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_rows(path: Path | None, rows: Sequence[dict[str, Any]]) -> None:
    """Write result rows, one a line, so that a version control system can keep them."""
    if path is not None:
        lines = ",\n".join(json.dumps(row, allow_nan=False, separators=(",", ":")) for row in rows)
        path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def report(error: Exception) -> int:
    """Tell the user what is wrong; the exit status for it."""
    print(f"error: {error}", file=sys.stderr)
    return 2
