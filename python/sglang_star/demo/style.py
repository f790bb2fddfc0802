"""The look of the report page, light and dark."""

from typing import Final

STYLE: Final = """
:root { color-scheme: light dark; --ink: #1f2937; --paper: #fff; --soft: #6b7280;
  --line: #e5e7eb; --good: #047857; --bad: #dc2626 }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --paper: #0d1117; --soft: #9ca3af;
  --line: #30363d; --good: #34d399; --bad: #f87171 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 960px; margin: 2.5rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem }
p { color: var(--soft); margin: .2rem 0 .8rem; max-width: 46rem } p.lead { color: var(--ink) }
svg { width: 100%; height: auto; display: block } .picture { margin: 1.4rem 0 .6rem }
.axis { fill: none; stroke: var(--soft) } .pair .grid { stroke: var(--line) }
.tick, .label { fill: var(--soft); font-size: 12px; text-anchor: middle } .end { text-anchor: end }
.band { stroke: #8b5cf6; stroke-opacity: .22; stroke-width: 2 }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .35em }
.nowrap { white-space: nowrap } .scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums } th, td { text-align: left; padding: .35rem .5rem;
  border-bottom: 1px solid var(--line) } th { color: var(--soft); font-weight: 500 }
.number { text-align: right } .good { color: var(--good) } .bad { color: var(--bad) }
@media (max-width: 720px) { .pair { grid-template-columns: 1fr } }
"""
