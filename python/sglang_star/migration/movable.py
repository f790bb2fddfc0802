"""Which requests may leave an engine now."""

from __future__ import annotations

from typing import Final

from sglang_star.engine.verbs import Engine, Request
from sglang_star.errors import NotMovable, OrderRefused

MIN_OUTPUT_TOKENS: Final = 2
"""A request moves only once it decodes steadily: SGLang's overlap treats the first steps apart."""


def check(engine: Engine, req: Request) -> None:
    """Look at a request that is to move.

    Raises:
        NotMovable: it never can.
        OrderRefused: not now.
    """
    if engine.unsupported:
        raise NotMovable(engine.unsupported)
    if why := engine.pinned(req):
        raise NotMovable(f"{req.rid} cannot move: it uses {why}")
    if engine.is_ending(req):
        raise OrderRefused(f"{req.rid} is about to end")
    if not engine.is_running(req) or len(req.output_ids) < MIN_OUTPUT_TOKENS:
        raise OrderRefused(f"{req.rid} is not decoding steadily yet", hint="retry in a few steps")
