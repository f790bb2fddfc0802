"""What stands in, in SGLang 0.5.22, for functions of later releases; the hooks' own logic."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_star.star_request import star_of

pytestmark = pytest.mark.engine

scheduler = pytest.importorskip("sglang_star.scheduler")
io_struct = pytest.importorskip("sglang.srt.managers.io_struct")


def test_a_request_keeps_the_message_it_is_made_of() -> None:
    made, later = SimpleNamespace(), SimpleNamespace()

    def build(_scheduler: Any, message: Any, *, mm_input_error: str | None = None) -> None:
        assert message == mm_input_error == "message"
        scheduler.make_request(None, made, "rid")

    scheduler.handle_generate_request(build, None, "message", mm_input_error="message")
    scheduler.make_request(None, later, "rid")
    assert star_of(made).origin == "message"
    assert star_of(later).origin is None


def test_a_message_that_cannot_be_taken_is_forgotten() -> None:
    def refuse(_scheduler: Any, message: Any) -> None:
        raise ValueError(message)

    with pytest.raises(ValueError, match="message"):
        scheduler.handle_generate_request(refuse, None, "message")
    later = SimpleNamespace()
    scheduler.make_request(None, later, "rid")
    assert star_of(later).origin is None


def test_only_the_end_of_a_guest_is_kept_from_the_tokenizer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[Any] = []
    ended: list[tuple[str, Any]] = []

    def send(_sender: Any, output: Any, recv_obj: Any) -> None:
        sent.append(output)

    def aborted(rid: str, reason: Any) -> bool:
        ended.append((rid, reason))
        return rid == "guest"

    reason = {"type": "abort", "status_code": 503, "message": "full"}
    guest = io_struct.AbortReq(rid="guest", finished_reason=reason)
    own = io_struct.AbortReq(rid="own")
    answer = object()
    for output in (guest, own, answer):
        scheduler.send_output(send, None, output, None)
    assert sent == [guest, own, answer], "without STAR everything is sent"
    sent.clear()
    here = SimpleNamespace(_star=SimpleNamespace(aborted=aborted))
    monkeypatch.setattr(scheduler, "_scheduler", here)
    for output in (guest, own, answer):
        scheduler.send_output(send, None, output, None)
    assert sent == [own, answer]
    assert ended == [("guest", reason), ("own", None)]
