"""Histories whose engines have two ranks: whatever the one does, the other has to do as well.

Rank 0 of a node has the network, as a node of one rank does. Rank 1 has an engine, a mover and
orders of its own, and is given the same input right after it, at the same time. Everything that the
protocol asks of the two engines is compared after each of their steps; rank 1's engine computes
tokens from its own KV, so that a shard that was not copied shows as well.

Run as a program, it prints what all engines were asked, as one number for each history: processes
that order their sets differently have to print the same.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from operator import le
from typing import TYPE_CHECKING, Any
from zlib import crc32

from sglang_star.config import StarConfig
from sglang_star.engine.tickets import Copying, Tickets
from sglang_star.migration.mailbox import OrderEnvelope
from sglang_star.migration.mover import Mover
from sglang_star.orders import Orders
from sglang_star.ranks.clock import StepClock
from sglang_star.ranks.ledger import Ledger
from sglang_star.ranks.posts import HeldPost
from sglang_star.ranks.replica import Replica
from sglang_star.ranks.step import StepInput
from sglang_star.ranks.transports import RankTransports
from simulation import invariants
from simulation.engine import FakeEngine
from simulation.history import Failed, History
from simulation.node import Node, Watcher
from simulation.plan import Allowed, draw
from simulation.request import Request
from simulation.run import quiet
from simulation.tally import tally
from simulation.transport import SLOTS, START_S, Direct, Remote, Staging

if TYPE_CHECKING:
    from simulation.plan import EngineShape

VERBS = (
    *("park", "unpark", "gather", "release", "rebuild", "seat", "extend", "scatter", "adopt"),
    *("join", "append", "end", "emit", "abort", "requeue", "retract"),
)
"""All that changes an engine."""


class RankEngine(FakeEngine):
    """An engine that notes what it is asked, and has its time from the step.

    Attributes:
        calls: the verbs since they were last compared.
    """

    def __init__(self, node: Pair, shape: EngineShape, rank: int) -> None:
        super().__init__(node, page_size=shape.page_size, pages=shape.pages, rows=shape.rows)
        self._pair = node
        self.clock = StepClock()
        self.calls: list[Any] = []
        self.tickets = Tickets(self._agree)
        self._rank = rank
        self._agreed: Sequence[int] = ()

    def now(self) -> float:
        return self.clock.now()

    def wall(self) -> float:
        return self.clock.wall()

    def new_id(self) -> str:
        return self.clock.new_id()

    def _agree(self, fares: Sequence[int]) -> Sequence[int]:
        """How copies fare on both ranks; rank 0, which comes first, looks at rank 1's."""
        if self._rank == 0:
            other = self._pair.sides[1].engine
            with self._pair.on(1):
                for ticket, here in list(other.tickets._here.items()):
                    if here is Copying.UNDER_WAY:
                        other.tickets._look(ticket)
            assert len(fares) == len(other.tickets._here), "the ranks have begun other copies"
            other._agreed = tuple(map(min, fares, other.tickets._here.values()))
            return other._agreed
        assert all(map(le, self._agreed, fares))
        return self._agreed

    def launch(self) -> bool:
        return self._step(super().launch)

    def result(self) -> None:
        self._step(super().result)

    def _step(self, act: Callable[[], Any]) -> Any:
        """The loop of a node lets its engine step: the other rank's does with it."""
        pair = self._pair
        if pair.side is not None:
            return act()
        mine = act()
        other = pair.sides[1].engine
        with pair.on(1):
            theirs = other.launch() if mine is not None else other.result()
        pair.compare("launches", mine, theirs)
        return mine


def _noted(name: str) -> Callable[..., Any]:
    original = getattr(FakeEngine, name)

    def verb(self: RankEngine, *args: Any, **kwargs: Any) -> Any:
        # Of a copy its slot: what is in there may come sooner on one rank than on the other.
        told = args[:3] if name in ("gather", "scatter") else args
        self.calls.append((name, *map(_essence, told), *kwargs.values()))
        return original(self, *args, **kwargs)

    return verb


def _essence(value: Any) -> Any:
    if isinstance(value, Request):
        return repr(value)
    if isinstance(value, list | tuple):
        return tuple(map(_essence, value))
    return str(value)


for _name in VERBS:
    setattr(RankEngine, _name, _noted(_name))


class Meeting:
    """What ranks ask each other, when one after the other comes by; see ``ranks.group.Ranks``.

    Rank 0, which comes first, looks at what rank 1 will say of its transports; of all else it takes
    what it has itself for what both have, and rank 1 sees whether that was so.
    """

    size = 2

    def __init__(self, pair: Pair, rank: int, met: deque[tuple[Any, ...]]) -> None:
        self.rank = rank
        self._pair = pair
        self._met = met

    def gather(self, data: bytes) -> tuple[bytes, ...]:
        if self.rank:
            return self._met.popleft()
        with self._pair.on(1) as other:
            self._met.append((data, other.transports.here()))
        return self._met[-1]

    def least(self, *values: int) -> tuple[int, ...]:
        if self.rank:
            return tuple(map(min, values, self._met.popleft()))
        self._met.append(values)
        return values


class Place:
    """What transports know of the process of one rank."""

    def __init__(self, pair: Pair, rank: int, world: Any, staging: Staging) -> None:
        self.label = pair.label + b"#%d" % rank
        self.name, self.shape, self.peer = pair.name, pair.shape, pair.peer
        self.world = world
        self.staging = staging
        self._pair = pair
        self._rank = rank
        pair.world.labelled[self.label] = self  # type: ignore[assignment]

    @property
    def alive(self) -> bool:
        return self._pair.alive

    @property
    def mover(self) -> Mover:
        return self._pair.sides[self._rank].mover


class Slower(Remote):
    """Rank 1's takes longer to start."""

    def start(self) -> None:
        self._ready_at = min(self._ready_at, self._node.world.clock.now + 2 * START_S)


class Side:
    """One rank."""

    def __init__(
        self,
        pair: Pair,
        rank: int,
        shape: EngineShape,
        config: StarConfig,
        met: deque[tuple[Any, ...]],
    ) -> None:
        self.engine = RankEngine(pair, shape, rank)
        self.world: Any = pair.world if rank == 0 else Muted(pair.world)
        ranks = Meeting(pair, rank, met)
        self.staging = Staging(SLOTS, pair.staging.slot_bytes)
        place: Any = Place(pair, rank, self.world, self.staging)
        kinds = (Direct(place, self.staging), (Slower if rank else Remote)(place, self.staging))
        self.transports = RankTransports(ranks, kinds, self.engine.now)
        ledger = Ledger()
        post = HeldPost(pair.peer, ledger, pair.link if rank == 0 else None)
        self.faults = Watcher(pair)
        self.mover = Mover(self.engine, post, config, "fingerprint", self.faults, self.transports)
        self.orders = Orders(
            self.engine,
            self.mover,
            pair.peer,
            config,
            status=lambda: None,  # type: ignore[arg-type, return-value]
            step_ms=lambda: self.engine.clock.step_ms,
        )
        self.replica = Replica(
            ranks,
            self.engine.clock,
            post,
            ledger,
            self.mover,
            self.orders,
            self.faults,
            copies=lambda: self.engine.tickets.begun,
        )


class Muted:
    """The world as rank 1 sees it: what is done to it was done already."""

    def __init__(self, world: History) -> None:
        self._world = world
        self.clock = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._world, name)

    @property
    def now(self) -> float:
        return self._world.clock.now

    def after(self, *_: Any) -> None:
        pass

    def note(self, *_: Any) -> None:
        pass

    def told(self, *_: Any) -> None:
        pass


class Pair(Node):
    """A node of two ranks; its ``engine``, ``mover`` and the like are those of the rank at work.

    Attributes:
        side: which rank an input is being given to; None while none is. sum: of all verbs so far.
    """

    def __init__(
        self, world: History, name: str, incarnation: int, shape: EngineShape, config: StarConfig
    ) -> None:
        super().__init__(world, name, incarnation, shape, config)
        self.side: int | None = None
        self.sum = 0
        met: deque[tuple[Any, ...]] = deque()
        self.sides = [Side(self, rank, shape, config, met) for rank in (0, 1)]
        self._steps = 0
        self._use(self.sides[0])

    def _use(self, side: Side) -> None:
        self.world, self.engine, self.mover = side.world, side.engine, side.mover
        self.orders, self.faults = side.orders, side.faults
        self.staging, self.transports = side.staging, side.transports

    @contextlib.contextmanager
    def on(self, rank: int) -> Iterator[Side]:
        before, self.side = self.side, rank
        self._use(self.sides[rank])
        try:
            yield self.sides[rank]
        finally:
            self.side = before
            self._use(self.sides[0])

    def both(self, act: Callable[[], Any]) -> Any:
        with self.on(0):
            mine = act()
        with self.on(1):
            theirs = act()
        self.compare("answers", mine, theirs)
        return mine

    def compare(self, what: str, mine: Any, theirs: Any) -> None:
        one, other = (side.engine.calls for side in self.sides)
        if (mine, one) != (theirs, other):
            calls = next(((a, b) for a, b in zip(one, other, strict=False) if a != b), None)
            self.world.fail(
                f"ranks of {self.name} differ: {what} {mine} and {theirs}, "
                f"{len(one)} and {len(other)} verbs, first {calls}"
            )
        self.sum = crc32(repr(one).encode(), self.sum)
        one.clear()
        other.clear()

    # ------------------------------------------------------------------ what comes in

    def arrived(self, item: Any, *, urgent: bool) -> None:
        (self._urgent if urgent else self._inbox).append(item)
        self._wake(self.world.clock.now)

    def queue(self, req: Request) -> None:
        self.input(lambda: self._queue(req))

    def _queue(self, req: Request) -> None:
        self.engine.waiting.append(Request(req.rid, req.spec) if self.side else req)

    def order(self, order: Any) -> None:
        """An order reaches rank 0."""
        if self.side == 0:
            self._inbox.append(OrderEnvelope(b"", order))

    # ------------------------------------------------------------------ the loop

    def _tick(self) -> None:
        needed = self.sides[0].replica.needs_step
        if needed or self._urgent or self._inbox:
            self._advance()
        while self._inputs:
            self.both(self._inputs.popleft())
        if needed or self._urgent or self._inbox:
            step = self._advance((*self._urgent, *self._inbox))
            self._urgent.clear()
            self._inbox.clear()
            answers = self.both(lambda: self.sides[self.side or 0].replica.tick(step))
            for _, reply in answers:
                self.world.note(self.name, "answers", reply.error_type or "done", reply.message)
        self.link.watch(self.mover.watched())

    def _advance(self, items: tuple[Any, ...] = ()) -> StepInput:
        self._steps += 1
        seed = f"{self.name}/{self.peer.incarnation}/{self._steps}".encode()
        now = self.world.clock.now
        step_ms = self.shape.step_s * 1e3
        step = StepInput(items=items, now=now, wall=now, seed=seed, step_ms=step_ms)
        for side in self.sides:
            side.engine.clock.advance(step)
        return step


class PairHistory(History):
    """A history whose engines have two ranks each."""

    def run(self) -> str:
        if not super().run():
            with contextlib.suppress(Failed):
                for node in self.nodes.values():
                    assert isinstance(node, Pair)
                    with node.on(1):
                        for broken in invariants._empty(self, node) if node.alive else ():
                            self.fail(f"rank 1: {broken}")
                for fetch in self.fetches:
                    if fetch._reader.here.alive:
                        self.fail("a fetch was never closed")
        return self.failure

    @property
    def sum(self) -> int:
        """Of all that every engine was asked."""
        nodes = (*self.nodes.values(), *self.dead)
        return crc32(repr([(node.name, node.sum) for node in nodes]).encode())  # type: ignore[attr-defined]

    def _boot(self, name: str) -> None:
        incarnation = sum(node.name == name for node in self.dead) + 1
        self.nodes[name] = Pair(self, name, incarnation, self.plan.shapes[name], self.config)

    def _obey(self, node: Any, order: Any) -> None:
        node.order(order)

    def fill(self, name: str, share: float, lasts: float) -> None:
        pair: Any = self.nodes[name]
        for rank in (0, 1):
            with pair.on(rank):
                super().fill(name, share, lasts)

    def _reflush(self, node: Any, until: float) -> None:
        again = not node.engine.is_idle(paused=True) or node.mover.holds_kv_off_batch
        if not (node.side and again):  # rank 0 has seen to that
            super()._reflush(node, until)


def run(seeds: range, allowed: Allowed) -> tuple[list[int], list[tuple[int, str]], Counter[str]]:
    """Run these histories; the sum of each, what does not hold, and what happened."""
    quiet()
    sums, found = [], []
    counts: Counter[str] = Counter()
    gc.disable()
    try:
        for seed in seeds:
            history = PairHistory(draw(seed, allowed))
            if failure := history.run():
                found.append((seed, failure))
            sums.append(history.sum)
            counts.update(tally(history))
            if seed % 50 == 49:
                gc.collect()
    finally:
        gc.enable()
    return sums, found, counts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m simulation.ranks", description=__doc__)
    parser.add_argument("--histories", type=int, default=1000, metavar="N")
    parser.add_argument("--start", type=int, default=0, metavar="SEED")
    parser.add_argument("--sums", action="store_true", help="print one number for each history")
    arguments = parser.parse_args()
    seeds = range(arguments.start, arguments.start + arguments.histories)
    sums, found, counts = run(seeds, Allowed())
    if arguments.sums:
        print(*sums)
        return int(bool(found))
    for seed, failure in found[:20]:
        print(f"{seed}: {failure}")
    print(f"{len(found)} of {len(seeds)} fail; {counts['moves moved']} moves came to pass")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
