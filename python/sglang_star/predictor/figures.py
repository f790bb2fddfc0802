"""Figures of training and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np

from sglang_star.predictor.hazard import Array
from sglang_star.predictor.metrics import MEDIAN
from sglang_star.predictor.samples import Samples

_BOLD: Final = {"star": 2.5}


def report(found: dict[str, Any], predicted: dict[str, Array], test: Samples, path: Path) -> None:
    """Draw a report of `star predictor eval`: six panels in one file.

    Args:
        found: the report; predicted: limited predictions by name; test: what they are about.
        path: its suffix chooses the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 9), layout="constrained")
    axes = figure.subplots(2, 3)
    _totals(axes[0, 0], found)
    _by_progress(axes[0, 1], found)
    _calibration(axes[0, 2], found)
    _actual(axes[1, 0], predicted["star"], test)
    _by_source(axes[1, 1], found)
    _removed(axes[1, 2], found)
    figure.suptitle(f"{found['model']}, {found['requests']} requests never fitted on")
    figure.savefig(path, dpi=110)


def losses(train: list[float], left_out: list[float], path: Path) -> None:
    """Draw the loss of a training against the epoch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="loss (nats per sample)")
    axes.plot(train, label="trained on")
    axes.plot(left_out, label="left out")
    axes.legend()
    figure.savefig(path)


def _totals(axes: Any, found: dict[str, Any]) -> None:
    results = found["results"]
    names = sorted(results, key=lambda name: -results[name]["mae"])
    values = np.array([results[name]["mae"] for name in names])
    low, high = np.array([results[name]["mae_ci"] for name in names]).T
    colours = ["C1" if name == "star" else "C0" for name in names]
    axes.barh(names, values, xerr=[values - low, high - values], color=colours, capsize=3)
    if found["floor"]:
        axes.axvline(found["floor"]["mae"], color="black", ls="--", label="floor")
        axes.legend()
    axes.set(xlabel="MAE (tokens), 95 % interval over requests")


def _by_progress(axes: Any, found: dict[str, Any]) -> None:
    for name, result in found["results"].items():
        errors = [np.nan if e is None else e for e in result["mae_by_progress"]]
        axes.plot(np.arange(10) / 10 + 0.05, errors, label=name, lw=_BOLD.get(name, 1))
    if found["floor"]:
        quarters = [np.nan if q is None else q for q in found["floor"]["mae_by_quarter"]]
        axes.plot(np.arange(4) / 4 + 0.125, quarters, "k--o", label="floor")
    axes.set(xlabel="share of the output generated", ylabel="MAE (tokens)", ylim=(0, None))
    axes.legend(fontsize=8)


def _calibration(axes: Any, found: dict[str, Any]) -> None:
    axes.plot([0, 1], [0, 1], color="grey", lw=0.8)
    for name, result in found["results"].items():
        rows = [r for r in result.get("calibration", ()) if r["within"] is not None]
        if rows:
            levels = [r["level"] for r in rows]
            axes.plot(levels, [r["within"] for r in rows], marker="o", label=name)
    axes.set(xlabel="level", ylabel="outputs that ended within it", xlim=(0, 1), ylim=(0, 1))
    axes.legend(fontsize=8)


def _actual(axes: Any, predicted: Array, test: Samples) -> None:
    actual = test.remaining
    axes.scatter(actual, predicted[:, MEDIAN], s=3, alpha=0.2)
    top = max(float(actual.max()), 1.0)
    axes.plot([0, top], [0, top], color="grey", lw=0.8)
    edges = np.unique(np.quantile(actual, np.linspace(0, 1, 13)))
    group = np.clip(np.searchsorted(edges, actual, side="right") - 1, 0, len(edges) - 2)
    used = np.unique(group)
    middle = [np.median(actual[group == i]) for i in used]
    for column, style in ((0, ":"), (MEDIAN, "-"), (-1, ":")):
        values = [np.median(predicted[group == i, column]) for i in used]
        axes.plot(middle, values, "C1" + style)
    axes.set(xlabel="actual remaining tokens", ylabel="star: predicted (orange: P10, P50, P90)")


def _by_source(axes: Any, found: dict[str, Any]) -> None:
    shown = [name for name in ("star", "by_age", "auxiliary") if name in found["results"]]
    for offset, name in enumerate(shown):
        rows = found["results"][name]["mae_by_source"]
        places = np.arange(len(rows)) + (offset - 1) * 0.27
        axes.barh(places, [row["mae"] for row in rows.values()], height=0.25, label=name)
        axes.set_yticks(range(len(rows)), [f"{k} ({v['requests']})" for k, v in rows.items()])
    axes.set(xlabel="MAE by source of the prompt (requests)")
    axes.legend(fontsize=8)


def _removed(axes: Any, found: dict[str, Any]) -> None:
    if not found["floor"]:
        axes.text(0.5, 0.5, "floor not measured", ha="center")
        axes.set_axis_off()
        return
    rows = {k: v for k, v in found["floor"]["predictors"].items() if v["removed"] is not None}
    shares = np.array([row["removed"] for row in rows.values()])
    bounds = np.array([row["removed_ci"] for row in rows.values()]).reshape(-1, 2).T
    whiskers = np.abs(bounds - shares)
    axes.barh(list(rows), shares, xerr=whiskers, capsize=3)
    axes.set(xlabel="share of the reducible error removed", xlim=(-1, 1))
