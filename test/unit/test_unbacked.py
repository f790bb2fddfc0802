"""A guest whose host has no memory for it, nor for a copy of it, goes on at home."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_star.migration.host import Guest, Host
from sglang_star.migration.states import Hosting
from sglang_star.protocol import Tokens
from sglang_star.star_request import star_of
from unit.test_out_of_order import A, AtHome, B, inserted, request

FULL = {
    "type": "abort",
    "message": "Retraction host KV pool exhausted. Aborting the request.",
    "status_code": 500,
}


class Pair:
    """A guest at B that has decoded one token which its home, A, has not heard of."""

    def __init__(self) -> None:
        self.at_home = AtHome()
        self.requeued: list[Any] = []
        self.ended: list[Any] = []
        engine = self.at_home.engine
        engine.append = lambda req, tokens, details: req.output_ids.extend(tokens)
        engine.requeue = self.requeued.append
        engine.end = lambda req, reason=None: self.ended.append((req, reason))
        self.at_home.hear(inserted("to-b", B, 1, tokens=4))
        self.guest = Guest(
            req=request(5),
            client_rid="r",
            stream_id=self.at_home.move.stream_id,
            migration_id="to-b",
            home=A,
            base=4,
            sent=4,
            confirmed_at=0.0,
        )
        hosting: Any = SimpleNamespace(finish_reason=lambda req: b"", details=lambda *args: b"")
        post: Any = SimpleNamespace(peer=B, send=lambda to, message: self._deliver(message))
        self.host = Host(hosting, post, timeout_s=3.0)
        self.host.take(self.guest)

    def _deliver(self, message: Any) -> None:
        assert isinstance(message, Tokens)
        for chunk in message.chunks:
            self.at_home.home.on_chunk(chunk)

    def abort(self) -> None:
        self.host.emit(self.guest)
        self.host.aborted(self.guest, FULL)
        self.host.flush()


@pytest.mark.parametrize("unbacked", [True, False])
def test_only_want_of_memory_lets_home_go_on(unbacked: bool) -> None:
    pair = Pair()
    star_of(pair.guest.req).unbacked = unbacked
    pair.abort()
    req = pair.at_home.req
    assert list(req.output_ids) == [0, 1, 2, 3, 4], "what the host had decoded came first"
    assert pair.guest.machine.state is Hosting.FINISHED
    assert pair.at_home.home.shadows == {}
    if unbacked:
        assert (pair.requeued, pair.ended) == ([req], [])
        [report] = [r for r in pair.at_home.log.reports if r.outcome == "reclaimed"]
        assert "memory" in report.detail
    else:
        assert (pair.requeued, pair.ended) == ([], [(req, FULL)])
