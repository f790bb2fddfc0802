"""``star-demo/report.html``: one self-contained page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, Final

from sglang_star.demo import charts
from sglang_star.demo.client import Sighting, Stream
from sglang_star.demo.report import Estimate, Twin

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1f2937; --paper: #fff; --soft: #6b7280;
  --line: #e5e7eb; --card: #f9fafb; --good: #059669; --bad: #dc2626 }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --paper: #111827; --soft: #9ca3af;
  --line: #374151; --card: #1f2937; --good: #34d399; --bad: #f87171 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 960px; margin: 2.5rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem }
p { color: var(--soft); margin: .2rem 0 .8rem; max-width: 46rem }
svg { width: 100%; height: auto; display: block }
.axis { fill: none; stroke: var(--soft) } .grid { stroke: var(--line) }
.tick, .label { fill: var(--soft); font-size: 12px; text-anchor: middle } .end { text-anchor: end }
.move { fill: var(--paper); stroke: var(--ink); stroke-width: 1.5 }
.band { stroke: #8b5cf6; stroke-opacity: .22; stroke-width: 2 }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: .8rem;
  margin: 1.4rem 0 } .card { background: var(--card); border-radius: 10px; padding: .8rem 1rem }
.card b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums }
.card span { color: var(--soft); font-size: .85rem }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .35em 0 1em }
table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums } th, td { text-align: left; padding: .35rem .5rem;
  border-bottom: 1px solid var(--line) } th { color: var(--soft); font-weight: 500 }
.number { text-align: right } .good { color: var(--good) } .bad { color: var(--bad) }
@media (max-width: 720px) { .pair { grid-template-columns: 1fr } }
"""


def render(
    report: dict[str, Any],
    streams: Sequence[Stream],
    sightings: Sequence[Sighting],
    moves: Sequence[dict[str, Any]],
    scored: Sequence[Estimate],
    twins: Sequence[Twin],
) -> str:
    """Return the page for one demo."""
    names = sorted({seen.instance for seen in sightings})
    colour_of = {name: charts.COLOURS[i % len(charts.COLOURS)] for i, name in enumerate(names)}
    key = "".join(
        f'<span class="key" style="background:{colour}"></span>{escape(name)}'
        for name, colour in colour_of.items()
    )
    moved = {move["rid"] for move in moves}
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>STAR demo</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{_STYLE}</style></head><body>
<h1>STAR demo</h1>
<p>Requests streamed from a prefill and two decode instances while the rescheduler moved some of
them between the two. {_verdict(report)}</p>
<div class="cards">{_cards(report)}</div>
<h2>Where each request was decoded</h2>
<p>One row per request; a diamond is a live move. {key}</p>
{charts.timeline(streams, sightings, moves, colour_of)}
<h2>Requests decoding on each instance</h2>
{charts.running(streams, sightings, colour_of)}
<div class="pair"><div><h2>Time per output token</h2>
<p>Share of requests at or below; moved requests in red.</p>{charts.tpot(streams, moved)}</div>
<div><h2>Predicted against actual length</h2>
<p>Remaining tokens; bars span P10 to P90.</p>{charts.predictions(scored)}</div></div>
<h2>Moves</h2>{_moves(moves)}
<h2>Identity</h2>
<p>Every moved greedy stream, run again without moving, token by token.</p>{_twins(twins)}
<h2>Versions</h2><p>{_versions(report["versions"])}</p>
</body></html>
"""


def _verdict(report: dict[str, Any]) -> str:
    identity = report["identity"]
    if report["failed"] or identity["mismatched"] or not identity["checked"]:
        return '<b class="bad">Not everything went well; see below.</b>'
    return (
        f'<b class="good">Every stream completed, and all {identity["checked"]} moved greedy '
        "streams equal their unmoved twins.</b>"
    )


def _cards(report: dict[str, Any]) -> str:
    ttft, tpot, predictor = report["ttft_ms"], report["tpot_ms"], report["predictor"]
    cards = [
        (f"{report['completed']}/{report['requests']}", "requests completed"),
        (str(report["output_tokens"]), "output tokens"),
        (str(len(report["migrations"])), "live moves"),
        (f"{ttft['p50']:.0f} ms" if ttft else "-", f"TTFT P50{_p99(ttft)}"),
        (f"{tpot['p50']:.0f} ms" if tpot else "-", f"TPOT P50{_p99(tpot)}"),
        (
            f"{predictor['mae']:.0f}" if predictor["n"] else "-",
            f"tokens mean error, {predictor['n']} estimates",
        ),
    ]
    return "".join(f'<div class="card"><b>{n}</b><span>{what}</span></div>' for n, what in cards)


def _p99(values: dict[str, float] | None) -> str:
    return f" (P99 {values['p99']:.0f})" if values else ""


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


def _twins(twins: Sequence[Twin]) -> str:
    if not twins:
        return "<p>No greedy stream moved.</p>"
    return _table(
        "request,#tokens,result,beginning",
        (
            (
                twin.moved.rid,
                twin.moved.tokens,
                "identical" if twin.identical else f"differs at token {twin.first_difference}",
                " ".join(twin.moved.text.split())[:90],
            )
            for twin in twins
        ),
    )


def _table(columns: str, rows: Iterable[Sequence[object]]) -> str:
    """Return a table; a column whose name starts with # holds numbers."""
    names = columns.split(",")
    classes = [' class="number"' if name.startswith("#") else "" for name in names]
    head = "".join(
        f"<th{kind}>{name.lstrip('#')}</th>" for name, kind in zip(names, classes, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{kind}>{escape(str(cell))}</td>" for cell, kind in zip(row, classes, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _versions(versions: dict[str, str]) -> str:
    return escape(", ".join(f"{name} {version}" for name, version in versions.items()))
