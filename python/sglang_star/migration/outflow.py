"""Guests' tokens, on their way home."""

from __future__ import annotations

from typing import Any

import orjson

from sglang_star.engine.verbs import Engine, Request
from sglang_star.errors import OrderRefused
from sglang_star.migration.guests import Guests
from sglang_star.migration.post import Post
from sglang_star.migration.relay import ESTIMATE
from sglang_star.migration.states import TargetEvent
from sglang_star.protocol import TokenChunk


class Outflow:
    """Diverts what SGLang would send to clients that are not ours."""

    def __init__(self, engine: Engine, post: Post, guests: Guests) -> None:
        self._engine = engine
        self._post = post
        self._guests = guests

    def emit(self, req: Request) -> bool:
        """Send a guest's new tokens home; False if ``req`` is not a guest."""
        guest = self._guests.by_rid.get(req.rid)
        if guest is None or guest.comes_home:
            # What SGLang says of a guest it just refused goes nowhere: its source is told.
            return req.rid.startswith(self._guests.prefix)
        have = len(req.output_ids)
        if guest.arriving or guest.muted or (have == guest.sent and not req.finished()):
            if req.finished():
                self._guests.forget(guest)
            return True
        chunk = TokenChunk(
            **self._guests.address(guest.reserve, to=guest.reserve.home),
            index=guest.sent,
            token_ids=tuple(req.output_ids[guest.sent :]),
            details=self._engine.details(req, guest.sent - guest.base, have - guest.base),
            remaining=getattr(req, ESTIMATE, ()),
            finished=self._engine.finish_reason(req),
        )
        self._post.send(guest.reserve.home, chunk)
        guest.sent = have
        assert guest.machine is not None
        if req.finished():
            guest.machine.fire(TargetEvent.FINISH)
            self._guests.forget(guest)
        else:
            guest.machine.fire(TargetEvent.DECODED)
        return True

    def aborted_here(self, rid: str, reason: dict[str, Any] | None) -> bool:
        """SGLang ended a guest outside its output stream; tell home. False if not a guest."""
        guest = self._guests.by_rid.get(rid)
        if guest is None or guest.comes_home:
            return rid.startswith(self._guests.prefix)
        if guest.arriving:
            self._guests.refuse(guest.reserve, OrderRefused("the target aborted the request"))
            return True
        if not guest.muted and guest.req is not None:
            reason = reason or {"type": "abort", "message": "Aborted at its migration target"}
            self._post.send(
                guest.reserve.home,
                TokenChunk(
                    **self._guests.address(guest.reserve, to=guest.reserve.home),
                    index=guest.sent,
                    token_ids=(),
                    finished=orjson.dumps(reason),
                ),
            )
        self._guests.forget(guest)
        return True
