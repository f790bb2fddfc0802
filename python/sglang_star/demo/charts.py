"""The report's figures as inline SVG: no script, no font, no file beside the page."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final

from sglang_star.demo.client import Sighting, Stream
from sglang_star.demo.report import Estimate

WIDTH: Final = 960
COLOURS: Final = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#14b8a6")

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Plot:
    """A frame with linear axes; data coordinates in, SVG out."""

    x_max: float
    y_max: float
    height: int
    x_label: str
    y_label: str
    width: int = WIDTH
    left: int = 60
    bottom: int = 42
    y_ticks: bool = True

    def x(self, value: float) -> float:
        """Horizontal position of a data value, pixels."""
        return self.left + (self.width - self.left - 14) * value / self.x_max

    def y(self, value: float) -> float:
        """Vertical position of a data value, pixels."""
        return self.height - self.bottom - (self.height - self.bottom - 12) * value / self.y_max

    def wrap(self, marks: Iterable[str], title: str) -> str:
        """Return the whole figure."""
        low, right = self.height - self.bottom, self.width - 14
        frame = [f'<path class="axis" d="M{self.left} 12V{low}H{right}"/>']
        for value in ticks(self.x_max):
            x = self.x(value)
            frame.append(f'<path class="grid" d="M{x:.1f} 12V{low}"/>')
            frame.append(f'<text x="{x:.1f}" y="{low + 16}" class="tick">{value:g}</text>')
        for value in ticks(self.y_max) if self.y_ticks else ():
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


def timeline(
    streams: Sequence[Stream],
    sightings: Sequence[Sighting],
    moves: Sequence[dict[str, Any]],
    colour_of: dict[str, str],
) -> str:
    """One row per request, coloured by the instance that decodes it; diamonds are moves."""
    began = min(stream.sent_s for stream in streams)
    end = max(max(stream.ended_s for stream in streams) - began, 1e-3)
    plot = Plot(end, len(streams), 14 * len(streams) + 60, "seconds", "requests", y_ticks=False)
    where: dict[str, list[Sighting]] = defaultdict(list)
    for seen in sightings:
        where[seen.rid].append(seen)
    marks = []
    for row, stream in enumerate(streams):
        top = plot.y(len(streams) - row) + 3
        for start_s, stop_s, instance in stays(stream, where[stream.rid]):
            x, width = plot.x(start_s - began), plot.x(stop_s - began) - plot.x(start_s - began)
            tip = f"{stream.prompt.name}: {stream.tokens} tokens; {instance or 'prefill or queue'}"
            colour = colour_of.get(instance, "#9ca3af")
            marks.append(
                f'<rect x="{x:.1f}" y="{top:.1f}" width="{max(width, 1):.1f}" height="9" rx="2" '
                f'fill="{colour}"><title>{escape(tip)}</title></rect>'
            )
        for before, after in zip(where[stream.rid], where[stream.rid][1:], strict=False):
            if before.instance != after.instance:
                x, y = plot.x(after.at_s - began), top + 4.5
                marks.append(
                    f'<path class="move" d="M{x:.1f} {y - 7:.1f}l6 7-6 7-6-7z">'
                    f"<title>{escape(_move_tip(stream.rid, moves))}</title></path>"
                )
    return plot.wrap(marks, "Where each request was decoded over time")


def stays(stream: Stream, seen: Sequence[Sighting]) -> list[tuple[float, float, str]]:
    """Split a stream's life into (from, to, instance) by where it was seen; "" before that."""
    parts: list[tuple[float, float, str]] = []
    start, instance = stream.sent_s, ""
    for sighting in seen:
        if sighting.instance != instance:
            parts.append((start, sighting.at_s, instance))
            start, instance = sighting.at_s, sighting.instance
    parts.append((start, max(stream.ended_s, start), instance))
    return parts


def _move_tip(rid: str, moves: Sequence[dict[str, Any]]) -> str:
    tips = [
        f"{move['source']} to {move['target']} ({move['reason']}): {move['context_tokens']} tokens,"
        f" stall {move['stall_ms']:.0f} ms"
        for move in moves
        if move["rid"] == rid
    ]
    return f"{rid}: " + "; ".join(tips)


def running(
    streams: Sequence[Stream], sightings: Sequence[Sighting], colour_of: dict[str, str]
) -> str:
    """Return running requests per instance over time."""
    began = min(stream.sent_s for stream in streams)
    counts: dict[float, dict[str, int]] = defaultdict(lambda: dict.fromkeys(colour_of, 0))
    for seen in sightings:
        if seen.instance in colour_of:
            counts[seen.at_s][seen.instance] += 1
    times = sorted(counts)
    if not times:
        return "<p>Nothing was seen running.</p>"
    most = max(max(row.values()) for row in counts.values())
    plot = Plot(max(times[-1] - began, 1e-3), most, 240, "seconds", "requests decoding")
    lines = [
        plot.line([(at - began, counts[at][name]) for at in times], colour)
        for name, colour in colour_of.items()
    ]
    return plot.wrap(lines, "Running requests per instance over time")


def tpot(streams: Sequence[Stream], moved: set[str]) -> str:
    """Return the distribution of TPOT: share of requests at or below each value."""
    values = sorted((s.tpot_ms, s.rid) for s in streams if s.tpot_ms is not None)
    if not values:
        return "<p>No request had two tokens.</p>"
    plot = Plot(values[-1][0] * 1.05, 1.0, 300, "TPOT, ms", "share of requests", width=470)
    points = [(value, (rank + 1) / len(values)) for rank, (value, _) in enumerate(values)]
    marks = [plot.line([(0, 0), *points], COLOURS[0])]
    for point, (value, rid) in zip(points, values, strict=True):
        colour = COLOURS[3] if rid in moved else COLOURS[0]
        marks.append(plot.dot(point, colour, f"{rid}: {value:.0f} ms per token"))
    return plot.wrap(marks, "Distribution of time per output token; moved requests in red")


def predictions(scored: Sequence[Estimate]) -> str:
    """Return predicted against actual remaining tokens, with the P10-P90 band of each."""
    if not scored:
        return "<p>The predictor gave no estimate.</p>"
    top = max(max(one.actual, one.median) for one in scored) * 1.05 + 1
    plot = Plot(top, top, 300, "actual remaining tokens", "predicted", width=470)
    marks = [plot.line([(0, 0), (top, top)], "#9ca3af")]
    for one in scored:
        x, low, high = plot.x(one.actual), plot.y(one.low), plot.y(min(one.high, top))
        marks.append(f'<path class="band" d="M{x:.1f} {low:.1f}V{high:.1f}"/>')
        tip = f"{one.rid}: predicted {one.median:.0f} ({one.low:.0f}-{one.high:.0f}), {one.actual}"
        marks.append(plot.dot((one.actual, one.median), COLOURS[4], tip, 2.5))
    return plot.wrap(marks, "Predicted against actual remaining length")
