"""The functions that ``hooks.HOOKS`` attaches to SGLang's scheduler: thin, each one decision."""

from __future__ import annotations

import sys
import time
from http import HTTPStatus
from typing import Any

from sglang_star import hooks
from sglang_star.errors import StarError
from sglang_star.launch import ATTRIBUTE
from sglang_star.star_request import star_of

_EXTENSION = "_star"
_scheduler: Any = None
"""This process's, for hooks on what does not know it."""
_message: Any = None
"""The message that a request is being made of."""


def init(original: Any, scheduler: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND ``Scheduler.__init__``: without ``--star`` exactly the original."""
    config = getattr(server_args, ATTRIBUTE, None)
    if config is None:
        original(scheduler, server_args, *args, **kwargs)
        return
    global _scheduler
    _scheduler = scheduler
    setattr(scheduler, _EXTENSION, None)
    try:
        hooks.verify_version()
        several = server_args.tp_size > 1
        hooks.install(hooks.Scope.SCHEDULER, *((hooks.Scope.RANKS,) if several else ()))
        original(scheduler, server_args, *args, **kwargs)
        # Both import what only a scheduler has.
        if several:
            from sglang_star.ranks.member import Member as Part
        else:
            from sglang_star.single import Single as Part  # type: ignore[assignment]
        setattr(scheduler, _EXTENSION, Part(scheduler, config))
    except StarError as error:
        # SystemExit passes SGLang's own handler, so that ours is the last readable line.
        print(f"STAR: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error


def get_init_info(info: dict[str, Any], scheduler: Any) -> dict[str, Any]:
    """AFTER ``Scheduler.get_init_info``."""
    from msgspec import structs

    front = getattr(scheduler, _EXTENSION).front
    if front is not None:
        info["star"] = structs.asdict(front.advertisement)
        info["star_order_address"] = front.links.order_address
    return info


def get_output_streamer_class(base: Any, scheduler: Any) -> Any:
    """AFTER ``Scheduler.get_output_streamer_class``: a subclass that diverts and annotates."""

    class StarOutputStreamer(base):
        """SGLang's streamer, which sees only requests whose clients are ours."""

        __slots__ = ()
        has_additional_customized_info = True

        def stream_output(self, reqs: Any, return_logprob: bool, skip_req: Any = None) -> None:
            star = getattr(scheduler, _EXTENSION)
            own = star.emit(reqs) if star is not None else reqs
            if own or not reqs:
                base.stream_output(self, own, return_logprob, skip_req)

        def build_additional_customized_info(self, reqs: Any) -> dict[str, list[Any]]:
            estimates = [star_of(req).estimate for req in reqs]
            if not any(estimates):
                return {}
            return {"star_remaining": [[tuple(e)] if e else [] for e in estimates]}

    return StarOutputStreamer


def ingest_requests(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``Scheduler.ingest_requests``."""
    getattr(scheduler, _EXTENSION).tick()


def pull_raw_reqs(recv_reqs: list[Any] | None, receiver: Any) -> None:
    """AFTER ``SchedulerRequestReceiver._pull_raw_reqs``; on ranks that pull nothing it is None."""
    star = getattr(_scheduler, _EXTENSION, None)
    if star is not None and recv_reqs is not None:
        star.pull(recv_reqs)


def recv_requests(recv_reqs: list[Any], receiver: Any, *args: Any, **kwargs: Any) -> list[Any]:
    """AFTER ``SchedulerRequestReceiver.recv_requests``, on every rank."""
    star = getattr(_scheduler, _EXTENSION, None)
    return recv_reqs if star is None else list(star.received(recv_reqs))


def create_generation_req(
    req: Any, scheduler: Any, recv_req: Any, *args: Any, **kwargs: Any
) -> None:
    """AFTER ``Scheduler._create_generation_req``."""
    star_of(req).origin = recv_req


def handle_generate_request(
    original: Any, scheduler: Any, recv_req: Any, *args: Any, **kwargs: Any
) -> None:
    """AROUND ``Scheduler._handle_generate_request``."""
    global _message
    _message = recv_req
    try:
        original(scheduler, recv_req, *args, **kwargs)
    finally:
        _message = None


def make_request(_result: None, req: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``Req.__init__``; requests that no message asks for have none."""
    if _message is not None:
        star_of(req).origin = _message


def add_request_to_queue(
    original: Any, scheduler: Any, req: Any, is_retracted: bool = False
) -> None:
    """AROUND ``Scheduler._add_request_to_queue``."""
    star = getattr(scheduler, _EXTENSION)
    if star is None or not star.queued(req, is_retracted=is_retracted):
        original(scheduler, req, is_retracted)


def abort_request(scheduler: Any, recv_req: Any) -> None:
    """BEFORE ``Scheduler.abort_request``."""

    def wanted(req: Any) -> bool:
        return bool(recv_req.abort_all or req.rid.startswith(recv_req.rid))

    # As SGLang answers: whatever has a message, such as a time-out, is the server's doing.
    message = recv_req.abort_message
    reason = {"message": message, "status_code": HTTPStatus.SERVICE_UNAVAILABLE} if message else {}
    getattr(scheduler, _EXTENSION).abort(wanted, reason)


def pause_generation(original: Any, scheduler: Any, recv_req: Any) -> None:
    """AROUND ``Scheduler.pause_generation``."""
    pause_req = recv_req
    if pause_req.mode == "retract":
        star = getattr(scheduler, _EXTENSION)
        star.recomputing(lambda: original(scheduler, pause_req))
    else:
        original(scheduler, pause_req)


def retract_decode(result: Any, _batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AFTER ``ScheduleBatch.retract_decode``: who cannot resume here can at home."""
    _retracted, _ratio, to_abort = result
    for req in to_abort:
        star_of(req).unbacked = True
    return result


def write_weights(original: Any, manager: Any, recv_req: Any) -> Any:
    """AROUND the methods of ``SchedulerWeightUpdaterManager`` that end an update of weights."""
    try:
        return original(manager, recv_req)
    finally:
        _weights_changed(over=True)


def write_some_weights(original: Any, manager: Any, recv_req: Any) -> Any:
    """AROUND those that write a part of them."""
    try:
        return original(manager, recv_req)
    finally:
        _weights_changed(over=False)


def _weights_changed(*, over: bool) -> None:
    """An update that fails may have written some of them, too."""
    star = getattr(_scheduler, _EXTENSION, None)
    if star is not None:
        star.weights_changed(over=over)


def send_abort_output(original: Any, scheduler: Any, abort_req: Any, req: Any) -> None:
    """AROUND ``Scheduler.send_abort_output``."""
    star = getattr(scheduler, _EXTENSION)
    if star is None or not star.aborted(req.rid, abort_req.finished_reason):
        original(scheduler, abort_req, req)


def send_output(original: Any, sender: Any, output: Any, recv_obj: Any = None) -> None:
    """AROUND ``SenderWrapper.send_output``, by which aborts leave as much else does."""
    from sglang.srt.managers.io_struct import AbortReq

    star = getattr(_scheduler, _EXTENSION, None)
    abort = output if isinstance(output, AbortReq) else None
    if star is None or abort is None or not star.aborted(abort.rid, abort.finished_reason):
        original(sender, output, recv_obj)


def poll_timeout_aborts(aborts: list[Any], scheduler: Any) -> list[Any]:
    """AFTER ``Scheduler._poll_timeout_aborts``: SGLang's own limit, for shadows too."""
    from sglang.srt.environ import envs
    from sglang.srt.managers.io_struct import AbortReq

    limit_s = envs.SGLANG_REQ_RUNNING_TIMEOUT.get()
    if limit_s > 0:
        overdue = getattr(scheduler, _EXTENSION).overdue(time.perf_counter() - limit_s)
        message = "Request running timeout reached."
        aborts.extend(AbortReq(rid=rid, abort_message=message) for rid in overdue)
    return aborts


def is_fully_idle(idle: bool, scheduler: Any, *args: Any, **kwargs: Any) -> bool:
    """AFTER ``Scheduler.is_fully_idle``."""
    star = getattr(scheduler, _EXTENSION)
    return idle and (star is None or not star.holds_kv_off_batch)


def on_idle(original: Any, scheduler: Any) -> None:
    """AROUND ``Scheduler.on_idle``."""
    star = getattr(scheduler, _EXTENSION)
    star.decoded(steady=False)
    if not star.may_sleep():
        return
    if star.holds_kv_off_batch:
        star.wait()
    else:
        original(scheduler)


def process_batch_result(original: Any, scheduler: Any, batch: Any, result: Any) -> None:
    """AROUND ``Scheduler.process_batch_result``: first wait for the device, usefully."""
    star = getattr(scheduler, _EXTENSION)
    star.await_result(result)
    original(scheduler, batch, result)
    star.decoded(steady=batch.forward_mode.is_decode())
