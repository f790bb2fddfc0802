"""The report's other figures as inline SVG: no script, no font, no file beside the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from sglang_star.demo.client import Stream
from sglang_star.demo.estimates import Estimate

COLOURS: Final = {"without": "#f59e0b", "with": "#3b82f6"}

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Plot:
    """A frame with axes; data coordinates in, SVG out.

    With ``x_log`` the horizontal axis is logarithmic, from ``x_min`` on.
    """

    x_max: float
    y_max: float
    x_label: str
    y_label: str
    x_log: bool = False
    x_min: float = 1.0
    height: int = 300
    width: int = 470
    left: int = 60
    bottom: int = 42

    def x(self, value: float) -> float:
        """Horizontal position of a data value, pixels."""
        share = value / self.x_max
        if self.x_log:
            low = math.log(self.x_min)
            share = (math.log(max(value, self.x_min)) - low) / (math.log(self.x_max) - low)
        return self.left + (self.width - self.left - 14) * share

    def y(self, value: float) -> float:
        """Vertical position of a data value, pixels."""
        return self.height - self.bottom - (self.height - self.bottom - 12) * value / self.y_max

    def wrap(self, marks: Iterable[str], title: str) -> str:
        """Return the whole figure."""
        low, right = self.height - self.bottom, self.width - 14
        frame = [f'<path class="axis" d="M{self.left} 12V{low}H{right}"/>']
        across = decades(self.x_min, self.x_max) if self.x_log else ticks(self.x_max)
        for value in across:
            x = self.x(value)
            frame.append(f'<path class="grid" d="M{x:.1f} 12V{low}"/>')
            frame.append(f'<text x="{x:.1f}" y="{low + 16}" class="tick">{value:g}</text>')
        for value in ticks(self.y_max):
            y = self.y(value)
            frame.append(f'<path class="grid" d="M{self.left} {y:.1f}H{right}"/>')
            frame.append(
                f'<text x="{self.left - 8}" y="{y + 4:.1f}" class="tick end">{value:g}</text>'
            )
        middle = (self.left + right) / 2
        frame.append(
            f'<text x="{middle}" y="{self.height - 6}" class="label">{escape(self.x_label)}</text>'
        )
        frame.append(
            f'<text transform="translate(14 {low / 2}) rotate(-90)" class="label">'
            f"{escape(self.y_label)}</text>"
        )
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{escape(title)}">{"".join(frame)}{"".join(marks)}</svg>'
        )

    def line(self, points: Sequence[Point], colour: str) -> str:
        """Return a polyline through data points."""
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'

    def dot(self, point: Point, colour: str, tip: str, radius: float = 3) -> str:
        """Return a disc with a tooltip."""
        x, y = self.x(point[0]), self.y(point[1])
        return (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}" fill-opacity=".7">'
            f"<title>{escape(tip)}</title></circle>"
        )


def ticks(maximum: float) -> list[float]:
    """Return about five round values from 0 to ``maximum``."""
    step = 10.0 ** math.floor(math.log10(maximum / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if maximum / (step * factor) <= 6)
    return [step * count for count in range(int(maximum / step) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Return 1, 2, 5, 10, ... times a power of ten, within both bounds."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    values = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    return [value for value in values if low <= value <= high]


def gaps(sides: Sequence[tuple[str, Sequence[Stream]]]) -> str:
    """Return the distribution of every request's longest gap, one line a side."""
    found = [
        (name, sorted((s.longest_gap_ms, s.rid) for s in streams if len(s.arrivals) > 1))
        for name, streams in sides
    ]
    values = [value for _, rows in found for value, _ in rows]
    if not values:
        return "<p>No request had two tokens.</p>"
    low, high = max(min(values), 1.0), max(*values, 2.0) * 1.05
    plot = Plot(
        high, 1.0, "longest gap of a request, ms", "share of requests", x_log=True, x_min=low * 0.9
    )
    marks = []
    for name, rows in found:
        points = [(value, (rank + 1) / len(rows)) for rank, (value, _) in enumerate(rows)]
        marks.append(plot.line(points, COLOURS[name]))
        marks += [
            plot.dot(point, COLOURS[name], f"{rid}: {value:.0f} ms")
            for point, (value, rid) in zip(points, rows, strict=True)
        ]
    return plot.wrap(marks, "Distribution of the longest gap in each request's stream")


def predictions(scored: Sequence[Estimate]) -> str:
    """Return predicted against actual remaining tokens, with the P10-P90 band of each."""
    if not scored:
        return "<p>The predictor gave no estimate.</p>"
    top = max(max(one.actual, one.median) for one in scored) * 1.05 + 1
    plot = Plot(top, top, "actual remaining tokens", "predicted")
    marks = [plot.line([(0, 0), (top, top)], "#9ca3af")]
    for one in scored:
        x, low, high = plot.x(one.actual), plot.y(one.low), plot.y(min(one.high, top))
        marks.append(f'<path class="band" d="M{x:.1f} {low:.1f}V{high:.1f}"/>')
        tip = f"{one.rid}: predicted {one.median:.0f} ({one.low:.0f}-{one.high:.0f}), {one.actual}"
        marks.append(plot.dot((one.actual, one.median), "#8b5cf6", tip, 2.5))
    return plot.wrap(marks, "Predicted against actual remaining length")
