"""What operators see: the fleet as JSON and as metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from msgspec.structs import asdict
from prometheus_client.core import Metric

from sglang_star_router.dispatch import Dispatcher
from sglang_star_router.fleet import Fleet
from sglang_star_router.instance import Instance
from sglang_star_router.ledger import Ledger
from sglang_star_router.metrics import counter, gauge
from sglang_star_router.rescheduler import Rescheduler
from sglang_star_router.telemetry import StatusFeed


def instance_json(
    instance: Instance, fleet: Fleet, ledger: Ledger, now: float, *, requests: bool
) -> dict[str, Any]:
    """Return one instance as ``GET /star/cluster`` shows it."""
    status, advertisement = instance.status, instance.advertisement
    moves_out, moves_in = ledger.moves_of(instance)
    row: dict[str, Any] = {
        "name": instance.name,
        "url": instance.endpoint.url,
        "role": instance.role,
        "healthy": instance.healthy,
        "trouble": instance.trouble,
        "circuit": instance.breaker.state.name.lower().replace("_", "-"),
        "draining": instance.draining,
        "star": advertisement is not None,
        "incarnation": advertisement.incarnation if advertisement else None,
        "predictor": advertisement.predictor if advertisement else None,
        "restarts": instance.restarts,
        "reserve_each": instance.reserve_each,
        "in_flight": len(instance.dispatches),
        "moves_out": moves_out,
        "moves_in": moves_in,
        "no_moves_with": {
            name: why.text for name, why in fleet.obstacles.of(instance.name).items()
        },
        "status_age_s": None if status is None else round(instance.age_s(now), 3),
        "status": None,
    }
    if status is not None:
        row["status"] = {
            "sequence": status.sequence,
            "step_ms_ema": status.step_ms_ema,
            "step_ms_p99": status.step_ms_p99,
            "kv_capacity_tokens": status.kv_capacity_tokens,
            "kv_used_tokens": status.kv_used_tokens,
            "kv_reserved_tokens": status.kv_reserved_tokens,
            "running": status.running,
            "queued": status.queued,
            "retracted": status.retracted,
            "retractions": status.retractions,
            "paced_late": status.paced_late,
        }
        if requests:
            row["status"]["requests"] = [asdict(one) for one in status.requests]
    return row


def cluster_json(
    fleet: Fleet,
    ledger: Ledger,
    dispatcher: Dispatcher,
    feed: StatusFeed,
    *,
    requests: bool = True,
) -> dict[str, Any]:
    """Return the body of ``GET /star/cluster``; without ``requests`` it stays small."""
    now = time.monotonic()
    return {
        "time": time.time(),
        "holding": dispatcher.holding,
        "dispatched": dispatcher.sequence,
        "open_migrations": ledger.open_count,
        "predictor_judged": fleet.lengths.band.judged,
        "predictor_kept": fleet.lengths.band.kept,
        "predictor_kept_corrected": fleet.lengths.band.kept_corrected,
        "statuses_received": feed.received,
        "statuses_dropped": sum(feed.dropped.values()),
        "instances": [instance_json(one, fleet, ledger, now, requests=requests) for one in fleet],
    }


def fleet_metrics(
    fleet: Fleet,
    ledger: Ledger,
    dispatcher: Dispatcher,
    feed: StatusFeed,
    rescheduler: Rescheduler | None,
) -> Iterator[Metric]:
    """Yield the metrics that are read off the fleet when scraped."""
    members = list(fleet)

    def each(name: str, text: str, value: Any, *, with_status: bool = False) -> Metric:
        rows = [(m.name, float(value(m))) for m in members if m.status or not with_status]
        return gauge(name, text, rows, "instance")

    def status(name: str, text: str, attribute: str) -> Metric:
        return each(name, text, lambda m: getattr(m.status, attribute), with_status=True)

    now = time.monotonic()
    yield each("instance_healthy", "1 if requests are sent there.", lambda m: m.healthy)
    yield each("instance_draining", "1 if no new work goes there.", lambda m: m.draining)
    yield each("instance_in_flight", "Requests sent there not ended.", lambda m: len(m.dispatches))
    yield each("instance_restarts", "Restarts seen.", lambda m: m.restarts)
    yield each("status_age_seconds", "Age of the status.", lambda m: m.age_s(now), with_status=True)
    yield status("kv_capacity_tokens", "Size of the KV pool.", "kv_capacity_tokens")
    yield status("kv_used_tokens", "KV tokens in use.", "kv_used_tokens")
    yield status("kv_reserved_tokens", "KV tokens reserved for guests.", "kv_reserved_tokens")
    yield status("running_requests", "Requests decoding.", "running")
    yield status("queued_requests", "Requests waiting in the engine.", "queued")
    yield status("step_milliseconds", "Decode step time, exponential mean.", "step_ms_ema")
    yield counter("retractions", "Requests taken out of the batch because KV was full.",
                  [((m.name,), m.status.retractions) for m in members if m.status],
                  ("instance",))  # fmt: skip
    yield counter("predictor_fallbacks", "Estimates read from the by-age table.",
                  [((m.name,), m.status.predictor_fallbacks) for m in members if m.status],
                  ("instance",))  # fmt: skip
    yield counter("predictor_failures", "Steps without estimates because of a defect.",
                  [((m.name,), m.status.predictor_failures) for m in members if m.status],
                  ("instance",))  # fmt: skip
    yield counter("faults", "Defects that cost a message, a move or an order.",
                  [((m.name, what), count) for m in members if m.status
                   for what, count in m.status.faults.items()],
                  ("instance", "what"))  # fmt: skip
    yield counter("dropped_messages", "Messages between instances lost at either end.",
                  [((m.name, why), count) for m in members if m.status
                   for why, count in m.status.dropped.items()],
                  ("instance", "why"))  # fmt: skip
    band = fleet.lengths.band
    yield counter("predictor_judged", "Requests that ended and had an estimate.",
                  [((), band.judged)], ())  # fmt: skip
    yield counter("predictor_kept", "Those of them that the P10-P90 band held.",
                  [((), band.kept)], ())  # fmt: skip
    yield counter("predictor_kept_corrected", "Those that the corrected band held.",
                  [((), band.kept_corrected)], ())  # fmt: skip
    yield gauge("holding_requests", "Requests held at the router.",
                [("router", dispatcher.holding)], "at")  # fmt: skip
    yield counter("refused", "Requests the router refused.",
                  [((str(code),), n) for code, n in dispatcher.refused.items()],
                  ("status",))  # fmt: skip
    yield counter("statuses_received", "Statuses taken in.", [((), feed.received)], ())
    yield counter("statuses_dropped", "Messages dropped.",
                  [(key, n) for key, n in sorted(feed.dropped.items())],
                  ("instance", "reason"))  # fmt: skip
    yield counter("migrations", "Migrations by outcome.",
                  [((outcome,), n) for outcome, n in sorted(ledger.outcomes.items())],
                  ("outcome",))  # fmt: skip
    yield gauge("migrations_open", "Migrations under way.",
                [("router", ledger.open_count)], "at")  # fmt: skip
    yield gauge("pairs_without_moves", "Pairs of instances that cannot exchange requests.",
                [(why, float(n)) for why, n in fleet.obstacles.counts().items()],
                "reason")  # fmt: skip
    if rescheduler is not None:
        yield counter("rescheduler_rounds", "Decisions taken.", [((), rescheduler.rounds)], ())
        yield counter("orders_skipped", "Orders not sent because of the router's limits.",
                      [((why,), n) for why, n in sorted(rescheduler.skipped.items())],
                      ("reason",))  # fmt: skip
