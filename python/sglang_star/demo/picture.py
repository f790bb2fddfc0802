"""``effect.svg``: KV of every decode instance over time, without rescheduling and with it.

One file that stands alone, in a page or in a README, light or dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any, Final

from sglang_star.demo.charts import ticks
from sglang_star.demo.side import Side

WIDTH: Final = 960
_PANEL: Final = 424
_LEFTS: Final = (56, 516)
_TOP: Final = 128
_LANE: Final = 118
_GAP: Final = 34
_TITLES: Final = {"without": "Rescheduling off", "with": "Rescheduling on"}

STYLE: Final = """
.paper{fill:#ffffff}.ink{fill:#1f2937}.soft{fill:#6b7280}.bad{fill:#dc2626}.good{fill:#047857}
.lane{fill:#f3f4f6}.area{fill:#3b82f6;fill-opacity:.28}.line{fill:none;stroke:#2563eb;stroke-width:1.8}
.full{stroke:#dc2626;stroke-width:1.2;stroke-dasharray:5 4}.move{stroke:#7c3aed;stroke-width:1.8}
.tip{fill:#7c3aed}.grid{stroke:#d1d5db;stroke-width:1}
text{font:13px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}
.h{font-size:18px;font-weight:600}.n{font-size:22px;font-weight:600}.s{font-size:12px}.m{text-anchor:middle}.e{text-anchor:end}
@media (prefers-color-scheme:dark){.paper{fill:#0d1117}.ink{fill:#e5e7eb}.soft{fill:#9ca3af}
.bad{fill:#f87171}.good{fill:#34d399}.lane{fill:#161b22}.area{fill:#60a5fa}.line{stroke:#60a5fa}
.full{stroke:#f87171}.move{stroke:#c4b5fd}.tip{fill:#c4b5fd}.grid{stroke:#30363d}}
"""


def render(sides: Sequence[tuple[Side, dict[str, Any]]], caption: str) -> str:
    """Return the SVG of both sides, each with its :func:`side.summary`.

    ``caption`` says in a line what ran.
    """
    lanes = max(len(side.instances) for side, _ in sides)
    height = _TOP + lanes * (_LANE + _GAP) + 56
    end_s = max(side.wall_s for side, _ in sides)
    panels = "".join(
        _panel(side, numbers, left, end_s)
        for (side, numbers), left in zip(sides, _LEFTS, strict=True)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="KV in use on each instance over time, without and with rescheduling">'
        f'<style>{STYLE}</style><rect class="paper" width="{WIDTH}" height="{height}"/>'
        f"{panels}{_legend(height - 34)}"
        f'<text x="{WIDTH / 2}" y="{height - 8}" class="soft s m">{escape(caption)}</text></svg>\n'
    )


def headline(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the three numbers of a side, each with what it counts."""
    tpot = numbers["tpot_ms"]
    return [
        (f"{tpot['p99']:.0f} ms" if tpot else "-", "P99 TPOT"),
        (f"{numbers['longest_gap_ms'] / 1e3:.1f} s", "longest gap"),
        (str(numbers["retractions"]), "retractions"),
    ]


def _legend(y: int) -> str:
    """Say what the marks mean, so that the picture needs no text around it."""
    return (
        f'<path class="area" d="M200 {y}v-10h16v10z"/><path class="line" d="M200 {y - 10}h16"/>'
        f'<text x="222" y="{y}" class="soft s">KV memory in use</text>'
        f'<path class="full" d="M352 {y - 4}h22"/>'
        f'<text x="380" y="{y}" class="soft s">pool full</text>'
        f'<path class="bad" d="M458 {y}l-5 -9h10z"/>'
        f'<text x="470" y="{y}" class="soft s">running requests thrown out</text>'
        f'<path class="move" d="M662 {y + 2}v-8"/><path class="tip" d="M662 {y - 12}l-4.5 9h9z"/>'
        f'<text x="674" y="{y}" class="soft s">live move</text>'
    )


def _panel(side: Side, numbers: dict[str, Any], left: int, end_s: float) -> str:
    title = _TITLES[side.name]
    if side.moves:
        title += f": {len(side.moves)} live move{'s' * (len(side.moves) != 1)}"
    marks = [f'<text x="{left}" y="30" class="ink h">{title}</text>']
    for place, (value, what) in enumerate(headline(numbers)):
        x = left + place * 140.0
        marks.append(f'<text x="{x}" y="66" class="ink n">{value}</text>')
        marks.append(f'<text x="{x}" y="84" class="soft">{what}</text>')
    bases = {name: _base(row) for row, name in enumerate(side.instances)}
    marks += [_lane(side, name, left, base, end_s) for name, base in bases.items()]
    for move in side.moves:
        if move["source"] in bases and move["target"] in bases:
            x = _x(side.move_s(move), left, end_s)
            marks.append(_arrow(x, bases[move["source"]], bases[move["target"]], move))
    foot = max(bases.values(), default=_TOP) + 18
    marks += [
        f'<text x="{_x(value, left, end_s):.1f}" y="{foot}" class="soft s m">{value:g} s</text>'
        for value in ticks(end_s)
    ]
    return "".join(marks)


def _base(row: int) -> int:
    return _TOP + row * (_LANE + _GAP) + _LANE


def _x(at_s: float, left: int, end_s: float) -> float:
    return left + _PANEL * min(max(at_s, 0.0), end_s) / end_s


def _lane(side: Side, name: str, left: int, base: int, end_s: float) -> str:
    """One instance: its KV over time, the pool's size, and where it retracted."""
    loads = side.of(name)
    points = [
        (_x(load.at_s - side.began_s, left, end_s), base - _LANE * load.used / load.capacity)
        for load in loads
        if 0 <= load.at_s - side.began_s <= end_s
    ]
    path = "".join(f"L{x:.1f} {y:.1f}" for x, y in points)
    right, top = left + _PANEL, base - _LANE
    marks = [
        f'<rect class="lane" x="{left}" y="{top}" width="{_PANEL}" height="{_LANE}"/>',
        f'<path class="area" d="M{points[0][0]:.1f} {base}{path}L{points[-1][0]:.1f} {base}Z"/>'
        f'<path class="line" d="M{path[1:]}"/>'
        if points
        else "",
        f'<path class="full" d="M{left} {top}H{right}"/>',
        f'<text x="{left}" y="{top - 7}" class="soft s">{escape(name)}</text>',
        f'<text x="{right}" y="{top - 7}" class="soft s e">'
        f"pool: {loads[0].capacity:,} tokens of KV</text>",
    ]
    for at_s, count in side.retractions(name):
        x = _x(at_s, left, end_s)
        marks.append(
            f'<path class="bad" d="M{x:.1f} {top + 2}l-5 -9h10z"><title>{count} retracted at '
            f"{at_s:.1f} s</title></path>"
        )
    return "".join(marks)


def _arrow(x: float, source: int, target: int, move: dict[str, Any]) -> str:
    """A move, from the middle of one lane to the middle of the other."""
    start, end = source - _LANE / 2, target - _LANE / 2
    down = 1 if end > start else -1
    tip = (
        f"{move['rid']}: {move['context_tokens']} tokens of KV, stall {move['stall_ms']:.0f} ms, "
        f"{move['stall_steps']:.1f} steps"
    )
    return (
        f'<g><title>{escape(tip)}</title><path class="move" d="M{x:.1f} {start}V{end - 7 * down}"/>'
        f'<circle class="tip" cx="{x:.1f}" cy="{start}" r="3"/>'
        f'<path class="tip" d="M{x:.1f} {end}l-4.5 {-9 * down}h9z"/></g>'
    )
