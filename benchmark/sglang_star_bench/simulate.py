"""``star simulate``: what a fleet does under one or several policies, without any hardware."""

from __future__ import annotations

import argparse
from typing import Any

from sglang_star.errors import ConfigError, StarError
from sglang_star_bench import arguments, capacity
from sglang_star_bench.progress import bar
from sglang_star_bench.runs import Run, execute
from sglang_star_bench.simulator.fleet import Fleet


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="star simulate", description=__doc__)
    parser.add_argument(
        "--policy",
        action="append",
        metavar="P",
        help="repeat or separate by commas; default: all; DISPATCH+RESCHEDULER combines freely",
    )
    parser.add_argument("--decode", type=int, default=8, metavar="N", help="decode instances")
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--rate-scale", type=float, default=1.0, metavar="R")
    rate.add_argument("--load", type=float, metavar="L", help="multiple of the saturation rate")
    parser.add_argument("--seed", type=int, default=0, metavar="K")
    parser.add_argument(
        "--capacity",
        choices=["instances", "rate"],
        help="answer instead: the fewest instances, or the highest rate, with --attainment",
    )
    parser.add_argument("--attainment", type=float, default=0.99, help="share within the SLO")
    arguments.add_common(parser)
    return parser


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    args = parser().parse_args(argv)
    try:
        runs = _runs(args)
        if args.capacity:
            if args.plot:
                raise ConfigError("--capacity draws no figure", hint="leave out --plot")
            arguments.write_json(args.json, _capacity(args, runs))
            return 0
        done = []
        for run in runs:
            end = run.duration_s
            done.append(execute(run, bar(run.policy, end)))
            _print_row(done[-1][0], header=len(done) == 1)
        arguments.write_json(args.json, [row for row, _ in done])
        if args.plot:
            _plot(args, done)
    except (StarError, OSError) as error:
        return arguments.report(error)
    return 0


def _runs(args: argparse.Namespace) -> list[Run]:
    common = arguments.common_run(args)
    if args.plot:
        common["config"]["timeline"] = True
    trace = arguments.read_trace(args.trace, args.scenario)
    return [
        Run(
            policy=name,
            trace=trace,
            decode=args.decode,
            rate_scale=args.rate_scale,
            load=args.load,
            seed=args.seed,
            **common,
        )
        for name in arguments.policy_names(args.policy)
    ]


def _capacity(args: argparse.Namespace, runs: list[Run]) -> list[dict[str, Any]]:
    answers = []
    for run in runs:
        ask = capacity.fewest_instances if args.capacity == "instances" else capacity.highest_load
        answer = {"policy": run.policy, "attainment": args.attainment} | ask(run, args.attainment)
        answers.append(answer)
        said = ", ".join(f"{k} {v}" for k, v in answer.items() if k not in ("policy", "probes"))
        print(f"{run.policy:16} {said}", flush=True)
    return answers


def _print_row(row: dict[str, Any], *, header: bool) -> None:
    if header:
        print(
            f"{'policy':16} {'requests':>8} {'in SLO':>7} {'goodput':>8} {'TTFT P99':>9} "
            f"{'TPOT P50':>8} {'P99':>6} {'retract':>7} {'moves':>6} {'wall s':>7}"
        )
    print(
        f"{row['policy']:16} {row['requests']:8} {row['slo_attainment']:7.2%} "
        f"{row['goodput_rps']:8.3f} {_cell(row['ttft_ms']['p99'], 9)} "
        f"{_cell(row['tpot_ms']['p50'], 8)} {_cell(row['tpot_ms']['p99'], 6)} "
        f"{row['retractions']:7} {row['migrations']:6} {row['wall_s']:7.1f}",
        flush=True,
    )


def _cell(value: float | None, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.1f}"


def _plot(args: argparse.Namespace, done: list[tuple[dict[str, Any], Fleet]]) -> None:
    from sglang_star_bench import figures

    figures.simulation(done, args.plot)
    print(f"figure: {args.plot}")
