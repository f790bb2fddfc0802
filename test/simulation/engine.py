"""The verbs on an engine whose KV knows its prefix; it behaves as SGLang does under them.

A step is launched, and its result comes later: with overlap after the next one was launched. It
writes KV where it was told at its launch, whatever became of the request since. So do copies: they
read and write what they were told to when they are over, and not when they began.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import orjson

from sglang_star.engine.bounds import Bounds
from sglang_star.engine.tickets import Tickets
from sglang_star.errors import MalformedMessage, OrderRefused, PeerError
from simulation.pages import Pages
from simulation.request import Request
from simulation.tokens import VOCABULARY

if TYPE_CHECKING:
    from simulation.node import Node

BOUNDS = Bounds(VOCABULARY, context=1000)
GARBAGE = -1
OTHER_WEIGHTS = 1 << 61
"""Above all hashes: what tells KV of one version of the weights from that of another."""
Step = list[tuple[Request, list[int], int, int]]
"""Per request its slots at launch, and the positions ``[start, end)`` that the step writes."""


class KvError(AssertionError):
    """KV is not what the tokens before it would have made."""


class Late:
    """A copy that happens when it is found to be over, in the memory as it is then."""

    __slots__ = ("_copy", "_due", "_node")

    def __init__(self, node: Node, copy: Callable[[], None]) -> None:
        self._node = node
        self._copy = copy
        self._due = 0.0
        world, longest = node.world, node.shape.copy_s
        if longest and world.chance(0.8):
            self._due = world.clock.now + world.random.uniform(0, longest)

    def is_over(self) -> bool:
        if self._node.world.clock.now < self._due:
            return False
        self._copy()
        return True


class LateScatter(Late):
    """One that writes what is fetched: begun once that has arrived, it is not to be stopped."""

    __slots__ = ("_data", "_fetch")

    def __init__(self, node: Node, write: Callable[[Any], None], fetch: Any) -> None:
        super().__init__(node, lambda: write(self._data))
        self._fetch = fetch
        self._data: list[int] | None = None

    def is_over(self) -> bool:
        try:
            if self._data is None:
                self._data = self._fetch.arrived()
            over = self._data is not None and super().is_over()
            if over and not self._fetch.intact():
                raise PeerError("the sender has used the slot again")
        except PeerError:
            self._fetch.close()
            raise
        if over:
            self._fetch.close()
        return over


class FakeEngine:
    """One engine's memory, batch and queues.

    Attributes:
        pool: the hash that each KV slot holds; pages: who has which.
        version: how often its weights were updated; KV of other weights than these is wrong, as
            it is where SGLang retracts all before an update.
        hidden: pages that somebody else has for a while.
        batch: those that decode; waiting: those without KV, oldest first.
        in_flight: launched steps whose results are still to come.
        tickets: copies; drains: slots that were released while one still writes into them.
    """

    unsupported = ""
    token_bytes = 8
    serves_decode = True

    def __init__(self, node: Node, *, page_size: int, pages: int, rows: int) -> None:
        self.page_size = page_size
        self.rows = rows
        self.pool = [GARBAGE] * (pages * page_size)
        self.pages = Pages(pages, page_size)
        self.batch: list[Request] = []
        self.waiting: list[Request] = []
        self.compiling: dict[str, Request] = {}
        self.in_flight: list[tuple[Step, list[Request]]] = []
        self._unwritten: list[Step] = []
        self.version = 0
        self.held_rows = 0
        self.hidden: list[int] = []
        self.tickets = Tickets()
        self.drains: list[tuple[Collection[int], list[int]]] = []
        self._joining: list[Request] = []
        self._node = node
        self._ids = itertools.count(1)

    # ------------------------------------------------------------------ time and names

    def now(self) -> float:
        return self._node.world.clock.now

    def wall(self) -> float:
        return self._node.world.clock.now

    def new_id(self) -> str:
        return f"{self._node.name}{self._node.peer.incarnation}.{next(self._ids)}"

    def weights(self) -> str:
        return str(self.version)

    def is_paused(self) -> bool:
        return self._node.paused

    # ------------------------------------------------------------------ room

    def free_tokens(self) -> int:
        return self.pages.available() * self.page_size

    def has_slot(self, arriving: int) -> bool:
        return len(self.batch) + arriving < self.rows and self.held_rows < self.rows

    def retracted(self) -> int:
        return 0

    def kept_free(self, guests: int) -> int:
        return 0

    # ------------------------------------------------------------------ requests

    def running(self) -> Sequence[Request]:
        return self.batch

    def is_running(self, req: Request) -> bool:
        return req.finished_reason is None and any(req is other for other in self.batch)

    def is_ending(self, req: Request) -> bool:
        return req.to_finish is not None

    def pinned(self, req: Request) -> str:
        return ""

    def tokens(self, req: Request) -> int:
        return len(req.chain)

    def max_new_tokens(self, req: Request) -> int:
        return req.max_new_tokens

    def written(self, req: Request) -> int:
        return len(req.chain) - 1

    def is_settled(self, req: Request) -> bool:
        return req.committed == len(req.chain) - 1

    # ------------------------------------------------------------------ leaving

    def park(self, req: Request) -> None:
        self.batch.remove(req)

    def unpark(self, req: Request) -> None:
        assert req.finished_reason is None, f"{req} is finished and would decode"
        assert self.is_settled(req), f"{req} needs complete KV"
        assert req.row, f"{req} has no row"
        assert not any(req is other for other in self.batch), f"{req} is in the batch already"
        self.batch.append(req)

    def describe(self, req: Request) -> tuple[bytes, bytes]:
        return req.spec.rid.encode(), b""

    def state(self, req: Request) -> tuple[tuple[int, ...], bytes]:
        return (), b""

    def gather(self, req: Request, start: int, end: int, slot: Any) -> int:
        assert end <= len(req.slots), f"{req} holds {len(req.slots)} positions, not {end}"
        pool, source = self.pool, req.slots[start:end]

        def copy() -> None:
            slot[:] = [pool[index] for index in source]

        return self.tickets.begin(Late(self._node, copy))

    # ------------------------------------------------------------------ copies

    def poll(self) -> None:
        if self.tickets:
            self.tickets.poll()
        if self.drains:
            waiting, self.drains = self.drains, []
            for after, slots in waiting:
                if all(map(self.copied, after)):
                    self.pages.give(slots, (), 0)
                    self.held_rows -= 1
                else:
                    self.drains.append((after, slots))

    def copied(self, ticket: int) -> bool:
        return self.tickets.is_over(ticket)

    def failure(self, ticket: int) -> str:
        return self.tickets.failure(ticket)

    def draining(self) -> bool:
        return bool(self.drains)

    def release(self, req: Request, *, keep_prefix: bool, after: Collection[int] = ()) -> None:
        if not req.row:
            return
        if not all(map(self.copied, after)):
            self.drains.append((after, req.slots))
            req.slots, req.committed, req.row = [], 0, False
            return
        complete = min(req.committed, len(req.chain) - 1) if keep_prefix else 0
        self.pages.give(req.slots, req.chain, complete)
        req.slots = []
        req.committed = 0
        req.row = False
        self.held_rows -= 1

    # ------------------------------------------------------------------ arriving

    def rebuild(self, message: bytes, prompt: bytes, rid: str) -> None:
        spec = self._node.world.specs.get(message.decode(errors="replace"))
        if spec is None:
            raise MalformedMessage("not a tokenized request")
        req = Request(rid, spec)
        if spec.grammar_s:
            self.compiling[rid] = req
            if spec.grammar_s > 0:
                self._node.world.clock.after(spec.grammar_s, self._node.compiled, rid)
            return
        if not self._node.mover.rebuilt(req):
            self.waiting.append(req)

    def compiles(self, rid: str) -> bool:
        return rid in self.compiling

    def refusal(self, req: Request) -> str:
        return "" if req.to_finish is None and not req.finished() else "Aborted"

    def seat(self, req: Request, max_new_tokens: int) -> bool:
        if max_new_tokens < 1:
            raise MalformedMessage(f"a request with room for {max_new_tokens} tokens")
        BOUNDS.check_length(len(req.spec.prompt) + max_new_tokens)
        if self.held_rows >= self.rows:
            return False
        assert not req.row, f"{req} has a row already"
        req.row = True
        self.held_rows += 1
        req.max_new_tokens = max_new_tokens
        return True

    def held(self, req: Request) -> int:
        return len(req.slots)

    def extend(self, req: Request, length: int) -> bool:
        assert req.row, f"{req} has no row"
        size = self.page_size
        last = req.slots[-1] // size if req.slots else 0
        have = len(req.slots)
        wanted = -(-length // size) - (-(-have // size))
        if wanted > self.pages.available():
            return False
        pages = [self.pages.take() for _ in range(wanted)]
        for position in range(have, length):
            if position % size == 0:
                last = pages.pop()
            req.slots.append(last * size + position % size)
        return True

    def scatter(self, req: Request, start: int, end: int, fetch: Any) -> int:
        target = req.slots[start:end]

        def write(data: list[int]) -> None:
            self.sync()
            for index, value in zip(target, data, strict=False):
                self.pool[index] = value

        return self.tickets.begin(LateScatter(self._node, write, fetch))

    def adopt(self, req: Request, output_ids: Sequence[int]) -> None:
        assert not req.output_ids, f"{req} has output"
        BOUNDS.check(output_ids, beside=len(req.spec.prompt))
        if len(output_ids) >= req.max_new_tokens:
            raise MalformedMessage("the output that was committed is over")
        for token in output_ids:
            req.push(token)

    def join(self, req: Request, length: int, penalty_log: Sequence[int], predictor: bytes) -> None:
        if not len(req.chain) - 1 == length == len(req.slots):
            raise OrderRefused("the committed length does not match the KV received")
        BOUNDS.check(penalty_log)
        req.committed = length
        self.unpark(req)

    # ------------------------------------------------------------------ the client's stream

    def append(self, req: Request, tokens: Sequence[int], details: bytes) -> None:
        BOUNDS.check(tokens, beside=len(req.chain))
        for token in tokens:
            req.push(token)

    def end(self, req: Request, reason: dict[str, Any] | None = None) -> None:
        if reason is not None:
            req.finished_reason = {"type": "abort", **reason}

    def emit(self, reqs: Sequence[Request]) -> None:
        for req in self._node.mover.emit(reqs):
            self._tell(req)

    def _tell(self, req: Request) -> None:
        if req.told_end:
            return
        new, req.told = req.output_ids[req.told :], len(req.output_ids)
        req.told_end = req.finished()
        self._node.world.told(self._node, req, new, req.finished_reason)

    def details(self, req: Request, start: int, end: int) -> bytes:
        return b""

    def finish_reason(self, req: Request) -> bytes:
        return orjson.dumps(req.finished_reason) if req.finished() else b""

    # ------------------------------------------------------------------ endings

    def abort(self, rid: str) -> None:
        self.abort_for(rid, {})

    def abort_for(self, rid: str, reason: dict[str, Any]) -> None:
        """As SGLang looks: waiting, compiling, then in the batch or in a step in flight."""
        self._node.mover.abort(lambda req: req.rid.startswith(rid), reason)
        ending = {"type": "abort", **reason}
        for req in [r for r in self.waiting if r.rid.startswith(rid)]:
            self.waiting.remove(req)
            if not self._node.mover.aborted(req.rid, ending):
                req.finished_reason = ending
                self._tell(req)
        for req in self.compiling.values():
            if req.rid.startswith(rid):
                req.to_finish = ending
                self._node.world.clock.after(0.0, self._node.compiled, req.rid)
        launched = [req for _, reqs in self.in_flight for req in reqs]
        for req in {id(r): r for r in [*self.batch, *self._joining, *launched]}.values():
            if not req.finished() and req.rid.startswith(rid):
                req.to_finish = ending

    def requeue(self, req: Request) -> None:
        assert not req.row, f"{req} still holds KV"
        assert not req.finished(), f"{req} is finished and would be recomputed"
        req.is_retracted = True
        self.waiting.append(req)

    # ------------------------------------------------------------------ steps

    def launch(self) -> bool:
        """Start a prefill of those that wait, or a decode step; False if nothing runs."""
        if self._joining:
            for req in self._joining:
                if not req.finished() and not req.is_retracted:
                    self.batch.append(req)
            self._joining = []
        if self.waiting and (step := self._prefill()):
            self._launched(step)
            return True
        if not self.batch:
            return False
        self.batch = [req for req in self.batch if req.finished_reason is None]
        coming = {id(req) for _, reqs in self.in_flight for req in reqs}
        if coming:
            self.batch = kept = [
                req
                for req in self.batch
                if id(req) not in coming or len(req.output_ids) + 1 < req.max_new_tokens
            ]
        else:
            kept = self.batch
        while kept and not self._fits(kept):
            self.retract(kept[-1])
            kept = self.batch
        step: Step = []
        size = self.page_size
        for req in kept:
            slots = req.slots
            have = len(slots)
            if have % size:
                slots.append(slots[-1] + 1)
            else:
                slots.append(self.pages.take() * size)
            req.committed += 1
            step.append((req, slots, have, have + 1))
        if step:
            self._launched(step)
        return bool(step)

    def _launched(self, step: Step) -> None:
        self.in_flight.append((step, [req for req, *_ in step]))
        self._unwritten.append(step)

    def _fits(self, reqs: Sequence[Request]) -> bool:
        available = self.pages.available()
        if len(reqs) <= available:
            return True
        return sum(len(req.slots) % self.page_size == 0 for req in reqs) <= available

    def _prefill(self) -> Step:
        step: Step = []
        while self.waiting and self.held_rows < self.rows:
            req = self.waiting[0]
            if len(req.chain) + 2 * self.page_size > self.free_tokens():
                break
            del self.waiting[0]
            self.seat(req, req.max_new_tokens)
            req.is_retracted = False
            req.slots = self.pages.share(req.chain)
            start = len(req.slots)
            self.extend(req, len(req.chain))
            req.committed = len(req.chain)
            self._joining.append(req)
            step.append((req, req.slots, start, len(req.slots)))
        return step

    def retract(self, req: Request) -> None:
        """Take its KV; it waits to be computed again, and its step in flight does not count."""
        self.batch = [other for other in self.batch if other is not req]
        self.release(req, keep_prefix=False)
        req.is_retracted = True
        self.waiting.append(req)

    def retract_all(self) -> None:
        """As a pause that retracts, once no result is to come."""
        for req in [r for r in (*self.batch, *self._joining) if not r.finished()]:
            self.retract(req)
        self._joining = []

    def is_idle(self, *, paused: bool) -> bool:
        """Whether SGLang itself sees nothing that holds KV."""
        batch = [req for req in self.batch if not req.finished()]
        return not (
            batch
            or self._joining
            or self.in_flight
            or (not paused and (self.waiting or self.compiling))
        )

    def flush(self) -> None:
        """Forget the prefix cache, and all else: SGLang does so only when nothing is here."""
        self.pages.clear(self.hidden)
        self.held_rows = 0

    def sync(self) -> None:
        """The device has done all it was told."""
        for step in self._unwritten:
            self._write(step)
        self._unwritten.clear()

    def result(self) -> None:
        """The oldest step's tokens are here."""
        step, reqs = self.in_flight.pop(0)
        if self._unwritten and self._unwritten[0] is step:
            self._unwritten.pop(0)
            self._write(step)
        pool, tag = self.pool, self.version * OTHER_WEIGHTS
        for req, slots, _, have in step:
            if req.finished_reason is not None or req.is_retracted:
                continue
            if slots is not req.slots:
                raise KvError(f"{req} decodes with KV that is not its own")
            if have != len(req.chain):
                raise KvError(f"{req} has {len(req.chain)} tokens, its step fed the {have}th")
            found = [*map(pool.__getitem__, slots[:have])]
            right = req.chain if not tag else [one ^ tag for one in req.chain]
            if found != right and self._node.world.judges(req.spec.rid):
                raise KvError(f"{req} decodes with {self._wrong(found, req)} KV")
            req.push(req.spec.next_token(req.chain[-1], self._node.number))
            if req.finished_reason is not None:
                self.release(req, keep_prefix=True)
        self.emit(reqs)

    def _write(self, step: Step) -> None:
        pool, tag = self.pool, self.version * OTHER_WEIGHTS
        for req, slots, start, end in step:
            # Of a request that has ended or lost its KV since, nobody knows what the step computes.
            known = len(req.chain) if slots is req.slots else 0
            for at in range(start, end):
                pool[slots[at]] = req.chain[at] ^ tag if at < known else GARBAGE

    def _wrong(self, found: list[int], req: Request) -> str:
        old = [one % OTHER_WEIGHTS for one in found] == req.chain
        return "other weights'" if old else "wrong"
