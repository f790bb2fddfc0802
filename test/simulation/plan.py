"""What happens in a history, chosen by its seed before it begins."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from sglang_star.migration.target import GUEST_PREFIX
from simulation.tokens import Spec

DISTURBED_S = 2.0


@dataclass(frozen=True, slots=True)
class Allowed:
    """Which kinds of faults histories have.

    Attributes:
        lost: messages vanish; duplicated: come twice; stray: come once more much later, whatever
            was sent meanwhile; delayed: a connection stands still for a while.
        slow: what one instance sends to another is late, always by the same time.
        blind: one cannot read another's memory over the network, while messages pass.
        cut: two instances cannot talk; frozen: a process stands still; stuck: its scheduler does
            while its heartbeats go on; killed: it dies, and mostly comes back under its name.
        flushed: the prefix cache is forgotten.
        updated: weights are, everywhere, after a retraction of all.
        guestlike: clients give names that begin like a guest's.
        full: memory is taken by others; paused: an engine's steps are, and its requests may be
            retracted then; aborted: clients give up.
    """

    lost: bool = True
    duplicated: bool = True
    stray: bool = True
    delayed: bool = True
    slow: bool = True
    cut: bool = True
    frozen: bool = True
    stuck: bool = True
    killed: bool = True
    full: bool = True
    paused: bool = True
    aborted: bool = True
    flushed: bool = True
    updated: bool = True
    guestlike: bool = True
    blind: bool = True


@dataclass(frozen=True, slots=True)
class EngineShape:
    """One engine; ``pages`` KV pages, ``rows`` requests at once, ``step_s`` a decode step.

    Attributes:
        copy_s: how long a copy of KV takes at most; 0 if all are over when they begin.
        machine: those of one share memory.
    """

    page_size: int
    pages: int
    rows: int
    overlap: bool
    step_s: float
    copy_s: float = 0.0
    machine: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """Something that is done to the fleet.

    Attributes:
        what: names a method of :class:`~simulation.history.History`.
        fault: whether the history is calmer without it.
    """

    at: float
    what: str
    args: tuple[str | int | float | bool, ...]
    fault: bool

    def __str__(self) -> str:
        return f"{self.at:6.3f} {self.what}{self.args}"


@dataclass(frozen=True, slots=True)
class Plan:
    """One history: the fleet, who asks for what where and when, and all that is done to them."""

    seed: int
    shapes: dict[str, EngineShape]
    copy_tokens: int
    requests: tuple[tuple[float, str, Spec], ...]
    events: tuple[Event, ...]

    def without(self, *, request: int | None = None, event: int | None = None) -> Plan:
        def rest(items: tuple[Any, ...], index: int | None) -> tuple[Any, ...]:
            return tuple(item for i, item in enumerate(items) if i != index)

        return replace(self, requests=rest(self.requests, request), events=rest(self.events, event))


def draw(seed: int, allowed: Allowed) -> Plan:
    """The plan of a seed; another set of allowed faults makes another history of it."""
    dice = random.Random(seed)
    names = "abcd"[: dice.choice((2, 2, 3, 3, 3, 4))]
    page = dice.choice((1, 1, 4, 16))
    tokens = dice.choice((160, 400, 400))
    shapes = {
        name: EngineShape(
            page_size=page,
            pages=max(tokens // page, 8),
            rows=dice.choice((3, 8)),
            overlap=dice.random() < 0.6,
            step_s=dice.choice((0.005, 0.02, 0.06)),
            copy_s=dice.choice((0.0, 0.01, 0.1)),
            machine=dice.choice((0, 0, 1)),
        )
        for name in names
    }
    longest = tokens - 3 * page
    requests: Any = ()
    for index in range(dice.randint(1, 5)):
        requests += (_request(dice, index, names, longest, requests, allowed),)
    events: list[Event] = []
    _orders(dice, names, requests, events)
    if len(names) > 2 and dice.random() < 0.3:
        requests = _chain(dice, names, requests, longest, allowed, events)
    # Some histories are calm, and what happens in the others happens mostly during moves.
    if mood := dice.choice((0.0, 0.5, 1.0, 1.0, 2.0)):
        _faults(dice, names, requests, allowed, events, mood)
    events.sort(key=lambda event: event.at)
    return Plan(seed, shapes, dice.choice((4, 16, 64)), requests, tuple(events))


def _request(
    dice: random.Random, index: int, names: str, longest: int, others: Any, allowed: Allowed
) -> tuple[float, str, Spec]:
    """One that fits an engine's memory, of ``longest`` tokens, if nobody else is there."""
    grammar = dice.random()
    output = dice.choice((5, 20, 60, 60, 90)) if dice.random() < 0.97 else 300
    prompt = tuple(dice.randrange(1, 500) for _ in range(dice.randint(2, 40)))
    if others and dice.random() < 0.4:
        # They share a prefix, which stays in the cache.
        shared = dice.choice(others)[2].prompt
        prompt = (*shared[: dice.randint(1, len(shared))], *prompt[: dice.randint(0, 8)])
    spec = Spec(
        rid=f"{GUEST_PREFIX if allowed.guestlike and dice.random() < 0.05 else ''}r{index}",
        prompt=prompt,
        max_new_tokens=min(output, longest - len(prompt)),
        end_every=dice.choice((40, 10**9, 10**9)),
        stop_token=dice.choice((-1, -1, dice.randrange(1, 500))),
        grammar_s=dice.uniform(0.001, 0.3) if grammar < 0.15 else -1.0 if grammar < 0.18 else 0.0,
        sampled=dice.random() < 0.5,
    )
    return dice.uniform(0.0, 0.5), dice.choice(names), spec


def _orders(dice: random.Random, names: str, requests: Any, events: list[Event]) -> None:
    for at, name, spec in requests:
        if dice.random() < 0.15:
            events.append(
                Event(
                    at,
                    "arm",
                    (
                        name,
                        spec.rid,
                        _other(dice, names, name),
                        dice.randint(1, 20),
                        dice.choice((-1, 0, 1, 4)),
                    ),
                    False,
                )
            )
        when = at
        for _ in range(dice.choice((0, 1, 1, 2, 2, 3, 5))):
            when += dice.expovariate(6.0)
            hold = dice.choice((-1, -1, 0, 2))
            events.append(Event(when, "move", (spec.rid, dice.choice(names), hold), False))
    if dice.random() < 0.1:
        name = dice.choice(names)
        events.append(Event(dice.uniform(0.1, 1.0), "drain", (name,), False))


def _chain(
    dice: random.Random,
    names: str,
    requests: Any,
    longest: int,
    allowed: Allowed,
    events: list[Event],
) -> Any:
    """A long request that goes from host to host, and what some host says home is late.

    Home then hears of them in another order than they had the stream in. Or the second host gives
    a move up whose target inserts the request all the same, so that both decode it.
    """
    index = dice.randrange(len(requests))
    at, home, spec = requests[index]
    output = longest - len(spec.prompt)
    spec = replace(spec, max_new_tokens=output, end_every=10**9, stop_token=-1, grammar_s=0.0)
    start = at + dice.uniform(0.1, 0.5)
    others = dice.sample([name for name in names if name != home], len(names) - 1)
    slow = dice.choice(others)
    if allowed.stuck and allowed.cut and dice.random() < 0.25:
        first, second = others[:2]
        then = start + dice.uniform(0.2, 0.5)
        stuck = then + dice.uniform(0.01, 0.2)
        events += (
            Event(start, "follow", (spec.rid, first, 0, 0.0), False),
            Event(then, "follow", (spec.rid, second, dice.choice((-1, 0)), 0.0), False),
            Event(stuck, "stick", (second, dice.uniform(1.0, 2.8)), True),
            Event(stuck + dice.uniform(0.0, 1.8), "cut_off", (first, second, 6.0), True),
        )
        start, slow = then, first
    else:
        path = "".join(others[: dice.randint(2, 3)])
        path += dice.choice(("", home, home + path[0], path[0]))
        gap, hold = dice.choice((0.0, 0.0, 0.02, 0.2)), dice.choice((-1, 0, 0, 2))
        if allowed.stray and dice.random() < 0.25:
            # There and back: what is late of one visit may come during the next.
            path = (path[0] + dice.choice((home, others[-1]))) * 3
            scatter = (0.5, dice.choice((0.05, 0.3, 1.0)), 4.0)
            events.append(Event(start, "scatter", scatter, True))
        events.append(Event(start, "follow", (spec.rid, path, hold, gap), False))
    if allowed.slow and dice.random() < 0.7:
        late = dice.choice((0.03, 0.1, 0.3, 0.5))
        when = start + dice.choice((-0.1, 0.0, 0.1))
        events.append(Event(when, "slow", (slow, home, late, dice.uniform(0.5, 5.0)), True))
    if allowed.cut and dice.random() < 0.1:
        when = start + dice.uniform(0.0, 0.5)
        events.append(Event(when, "cut_off", (slow, home, dice.choice((0.3, 0.9, 1.5))), True))
    return (*requests[:index], (at, home, spec), *requests[index + 1 :])


def _other(dice: random.Random, names: str, name: str) -> str:
    return dice.choice([other for other in names if other != name])


def _faults(
    dice: random.Random,
    names: str,
    requests: Any,
    allowed: Allowed,
    events: list[Event],
    mood: float,
) -> None:
    orders = [event for event in events if event.what == "move"]

    def some(chance: float) -> bool:
        return dice.random() < chance * mood

    def add(what: str, *args: Any) -> None:
        when = dice.uniform(0.05, 1.2)
        if orders and dice.random() < 0.7:
            order = dice.choice(orders)
            when = order.at + dice.choice((-0.3, 0.0, 0.0)) + dice.expovariate(20.0)
            if (
                what in ("freeze", "stick", "kill", "pause", "fill", "reset")
                and dice.random() < 0.5
            ):
                args = (order.args[1], *args[1:])
        events.append(Event(min(max(when, 0.02), DISTURBED_S), what, args, True))

    def span() -> float:
        return dice.choice((0.05, 0.3, 0.9, 1.5, 2.5, 4.0)) * dice.uniform(0.8, 1.2)

    if allowed.lost and some(0.15):
        add("lose", dice.choice((0.01, 0.05, 0.3)), span())
    if allowed.lost and some(0.3):
        add("reset", dice.choice(names), dice.choice((1, 1, 2, 5)))
    if allowed.duplicated and some(0.15):
        add("duplicate", dice.choice((0.05, 0.5)), span())
    if allowed.stray and some(0.15):
        add("scatter", dice.choice((0.05, 0.5)), dice.choice((0.02, 0.3, 2.0)), span())
    if allowed.delayed and some(0.2):
        add("delay", dice.choice((0.02, 0.2)), dice.choice((0.1, 0.5, 3.0)), span())
    for _ in range(2):
        if allowed.slow and some(0.15):
            one = dice.choice(names)
            add("slow", one, _other(dice, names, one), dice.choice((0.03, 0.2, 0.5)), span())
        if allowed.cut and some(0.15):
            one = dice.choice(names)
            add("cut_off", one, _other(dice, names, one), span())
        if allowed.frozen and some(0.15):
            add("freeze", dice.choice(names), span())
        if allowed.stuck and some(0.15):
            add("stick", dice.choice(names), span())
    if allowed.killed and some(0.2):
        add("kill", dice.choice(names), dice.choice((0.05, 0.5, 2.0, 1e9)))
    if allowed.full and some(0.15):
        add("fill", dice.choice(names), dice.uniform(0.5, 1.0), span())
    if allowed.paused and some(0.15):
        add("pause", dice.choice(names), span(), dice.choice((False, True)), dice.random() < 0.1)
    if allowed.updated and some(0.3):
        add("update", dice.choice((0.1, 0.5, 3.0)))
    if allowed.flushed and some(0.1):
        name = dice.choice(names)
        add("flush", name)
        if dice.random() < 0.5:
            last = events[-1]
            events.append(Event(last.at, "pause", (name, span(), True, False), True))
    if allowed.blind and some(0.2):
        one = dice.choice(names)
        add("blind", one, _other(dice, names, one), span())
    for at, _, spec in requests:
        if allowed.aborted and some(0.2):
            when = at + dice.expovariate(3.0)
            events.append(Event(when, "abort", (spec.rid, dice.choice(("", "timed out"))), True))
