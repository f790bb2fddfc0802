"""What operators see of faults, as metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric

from sglang_star_router.dispatch import Dispatcher
from sglang_star_router.fleet import Fleet
from sglang_star_router.health import Health
from sglang_star_router.metrics import counter, gauge
from sglang_star_router.proxy import Proxy
from sglang_star_router.upkeep import Upkeep


def fault_metrics(
    fleet: Fleet, dispatcher: Dispatcher, proxy: Proxy, health: Health, upkeep: Upkeep
) -> Iterator[Metric]:
    """Yield the metrics about faults that are read when scraped."""
    members = list(fleet)
    yield counter("attempts", "Attempts at an instance by how they ended.",
                  [((m.name, what), n) for m in members
                   for what, n in sorted(m.breaker.counts.items()) if n],
                  ("instance", "outcome"))  # fmt: skip
    yield gauge("instance_circuit", "Circuit: 0 closed, 1 half-open, 2 open.",
                [(m.name, float(m.breaker.state.value)) for m in members],
                "instance")  # fmt: skip
    yield counter("circuit_openings", "Times a circuit has opened.",
                  [((m.name,), m.breaker.opened) for m in members], ("instance",))  # fmt: skip
    yield counter("retries_denied", "Retries not made because the budget was used up.",
                  [((), proxy.budget.denied)], ())  # fmt: skip
    yield counter("local_errors", "What this machine lacked: no instance's failure.",
                  [((what,), n) for what, n in sorted(proxy.descriptors.errors.items())],
                  ("what",))  # fmt: skip
    yield counter("policy_errors", "Arrivals that least-tokens placed as the policy failed.",
                  [((name,), n) for name, n in sorted(dispatcher.policy_errors.items())],
                  ("policy",))  # fmt: skip
    yield counter("check_errors", "Health checks that failed at the router's own end.",
                  [((what,), n) for what, n in sorted(health.errors.items())],
                  ("what",))  # fmt: skip
    yield counter("upkeep_errors", "Failures of the router's own upkeep.",
                  [((), upkeep.errors)], ())  # fmt: skip
