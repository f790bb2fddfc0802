"""A decode instance of SGLang: continuous batching, KV pool, admission, retraction.

What is modelled after SGLang 0.5.23's disaggregated decode scheduler:

* Admission, first come first served: a request needs its prompt plus ``reserved`` tokens, and room
  for one output of up to ``clip`` tokens once everything else were retracted; ``reserved`` tokens
  are kept for every active request. Nobody is admitted, nor joins, while retracted requests wait.
* Before each step every running request takes one token. If they do not fit, the request with the
  fewest output tokens (longest prompt among equals) is copied to host memory, until they do; at
  least one is, and the last one standing is aborted if it does not fit alone.
* Host memory for these is a share of the device pool; a request that finds it full is aborted.
* Retracted requests resume in order, each once its KV plus ``reserved`` tokens fit.

Steps are not simulated one by one. Between two changes of the batch ``n`` requests run and each
step adds ``n`` KV tokens, so step times form an arithmetic series with a closed-form sum: the
instance sleeps until its next *interesting* step boundary (a finish, a full pool, something
waiting to join) and jumps there. The result is the same as stepping, at a cost per request
instead of per token.
"""

from __future__ import annotations

import heapq
import math
from collections import deque

from sglang_star.platform.profile import Profile
from sglang_star_bench.simulator.fleet_hooks import FleetHooks
from sglang_star_bench.simulator.request import Request, State
from sglang_star_router.policy.snapshot import RESERVE_EACH

NEVER = math.inf


class Instance:
    """State of one decode instance.

    Attributes:
        steps: decode steps done since the start.
        started_s: when the step after ``steps`` began (the segment's first boundary).
        running: slot -> request; running_kv: KV tokens of these at that boundary.
        held_kv: KV of requests that are not in the batch: prefilling, arrived, parked.
        reserved_kv: KV reserved for requests that are being moved here.
        host_kv: KV of retracted requests in host memory; host_capacity: the most there may be.
        slowdown: factor on step time, above 1 while KV is being copied.
    """

    def __init__(
        self,
        row: int,
        name: str,
        profile: Profile,
        fleet: FleetHooks,
        *,
        reserved: int = RESERVE_EACH,
        clip: int = 4096,
        host_share: float = NEVER,
    ) -> None:
        self.row = row
        self.name = name
        self.profile = profile
        self.fleet = fleet
        self.reserved = reserved
        self.clip = clip
        self.capacity = profile.kv_capacity
        self.host_capacity = host_share * self.capacity
        self.host_kv = 0
        self.steps = 0
        self.started_s = 0.0
        self.running: dict[int, Request] = {}
        self.running_kv = 0
        self.held_kv = 0
        self.reserved_kv = 0
        self.queue: deque[Request] = deque()
        self.prefilling = 0
        self.arrived: deque[Request] = deque()
        self.parking: list[Request] = []
        self.retracted: deque[Request] = deque()
        self.finishing: list[tuple[int, int, Request]] = []
        self._entries = 0
        self.copies = 0
        self.moves_out = 0
        self.moves_in = 0
        self.slowdown = 1.0
        self._next_slowdown = 1.0
        self.draining = False
        self.wake_s = NEVER
        self.wake_version = 0
        self.last_step_ms = 0.0

    # ------------------------------------------------------------------ time and memory

    def step_s(self) -> float:
        """Duration of the step that is running now."""
        return self.profile.step_ms(len(self.running), self.running_kv) * self.slowdown / 1e3

    def span_s(self, steps: int) -> float:
        """Duration of the next ``steps`` steps of the unchanged batch."""
        growth = self.profile.per_token_ms * len(self.running) * self.slowdown / 1e3
        return steps * self.step_s() + growth * steps * (steps - 1) / 2.0

    def steps_within(self, seconds: float) -> int:
        """Whole steps of the unchanged batch that fit in ``seconds``."""
        if not self.running or seconds <= 0.0:
            return 0
        half = self.profile.per_token_ms * len(self.running) * self.slowdown / 2e3
        linear = self.step_s() - half
        root = math.sqrt(linear * linear + 4.0 * half * seconds)
        steps = int(2.0 * seconds / (linear + root) + 1e-9)
        return steps - 1 if self.span_s(steps) > seconds + 1e-9 else steps

    def skip(self, steps: int) -> None:
        """Do ``steps`` steps of the unchanged batch."""
        if steps <= 0:
            return
        seconds = self.span_s(steps)
        count = len(self.running)
        self.fleet.tokens_decoded(count, steps, seconds)
        self.last_step_ms = seconds * 1e3 / steps
        self.started_s += seconds
        self.steps += steps
        self.running_kv += count * steps

    def sync(self, now_s: float) -> None:
        """Do the steps completed by ``now_s``; the batch is unchanged till the next wake."""
        self.skip(self.steps_within(now_s - self.started_s))

    @property
    def used_kv(self) -> int:
        """Tokens in the pool that are neither free nor reserved for a guest."""
        return self.running_kv + self.held_kv

    @property
    def free_kv(self) -> int:
        """Tokens nobody holds."""
        return self.capacity - self.running_kv - self.held_kv - self.reserved_kv

    @property
    def active(self) -> int:
        """Requests SGLang keeps a reserve for."""
        return len(self.running) + self.prefilling + len(self.arrived)

    # ------------------------------------------------------------------ from outside

    def enqueue(self, request: Request, now_s: float) -> None:
        """A request arrives from the router."""
        request.state = State.QUEUED
        request.instance = self
        self.queue.append(request)
        self.poke(now_s)

    def arrive(self, request: Request, now_s: float, *, from_prefill: bool = True) -> None:
        """KV of a request is complete here; it joins at the next boundary."""
        request.state = State.ARRIVED
        request.instance = self
        if from_prefill:
            self.prefilling -= 1
        self.arrived.append(request)
        self.poke(now_s)

    def park(self, request: Request, now_s: float) -> None:
        """Take a running request out of the batch at the next boundary, for a move."""
        self.parking.append(request)
        self.poke(now_s)

    def can_reserve(self, tokens: int) -> bool:
        """Whether a guest of that size may come, by the rule that lets retracted ones resume."""
        waiting = self.retracted or self.queue
        spare = self.free_kv - self.reserved * self.active
        return not waiting and not self.draining and spare >= tokens + self.reserved

    def copying(self, change: int, slowdown: float, now_s: float) -> None:
        """Start (+1) or end (-1) a KV copy that shares this instance's bandwidth."""
        self.copies += change
        self._next_slowdown = slowdown if self.copies else 1.0
        self.poke(now_s)

    def poke(self, now_s: float) -> None:
        """Something changed: look again at the next step boundary."""
        if not self.running:
            self._wake_at(max(now_s, self.started_s))
            return
        done = self.steps_within(now_s - self.started_s)
        boundary = self.started_s + self.span_s(done)
        if boundary < now_s - 1e-9:
            boundary = self.started_s + self.span_s(done + 1)
        self._wake_at(boundary)

    def _wake_at(self, when_s: float) -> None:
        if when_s < self.wake_s:
            self.wake_s = when_s
            self.wake_version += 1
            self.fleet.wake_instance(self, when_s, self.wake_version)

    # ------------------------------------------------------------------ the scheduler's loop

    def wake(self, now_s: float) -> None:
        """One pass of the scheduler at a step boundary."""
        self.wake_s = NEVER
        if self.running:
            self.sync(now_s)
        else:
            self.started_s = max(self.started_s, now_s)
        self.slowdown = self._next_slowdown
        self._finish()
        self._park()
        self._resume()
        if not self.retracted:
            self._join()
            self._admit()
        self._make_room()
        self._sleep()

    def _finish(self) -> None:
        while self.finishing and self.finishing[0][0] <= self.steps:
            finish_step, _, request = heapq.heappop(self.finishing)
            if self._runs(request) and request.finish_step == finish_step:
                self._leave(request)
                request.last_token_s = self.started_s
                request.state = State.FINISHED
                self.fleet.request_done(request)

    def _park(self) -> None:
        for request in self.parking:
            if self._runs(request):
                self._leave(request)
                self.held_kv += request.kv(self.steps)
                request.last_token_s = self.started_s
                request.state = State.PARKED
            self.fleet.request_parked(request, self.started_s)
        self.parking.clear()

    def _resume(self) -> None:
        while self.retracted:
            request = self.retracted[0]
            wanted = request.kv(self.steps) + self.reserved
            if self.free_kv - self.reserved * self.active < wanted:
                return
            self.retracted.popleft()
            self.host_kv -= request.kv(self.steps)
            self.started_s += (
                request.kv(self.steps) * self.profile.kv_bytes / (self.profile.host_bytes_per_s)
            )
            self._enter(request)

    def _join(self) -> None:
        while self.arrived and len(self.running) < self.profile.max_running:
            request = self.arrived.popleft()
            self.held_kv -= request.kv(self.steps)
            if request.first_token_s < 0:
                request.first_token_s = request.last_token_s = self.started_s
                request.output = 1
                if request.length <= 1:
                    request.state = State.FINISHED
                    self.fleet.request_done(request)
                    continue
            self._enter(request)

    def _admit(self) -> None:
        while self.queue and self.active < self.profile.max_running:
            request = self.queue[0]
            wanted = max(
                request.prompt + self.reserved,
                request.prompt + min(request.max_new, self.clip) - self.running_kv,
            )
            if self.free_kv - self.reserved * self.active < wanted:
                return
            if self.free_kv - self._room_for_one() < wanted:
                return
            self.queue.popleft()
            self.held_kv += request.prompt
            self.prefilling += 1
            request.state = State.PREFILLING
            self.fleet.prefill(request, self.started_s)

    def _room_for_one(self) -> int:
        """Tokens the largest running request still needs once all others were retracted."""
        if not self.running:
            return 0
        largest = max(r.prompt + min(r.max_new, self.clip) for r in self.running.values())
        return largest - self.running_kv

    def _make_room(self) -> None:
        count = len(self.running)
        if not count or self.free_kv >= count:
            return
        order = sorted(
            self.running.values(), key=lambda r: (r.tokens(self.steps), -r.prompt), reverse=True
        )
        first = True
        while first or self.free_kv < len(self.running):
            if len(order) == 1:
                break
            first = False
            self._retract(order.pop())
        if len(order) == 1 and self.free_kv < 1:
            self._leave(order[0])
            order[0].state = State.FAILED
            self.fleet.request_aborted(order[0])
            self.fleet.request_done(order[0])

    def _retract(self, request: Request) -> None:
        self._leave(request)
        request.last_token_s = self.started_s
        if self.host_kv + request.kv(self.steps) > self.host_capacity:
            request.state = State.FAILED
            self.fleet.request_aborted(request)
            self.fleet.request_done(request)
            return
        request.state = State.RETRACTED
        self.host_kv += request.kv(self.steps)
        self.retracted.append(request)
        self.started_s += (
            request.kv(self.steps) * self.profile.kv_bytes / self.profile.host_bytes_per_s
        )
        self.fleet.request_retracted(request)

    def _sleep(self) -> None:
        """Set the next wake: the earliest finish or the step that no longer fits."""
        if not self.running:
            return
        while self.finishing and not (
            self._runs(self.finishing[0][2])
            and self.finishing[0][2].finish_step == self.finishing[0][0]
        ):
            heapq.heappop(self.finishing)
        to_finish = self.finishing[0][0] - self.steps
        to_full = self.free_kv // len(self.running)
        self._wake_at(self.started_s + self.span_s(max(min(to_finish, to_full), 1)))

    # ------------------------------------------------------------------ batch membership

    def _runs(self, request: Request) -> bool:
        return request.state == State.RUNNING and request.instance is self

    def _enter(self, request: Request) -> None:
        self._entries += 1
        request.joined_step = self.steps
        request.finish_step = self.steps + request.length - request.output
        request.state = State.RUNNING
        self.running[request.slot] = request
        self.running_kv += request.kv(self.steps)
        heapq.heappush(self.finishing, (request.finish_step, self._entries, request))
        if request.last_token_s < self.started_s:
            self.fleet.gap_seen(request, self.started_s, self.step_s())
        self.fleet.request_entered(request, self)

    def _leave(self, request: Request) -> None:
        tokens = request.tokens(self.steps)
        self.running_kv -= request.kv(self.steps)
        request.output = tokens
        request.joined_step = self.steps
        del self.running[request.slot]
        self.fleet.request_left(request, tokens)
