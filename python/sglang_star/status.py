"""What this instance tells the fleet: its load, and every request's length and estimate."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from sglang.srt.disaggregation.utils import DisaggregationMode

from sglang_star.engine import batch
from sglang_star.engine.real import SglangEngine
from sglang_star.faults import Faults
from sglang_star.migration.mover import Mover
from sglang_star.migration.transport.choice import Transports
from sglang_star.platform import paced
from sglang_star.predictor import runner
from sglang_star.protocol import InstanceStatus, Peer, RequestStatus
from sglang_star.star_request import star_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

RUNNING, JOINING, QUEUED = "running", "joining", "queued"
"""State of a request that is not moving: decoding, about to, waiting to be admitted or resumed."""

EMA_WEIGHT = 0.1
WINDOW = 256

ROLES = {
    DisaggregationMode.NULL: "aggregated",
    DisaggregationMode.PREFILL: "prefill",
    DisaggregationMode.DECODE: "decode",
}


class StepTimer:
    """Time from one decode result to the next, while decoding without interruption.

    Attributes:
        ema_ms: exponential mean; p99_ms: over the last :data:`WINDOW` steps.
    """

    def __init__(self) -> None:
        self.ema_ms = 0.0
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._last: float | None = None

    def decoded(self) -> None:
        """A decode step's result is in."""
        now = time.monotonic()
        if self._last is not None:
            step_ms = (now - self._last) * 1e3
            self._recent.append(step_ms)
            self.ema_ms += (step_ms - self.ema_ms) * (EMA_WEIGHT if self.ema_ms else 1.0)
        self._last = now

    def interrupted(self) -> None:
        """The next decode result does not follow a decode step."""
        self._last = None

    @property
    def p99_ms(self) -> float:
        """P99 of the recent steps; 0 before the first."""
        return float(np.percentile(self._recent, 99)) if self._recent else 0.0


class StatusReporter:
    """Builds :class:`InstanceStatus` from the scheduler as it stands."""

    def __init__(
        self,
        scheduler: Scheduler,
        engine: SglangEngine,
        peer: Peer,
        mover: Mover,
        timer: StepTimer,
        faults: Faults,
        dropped: Mapping[str, int],
        transports: Transports,
    ) -> None:
        self._scheduler = scheduler
        self._engine = engine
        self._pages = engine.pages
        self._peer = peer
        self._sender = mover.sender
        self._target = mover.target
        self._guests = mover.host
        self._log = mover.log
        self._armed = mover.armed
        self._faults = faults
        self._dropped = dropped
        self._transports = transports
        self._timer = timer
        self._sequence = 0
        self.retractions = 0

    def report(self, *, all_reports: bool = False) -> InstanceStatus:
        """The status now; every call has a new sequence number.

        Args:
            all_reports: add the older reports of moves that are still kept.
        """
        self._sequence += 1
        scheduler = self._scheduler
        running = [self._describe(req, RUNNING) for req in self._running()]
        running += [self._describe(req, JOINING) for req in self._joining()]
        queued = [self._describe(req, QUEUED) for req in self._queued()]
        retracted = [self._describe(req, QUEUED) for req in batch.retracted(scheduler)]
        arriving = [move.req for move in self._target.moves.values() if move.req]
        reserved = sum(map(self._engine.held, arriving))
        return InstanceStatus(
            instance_id=self._peer.instance_id,
            incarnation=self._peer.incarnation,
            sequence=self._sequence,
            role=ROLES[scheduler.disaggregation_mode],
            wall_s=time.time(),
            monotonic_s=time.monotonic(),
            step_ms_ema=self._timer.ema_ms,
            step_ms_p99=self._timer.p99_ms,
            kv_capacity_tokens=self._pages.capacity,
            kv_used_tokens=max(0, self._pages.capacity - self._pages.free - reserved),
            kv_reserved_tokens=reserved,
            running=len(running),
            queued=len(queued),
            retracted=len(retracted),
            retractions=self.retractions,
            draining=self._target.draining,
            requests=(*running, *queued, *retracted),
            recent_moves=tuple(self._log.reports) if all_reports else self._log.recent(),
            move_outcomes=dict(self._log.outcomes),
            predictor_fallbacks=runner.fallbacks,
            predictor_failures=runner.failures,
            paced_late=paced.late,
            armed=len(self._armed),
            faults=dict(self._faults.counts),
            dropped=dict(self._dropped),
            transports=self._transports.states(),
        )

    def _running(self) -> Iterator[Req]:
        seen: set[int] = set()
        parked = (move.req for move in self._sender.moves.values())
        last = self._scheduler.last_batch
        batches = [self._scheduler.running_batch.reqs, last.reqs if last else (), parked]
        for reqs in batches:
            for req in reqs:
                if id(req) not in seen and not req.finished() and req.kv.holds_kv:
                    seen.add(id(req))
                    yield req

    def _joining(self) -> Iterator[Req]:
        """Admitted, holding KV, and not decoding yet: SGLang keeps a reserve for these too."""
        scheduler = self._scheduler
        if scheduler.disaggregation_mode == DisaggregationMode.DECODE:
            yield from (waiting.req for waiting in scheduler.disagg_decode_transfer_queue.queue)
            yield from scheduler.waiting_queue

    def _queued(self) -> Iterator[Req]:
        scheduler = self._scheduler
        if scheduler.disaggregation_mode == DisaggregationMode.DECODE:
            prealloc = scheduler.disagg_decode_prealloc_queue
            yield from (waiting.req for waiting in prealloc.queue)
            return
        yield from scheduler.waiting_queue
        if scheduler.disaggregation_mode == DisaggregationMode.PREFILL:
            yield from scheduler.disagg_prefill_bootstrap_queue.queue

    def _describe(self, req: Req, state: str) -> RequestStatus:
        guest = self._guests.by_rid.get(req.rid)
        star = star_of(req)
        move = next((m for m in self._sender.moves.values() if m.req is req), None)
        return RequestStatus(
            rid=guest.client_rid if guest else req.rid,
            prompt_tokens=len(req.origin_input_ids),
            output_tokens=len(req.output_ids),
            max_new_tokens=req.sampling_params.max_new_tokens,
            remaining=tuple(star.estimate),
            home=(guest.home if guest else self._peer).instance_id,
            state=move.machine.state.value if move else state,
            pinned=self._engine.unsupported or self._engine.pinned(req),
            moves=star.moves,
            queued=state == QUEUED,
        )
