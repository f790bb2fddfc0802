"""``star-demo/report.html``: one self-contained page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, Final

from sglang_star.demo import charts
from sglang_star.demo.report import Findings, rows, verdict
from sglang_star.demo.style import STYLE

_TWINS_SHOWN: Final = 40


def render(found: Findings, report: dict[str, Any], picture: str, setting: Sequence[str]) -> str:
    """Return the page for one demo.

    Args:
        picture: the SVG of the effect.
        setting: paragraphs that say what ran.
    """
    sides = [("without", found.without.streams), ("with", found.rescheduled.streams)]
    key = "".join(
        f'<span class="nowrap"><i class="key" style="background:{charts.COLOURS[name]}"></i>'
        f"{name} rescheduling</span> "
        for name, _ in sides
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>STAR demo</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{STYLE}</style></head><body>
<h1>STAR demo</h1>
<p class="lead">The same requests twice on the same engines: once they stay where the router put
them, once STAR moves running ones before memory runs out.</p>
<p>{_verdict(found, report)}</p>
<div class="picture">{picture}</div>
<p>An instance whose pool is full throws running requests out (a retraction): their streams stand
still until there is room again, and nobody new is let in meanwhile.</p>
<h2>Side by side</h2>
{_table("rescheduling,#off,#on", rows(report))}
<h2>What ran</h2>
{"".join(f"<p>{escape(text)}</p>" for text in setting)}
<div class="pair"><div><h2>Longest gap of each request</h2>
<p>Share of requests at or below. {key}</p>{charts.gaps(sides)}</div>
<div><h2>Predicted against actual</h2>
<p>Remaining tokens, while requests ran; bars span P10 to P90. {_predictor(report)}</p>
{charts.predictions(found.scored)}</div></div>
<h2>Identity</h2>
<p>Every stream that moved, beside the same question asked without moving, token by token.</p>
{_twins(found)}
<h2>Moves</h2>{_moves(report["migrations"])}
<h2>Phases</h2>{_table("phase,#seconds", ((n, f"{s:.0f}") for n, s in found.phases))}
<p>{_versions(report["versions"])}</p>
</body></html>
"""


def _verdict(found: Findings, report: dict[str, Any]) -> str:
    wrong = verdict(found)
    if wrong:
        return "".join(f'<b class="bad">{escape(line)}</b><br>' for line in wrong)
    return (
        f'<b class="good">All {report["requests"]} streams completed, and all '
        f"{report['identity']['checked']} that moved equal their unmoved twins.</b>"
    )


def _predictor(report: dict[str, Any]) -> str:
    score = report["predictor"]
    if not score["n"]:
        return ""
    return (
        f"{score['n']} estimates, off by {score['mae']:.0f} tokens in the mean; the band held "
        f"{score['coverage']:.0%}."
    )


def _moves(moves: Sequence[dict[str, Any]]) -> str:
    if not moves:
        return "<p>Nothing moved.</p>"
    return _table(
        "request,from,to,reason,#tokens,#pre-copied,#stall ms,#stall steps",
        (
            (
                move["rid"],
                move["source"],
                move["target"],
                move["reason"],
                move["context_tokens"],
                move["precopied_tokens"],
                f"{move['stall_ms']:.1f}",
                f"{move['stall_steps']:.2f}",
            )
            for move in moves
        ),
    )


def _twins(found: Findings) -> str:
    twins = found.twins
    if not twins:
        return "<p>No stream moved.</p>"
    # Those that differ first: they are what one looks for.
    shown = sorted(twins, key=lambda twin: twin.identical)[:_TWINS_SHOWN]
    return _table(
        "request,#tokens,result,end of the answer",
        (
            (
                twin.moved.rid,
                twin.moved.tokens,
                "identical" if twin.identical else f"differs at token {twin.first_difference}",
                "..." + " ".join(twin.moved.text.split())[-70:],
            )
            for twin in shown
        ),
    )


def _table(columns: str, lines: Iterable[Sequence[object]]) -> str:
    """Return a table; a column whose name starts with # holds numbers."""
    names = columns.split(",")
    classes = [' class="number"' if name.startswith("#") else "" for name in names]
    head = "".join(
        f"<th{kind}>{name.lstrip('#')}</th>" for name, kind in zip(names, classes, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{kind}>{escape(str(cell))}</td>" for cell, kind in zip(line, classes, strict=True)
        )
        + "</tr>"
        for line in lines
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _versions(versions: dict[str, str]) -> str:
    return escape(", ".join(f"{name} {version}" for name, version in versions.items()))
