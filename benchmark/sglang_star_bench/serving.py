"""``star bench serving``: a cluster of real engines under a trace, and the simulator beside it.

One prefill and some decode engines with a tiny model, paced to a modelled card, behind the real
router; prompts, outputs and SGLang's admission reserve divided by ``--shrink``, since the tiny
model must keep up. The same requests then run in the simulator, whose every assumption about
engines, router and migration is thereby tested: the table shows where the two differ.

Every request has the same ``max_new_tokens``, and what ends it is told to nobody who decides
anything; no predictor runs, so policies that look ahead go by age alone, on both sides.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from sglang_star.cluster import Cluster
from sglang_star.cluster_layout import ClusterSpec
from sglang_star.config import PREDICTOR_OFF
from sglang_star.errors import ConfigError
from sglang_star.model import tiny_model
from sglang_star.platform.profile import Profile, find
from sglang_star_bench import arguments
from sglang_star_bench.replay import replay
from sglang_star_bench.runs import dispatch_params, fleet_params, parts
from sglang_star_bench.simulator.fleet import Fleet, FleetConfig
from sglang_star_bench.simulator.recorder import Recorder
from sglang_star_bench.simulator.saturation import scale_for_load
from sglang_star_bench.traces import Trace, checked
from sglang_star_router.policy.registry import make_dispatch, make_rescheduler
from sglang_star_router.policy.snapshot import RESERVE_EACH

DEFAULT_POLICIES: Final = ["round-robin", "least-tokens", "reactive", "star"]
DECISION_S: Final = 0.5
LIMIT: Final = 32_768
"""``max_new_tokens`` that clients of a reasoning model set, before shrinking."""
COMPARED: Final = (
    ("TTFT P50, ms", "ttft_ms", "p50"),
    ("TTFT P99, ms", "ttft_ms", "p99"),
    ("TPOT mean, ms", "tpot_ms", "mean"),
    ("TPOT P50, ms", "tpot_ms", "p50"),
    ("TPOT P99, ms", "tpot_ms", "p99"),
    ("ITL P99, ms", "itl_ms", "p99"),
    ("ITL max, ms", "itl_ms", "max"),
    ("in SLO", "slo_attainment", ""),
    ("goodput, req/s", "goodput_rps", ""),
    ("throughput, tok/s", "throughput_tok_s", ""),
    ("retractions", "retractions", ""),
    ("moves", "migrations", ""),
    ("move stall P50, ms", "stall_ms", "p50"),
    ("load CV", "load_cv", ""),
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="star bench serving", description=__doc__)
    add = made.add_argument
    add("--policy", action="append", metavar="P", help=f"[{','.join(DEFAULT_POLICIES)}]")
    add("--trace", metavar="FILE", help="as for star simulate; default: synthetic")
    add("--paced", default="24gb-7b*2", metavar="PROFILE", help="modelled card [%(default)s]")
    add("--prefill", type=int, default=1, help="prefill engines [%(default)s]")
    add("--decode", type=int, default=2, help="decode engines [%(default)s]")
    add("--kv-tokens", type=int, default=6000, help="KV of a decode engine [%(default)s]")
    add("--shrink", type=float, default=16.0, help="divide the trace's lengths [%(default)s]")
    add("--longest", type=int, default=1500, help="cut lengths after shrinking [%(default)s]")
    add("--limit", type=int, help=f"max_new_tokens of every request [{LIMIT:,} shrunk]")
    add("--load", type=float, default=0.9, help="multiple of the saturation rate [%(default)s]")
    add("--duration", type=float, default=180.0, help="seconds of arrivals [%(default)s]")
    add("--warmup", type=float, default=30.0, help="seconds not judged [%(default)s]")
    add("--ttft-slo", type=float, default=2000.0, metavar="MS")
    add("--tpot-slo", type=float, default=60.0, metavar="MS")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="write results of both sides here")
    add("--plot", type=Path, metavar="FILE", help="write a figure here")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Raises:
        ConfigError: a flag makes no sense; SetupError: the cluster does not come up.
    """
    args = parser().parse_args(argv)
    policies = arguments.policy_names(args.policy or DEFAULT_POLICIES)
    for name in policies:
        if parts(name)[2]:
            raise ConfigError(f"{name} knows the future; real engines do not")
    profile = replace(find(args.paced), kv_capacity=args.kv_tokens)
    trace = window(args, profile)
    print(f"{trace.arrival_s.size} requests in {args.duration:.0f} s, mean output "
          f"{trace.output_len.mean():.0f}, longest {trace.output_len.max()}")  # fmt: skip
    rows: list[dict[str, Any]] = []
    recorders: list[tuple[str, Recorder]] = []
    with tempfile.TemporaryDirectory() as logs, Cluster(cluster(args), Path(logs)) as running:
        for name in policies:
            running.replace_router(**routing(name, args, profile))
            recorder = Recorder(args.ttft_slo, args.tpot_slo, args.warmup)
            wall_s, late = asyncio.run(replay(running.url, trace, recorder, args.seed, limit(args)))
            twin = simulate(args, name, profile, trace)
            for where, found in (("cluster", recorder), ("simulator", twin)):
                recorders.append((f"{name}, {where}", found))
                rows.append(
                    {"where": where, "policy": name, "profile": args.paced, "trace": trace.name,
                     "instances": args.decode, "load": args.load, "seed": args.seed,
                     "max_new_tokens": limit(args)}
                    | found.summary(args.duration - args.warmup)
                )  # fmt: skip
            rows[-2] |= {"wall_s": round(wall_s, 3), "late_forwards": late}
            print(table(*rows[-2:]), flush=True)
            print(f"{late} forwards took longer than they are paced to", flush=True)
    arguments.write_json(args.json, rows)
    if args.plot:
        from sglang_star_bench import figures

        figures.distributions(recorders, args.plot)
    return 0


def window(args: argparse.Namespace, profile: Profile) -> Trace:
    """The requests to play: the trace's, shorter, at the rate that makes the load.

    Raises:
        ConfigError: a number makes no sense.
    """
    for flag in ("shrink", "longest", "load", "duration", "kv_tokens"):
        if not 0 < getattr(args, flag) < math.inf:
            raise ConfigError(f"--{flag.replace('_', '-')} must be positive")
    if not 0 <= args.warmup < args.duration:
        raise ConfigError("--warmup must lie between 0 and --duration")
    if args.longest > limit(args):
        raise ConfigError(
            f"outputs up to --longest {args.longest} do not end within --limit {limit(args)}"
        )
    whole = arguments.read_trace(args.trace)
    lengths = [
        (column / args.shrink).clip(2, args.longest).round()
        for column in (whole.input_len, whole.output_len)
    ]
    short = checked(whole.name, whole.arrival_s, *lengths)
    fleet = [profile] * args.decode
    scale = scale_for_load(short, fleet, args.load, args.duration, args.seed)
    return short.window(scale, args.duration, args.seed)


def cluster(args: argparse.Namespace) -> ClusterSpec:
    """The engines."""
    return ClusterSpec(
        model=str(tiny_model()),
        prefill=args.prefill,
        decode=args.decode,
        paced=args.paced,
        predictor=PREDICTOR_OFF,
        rescheduler="off",
        max_total_tokens=args.kv_tokens,
        decode_arguments=("--num-reserved-decode-tokens", str(reserve(args))),
    )


def limit(args: argparse.Namespace) -> int:
    """``max_new_tokens`` of every request."""
    return int(args.limit or max(2, round(LIMIT / args.shrink)))


def reserve(args: argparse.Namespace) -> int:
    """SGLang's admission reserve per running request, shrunk like the lengths it is meant for."""
    return max(1, round(RESERVE_EACH / args.shrink))


def params(args: argparse.Namespace, profile: Profile) -> dict[str, dict[str, float]]:
    """What the policies must know of this fleet."""
    known = fleet_params(profile)
    known["star"] |= {"tpot_slo_ms": args.tpot_slo}
    return known


def routing(policy: str, args: argparse.Namespace, profile: Profile) -> dict[str, Any]:
    """Fields of a cluster's specification that make its router follow ``policy``."""
    dispatch, rescheduler, _ = parts(policy)
    known = params(args, profile)
    words = ["--decode-policy", dispatch, "--rescheduler-interval", str(DECISION_S)]
    for name, value in dispatch_params(dispatch, known).items():
        words += ["--policy-param", f"{name}={value}"]
    if rescheduler != "off":
        for name, value in known.get(rescheduler, {}).items():
            words += ["--rescheduler-param", f"{name}={value}"]
    return {"rescheduler": rescheduler, "router_arguments": tuple(words)}


def simulate(args: argparse.Namespace, policy: str, profile: Profile, trace: Trace) -> Recorder:
    """The same requests and policy in the simulator."""
    dispatch, rescheduler, _ = parts(policy)
    known = params(args, profile)
    config = FleetConfig(
        decode=(profile,) * args.decode,
        prefill=find(args.paced),
        prefill_instances=args.prefill,
        duration_s=args.duration,
        warmup_s=args.warmup,
        max_new_tokens=limit(args),
        reserved_tokens=reserve(args),
        ttft_slo_ms=args.ttft_slo,
        tpot_slo_ms=args.tpot_slo,
        decision_interval_s=DECISION_S,
        error_scale=math.inf,
        host_share=math.inf,  # the paced cluster backs up to `cpu_tensor`, which has no limit
    )
    fleet = Fleet(
        trace,
        config,
        make_dispatch(dispatch, **dispatch_params(dispatch, known)),
        None
        if rescheduler == "off"
        else make_rescheduler(rescheduler, **known.get(rescheduler, {})),
        seed=args.seed,
    )
    return fleet.run()


def table(real: dict[str, Any], modelled: dict[str, Any]) -> str:
    """Both sides of one policy, metric by metric."""
    lines = [f"{real['policy']:22}{'cluster':>10}{'simulator':>11}{'ratio':>8}"]
    for label, name, point in COMPARED:
        pair = [(row[name][point] if point else row[name]) or 0.0 for row in (real, modelled)]
        ratio = f"{pair[1] / pair[0]:8.2f}" if pair[0] else ""
        lines.append(f"{label:22}{pair[0]:10.4g}{pair[1]:11.4g}{ratio}")
    return "\n".join(lines)
