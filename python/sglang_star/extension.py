"""STAR's part of one scheduler, as SGLang's hooks see it."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang_star.engine.real import SglangEngine
from sglang_star.engine.verbs import Request
from sglang_star.faults import Faults
from sglang_star.flight import Flight
from sglang_star.front import Front
from sglang_star.migration.mover import Mover
from sglang_star.platform import ballast, device
from sglang_star.status import StepTimer

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler


class Extension(abc.ABC):
    """Everything STAR keeps per scheduler.

    Attributes:
        front: the sockets; None on a rank that has none.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        engine: SglangEngine,
        mover: Mover,
        timer: StepTimer,
        faults: Faults,
        front: Front | None,
    ) -> None:
        self.front = front
        self._scheduler = scheduler
        self._faults = faults
        self._inspector = ballast.inspector(scheduler)
        self._loaded = engine.loaded
        self._mover = mover
        self._timer = timer
        self._flight = Flight()

    # ------------------------------------------------------------------ the loop

    @abc.abstractmethod
    def tick(self) -> None:
        """Handle what arrived, advance moves, publish; SGLang is between two steps."""

    @abc.abstractmethod
    def await_result(self, result: object) -> None:
        """The device works on ``result``, and SGLang is about to wait for it."""

    @abc.abstractmethod
    def may_sleep(self) -> bool:
        """Whether nothing waits for the next tick; call before anything that polls for work."""

    @abc.abstractmethod
    def wait(self) -> None:
        """Sleep until a message arrives or a short moment has passed."""

    def decoded(self, *, steady: bool) -> None:
        """A batch result was processed; ``steady`` if it was a decode step."""
        if steady and self._inspector is not None:
            with self._faults.contained("KV"):
                self._inspector.step(self._scheduler.running_batch.reqs)
        if steady:
            self._timer.decoded()
        else:
            self._timer.interrupted()

    def _may_hold(self) -> Callable[[], bool]:
        """Whether queueing the next step can still be put off; to be asked until it cannot."""
        queue = getattr(self._scheduler, "result_queue", None)
        if not queue or self._timer.ema_ms <= 0.0:
            return lambda: False
        running = device.pending(queue[-1][1])
        until = self._flight.hold_until(self._timer.ema_ms / 1e3)
        return lambda: time.monotonic() < until and running()

    # ------------------------------------------------------------------ what the hooks ask

    @property
    def holds_kv_off_batch(self) -> bool:
        """Whether KV is held that SGLang's accounting does not see."""
        return self._mover.holds_kv_off_batch

    def queued(self, req: Req, *, is_retracted: bool) -> bool:
        """SGLang is about to queue ``req``; True if it is ours to keep."""
        if is_retracted:
            if self.front is not None:
                self.front.retracted()
            return False
        return self._mover.rebuilt(req)

    def emit(self, reqs: list[Req]) -> list[Req]:
        """Divert guests' output; return the requests whose clients are ours."""
        return list(self._mover.emit(reqs))

    def aborted(self, rid: str, reason: dict[str, Any] | None) -> bool:
        """SGLang ends a request outside the output stream; True if it was a guest."""
        return self._mover.aborted(rid, reason)

    def abort(self, wanted: Callable[[Request], bool], reason: dict[str, Any]) -> None:
        """An abort of SGLang's, for requests that it does not find in its batch."""
        self._mover.abort(wanted, reason)

    def recomputing(self, recompute: Callable[[], None]) -> None:
        """A pause of SGLang's that gives all KV back, carried out by ``recompute``."""
        self._mover.recomputing(recompute)

    def weights_changed(self, *, over: bool) -> None:
        """The model's weights were written, or some of them, or may have been.

        Args:
            over: nothing more will be written; read them now, and not when a request moves.
        """
        self._loaded.changed()
        if over:
            self._loaded.checksum()

    def overdue(self, started_before: float) -> list[str]:
        """Rids of shadows whose forward started before that ``time.perf_counter()``."""
        return [
            shadow.req.rid
            for shadow in self._mover.home.shadows.values()
            if 0 < shadow.req.time_stats.forward_entry_time < started_before  # type: ignore[attr-defined]
        ]
