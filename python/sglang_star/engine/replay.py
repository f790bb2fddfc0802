"""A guest's grammar takes in the output it has had elsewhere, while its KV arrives.

A grammar's state cannot be sent, only made again from the tokens. All of them at once, when the
request joins, would hold every stream of the engine for as long as that takes, and the guest's
client most of all. So what is known at the beginning of a move travels with the request's message,
and the grammar follows the KV: tokens are taken in with the pages that hold them, as many per step
as KV is copied. What was decoded meanwhile is left for the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sglang_star.errors import OrderRefused
from sglang_star.star_request import star_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


def begin(req: Req, output: Sequence[int]) -> None:
    """Note the output so far of a request that was just rebuilt."""
    if req.grammar is not None and len(output):
        star_of(req).known_output = output


def follow(req: Req, positions: int) -> None:
    """Take in the output whose KV lies in positions ``[0, positions)``.

    Raises:
        OrderRefused: the grammar does not accept it.
    """
    known = star_of(req).known_output
    if known is not None:
        _take(req, known, min(len(known), positions - len(req.origin_input_ids)))


def finish(req: Req, output: Sequence[int]) -> None:
    """Take in what is left, now that all is known.

    Raises:
        OrderRefused: the grammar does not accept it, or took in something else before.
    """
    if req.grammar is None:
        return
    star = star_of(req)
    taken, known = star.grammar_taken, star.known_output
    if known is not None and list(known[:taken]) != list(output[:taken]):
        raise OrderRefused("the output is not the one that the move began with")
    _take(req, output, len(output))
    star.known_output = None


def _take(req: Req, output: Sequence[int], end: int) -> None:
    star = star_of(req)
    try:
        for token in output[star.grammar_taken : end]:
            req.grammar.accept_token(token)
    except ValueError as error:
        raise OrderRefused(f"the grammar does not accept the output so far: {error}") from error
    star.grammar_taken = max(star.grammar_taken, end)
