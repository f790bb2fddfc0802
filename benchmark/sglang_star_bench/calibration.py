"""``star bench calibration``: what the router's correction makes of a head's estimates.

Requests that a head was not fitted on are played as if served, so many at a time and a token a
step. At every sample the head's quantiles go through the correction that the router applies, which
knows only what has ended before. Best with ``--hold-out-source`` and a head trained without that
source: this is traffic the head knows nothing of.
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from sglang_star.predictor import metrics
from sglang_star.predictor.hazard import Array
from sglang_star.predictor.head import load
from sglang_star.predictor.samples import Samples
from sglang_star.predictor.train import load_split, predict
from sglang_star_router.policy.calibration import Calibration

PARTS: Final = 5
"""Stretches of time that are told apart."""
SAMPLE, END = 0, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Raises:
        ConfigError: the samples or their sources are unusable; HeadError for the head.
    """
    args = _parser().parse_args(argv)
    parts, _ = load_split(args.samples, args.sources, args.hold_out_source)
    given = predict(load(args.head), parts.test)
    report = measure(given, parts.test, running=args.running, seed=args.seed)
    print(f"{report['requests']} requests, {args.running} at a time")
    for name, row in report["estimates"].items():
        shares = ", ".join(f"{share:.0%}" for share in row["held_over_time"])
        print(
            f"{name:10} MAE {row['mae']:6.1f}, P10-P90 held {row['held']:.1%}, by fifth of the "
            f"samples in time {shares}; ended below each quantile "
            + ", ".join(f"{share:.0%}" for share in row["below"])
        )
    if args.json:
        args.json.write_text(json.dumps(report, indent=2))
    return 0


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="star bench calibration", description=__doc__)
    result.add_argument("--samples", type=Path, required=True, help="made by predictor collect")
    result.add_argument("--head", type=Path, required=True)
    result.add_argument("--sources", type=Path, help="prompt file with sources [the samples']")
    result.add_argument("--hold-out-source", nargs="+", default=[], metavar="NAME")
    result.add_argument("--running", type=int, default=64, help="requests at a time [64]")
    result.add_argument("--seed", type=int, default=0, help="of the order of requests [0]")
    result.add_argument("--json", type=Path)
    return result


def measure(given: Array, test: Samples, *, running: int, seed: int) -> dict[str, Any]:
    """Serve the requests of ``test`` and judge estimates as given, ``[n, 5]``, and corrected."""
    when, ends = _schedule(test, running, seed)
    corrected = _serve(given, test, when, ends)
    order = np.argsort(when, kind="stable")
    return {
        "requests": len(test.rids),
        "samples": len(when),
        "estimates": {
            "given": _judge(given, test, order),
            "corrected": _judge(corrected, test, order),
        },
    }


def _schedule(test: Samples, running: int, seed: int) -> tuple[Array, Array]:
    """The step of every sample and the step at which every request ends."""
    slots = [0] * running
    begins = np.zeros(len(test.rids), np.int64)
    for request in np.random.default_rng(seed).permutation(len(test.rids)):
        begins[request] = heapq.heappop(slots)
        heapq.heappush(slots, int(begins[request] + test.output_tokens[request]))
    return begins[test.request] + test.tokens, begins + test.output_tokens


def _serve(given: Array, test: Samples, when: Array, ends: Array) -> Array:
    """Every estimate as corrected by what had ended at its time."""
    calibration = Calibration()
    corrected = np.empty_like(given)
    events = [(int(step), SAMPLE, row) for row, step in enumerate(when)]
    events += [(int(step), END, request) for request, step in enumerate(ends)]
    for _, kind, index in sorted(events):
        if kind == END:
            calibration.ended(test.rids[index], int(test.output_tokens[index]))
            continue
        request, tokens = test.request[index], int(test.tokens[index])
        rid, left = test.rids[request], int(test.max_new_tokens[request]) - tokens
        calibration.note(rid, tokens, left, given[index])
        corrected[index] = calibration.corrected(given[index][None])[0]
    return corrected


def _judge(predicted: Array, test: Samples, order: Array) -> dict[str, Any]:
    clipped, remaining = metrics.clip(predicted, test), test.remaining
    held = (clipped[:, 0] <= remaining) & (remaining <= clipped[:, -1])
    return {
        "mae": float(metrics.errors(predicted, test).mean()),
        "held": float(held.mean()),
        "held_over_time": [float(part.mean()) for part in np.array_split(held[order], PARTS)],
        "below": [float((remaining <= column).mean()) for column in clipped.T],
    }
