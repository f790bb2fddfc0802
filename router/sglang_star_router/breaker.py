"""A circuit breaker per instance, over how its latest attempts went.

It opens when an instance fails where another one of its kind does clearly better: a fault of the
router, of a client or of the whole fleet never shuts the fleet. While it is open nothing is sent;
after a while a few requests are let through as probes, and answers that end well close it again.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Final

from sglang_star_router.faults import FaultLimits

SHARE: Final = 0.5
"""Share of failures among the latest attempts from which a circuit may open."""


class Circuit(Enum):
    """State of a breaker; the value is the metric's."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Trial:
    """One attempt at an instance.

    Attributes:
        at: when it began or, once that is known, how it ended; monotonic seconds.
        breaker: whose; probe: it was let through a half-open circuit.
        failed: None while it is not known.
    """

    __slots__ = ("at", "breaker", "failed", "outcome", "probe")

    def __init__(self, breaker: Breaker, at: float, probe: bool) -> None:
        self.at = at
        self.probe = probe
        self.failed: bool | None = None
        self.outcome = ""
        self.breaker = breaker

    def succeeded(self) -> None:
        """The answer has begun well."""
        self.breaker.settle(self, "ok", failed=False)

    def failure(self, outcome: str) -> None:
        """The instance is to blame; may follow a success, when a stream breaks."""
        self.breaker.settle(self, outcome, failed=True)

    def neutral(self, outcome: str) -> None:
        """It ended in a way that says nothing about the instance."""
        self.breaker.settle(self, outcome, failed=None)

    def over(self) -> None:
        """The attempt is over, whether or not anything was said about it."""
        self.breaker.over(self)

    def forgive(self) -> None:
        """It turned out that the instance was not to blame."""
        self.breaker.forgive(self)


class Breaker:
    """One instance's circuit.

    Attributes:
        counts: attempts by how they ended; a stream that broke has first begun well.
        opened: times the circuit has opened.
        others: breakers of the instances that could serve instead.
    """

    def __init__(self, limits: FaultLimits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.counts: Counter[str] = Counter()
        self.opened = 0
        self.others: Callable[[], Iterable[Breaker]] = tuple
        self._limits = limits
        self._clock = clock
        self._recent: deque[Trial] = deque(maxlen=2 * limits.cb_failure_threshold)
        self._open_until: float | None = None
        self._probes: set[Trial] = set()
        self._passed = 0
        self._needed = limits.cb_failure_threshold

    @property
    def state(self) -> Circuit:
        """Closed, open, or half-open once the time-out of an open one has passed."""
        if self._open_until is None:
            return Circuit.CLOSED
        return Circuit.OPEN if self._clock() < self._open_until else Circuit.HALF_OPEN

    @property
    def admits(self) -> bool:
        """Whether a request may be sent now."""
        if self._open_until is None:
            return True
        self._ripen()
        room = len(self._probes) < self._limits.cb_success_threshold
        return self._open_until is None or (room and self.state is Circuit.HALF_OPEN)

    def begin(self) -> Trial:
        """Note an attempt that is about to be made."""
        trial = Trial(self, self._clock(), self.state is Circuit.HALF_OPEN)
        if trial.probe:
            self._probes.add(trial)
        return trial

    def tally(self) -> tuple[int, int]:
        """Failures and attempts among the latest ones within the window."""
        horizon = self._clock() - self._limits.cb_window
        while self._recent and self._recent[0].at < horizon:
            self._recent.popleft()
        return sum(bool(one.failed) for one in self._recent), len(self._recent)

    def share(self) -> float:
        """Share of failures among them, 0 if there were none."""
        failures, total = self.tally()
        return failures / total if total else 0.0

    # ------------------------------------------------------------------ for trials

    def settle(self, trial: Trial, outcome: str, *, failed: bool | None) -> None:
        """Take in how a trial ended."""
        if failed is not False:
            self._probes.discard(trial)
        if failed is not None:
            # A stream that breaks counts as of now, however long ago it began.
            if trial.outcome and trial in self._recent:
                self._recent.remove(trial)
            trial.at = self._clock()
            self._recent.append(trial)
        self.counts[outcome] += 1
        trial.outcome, trial.failed = outcome, failed
        if failed:
            self._judge(trial)
        elif failed is False and len(self._recent) >= self._limits.cb_failure_threshold:
            self._needed = self._limits.cb_failure_threshold

    def over(self, trial: Trial) -> None:
        """Take in that nothing more will be said of a trial."""
        if not trial.outcome:
            self.settle(trial, "left", failed=None)
        elif trial in self._probes:
            self._pass(trial)

    def forgive(self, trial: Trial) -> None:
        """Take a failure back, and what it led to."""
        if not trial.failed:
            return
        trial.failed = None
        if trial in self._recent:
            self._recent.remove(trial)
        failures, _ = self.tally()
        if self._open_until is not None and failures < self._needed:
            self._open_until, self._passed = None, 0

    # ------------------------------------------------------------------ inside

    def _pass(self, trial: Trial) -> None:
        """A probe's answer has ended well, or has gone on well for long enough."""
        self._probes.discard(trial)
        self._passed += 1
        if self._open_until is not None and self._passed >= self._limits.cb_success_threshold:
            self._close()

    def _ripen(self) -> None:
        ripe = self._clock() - self._limits.cb_timeout
        for trial in tuple(self._probes):
            if trial.outcome and trial.at <= ripe:
                self._pass(trial)

    def _judge(self, trial: Trial) -> None:
        if not self._limits.circuit_breaker:
            return
        if self._open_until is not None:
            # Late failures of what was sent before it opened say nothing new.
            if trial.probe:
                self._open()
            return
        failures, total = self.tally()
        share = failures / max(1, total)
        if failures < self._needed or share < SHARE:
            return
        if any(one.state is Circuit.CLOSED and 2 * one.share() < share for one in self.others()):
            self._open()

    def _open(self) -> None:
        self.opened += 1
        self._passed = 0
        self._open_until = self._clock() + self._limits.cb_timeout

    def _close(self) -> None:
        self._open_until, self._passed = None, 0
        self._recent.clear()
        # Answers that begin well may still break: for a while as few do as closed it.
        self._needed = min(self._limits.cb_failure_threshold, self._limits.cb_success_threshold)
