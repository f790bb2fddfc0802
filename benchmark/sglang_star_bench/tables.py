"""``python -m sglang_star_bench.tables NAME --traces DIR --out FILE``: one table of the log each.

A table is a list of variants on the same disjoint windows, and the first variant is what the others
are compared with, window by window. Windows are the outer loop, so that a run that is stopped early
leaves whole windows behind; it is continued with the same command.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from sglang_star.errors import ConfigError
from sglang_star_bench import arguments, paired, traces
from sglang_star_bench.policy_bench import kept
from sglang_star_bench.runs import Run, execute
from sglang_star_bench.simulator.emulated import ErrorCurve

LONG: Final = "trace_servegen_r1_long3h.parquet"
TRACES: Final = {
    "long3h": (LONG, 400.0, 100.0),
    "peak1h": ("trace_servegen_r1_peak1h.parquet", 120.0, 40.0),
    "mooncake": ("trace_mooncake_synthetic.parquet", 24.0, 8.0),
    "chat": ("trace_azure2023_conv.parquet", 30.0, 10.0),
}
"""File, length of a window and of its part that is not judged, seconds."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A policy with its settings.

    Attributes:
        changes: fields of :class:`Run`.
    """

    name: str
    policy: str
    changes: Mapping[str, Any] = field(default_factory=dict)


REACTIVE: Final = "queued-least-tokens+reactive"
OLD_CURVE: Final = ErrorCurve(
    "star-reasoning-1.6m, 341 requests, an older head",
    True,
    np.linspace(0.05, 0.95, 10),
    np.array([0.8292, 0.5707, 0.499, 0.4935, 0.5178, 0.5734, 0.6207, 0.8138, 0.8108, 1.2552]),
    0.83,
)
EXACT: Final = {"weights": 1.0, "link": 1.0, "slo": 1.0}


def effects() -> list[Variant]:
    """Each correction of the simulator undone, alone, and all of them."""
    free = {"host_share": 1e9}
    apart = {"shared_links": False}
    return [
        Variant("as corrected", "star"),
        Variant("prior from the judged window", "star", {"own_past": True}),
        Variant("an older head's error", "star", {"curve": OLD_CURVE}),
        Variant("weights and link known exactly", "star", {"told": EXACT}),
        Variant("told 0.8 of the TPOT limit", "star", {"told": EXACT | {"slo": 0.8}}),
        Variant("prefill has links of its own", "star", {"config": apart}),
        Variant("host memory without limit", "star", {"config": free}),
        Variant(
            "all as it was",
            "star",
            {"own_past": True, "curve": OLD_CURVE, "told": EXACT, "config": free | apart},
        ),
    ]


def tune() -> list[Variant]:
    """Every policy's own numbers, on the trace for tuning."""
    found = [
        Variant(f"reactive, gap {gap}", REACTIVE, {"reactive": {"gap": gap}})
        for gap in (0.1, 0.3, 0.5)
    ]
    for low, high in ((256, 512), (1024, 2048)):
        given = {"freeness": {"low": float(low), "high": float(high)}}
        name = f"freeness, {low} / {high}"
        found.append(Variant(name, "queued-freeness+freeness", given))
    found += [
        Variant(f"star, pressure {pressure}", "star", {"star": {"admit_pressure": pressure}})
        for pressure in (0.95, 1.0, 1.1)
    ]
    return found


def judge() -> list[Variant]:
    """Every policy behind the same queue, as tuned."""
    return [
        Variant("reactive", REACTIVE, {"reactive": {"gap": 0.3}}),
        Variant("least-tokens", "queued-least-tokens+off"),
        Variant("power-of-two", "queued-power-of-two+off"),
        Variant("cache-aware", "queued-cache-aware+off"),
        Variant("shortest-first", "queued-shortest-first+off"),
        Variant("freeness", "queued-freeness+freeness"),
        Variant("star", "star"),
        Variant("star by age", "star", {"error_scale": float("inf")}),
        Variant("star, true lengths", "oracle"),
    ]


def reserve() -> list[Variant]:
    """SGLang's blind reserve at several values against one that the forecast sets."""
    settled = {"reactive": {"gap": 0.3}}

    def variant(name: str, **config: Any) -> Variant:
        return Variant(name, REACTIVE, settled | {"config": config})

    return [
        variant("by age", reserve="age"),
        variant("true lengths", reserve="oracle"),
        variant("head", reserve="head"),
        variant("512", reserved_tokens=512),
        variant("128", reserved_tokens=128),
        variant("64", reserved_tokens=64),
    ]


TABLES: Final = {"effects": effects, "tune": tune, "judge": judge, "reserve": reserve}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        rows = run(args)
        for line in paired.report(rows, TABLES[args.table]()[0].name):
            print(line)
    except (ConfigError, OSError) as error:
        return arguments.report(error)
    return 0


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__)
    result.add_argument("table", choices=TABLES)
    result.add_argument("--traces", type=Path, required=True, help="folder of the traces")
    result.add_argument("--trace", choices=TRACES, default="long3h")
    result.add_argument("--out", type=Path, required=True, help="rows; continued if it exists")
    result.add_argument("--windows", type=int, default=10)
    result.add_argument("--decode", type=int, default=4)
    result.add_argument("--load", type=float, default=1.3)
    result.add_argument("--report", action="store_true", help="only print what --out has")
    return result


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of the table; the file is rewritten after every one."""
    file, duration_s, warmup_s = TRACES[args.trace]
    trace = traces.load(args.traces / file)
    planned: list[tuple[Variant, int, Run]] = []
    for part in range(args.windows):
        for variant in TABLES[args.table]():
            one = Run(
                policy=variant.policy,
                trace=trace,
                decode=args.decode,
                load=args.load,
                part=part,
                seed=part,
                duration_s=duration_s,
                warmup_s=warmup_s,
                **variant.changes,
            )
            planned.append((variant, part, one))
    rows = kept(args.out, {one.key for _, _, one in planned})
    have = {row["key"] for row in rows}
    for variant, part, one in planned:
        if one.key not in have and not args.report:
            row = execute(one)[0] | {"variant": variant.name, "window": part}
            rows.append(row)
            arguments.write_rows(args.out, rows)
            print(variant.name, part, row["slo_attainment"], f"{row['wall_s']:.0f} s", flush=True)
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
