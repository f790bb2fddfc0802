"""One history: a fleet, its clients, and what is done to them, on one clock."""

from __future__ import annotations

import contextlib
import random
import traceback
from dataclasses import dataclass
from typing import Any

from sglang_star.config import StarConfig
from sglang_star.protocol import DrainOrder, MigrateOrder, Peer
from simulation import invariants
from simulation.clock import Clock
from simulation.node import Node
from simulation.plan import DISTURBED_S, Plan
from simulation.request import Request
from simulation.tokens import Spec, extend

HEARTBEAT_S, TIMEOUT_S, DEADLINE_S = 0.25, 1.0, 2.0
STUCK_S = 1.5
PROBE_S, STARVED_S = 0.25, 4.0
"""No client waits longer: a commit home may wait for lost tokens until its deadline, and what is
sent after it shows the gap, which is then waited for once more; both over a late way."""
GENTLE = frozenset({"slow", "abort", "duplicate"})
"""Faults that lose nothing and last for less than any time-out."""
FOLLOW_S, PATIENCE_S = 0.01, 4.0
BOUND_S = 40.0
"""No history lasts longer: its faults, every deadline after them, and decoding what is left."""


class Failed(Exception):
    """An invariant does not hold; ends the history."""


@dataclass(slots=True)
class Weather:
    """How messages fare just now; chances per message."""

    lose: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.0
    delay_s: float = 0.0
    stray: float = 0.0
    garble: float = 0.0
    stray_s: float = 0.0


@dataclass(slots=True)
class Client:
    """Who waits for one stream.

    Attributes:
        home: the process it is connected to; state: hash of the prompt and what it has; excused:
            why its stream may end early.
    """

    spec: Spec
    home: Node
    state: int
    seen: int = 0
    reason: dict[str, object] | None = None
    end: dict[str, Any] | None = None
    excused: str = ""


class History:
    """See the module's text; also all that a plan's events do.

    Attributes:
        trace: (time, who, what, details) of everything.
        failure: what does not hold, empty if all does.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.clock = Clock()
        self.random = random.Random(plan.seed ^ 0x5EED)
        self.weather = Weather()
        self.labelled: dict[bytes, Node] = {}
        self.fetches: set[Any] = set()
        self.blind_pairs: set[tuple[str, str]] = set()
        self.trace: list[tuple[float, str, str, tuple[Any, ...]]] = []
        self.failure = ""
        self.stack = ""
        self.specs = {spec.rid: spec for _, _, spec in plan.requests}
        self.clients: dict[str, Client] = {}
        self._updating: set[int] = set()
        self.config = StarConfig(
            predictor="off",
            heartbeat_s=HEARTBEAT_S,
            peer_timeout_s=TIMEOUT_S,
            stuck_timeout_s=STUCK_S,
            move_deadline_s=DEADLINE_S,
            copy_mb_per_step=(8 * plan.copy_tokens + 0.5) / 1e6,
            max_moves=3,
            max_guests=4,
        )
        self._engines = 0
        self._cuts: set[frozenset[str]] = set()
        self._late: dict[tuple[str, str], float] = {}
        self.gentle = all(e.what in GENTLE for e in plan.events if e.fault)
        self.nodes: dict[str, Node] = {}
        self.dead: list[Node] = []
        for name in plan.shapes:
            self._boot(name)

    # ------------------------------------------------------------------ running

    def run(self) -> str:
        """Run to the end; return what does not hold, empty if all does."""
        for at, name, spec in self.plan.requests:
            self.clock.at(at, self._ask, name, spec)
        for event in self.plan.events:
            self.clock.at(event.at, self._do, event.what, event.args)
        self.clock.at(DISTURBED_S, self._calm)
        with contextlib.suppress(Failed):
            if not self.clock.run(BOUND_S):
                left = "; ".join(invariants.at_rest(self))
                self.fail(f"it does not come to rest within {BOUND_S:g} s: {left}")
            for broken in invariants.at_rest(self):
                self.fail(broken)
        return self.failure

    def fail(self, what: str, error: BaseException | None = None) -> None:
        if isinstance(error, Failed):
            raise error
        self.failure = what
        if error is not None:
            self.stack = "".join(traceback.format_exception(error))
        self.note("history", "fails", what)
        raise Failed(what)

    def note(self, who: str, what: str, *details: Any) -> None:
        self.trace.append((self.clock.now, who, what, details))

    def judges(self, rid: str) -> bool:
        """Whether what this client gets is to be what its twin gets."""
        return True

    def garble(self, address: str, message: Any) -> None:
        """See :mod:`simulation.garbled`."""

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def at(self, address: str) -> Node | None:
        node = self.nodes.get(address[len("sim://") :])
        return node if node is not None and node.alive else None

    def cut(self, one: str, other: str) -> bool:
        return bool(self._cuts) and frozenset((one, other)) in self._cuts

    def late(self, one: str, other: str) -> float:
        return self._late.get((one, other), 0.0) if self._late else 0.0

    # ------------------------------------------------------------------ clients

    def _ask(self, name: str, spec: Spec) -> None:
        node = self.nodes[name]
        if not node.alive:
            return
        req = Request(spec.rid, spec)
        self.clients[spec.rid] = Client(spec, node, req.chain[-1])
        self.note("client", "asks", spec.rid, name)
        node.queue(req)

    def told(self, node: Node, req: Request, new: list[int], end: dict[str, Any] | None) -> None:
        """A client gets tokens, and the end."""
        client = self.clients.get(req.rid)
        if client is None:
            self.fail(f"{node.name} sends {new} to nobody, as {req.rid}")
            return
        if client.home is not node:
            self.fail(f"{node.name} sends to {req.rid}, whose home is {client.home.name}")
        if client.end is not None:
            self.fail(f"{req.rid} gets {new} after its end")
        for token in new:
            self._see(client, token)
        client.end = end
        if end is not None:
            self.note(node.name, "ends", req, end)
            if end["type"] != "abort":
                if end != client.reason:
                    self.fail(f"{req.rid} ends as {end}, its twin {client.reason}")
            elif not client.excused:
                self.fail(f"{req.rid} is aborted ({end}), and nobody asked for it")

    def _see(self, client: Client, token: int) -> None:
        """One token: what the same request that never moved would get next.

        One that is sampled goes on as some engine would from exactly what its client has.
        """
        spec = client.spec
        if client.reason is not None:
            self.fail(f"{spec.rid} gets {token} where its twin has ended")
        state = client.state
        if not (
            any(spec.next_token(state, engine) == token for engine in range(1, self._engines + 1))
            if spec.sampled
            else spec.next_token(state, 0) == token
        ):
            self.fail(f"{spec.rid} gets {token} at {client.seen}: its twin would not")
        client.seen += 1
        client.state = extend(state, token)
        client.reason = spec.ends(token, client.seen)

    def count_engine(self) -> int:
        self._engines += 1
        return self._engines

    # ------------------------------------------------------------------ events

    def _do(self, what: str, args: tuple[Any, ...]) -> None:
        self.note("plan", what, *args)
        getattr(self, what)(*args)

    def _boot(self, name: str) -> None:
        incarnation = sum(node.name == name for node in self.dead) + 1
        shape = self.plan.shapes[name]
        node = self.nodes[name] = Node(self, name, incarnation, shape, self.config)
        self.labelled[node.label] = node

    def _peer(self, name: str) -> Peer:
        return self.nodes[name].peer

    def _host(self, rid: str) -> Node | None:
        """Where an order for the request should go, as the statuses would tell the router."""
        for node in self.nodes.values():
            if node.alive and any(known == rid for known, _, _ in node.orders._movable()):
                return node
        return None

    def move(self, rid: str, target: str, hold: int) -> None:
        if (node := self._host(rid)) is not None:
            order = MigrateOrder(
                order_id=1, rid=rid, target=self._peer(target), reason="plan", hold_after=hold
            )
            node.input(lambda: self._obey(node, order))

    def follow(self, rid: str, path: str, hold: int, gap: float) -> None:
        """Order the request from host to host, on as soon as it decodes at each."""
        self._follow(rid, path, hold, gap, "", self.clock.now + PATIENCE_S)

    def _follow(self, rid: str, path: str, hold: int, gap: float, here: str, until: float) -> None:
        node = self._host(rid)
        if node is not None and here in ("", node.name) and node.name != path[0]:
            self.note("plan", "follows", rid, path)
            self.move(rid, path[0], hold)
            here, path = path[0], path[1:]
        if path and self.clock.now < until:
            self.clock.after(max(gap, FOLLOW_S), self._follow, rid, path, hold, gap, here, until)

    def arm(self, name: str, rid: str, target: str, at_tokens: int, hold: int) -> None:
        node = self.nodes[name]
        order = MigrateOrder(
            order_id=1,
            rid=rid,
            target=self._peer(target),
            reason="armed",
            hold_after=hold,
            at_tokens=at_tokens,
            expire_s=1.5,
        )
        node.input(lambda: self._obey(node, order))

    def drain(self, name: str) -> None:
        node = self.nodes[name]
        targets = tuple(other.peer for other in self.nodes.values() if other is not node)
        node.input(lambda: self._obey(node, DrainOrder(order_id=1, targets=targets)))

    def _obey(self, node: Node, order: Any) -> None:
        with node.faults.contained("an order"):
            reply = node.orders.obey(order)
            self.note(node.name, "answers", reply.error_type or "done", reply.message)

    def abort(self, rid: str, message: str) -> None:
        client = self.clients.get(rid)
        if client is None or client.end is not None:
            return
        client.excused = message or "aborted"
        reason: dict[str, Any] = {"message": message, "status_code": 503} if message else {}
        node = client.home
        node.input(lambda: node.engine.abort_for(rid, reason))

    def reset(self, name: str, count: int) -> None:
        """A connection breaks: the next messages of one instance do not arrive."""
        self.nodes[name].link.losing = count

    def lose(self, share: float, lasts: float) -> None:
        self.weather.lose = share
        self.clock.after(lasts, setattr, self.weather, "lose", 0.0)

    def duplicate(self, share: float, lasts: float) -> None:
        self.weather.duplicate = share
        self.clock.after(lasts, setattr, self.weather, "duplicate", 0.0)

    def scatter(self, share: float, longest: float, lasts: float) -> None:
        self.weather.stray, self.weather.stray_s = share, longest
        self.clock.after(lasts, setattr, self.weather, "stray", 0.0)

    def delay(self, share: float, longest: float, lasts: float) -> None:
        self.weather.delay, self.weather.delay_s = share, longest
        self.clock.after(lasts, setattr, self.weather, "delay", 0.0)

    def cut_off(self, one: str, other: str, lasts: float) -> None:
        pair = frozenset((f"sim://{one}", f"sim://{other}"))
        self._cuts.add(pair)
        self.clock.after(lasts, self._join, pair)

    def _join(self, pair: frozenset[str]) -> None:
        self._cuts.discard(pair)
        self._heal()

    def _heal(self) -> None:
        for node in self.nodes.values():
            if node.alive:
                node.link.healed()

    def blind(self, one: str, other: str, lasts: float) -> None:
        """The one cannot read the other's memory, while messages pass."""
        self.blind_pairs.add((one, other))
        self.clock.after(lasts, self.blind_pairs.discard, (one, other))

    def slow(self, one: str, other: str, late: float, lasts: float) -> None:
        """All that the one sends the other is late, in its order."""
        way = f"sim://{one}", f"sim://{other}"
        self._late[way] = late
        self.clock.after(lasts, self._late.pop, way, None)

    def freeze(self, name: str, lasts: float) -> None:
        node = self.nodes[name]
        node.frozen_until = max(node.frozen_until, self.clock.now + lasts)

    def stick(self, name: str, lasts: float) -> None:
        node = self.nodes[name]
        node.stuck_until = max(node.stuck_until, self.clock.now + lasts)

    def kill(self, name: str, back_after: float) -> None:
        node = self.nodes[name]
        node.kill()
        self.dead.append(node)
        for client in self.clients.values():
            if client.home is node:
                client.excused = "its home died"
        if back_after < BOUND_S:
            self.clock.after(back_after, self._restart, name)

    def _restart(self, name: str) -> None:
        self._boot(name)
        self.note(name, "is back")
        self._heal()

    def fill(self, name: str, share: float, lasts: float) -> None:
        """Somebody else has most of the memory for a while."""
        engine = self.nodes[name].engine
        taken = [engine.pages.take() for _ in range(int(engine.pages.available() * share))]
        engine.hidden += taken
        self.clock.after(lasts, self._empty, engine, taken)

    def _empty(self, engine: Any, taken: list[int]) -> None:
        engine.pages.free += taken
        engine.hidden = [page for page in engine.hidden if page not in set(taken)]

    def flush(self, name: str) -> None:
        node = self.nodes[name]

        def now() -> None:
            engine, mover = node.engine, node.mover
            if engine.is_idle(paused=node.paused) and not mover.holds_kv_off_batch:
                self.note(name, "flushes")
                engine.flush()

        node.input(now)

    def pause(self, name: str, lasts: float, retract: bool, abort: bool = False) -> None:
        """As SGLang pauses: in place, after a retraction of all, or after aborting all."""
        node = self.nodes[name]
        if abort:
            node.input(lambda: self._abort_all(node))
            return

        def now() -> None:
            node.paused = True
            if retract:
                node.mover.recomputing(recompute)
            # Whoever pauses hears that it is done before going on.
            self.clock.after(lasts, node.input, lambda: self._go_on(node))

        def recompute() -> None:
            while node.engine.in_flight:
                node.engine.result()
            node.engine.retract_all()

        node.input(now)

    def update(self, lasts: float) -> None:
        """New weights everywhere: each engine retracts all, loads them, flushes, and goes on."""
        for name, node in self.nodes.items():
            self.pause(name, lasts, True)
            node.input(lambda node=node: self._load(node, self.clock.now + lasts))

    def _load(self, node: Node, until: float) -> None:
        node.engine.version += 1
        self._updating.add(id(node))
        self._reflush(node, until)

    def _reflush(self, node: Node, until: float) -> None:
        engine = node.engine
        if engine.is_idle(paused=True) and not node.mover.holds_kv_off_batch:
            self.note(node.name, "flushes")
            engine.flush()
            self._updating.discard(id(node))
            self.clock.after(
                max(0.0, until - self.clock.now), node.input, lambda: self._go_on(node)
            )
        else:
            # SGLang says that it could not, and whoever updates asks again before going on: old KV
            # would be found in the cache.
            self.clock.after(0.01, node.input, lambda: self._reflush(node, until))

    def _go_on(self, node: Node) -> None:
        node.paused = id(node) in self._updating

    def _abort_all(self, node: Node) -> None:
        guests = {guest.client_rid for guest in node.mover.host.by_stream.values()}
        for rid, client in self.clients.items():
            if client.end is None and (client.home is node or rid in guests):
                client.excused = "aborted"
        node.engine.abort_for("", {})

    def _calm(self) -> None:
        """No message is lost, doubled or delayed any more; what lasts ends by itself."""
        weather = self.weather
        weather.lose = weather.duplicate = weather.delay = weather.stray = 0.0
        self.clock.after(PROBE_S, self._probe, {})

    def _probe(self, before: dict[str, tuple[int, float]]) -> None:
        """No client waits for long while somebody decodes for it and nobody stands still.

        And nobody decodes for long for a home that is gone or has the stream no more.
        """
        now = self.clock.now
        still = any(
            max(node.frozen_until, node.stuck_until) > now
            or node.paused
            or node.engine.hidden
            or node.engine.waiting
            for node in self.nodes.values()
        )
        since: dict[str, tuple[int, float]] = {}
        for node in self.nodes.values():
            for shadow in node.mover.home.shadows.values() if node.alive and not still else ():
                have = len(shadow.req.output_ids)
                known, began = before.get(shadow.stream_id, (have, now))
                since[shadow.stream_id] = have, began if known == have else now
                starved = known == have and now - began > STARVED_S
                if starved and self.judges(shadow.req.rid):
                    self.fail(f"{shadow.req.rid} gets no token for {STARVED_S:g} s")
            for guest in node.mover.host.by_stream.values() if node.alive and not still else ():
                home = self.at(guest.home.address)
                if home is None or guest.stream_id not in home.mover.home.shadows:
                    key = f"{node.name} for nobody: {guest.stream_id}"
                    since[key] = before.get(key, (0, now))
                    if now - since[key][1] > STARVED_S:
                        self.fail(f"{node.name} decodes {guest.req} for nobody")
        if any(client.end is None and client.home.alive for client in self.clients.values()):
            self.clock.after(PROBE_S, self._probe, since)
