"""What an instance says of its load: every request once, every KV token once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.engine

status = pytest.importorskip("sglang_star.status")
admission = pytest.importorskip("sglang_star.migration.admission")
real = pytest.importorskip("sglang_star.engine.real")
utils = pytest.importorskip("sglang.srt.disaggregation.utils")

from sglang_star.engine.clock import RealClock  # noqa: E402
from sglang_star.errors import OrderRefused  # noqa: E402
from sglang_star.faults import Faults  # noqa: E402
from sglang_star.migration.armed import ArmedOrders  # noqa: E402
from sglang_star.migration.report import MoveLog  # noqa: E402
from sglang_star.migration.transport.choice import Transports  # noqa: E402
from sglang_star.protocol import DRAIN, Peer  # noqa: E402

PEER = Peer(instance_id="d0", incarnation=1, address="tcp://127.0.0.1:1")
RESERVED = 100
CAPACITY = 10_000


def request(rid: str, allocated: int = 0) -> Any:
    return SimpleNamespace(
        rid=rid,
        origin_input_ids=[1] * 40,
        output_ids=[2] * 10,
        sampling_params=SimpleNamespace(max_new_tokens=500),
        finished=lambda: False,
        kv=SimpleNamespace(holds_kv=allocated > 0, kv_allocated_len=allocated),
    )


def queue_of(*requests: Any, **more: Any) -> Any:
    return SimpleNamespace(queue=[SimpleNamespace(req=req) for req in requests], **more)


@pytest.fixture
def scheduler() -> Any:
    """A decode instance with a request in every place SGLang keeps one."""
    running = [request("a", 50), request("b", 50)]
    return SimpleNamespace(
        disaggregation_mode=utils.DisaggregationMode.DECODE,
        running_batch=SimpleNamespace(reqs=running),
        last_batch=SimpleNamespace(
            reqs=[*running, request("merging", 50)],
            forward_mode=SimpleNamespace(is_mixed=lambda: False),
        ),
        waiting_queue=[request("arrived", 50)],
        disagg_decode_transfer_queue=queue_of(request("transfer", 50)),
        disagg_decode_prealloc_queue=queue_of(
            request("waits"),
            retracted_queue=[],
            num_reserved_decode_tokens=RESERVED,
        ),
        max_running_requests=64,
        req_to_token_pool=SimpleNamespace(free_slots=[1]),
    )


def arriving_moves(*arriving: Any) -> dict[str, Any]:
    return {req.rid: SimpleNamespace(req=req) for req in arriving}


NO_GUESTS: Any = SimpleNamespace(by_rid={}, by_stream={})


def engine_of(scheduler: Any, free: int) -> Any:
    """The real verbs over that scheduler, and over KV memory with so much room."""
    engine = real.SglangEngine.__new__(real.SglangEngine)
    engine._scheduler = scheduler
    engine._clock = RealClock()
    engine.pages = SimpleNamespace(capacity=CAPACITY, free=free)  # type: ignore[assignment]
    engine.unsupported = ""
    return engine


def reporter(scheduler: Any, free: int, monkeypatch: pytest.MonkeyPatch, *arriving: Any) -> Any:
    engine = engine_of(scheduler, free)
    monkeypatch.setattr(engine, "pinned", lambda req: "")
    mover: Any = SimpleNamespace(
        sender=SimpleNamespace(moves={}),
        target=SimpleNamespace(moves=arriving_moves(*arriving), draining=False),
        host=NO_GUESTS,
        log=MoveLog(engine),
        armed=ArmedOrders(),
    )
    transports = Transports((), lambda: 0.0)
    return status.StatusReporter(
        scheduler, engine, PEER, mover, status.StepTimer(), Faults(), {}, transports
    ).report()


def test_every_request_is_counted_once(scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler.disagg_decode_prealloc_queue.retracted_queue.append(request("retracted"))
    found = reporter(scheduler, CAPACITY - 250, monkeypatch)
    states = {r.rid: (r.state, r.queued) for r in found.requests}
    assert states == {
        **dict.fromkeys(("a", "b", "merging"), ("running", False)),
        **dict.fromkeys(("arrived", "transfer"), ("joining", False)),
        **dict.fromkeys(("waits", "retracted"), ("queued", True)),
    }
    assert (found.running, found.queued, found.retracted) == (5, 1, 1)
    assert len(found.requests) == found.running + found.queued + found.retracted


def test_kv_held_for_guests_is_reserved_and_not_used(
    scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = reporter(scheduler, CAPACITY - 550, monkeypatch, request("guest", 300))
    assert (found.kv_used_tokens, found.kv_reserved_tokens) == (250, 300)


def check(scheduler: Any, free: int, reason: str = "overflow", *arriving: Any) -> None:
    """Ask a target whether it takes a guest of 1,000 tokens."""
    message: Any = SimpleNamespace(context_tokens=1000, reason=reason)
    others: Any = [SimpleNamespace(context_tokens=req.kv.kv_allocated_len) for req in arriving]
    admission.check_room(engine_of(scheduler, free), message, others)


def test_a_guest_leaves_room_for_those_who_run_to_grow(scheduler: Any) -> None:
    enough = 1000 + RESERVED * 5  # two run, one transfers, one joins, and the guest
    check(scheduler, enough)
    with pytest.raises(OrderRefused, match="KV memory is full"):
        check(scheduler, enough - 1)
    with pytest.raises(OrderRefused, match="400 of them promised"):
        check(scheduler, enough + 499, "overflow", request("other", 400))
    # Off an instance that is to go, a guest may come as long as it fits at all.
    check(scheduler, 1000 + admission.HEADROOM_TOKENS, DRAIN)


def test_no_guest_comes_before_those_who_were_retracted(scheduler: Any) -> None:
    scheduler.disagg_decode_prealloc_queue.retracted_queue.append(request("retracted"))
    with pytest.raises(OrderRefused, match="1 requests wait for it"):
        check(scheduler, CAPACITY)


def test_an_aggregated_instance_asks_only_that_a_guest_fits(scheduler: Any) -> None:
    scheduler.disagg_decode_prealloc_queue = scheduler.disagg_decode_transfer_queue = None
    check(scheduler, 1000 + admission.HEADROOM_TOKENS)
