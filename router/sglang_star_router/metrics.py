"""Prometheus metrics, all named ``star_router_*``; docs/metrics.md defines them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_FINE_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)


class Metrics:
    """What is counted as it happens; what can be read off the fleet is, at scrape time."""

    def __init__(self, buckets: Sequence[float] = ()) -> None:
        """``buckets`` are the bounds, in seconds, of the histogram of first bytes."""
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "star_router_requests", "Generation requests by path and status.",
            ("path", "status"), registry=self.registry,
        )  # fmt: skip
        self._children: dict[tuple[str, int], Counter] = {}
        self.active = Gauge(
            "star_router_active_requests", "Generation requests in progress.",
            registry=self.registry,
        )  # fmt: skip
        self.retries = Counter(
            "star_router_retries", "Attempts that failed before their first byte.",
            registry=self.registry,
        )  # fmt: skip
        self.lost_streams = Counter(
            "star_router_lost_streams", "Streams broken by an instance after they had begun.",
            registry=self.registry,
        )  # fmt: skip
        self.denied = Counter(
            "star_router_denied", "Requests without the key they need.",
            ("door",), registry=self.registry,
        )  # fmt: skip
        self.buffered = Gauge(
            "star_router_buffered_bytes", "Bytes of request bodies that are kept.",
            registry=self.registry,
        )  # fmt: skip
        self.slow_heads = Counter(
            "star_router_slow_heads", "Connections closed because no head came in time.",
            registry=self.registry,
        )  # fmt: skip
        self.malformed = Counter(
            "star_router_malformed_requests", "Requests that are no HTTP, or whose body is not.",
            registry=self.registry,
        )  # fmt: skip
        self.first_byte = Histogram(
            "star_router_first_byte_seconds", "Request received to first byte of the answer.",
            buckets=tuple(buckets) or _SECONDS, registry=self.registry,
        )  # fmt: skip
        self.decision = Histogram(
            "star_router_rescheduler_decision_seconds", "Time of one rescheduling decision.",
            buckets=_FINE_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.rescheduler_errors = Counter(
            "star_router_rescheduler_errors", "Rounds in which the policy failed.",
            registry=self.registry,
        )  # fmt: skip

    def count(self, path: str, status: int) -> None:
        """Count one finished request."""
        child = self._children.get((path, status))
        if child is None:
            child = self._children[path, status] = self._requests.labels(path, str(status))
        child.inc()

    def add_source(self, collect: Callable[[], Iterable[Metric]]) -> None:
        """Add metrics that are computed when scraped."""
        self.registry.register(_Source(collect))

    def text(self) -> bytes:
        """Return the exposition text."""
        return generate_latest(self.registry)


class _Source:
    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self.collect = collect


def gauge(name: str, text: str, rows: Iterable[tuple[str, float]], label: str) -> Metric:
    """Return one gauge with a label."""
    family = GaugeMetricFamily(f"star_router_{name}", text, labels=[label])
    for key, value in rows:
        family.add_metric([key], value)
    return family


def counter(
    name: str, text: str, rows: Iterable[tuple[tuple[str, ...], float]], labels: tuple[str, ...]
) -> Metric:
    """Return one counter with labels."""
    family = CounterMetricFamily(f"star_router_{name}", text, labels=list(labels))
    for keys, value in rows:
        family.add_metric(list(keys), value)
    return family
