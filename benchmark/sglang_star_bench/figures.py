"""Figures of the simulator and the policy benchmark."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from sglang_star_bench.runs import POLICIES
from sglang_star_bench.simulator.fleet import Fleet
from sglang_star_bench.simulator.recorder import Recorder

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_COLOURS = dict(zip(POLICIES, plt.get_cmap("tab10").colors, strict=False))
_STYLES: dict[str, dict[str, Any]] = {"star": {"linewidth": 2.2}, "oracle": {"linestyle": "--"}}


def _style(policy: str) -> dict[str, Any]:
    return {"label": policy, "color": _COLOURS.get(policy)} | _STYLES.get(policy, {})


def simulation(done: Sequence[tuple[dict[str, Any], Fleet]], path: Path) -> None:
    """TTFT and TPOT distributions of every run above; below, each run's KV use over time."""
    rows = 1 + len(done)
    figure, axes = plt.subplots(
        rows, 2, figsize=(12, 3.2 + 2.2 * len(done)), squeeze=False, constrained_layout=True
    )
    for column, (name, slo) in enumerate((("ttft", "ttft_ms"), ("tpot", "tpot_ms"))):
        axis = axes[0, column]
        for row, fleet in done:
            values, share = getattr(fleet.recorder, name).cdf()
            axis.plot(values, share, **_style(row["policy"]))
        limit = done[0][0]["slo"][slo]
        axis.axvline(limit, color="black", linewidth=0.8, linestyle=":")
        axis.set(
            xscale="log", xlabel=f"{name.upper()} [ms], SLO dotted", ylabel="share", ylim=(0, 1)
        )
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    for axis_row, (row, fleet) in zip(axes[1:], done, strict=True):
        merged = axis_row[0].get_gridspec()[axis_row[0].get_subplotspec().rowspan.start, :]
        for axis in axis_row:
            axis.remove()
        _kv_use(figure.add_subplot(merged), row, fleet)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _kv_use(axis: Any, row: dict[str, Any], fleet: Fleet) -> None:
    """KV share of every instance; an arrow per move, a cross per retraction."""
    line = fleet.timeline
    times, shares = np.array(line.times_s), np.array(line.shares)
    axis.plot(times, shares, linewidth=0.7, alpha=0.7)
    axis.plot([], [], color="black", linewidth=0.5, label=f"moves: {len(line.moves)}")
    axis.plot([], [], "rx", markersize=4, label=f"retractions: {len(line.retractions)}")
    for when, source, target in line.moves:
        at = min(int(np.searchsorted(times, when)), len(times) - 1)
        axis.annotate(
            "",
            xy=(when, shares[at, target]),
            xytext=(when, shares[at, source]),
            arrowprops={"arrowstyle": "->", "linewidth": 0.4, "color": "black"},
        )
    if line.retractions:
        at_s = [t for t, _ in line.retractions]
        axis.plot(at_s, [1.02] * len(at_s), "rx", markersize=4, clip_on=False)
    axis.set(ylim=(0, 1.08), ylabel="KV in use", xlabel="time [s]", title=row["policy"])
    axis.legend(fontsize=7, loc="lower right")


def policy_benchmark(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Attainment, goodput, P99 TPOT, P99 TTFT, retractions and moves against load."""
    panels = (
        ("share within SLO", lambda r: r["slo_attainment"], "linear"),
        ("goodput [req/s]", lambda r: r["goodput_rps"], "linear"),
        ("TPOT P99 [ms]", lambda r: r["tpot_ms"]["p99"], "log"),
        ("TTFT P99 [ms]", lambda r: r["ttft_ms"]["p99"], "log"),
        ("retractions + 1", lambda r: r["retractions"] + 1, "log"),
        ("moves + 1", lambda r: r["migrations"] + 1, "log"),
    )
    figure, axes = plt.subplots(2, 3, figsize=(14, 7.5), constrained_layout=True)
    for axis, (label, value, scale) in zip(axes.flat, panels, strict=True):
        for policy in dict.fromkeys(r["policy"] for r in rows):
            loads, mean, low, high = _spread(rows, policy, value)
            axis.plot(loads, mean, marker="o", markersize=3, **_style(policy))
            axis.fill_between(loads, low, high, alpha=0.12, color=_COLOURS.get(policy))
        axis.set(xlabel="load (1 = memory saturation)", ylabel=label, yscale=scale)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    first = rows[0]
    figure.suptitle(f"{first['trace']}, {first['instances']} x {first['profile']}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _spread(
    rows: Sequence[dict[str, Any]], policy: str, value: Any
) -> tuple[list[float], list[float], list[float], list[float]]:
    """By load; a load at which any value is infinite has no point."""
    by_load = defaultdict(list)
    for row in rows:
        if row["policy"] == policy:
            by_load[row["asked_load"]].append(value(row))
    loads = sorted(load for load, values in by_load.items() if None not in values)
    return (
        loads,
        [float(np.mean(by_load[x])) for x in loads],
        [float(min(by_load[x])) for x in loads],
        [float(max(by_load[x])) for x in loads],
    )


def decision_time(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Decision time against fleet size, on both axes logarithmic."""
    figure, axis = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for policy in dict.fromkeys(r["policy"] for r in rows):
        mine = [r for r in rows if r["policy"] == policy]
        axis.plot(
            [r["instances"] for r in mine],
            [r["decision_ms"]["p50"] for r in mine],
            marker="o",
            **_style(policy),
        )
    axis.axhline(10, color="black", linestyle=":", linewidth=0.8)
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="instances (64 requests each)",
        ylabel="decision P50 [ms], limit dotted",
    )
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def distributions(runs: Sequence[tuple[str, Recorder]], path: Path) -> None:
    """TTFT, TPOT and ITL of pairs of runs: each pair in one colour, its second run dashed."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), constrained_layout=True)
    colours = plt.get_cmap("tab10").colors
    for axis, name in zip(axes, ("ttft", "tpot", "itl"), strict=True):
        for number, (label, recorder) in enumerate(runs):
            values, share = getattr(recorder, name).cdf()
            style = "--" if number % 2 else "-"
            axis.plot(values, share, style, color=colours[number // 2], label=label)
        axis.set(xscale="log", xlabel=f"{name.upper()} [ms]", ylabel="share", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
