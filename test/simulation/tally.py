"""What happened in a history, counted: a campaign in which nothing happens proves nothing."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from sglang_star.protocol import Commit, Inserted, Refused, Release, Reserve, Tokens

if TYPE_CHECKING:
    from simulation.history import History


def tally(history: History) -> Counter[str]:
    """Counts by what happened; ``plan: X`` are the events of the plan that came to pass."""
    counts: Counter[str] = Counter(histories=1)
    chain: dict[str, set[str]] = {}
    settled: set[tuple[str, str]] = set()
    for _, who, what, details in history.trace:
        if what == "sends":
            _message(counts, details[0], details[1].instance_id, chain, settled)
        elif who == "plan":
            counts[f"plan: {what}"] += 1
        elif who == "network":
            counts[f"messages {what}"] += 1
        elif what == "answers":
            counts[f"orders: {details[0]}"] += 1
        elif what in ("ends", "retracts"):
            counts[what] += 1
    counts["chains of three"] += sum(len(moves) > 2 for moves in chain.values())
    for node in (*history.nodes.values(), *history.dead):
        for outcome, count in node.mover.log.outcomes.items():
            counts[f"moves {outcome}"] += count
    counts["tokens"] += sum(client.seen for client in history.clients.values())
    counts["clients excused"] += sum(bool(client.excused) for client in history.clients.values())
    counts["failed"] += bool(history.failure)
    return counts


def _message(
    counts: Counter[str],
    message: object,
    to: str,
    chain: dict[str, set[str]],
    settled: set[tuple[str, str]],
) -> None:
    counts["messages"] += 1
    match message:
        case Reserve():
            counts["moves"] += 1
            counts["moves toward home"] += message.home.instance_id == to
        case Commit():
            counts["commits"] += 1
        case Refused():
            counts["refusals"] += 1
        case Release():
            counts["releases"] += 1
        case Tokens():
            counts["chunks"] += len(message.chunks)
        case Inserted():
            if (key := (message.stream_id, message.migration_id)) not in settled:
                settled.add(key)
                counts["hand-overs"] += 1
                chain.setdefault(message.stream_id, set()).add(message.migration_id)
