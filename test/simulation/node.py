"""One instance: the loop of a scheduler around the real protocol and a fake engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sglang_star.config import StarConfig
from sglang_star.errors import IllegalTransition
from sglang_star.faults import Faults
from sglang_star.migration.mover import Mover
from sglang_star.orders import Orders
from sglang_star.protocol import Peer
from simulation.engine import FakeEngine
from simulation.network import Link
from simulation.request import Request
from simulation.transport import SLOTS, Staging, transports

if TYPE_CHECKING:
    from simulation.history import History
    from simulation.plan import EngineShape

IDLE_S = 0.05


class Watcher(Faults):
    """Containment as in production, which tells the history what it contained."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self._node = node

    def _note(self, what: str, error: Exception) -> None:
        self.counts[what] += 1
        world = self._node.world
        world.fail(f"a defect in {what} on {self._node.name}: {error!r}", error)


class Node:
    """See the module's text.

    Attributes:
        alive: whether its process runs; frozen_until: it does nothing before; stuck_until: its
            scheduler does not, its links do; paused: its steps are.
    """

    def __init__(
        self, world: History, name: str, incarnation: int, shape: EngineShape, config: StarConfig
    ) -> None:
        self.world = world
        self.name = name
        self.number = world.count_engine()
        self.shape = shape
        self.alive = True
        self.frozen_until = 0.0
        self.stuck_until = 0.0
        self.paused = False
        self.peer = Peer(instance_id=name, incarnation=incarnation, address=f"sim://{name}")
        self.link = Link(self, self.peer, config)
        self.engine = FakeEngine(
            self, page_size=shape.page_size, pages=shape.pages, rows=shape.rows
        )
        self.faults = Watcher(self)
        self.label = f"{name}/{incarnation}".encode()
        self.staging = Staging(SLOTS, 8 * max(shape.page_size, world.plan.copy_tokens))
        self.transports = transports(self, self.staging)
        self.mover = Mover(
            self.engine, self.link, config, "fingerprint", self.faults, self.transports
        )
        self.orders = Orders(
            self.engine,
            self.mover,
            self.peer,
            config,
            status=lambda: None,  # type: ignore[arg-type, return-value]
            step_ms=lambda: shape.step_s * 1e3,
        )
        self._inputs: deque[Callable[[], object]] = deque()
        self._inbox: deque[Any] = deque()
        self._urgent: deque[Any] = deque()
        self._stepping = False
        self._planned: float | None = None

    # ------------------------------------------------------------------ what comes in

    def input(self, act: Callable[[], object]) -> None:
        """Something for the next step boundary from our own clients and operators."""
        if self.alive:
            self._inputs.append(act)
            self._wake(self.world.clock.now)

    def arrived(self, item: Any, *, urgent: bool) -> None:
        (self._urgent if urgent else self._inbox).append(item)
        if self._stepping:
            if urgent and self.mover.under_way and not self._held_up():
                with self:
                    while self._urgent:
                        self.mover.handle(self._urgent.popleft())
                    self.mover.flush()
        else:
            self._wake(self.world.clock.now)

    def compiled(self, rid: str) -> None:
        self.input(lambda: self._compiled(rid))

    def _compiled(self, rid: str) -> None:
        req = self.engine.compiling.pop(rid, None)
        if req is not None and not self.mover.rebuilt(req):
            self.engine.waiting.append(req)

    def queue(self, req: Request) -> None:
        self.input(lambda: self.engine.waiting.append(req))

    def kill(self) -> None:
        self.alive = False

    # ------------------------------------------------------------------ the loop

    def _wake(self, when: float) -> None:
        if not self._stepping and (self._planned is None or when < self._planned):
            self._planned = when
            self.world.clock.at(when, self._loop, when)

    def _held_up(self) -> bool:
        now = self.world.clock.now
        return self.frozen_until > now or self.stuck_until > now

    def _loop(self, planned: float) -> None:
        if not self.alive or self._stepping or self._planned != planned:
            return
        self._planned = None
        if self._held_up():
            self._wake(max(self.frozen_until, self.stuck_until))
            return
        with self:
            self._tick()
            if self.paused:
                self._wake(self.world.clock.now + IDLE_S)
                return
            before = len(self.engine.in_flight)
            launched = self.engine.launch()
        if launched or before:
            self._stepping = True
            lasts = self.shape.step_s if launched else 0.001
            lasts *= self.world.random.uniform(0.8, 1.2)
            due = before if self.shape.overlap else 1
            self.world.clock.after(lasts, self._finish, due)
        elif self._waits():
            self._wake(self.world.clock.now + IDLE_S)

    def _finish(self, due: int) -> None:
        if not self.alive:
            return
        if self._held_up():
            until = max(self.frozen_until, self.stuck_until)
            self.world.clock.at(until, self._finish, due)
            return
        self._stepping = False
        with self:
            for _ in range(due):
                self.engine.result()
        self._wake(self.world.clock.now)

    def _tick(self) -> None:
        mover = self.mover
        mover.poll()
        while self._inputs:
            self._inputs.popleft()()
        while self._urgent or self._inbox:
            mover.handle((self._urgent or self._inbox).popleft())
        mover.step()
        if mover.armed or self.orders._drain_targets:
            with self.faults.contained("orders"):
                self.orders.step()
        mover.flush()
        if self.link.watches or mover.under_way or mover.target.moves or mover.host.by_stream:
            self.link.watch(mover.watched())

    def _waits(self) -> bool:
        """Whether something here goes on by the clock alone."""
        mover = self.mover
        return bool(
            mover.sender.busy
            or self.engine.tickets
            or self.engine.draining()
            or mover.target.moves
            or mover.host.by_stream
            or mover.armed
            or self.engine.waiting
            or (self.orders._drain_targets and self.engine.batch)
        )

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """What leaves a block inside a node ends an engine, which nothing may."""
        if isinstance(error, IllegalTransition):
            self.world.fail(f"{self.name} met a defect: {error}", error)
        elif isinstance(error, Exception):
            self.world.fail(f"{self.name} ended: {error!r}", error)
