"""What holds once a history has come to rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simulation.history import History
    from simulation.node import Node


def at_rest(history: History) -> Iterator[str]:
    """Say what does not hold."""
    for rid, client in history.clients.items():
        if client.end is None and client.home.alive:
            yield f"{rid} has {client.seen} tokens and never ends"
    for node in history.nodes.values():
        if node.alive:
            yield from _empty(history, node)
    if history.gentle:
        for node in history.nodes.values():
            if node.mover.log.outcomes["reclaimed"]:
                yield f"{node.name} reclaims a stream though nothing was lost"


def _empty(history: History, node: Node) -> Iterator[str]:
    mover, engine = node.mover, node.engine
    kept = {
        "moves": mover.sender.moves,
        "arriving": mover.target.moves,
        "arriving by name": mover.target._by_rid,
        "being rebuilt": mover.target._rebuilding,
        "guests": mover.host.by_stream,
        "guests by name": mover.host.by_rid,
        "shadows": mover.home.shadows,
        "armed orders": len(mover.armed),
        "running requests": [req for req in engine.batch if not req.finished()],
        "waiting requests": engine.waiting,
        "rows": engine.held_rows,
        "steps": engine.in_flight,
        "copies": engine.tickets,
        "released KV": engine.drains,
        "slots": node.staging.slots - node.staging.free,
        "peers' memory": node.transports.in_use,
        "fetches": [one for one in history.fetches if one._reader.here is node],
    }
    for what, left in kept.items():
        if left:
            yield f"{node.name} keeps {what}: {left}"
    if not engine.pages.all_given_back():
        yield f"{node.name} has {engine.pages.available()} free pages of {engine.pages.count}"
