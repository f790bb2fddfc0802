"""What a run is judged by, in bounded memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from sglang_star_bench.simulator.histogram import LogHistogram
from sglang_star_bench.simulator.request import Request, State


@dataclass
class Recorder:
    """Counts and distributions over requests that arrived at or after ``warmup_s``.

    TTFT, TPOT and attainment count these requests, and one that was refused, aborted or never
    ended counts as infinitely late in both; ``served`` are those that ended. ITL, retractions and
    moves count the fleet from the start, since they cannot be told apart by request. What no
    instance could ever hold is counted apart: no policy can serve it.
    """

    ttft_slo_ms: float
    tpot_slo_ms: float
    warmup_s: float
    requests: int = 0
    completed: int = 0
    failed: int = 0
    rejected: int = 0
    aborted: int = 0
    too_long: int = 0
    within_slo: int = 0
    output_tokens: int = 0
    decoded_tokens: float = 0.0
    judged_tokens: float = 0.0
    retractions: int = 0
    recomputed_tokens: int = 0
    migrations: int = 0
    migrated_tokens: int = 0
    refused_moves: int = 0
    cancelled_moves: int = 0
    load_cv_sum: float = 0.0
    load_cv_count: int = 0
    ttft: LogHistogram = field(default_factory=LogHistogram)
    tpot: LogHistogram = field(default_factory=LogHistogram)
    ttft_served: LogHistogram = field(default_factory=LogHistogram)
    tpot_served: LogHistogram = field(default_factory=LogHistogram)
    itl: LogHistogram = field(default_factory=LogHistogram)
    stall: LogHistogram = field(default_factory=LogHistogram)
    decision: LogHistogram = field(default_factory=LogHistogram)

    def arrived(self, request: Request) -> None:
        """Count an arrival."""
        self.requests += request.arrival_s >= self.warmup_s

    def done(self, request: Request) -> None:
        """Count a finished or failed request."""
        if request.arrival_s < self.warmup_s:
            return
        if request.state != State.FINISHED:
            self.failed += 1
            self.ttft.add(math.inf)
            self.tpot.add(math.inf)
            return
        self.completed += 1
        self.output_tokens += request.length
        ttft = (request.first_token_s - request.arrival_s) * 1e3
        self.ttft.add(ttft)
        self.ttft_served.add(ttft)
        tpot = 0.0
        if request.length > 1:
            span = request.last_token_s - request.first_token_s
            tpot = span * 1e3 / (request.length - 1)
            self.tpot.add(tpot)
            self.tpot_served.add(tpot)
        self.within_slo += ttft <= self.ttft_slo_ms and tpot <= self.tpot_slo_ms

    def summary(self, window_s: float) -> dict[str, Any]:
        """The fields of the result JSON this class knows; rates are per second of ``window_s``."""
        return {
            "requests": self.requests,
            "completed": self.completed,
            "failed": self.failed,
            "rejected": self.rejected,
            "aborted": self.aborted,
            "too_long": self.too_long,
            "ttft_ms": _points(self.ttft),
            "tpot_ms": _points(self.tpot),
            "ttft_served_ms": _points(self.ttft_served),
            "tpot_served_ms": _points(self.tpot_served),
            "itl_ms": _points(self.itl) | {"max": _round(self.itl.max)},
            "slo": {"ttft_ms": self.ttft_slo_ms, "tpot_ms": self.tpot_slo_ms},
            "slo_attainment": _round(self.within_slo / self.requests if self.requests else None),
            "goodput_rps": _round(self.within_slo / window_s),
            "throughput_tok_s": _round(self.output_tokens / window_s),
            "decoded_tok_s": _round(self.judged_tokens / window_s),
            "retractions": self.retractions,
            "recomputed_tokens": self.recomputed_tokens,
            "migrations": self.migrations,
            "migrated_tokens": self.migrated_tokens,
            "refused_moves": self.refused_moves,
            "cancelled_moves": self.cancelled_moves,
            "stall_ms": {
                "p50": _round(self.stall.quantile(0.5)),
                "p99": _round(self.stall.quantile(0.99)),
            },
            "load_cv": _round(self.load_cv_sum / max(self.load_cv_count, 1)),
            "decision_ms": {
                "p50": _round(self.decision.quantile(0.5)),
                "p99": _round(self.decision.quantile(0.99)),
            },
        }


def _points(histogram: LogHistogram) -> dict[str, float | None]:
    return {
        "mean": _round(histogram.mean),
        "p50": _round(histogram.quantile(0.5)),
        "p90": _round(histogram.quantile(0.9)),
        "p99": _round(histogram.quantile(0.99)),
    }


def _round(value: float | None) -> float | None:
    """Six significant digits; None for what has no finite value, since JSON has neither."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")
