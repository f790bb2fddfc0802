"""``star bench policy``: all policies on one trace over loads and seeds, and decision times."""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from sglang_star.errors import ConfigError, StarError
from sglang_star_bench import arguments, capacity
from sglang_star_bench.progress import bar
from sglang_star_bench.runs import Run, execute
from sglang_star_router.policy.registry import RESCHEDULER_NAMES, make_rescheduler
from sglang_star_router.policy.snapshot import RESERVE_EACH, FleetSnapshot, Instances, Requests

REQUESTS_PER_INSTANCE = 64


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="star bench policy", description=__doc__)
    parser.add_argument("--policy", action="append", metavar="P", help="as in star simulate")
    parser.add_argument("--decode", default="8", metavar="N[,N...]", help="fleet sizes")
    parser.add_argument(
        "--loads",
        default="0.6,0.9,1.3",
        metavar="L[,L...]",
        help="multiples of the memory-saturation rate: below, near and past it",
    )
    parser.add_argument("--seeds", type=int, default=3, help="windows of the trace per point")
    parser.add_argument(
        "--windows",
        type=int,
        metavar="N",
        help="instead of --seeds: the first N disjoint windows of the trace",
    )
    parser.add_argument(
        "--sustainable",
        metavar="A[,A...]",
        help="instead of --loads: the highest rate with these shares of requests in SLO",
    )
    parser.add_argument(
        "--decision-time",
        metavar="N[,N...]",
        help=f"time a decision at these fleet sizes, {REQUESTS_PER_INSTANCE} requests each",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="do not run again what --json has a row of: of this code, with these parameters",
    )
    arguments.add_common(parser)
    return parser


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    args = parser().parse_args(argv)
    try:
        if args.decision_time:
            rows = list(decision_times(_numbers(args.decision_time, int)))
        elif args.sustainable:
            rows = list(_sustainable(args))
        else:
            rows = _grid(args)
        arguments.write_rows(args.json, rows)
        if args.plot:
            _plot(args, rows)
    except (StarError, OSError) as error:
        return arguments.report(error)
    return 0


def _numbers(text: str, kind: type[Any]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a comma-separated list of numbers") from error


def _grid(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All policies x fleet sizes x loads x seeds; the file is rewritten after every row."""
    trace, common = arguments.read_trace(args.trace, args.scenario), arguments.common_run(args)
    names = arguments.policy_names(args.policy)
    parts = args.windows is not None
    runs = [
        Run(
            policy=name,
            trace=trace,
            decode=decode,
            load=load,
            seed=seed,
            part=seed if parts else None,
            **common,
        )
        for decode in _numbers(args.decode, int)
        for load in _numbers(args.loads, float)
        for seed in range(args.windows if parts else args.seeds)
        for name in names
    ]
    rows = kept(args.json, {run.key for run in runs}) if args.resume else []
    have = {row["key"] for row in rows}
    update = bar("policy benchmark", len(runs))
    for done, run in enumerate(runs):
        if run.key in have:
            continue
        rows.append(execute(run)[0] | {"asked_load": run.load})
        arguments.write_rows(args.json, rows)
        update(done + 1)
    _print_table(rows)
    return rows


def kept(path: Path | None, wanted: Collection[str]) -> list[dict[str, Any]]:
    """Rows that ``path`` has already; none if there is no such file.

    Raises:
        ConfigError: it is no result, or has rows of other code or other parameters: a table made of
            both would compare what is not comparable.
    """
    if path is None or not path.exists():
        return []
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        keys = [row.get("key") for row in rows]
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be resumed: {error}") from error
    strange = sum(key not in wanted for key in keys)
    if strange:
        raise ConfigError(
            f"{path}: {strange} of {len(rows)} rows are of other code or other parameters",
            hint="name another file with --json, or leave out --resume to begin anew",
        )
    return rows


def _sustainable(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Highest sustainable rate by policy, fleet size, attainment and seed."""
    trace, common = arguments.read_trace(args.trace, args.scenario), arguments.common_run(args)
    for decode in _numbers(args.decode, int):
        for wanted in _numbers(args.sustainable, float):
            for name in arguments.policy_names(args.policy):
                for seed in range(args.seeds):
                    run = Run(policy=name, trace=trace, decode=decode, seed=seed, **common)
                    answer = capacity.highest_load(run, wanted)
                    row = {
                        "policy": name,
                        "instances": decode,
                        "profile": run.profile,
                        "trace": trace.name,
                        "attainment": wanted,
                        "seed": seed,
                    } | answer
                    print(
                        f"{name:16} {decode:4} instances, {wanted:.0%} in SLO, seed {seed}: "
                        f"load {row['load']}, {row['rate_rps']} req/s",
                        flush=True,
                    )
                    yield row


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Mean over seeds with the range, one line per point."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["instances"], row["asked_load"], row["policy"]].append(row)
    print(
        f"{'N':>4} {'load':>5} {'policy':16} {'in SLO':>7} {'(range)':>15} {'goodput':>8} "
        f"{'TTFT P99':>9} {'TPOT P99':>8} {'retract':>8} {'moves':>8}"
    )
    for (instances, load, policy), found in groups.items():
        share = [r["slo_attainment"] for r in found]
        print(
            f"{instances:4} {load:5.2f} {policy:16} {mean(share):7.2%} "
            f"({min(share):6.2%}-{max(share):6.2%}) {_mean(found, 'goodput_rps'):8.3f} "
            f"{_mean(found, 'ttft_ms', 'p99'):9.0f} {_mean(found, 'tpot_ms', 'p99'):8.1f} "
            f"{_mean(found, 'retractions'):8.1f} {_mean(found, 'migrations'):8.1f}"
        )


def _mean(rows: Sequence[dict[str, Any]], key: str, inner: str | None = None) -> float:
    values = [r[key] if inner is None else r[key][inner] for r in rows]
    return mean(float("inf") if v is None else v for v in values)


def decision_times(sizes: Sequence[int], rounds: int = 31) -> Iterator[dict[str, Any]]:
    """Time every rescheduler on a random loaded fleet of each size.

    Processor time, so that what else runs on the machine does not count.
    """
    for instances in sizes:
        for name in RESCHEDULER_NAMES:
            policy = make_rescheduler(name)
            spans = []
            for seed in range(rounds):
                snapshot = random_fleet(seed, instances, REQUESTS_PER_INSTANCE)
                started = time.thread_time()
                policy.orders(snapshot)
                spans.append((time.thread_time() - started) * 1e3)
            row = {
                "policy": name,
                "instances": instances,
                "requests_per_instance": REQUESTS_PER_INSTANCE,
                "decision_ms": {
                    "p50": float(np.quantile(spans, 0.5)),
                    "p99": float(np.quantile(spans, 0.99)),
                },
            }
            print(f"{instances:5} instances, {name:12} {row['decision_ms']}", flush=True)
            yield row


def random_fleet(seed: int, instances: int, each: int) -> FleetSnapshot:
    """A fleet at 55-105 % of its memory, with estimates, all requests movable."""
    rng = np.random.default_rng(seed)
    total = instances * each
    owner = np.repeat(np.arange(instances), each)
    prompt = rng.integers(10, 1000, total)
    output = rng.integers(0, 3000, total)
    used = np.bincount(owner, prompt + output, instances).astype(np.int64)
    median = rng.lognormal(7.0, 0.8, total)
    none = np.zeros(instances, dtype=np.int64)
    return FleetSnapshot(
        now_s=0.0,
        instances=Instances(
            ids=tuple(f"decode-{i}" for i in range(instances)),
            kv_capacity=(used / rng.uniform(0.55, 1.05, instances)).astype(np.int64),
            kv_used=used,
            kv_reserved=none,
            reserve_each=none + RESERVE_EACH,
            guest_reserve=none + RESERVE_EACH,
            running=none + each,
            queued=none,
            retracted=none,
            step_ms=np.full(instances, 30.0),
            age_s=np.zeros(instances),
            accepts=np.ones(instances, dtype=bool),
            draining=np.zeros(instances, dtype=bool),
            group=none,
            moves_out=none,
            moves_in=none,
        ),
        requests=Requests(
            rids=tuple(f"r{i}" for i in range(total)),
            instance=owner,
            prompt_tokens=prompt,
            output_tokens=output,
            max_new_tokens=np.full(total, 32_768),
            remaining=median[:, None] * np.array([0.4, 0.65, 1.0, 1.5, 2.5]),
            true_remaining=median,
            movable=np.ones(total, dtype=bool),
            queued=np.zeros(total, dtype=bool),
            since_move_s=np.full(total, 1e3),
        ),
    )


def _plot(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    from sglang_star_bench import figures

    if args.sustainable:
        raise ConfigError("--sustainable draws no figure", hint="leave out --plot")
    if args.decision_time:
        figures.decision_time(rows, args.plot)
    else:
        sizes = sorted({r["instances"] for r in rows})
        for size in sizes:
            path = args.plot
            if len(sizes) > 1:
                path = path.with_stem(f"{path.stem}-{size}")
            figures.policy_benchmark([r for r in rows if r["instances"] == size], path)
            print(f"figure: {path}")
