"""The event loop: arrivals, step boundaries, transfers, statuses, rescheduling rounds."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sglang_star.errors import ConfigError
from sglang_star.platform.profile import PROFILES, Profile
from sglang_star_bench.simulator.emulated import EmulatedPredictor, ErrorCurve
from sglang_star_bench.simulator.instance import NEVER, Instance
from sglang_star_bench.simulator.links import Links
from sglang_star_bench.simulator.migration import Mover
from sglang_star_bench.simulator.prefill import PrefillPool
from sglang_star_bench.simulator.recorder import Recorder
from sglang_star_bench.simulator.request import Request, State
from sglang_star_bench.simulator.reserve import Foresight, by_forecast
from sglang_star_bench.simulator.router import SimRouter
from sglang_star_bench.simulator.table import Table
from sglang_star_bench.simulator.view import RecentLengths, StatusView
from sglang_star_bench.traces import IntArray, Trace
from sglang_star_router.policy.base import DispatchPolicy, ReschedulePolicy
from sglang_star_router.policy.calibration import Calibration
from sglang_star_router.policy.params import StarParams
from sglang_star_router.policy.snapshot import RESERVE_EACH, MoveOrder

Progress = Callable[[float], None]
RESERVES = ("blind", "age", "head", "oracle")
FEWEST_PAST = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    """What is simulated; times in seconds unless named otherwise.

    Attributes:
        decode: one profile per decode instance.
        prefill: profile of the prefill pool; prefill_instances: how many.
        duration_s: arrivals are taken until then; warmup_s: those before are not judged.
        drain_s: how long to wait for the rest after the last arrival; what is left then failed.
        max_new_tokens: the limit every client sets; traces do not record it. 0: every client
            sets the true length, as a replay on real engines does.
        status_interval_s, status_delay_s: how often statuses are taken, and how old they are
            when they arrive.
        decision_interval_s: between rescheduling rounds.
        copy_slowdown: factor on the step time of both ends of a copy.
        shared_links: KV from prefill and KV that moves share an instance's link.
        host_share: host memory for retracted KV as a share of the device pool, SGLang's default
            for ``host_pool``; what finds it full is aborted.
        reserve: who says what an instance keeps free for every active request: ``blind`` is
            ``reserved_tokens``, as SGLang does it; ``age``, ``head`` and ``oracle`` set it by
            forecast at every status, from what age alone tells, the emulated head or the truth.
        reserve_sigma, reserve_horizon: of that forecast, see :mod:`reserve`.
        error_scale: times the error curve; 0 perfect, ``inf`` useless.
        estimate_bias, estimate_band: factors on every estimate and on the width of its band, to
            emulate a head trained on other traffic.
        calibrate: correct estimates by how earlier ones turned out, as the router does.
        hold_deadline_s: held longer at the router, a request yields to fresher ones.
        timeline: keep every instance's KV share at every status, and every move, for a figure.
    """

    decode: tuple[Profile, ...]
    prefill: Profile = PROFILES["80gb-7b"]
    prefill_instances: int = 1
    duration_s: float = 600.0
    warmup_s: float = 0.0
    drain_s: float = 3600.0
    max_new_tokens: int = 32_768
    ttft_slo_ms: float = 2000.0
    tpot_slo_ms: float = 50.0
    status_interval_s: float = 0.25
    status_delay_s: float = 0.02
    decision_interval_s: float = 1.0
    copy_slowdown: float = 1.05
    shared_links: bool = True
    host_share: float = 0.2
    reserved_tokens: int = RESERVE_EACH
    clip_tokens: int = 4096
    reserve: str = "blind"
    reserve_sigma: float = 1.0
    reserve_horizon: int = 1536
    curve: ErrorCurve = field(default_factory=ErrorCurve.read)
    error_scale: float = 1.0
    estimate_bias: float = 1.0
    estimate_band: float = 1.0
    calibrate: bool = True
    hold_deadline_s: float = field(default_factory=lambda: StarParams().hold_deadline_s)
    timeline: bool = False


@dataclass(slots=True)
class Timeline:
    """KV share of every instance over time and the moves between them."""

    times_s: list[float] = field(default_factory=list)
    shares: list[list[float]] = field(default_factory=list)
    moves: list[tuple[float, int, int]] = field(default_factory=list)
    retractions: list[tuple[float, int]] = field(default_factory=list)


def past_lengths(trace: Trace) -> IntArray:
    """What is known of output lengths when a window begins.

    Raises:
        ConfigError: nothing is, or so little that it says nothing.
    """
    if trace.past.size < FEWEST_PAST:
        raise ConfigError(
            f"{trace.name}: {trace.past.size} requests before the window, and a predictor's prior "
            f"is made of at least {FEWEST_PAST}",
            hint="use a shorter --duration, so that the trace has a past",
        )
    return trace.past


class Fleet:
    """One run. Deterministic in (trace, config, policies, seed), timings of decisions apart."""

    def __init__(
        self,
        trace: Trace,
        config: FleetConfig,
        dispatch: DispatchPolicy,
        rescheduler: ReschedulePolicy | None,
        *,
        seed: int = 0,
        oracle: bool = False,
    ) -> None:
        if not config.decode:
            raise ConfigError("a fleet needs at least one decode instance")
        if config.prefill_instances < 1:
            raise ConfigError("a fleet needs at least one prefill instance")
        self.trace = trace
        self.config = config
        self.recorder = Recorder(config.ttft_slo_ms, config.tpot_slo_ms, config.warmup_s)
        self.table = Table(np.random.default_rng(seed))
        self.live: dict[str, Request] = {}
        self.timeline = Timeline()
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._order = 0
        self._arrived = 0
        width = len(str(len(config.decode) - 1))
        self.instances = [
            Instance(
                row,
                f"decode-{row:0{width}}",
                profile,
                self,
                reserved=config.reserved_tokens,
                clip=config.clip_tokens,
                host_share=config.host_share,
            )
            for row, profile in enumerate(config.decode)
        ]
        self.by_name = {i.name: i for i in self.instances}
        self.pool = PrefillPool(config.prefill, config.prefill_instances)
        self.links = Links(self.at, shared=config.shared_links)
        self.mover = Mover(
            self.recorder, self.pool, self.links, config.copy_slowdown, self.at, self._note
        )
        self.recent = RecentLengths()
        predictor = None
        looks_ahead = {dispatch.name, getattr(rescheduler, "name", "")} & {"star", "star-point"}
        if looks_ahead and not oracle:
            predictor = EmulatedPredictor(
                past_lengths(trace),
                config.curve,
                config.error_scale,
                bias=config.estimate_bias,
                band=config.estimate_band,
            )
        self.calibration = Calibration(enabled=config.calibrate)
        self.view = StatusView(
            self.instances, self.table, predictor, self.recent, self.calibration, oracle=oracle
        )
        self.foresight = self._foresight()
        self.router = SimRouter(
            dispatch,
            rescheduler,
            self.recorder,
            send=self._send,
            refuse=self._refuse,
            move=self._move,
            oracle=oracle,
            hold_deadline_s=config.hold_deadline_s,
            predicted=self._predicted if dispatch.name.endswith("shortest-first") else None,
        )
        self._oracle = oracle

    def _foresight(self) -> Foresight | None:
        config = self.config
        if config.reserve not in RESERVES:
            raise ConfigError(
                f"no reserve {config.reserve!r}", hint=f"choose from {', '.join(RESERVES)}"
            )
        if config.reserve in ("blind", "oracle"):
            return None if config.reserve == "blind" else Foresight(self.table, None)
        scale = math.inf if config.reserve == "age" else config.error_scale
        return Foresight(
            self.table, EmulatedPredictor(past_lengths(self.trace), config.curve, scale)
        )

    def _predicted(self, request: Request) -> float:
        """Output tokens as guessed from the prompt: with the error that the curve begins with."""
        if self._oracle or self.config.error_scale == 0.0:
            return float(request.length)
        spread = self.config.error_scale * float(self.config.curve.log_error_std[0])
        return request.length * math.exp(spread * self.table.noise[request.slot, 0])

    # ------------------------------------------------------------------ running

    def run(self, progress: Progress | None = None) -> Recorder:
        """Simulate until the last request is done or the drain time is over."""
        config = self.config
        self._status_now()
        self.at(config.status_interval_s, self._tick, None)
        self.at(config.decision_interval_s, self._round, None)
        self._next_arrival(None)
        end = config.duration_s + config.drain_s
        while self._events:
            when, _, call, argument = heapq.heappop(self._events)
            if when > end or (when > config.duration_s and not self.live):
                break
            self.now_s = self.mover.now_s = when
            call(argument)
            if progress is not None:
                progress(when)
        for request in list(self.live.values()):
            request.state = State.FAILED
            self.request_done(request)
        return self.recorder

    def at(self, when_s: float, call: Callable[[Any], None], argument: Any) -> None:
        """Schedule a call; equal times run in the order they were scheduled."""
        self._order += 1
        heapq.heappush(self._events, (when_s, self._order, call, argument))

    def _next_arrival(self, due: tuple[int, int, int] | None) -> None:
        if due is not None:
            self._admit_from_trace(*due)
        row = self._arrived
        if row < self.trace.arrival_s.size:
            when = float(self.trace.arrival_s[row])
            if when <= self.config.duration_s:
                self._arrived += 1
                prompt, length = int(self.trace.input_len[row]), int(self.trace.output_len[row])
                self.at(when, self._next_arrival, (row, prompt, length))

    def _admit_from_trace(self, row: int, prompt: int, length: int) -> None:
        config = self.config
        limit = config.max_new_tokens or length
        length = min(length, limit)
        # SGLang refuses what could never be admitted even on an idle instance.
        room = max(i.capacity for i in self.instances) - config.reserved_tokens
        if prompt + min(limit, config.clip_tokens) > room:
            self.recorder.too_long += self.now_s >= config.warmup_s
            return
        request = self.table.add(f"r{row}", self.now_s, prompt, length, limit)
        self.live[request.rid] = request
        self.recorder.arrived(request)
        self.router.arrive(request, self.now_s)

    def _note(self, request: Request) -> None:
        if request.rid in self.live:
            self.table.note(request)

    def _tick(self, _: None) -> None:
        config = self.config
        self._status_now()
        self.at(self.now_s + config.status_interval_s, self._tick, None)

    def _status_now(self) -> None:
        config = self.config
        snapshot = self.view.take(self.now_s, config.status_delay_s)
        if self.foresight is not None:
            each = by_forecast(
                self.foresight.of(snapshot), config.reserve_horizon, config.reserve_sigma
            )
            for instance, reserved in zip(self.instances, each, strict=True):
                instance.reserved = int(reserved)
            told = replace(snapshot.instances, reserve_each=each, guest_reserve=each)
            snapshot = replace(snapshot, instances=told)
        share = snapshot.instances.kv_used / snapshot.instances.kv_capacity
        if self.now_s >= config.warmup_s and (mean := share.mean()) > 0:
            self.recorder.load_cv_sum += float(share.std() / mean)
            self.recorder.load_cv_count += 1
        if config.timeline:
            self.timeline.times_s.append(self.now_s)
            self.timeline.shares.append([float(s) for s in share])
        taken = self.now_s
        if self.router.snapshot is None:
            self.router.status(snapshot, taken, self.now_s)
            return
        self.at(
            self.now_s + config.status_delay_s,
            lambda s: self.router.status(s, taken, self.now_s),
            snapshot,
        )

    def _round(self, _: None) -> None:
        self.router.reschedule(self.now_s)
        self.at(self.now_s + self.config.decision_interval_s, self._round, None)

    # ------------------------------------------------------------------ the router's wishes

    def _send(self, request: Request, name: str) -> None:
        self.by_name[name].enqueue(request, self.now_s)
        self.table.note(request)

    def _refuse(self, request: Request) -> None:
        request.state = State.FAILED
        self.recorder.rejected += request.arrival_s >= self.config.warmup_s
        self.request_done(request)

    def _move(self, order: MoveOrder) -> None:
        source, target = self.by_name[order.source], self.by_name[order.target]
        request = self.live.get(order.rid)
        started = self.mover.start(request, source, target, order.mode, self.now_s)
        if started and self.config.timeline:
            self.timeline.moves.append((self.now_s, source.row, target.row))

    # ------------------------------------------------------------------ FleetHooks

    def wake_instance(self, instance: Instance, when_s: float, version: int) -> None:
        """See :class:`FleetHooks`."""
        self.at(when_s, self._wake, (instance, version))

    def _wake(self, wake: tuple[Instance, int]) -> None:
        instance, version = wake
        if version == instance.wake_version and instance.wake_s < NEVER:
            instance.wake(self.now_s)

    def tokens_decoded(self, requests: int, steps: int, seconds: float) -> None:
        """See :class:`FleetHooks`."""
        count = requests * steps
        self.recorder.itl.add(seconds * 1e3 / steps, count)
        self.recorder.decoded_tokens += count
        if self.config.warmup_s <= self.now_s <= self.config.duration_s:
            self.recorder.judged_tokens += count

    def prefill(self, request: Request, now_s: float) -> None:
        """See :class:`FleetHooks`."""
        self.table.note(request)
        target = request.instance
        assert target is not None
        for when, tokens, last in self.pool.submit(request.prompt, now_s):
            self.at(when, self._computed, (request, target, tokens, last))

    def _computed(self, chunk: tuple[Request, Instance, int, bool]) -> None:
        request, target, tokens, last = chunk
        arrived = self._prefilled if last else self._nothing
        self.links.send(None, target, tokens, self.now_s, arrived, request)

    def _nothing(self, _: Any) -> None:
        """An earlier chunk has arrived: the last one is waited for."""

    def _prefilled(self, request: Request) -> None:
        assert request.instance is not None
        request.instance.arrive(request, self.now_s)
        self.table.note(request)

    def request_entered(self, request: Request, instance: Instance) -> None:
        """See :class:`FleetHooks`."""
        self.table.note(request)

    def request_left(self, request: Request, tokens: int) -> None:
        """See :class:`FleetHooks`."""
        self.table.note(request)

    def request_retracted(self, request: Request) -> None:
        """See :class:`FleetHooks`."""
        self.recorder.retractions += 1
        if self.config.timeline and request.instance is not None:
            self.timeline.retractions.append((self.now_s, request.instance.row))
        self.table.note(request)

    def request_aborted(self, request: Request) -> None:
        """See :class:`FleetHooks`."""
        self.recorder.aborted += request.arrival_s >= self.config.warmup_s

    def request_parked(self, request: Request, now_s: float) -> None:
        """See :class:`FleetHooks`."""
        self._note(request)
        self.mover.parked(request, now_s)

    def request_done(self, request: Request) -> None:
        """See :class:`FleetHooks`."""
        self.recorder.done(request)
        if request.state == State.FINISHED:
            self.recent.add(request.length)
            self.calibration.ended(request.rid, request.length)
        else:
            self.calibration.lost(request.rid)
        if self.live.pop(request.rid, None) is not None:
            self.table.remove(request)

    def gap_seen(self, request: Request, now_s: float, step_s: float) -> None:
        """See :class:`FleetHooks`."""
        gap_ms = (now_s - request.last_token_s) * 1e3
        self.recorder.itl.add(gap_ms + step_s * 1e3)
        self.recorder.itl.add(step_s * 1e3, -1.0)
        if request.moved_s >= request.last_token_s:
            self.recorder.stall.add(gap_ms)
