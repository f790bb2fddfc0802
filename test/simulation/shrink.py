"""Make a failing history smaller, and tell it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from msgspec import structs

from sglang_star.protocol import Message, Peer
from simulation.history import History
from simulation.plan import Plan


def kind(failure: str) -> str:
    """What two failures have in common: all but names and numbers."""
    text = re.sub(r"\[[^\]]*\]", "[]", failure)
    return re.sub(r"\d+", "N", re.sub(r"\b(star-guest-)?[abcd]\b", "X", text))[:60]


def shrink(plan: Plan, failure: str) -> Plan:
    """Leave out events and requests for as long as the history fails in the same way."""
    wanted = kind(failure)
    smaller = True
    while smaller:
        smaller = False
        for one in _smaller(plan):
            if kind(History(one).run()) == wanted:
                plan, smaller = one, True
                break
    return plan


def _smaller(plan: Plan) -> Iterator[Plan]:
    for index in reversed(range(len(plan.events))):
        yield plan.without(event=index)
    for index in reversed(range(len(plan.requests))):
        yield plan.without(request=index)


def story(plan: Plan, history: History, lines: int = 60) -> str:
    """What happened, latest last: time, who, what."""
    fleet = ", ".join(
        f"{name}: page {s.page_size}, {s.pages} pages, {s.step_s * 1e3:g} ms"
        + (", overlap" if s.overlap else "")
        for name, s in plan.shapes.items()
    )
    told = [
        f"{at:8.4f}  {who:8} {what:8} {' '.join(map(_short, details))}"
        for at, who, what, details in history.trace[-lines:]
    ]
    return "\n".join([f"seed {plan.seed}; {fleet}", *told, history.stack])


def _short(thing: Any) -> str:
    if isinstance(thing, Peer):
        return f"-> {thing.instance_id}/{thing.incarnation}"
    if not isinstance(thing, Message):
        return str(thing)
    fields = structs.asdict(thing)
    shown = [fields.get("migration_id", ""), fields.get("stream_id", "")]
    names = ("start", "end", "slot", "index", "token_ids", "finished", "moves", "reason")
    told = {name: fields.get(name) for name in names}
    shown += [f"{name}={value}" for name, value in told.items() if value not in (None, b"", "")]
    if "message" in fields:
        shown.append(repr(fields["message"]))
    if "output_ids" in fields:
        shown.append(f"{len(fields['output_ids'])} tokens")
    return f"{type(thing).__name__}({' '.join(shown)})"
