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

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

_KNOWN = "_star_known_output"
"""Attribute of an arriving Req: its output when the move began."""
_TAKEN = "_star_grammar_taken"
"""Attribute of an arriving Req: how many of these its grammar has taken in."""


def begin(req: Req, output: Sequence[int]) -> None:
    """Note the output so far of a request that was just rebuilt."""
    if req.grammar is not None and len(output):
        setattr(req, _KNOWN, output)


def follow(req: Req, positions: int) -> None:
    """Take in the output whose KV lies in positions ``[0, positions)``.

    Raises:
        OrderRefused: the grammar does not accept it.
    """
    known = getattr(req, _KNOWN, None)
    if known is not None:
        _take(req, known, min(len(known), positions - len(req.origin_input_ids)))


def finish(req: Req, output: Sequence[int]) -> None:
    """Take in what is left, now that all is known.

    Raises:
        OrderRefused: the grammar does not accept it, or took in something else before.
    """
    if req.grammar is None:
        return
    taken = getattr(req, _TAKEN, 0)
    if taken and list(getattr(req, _KNOWN)[:taken]) != list(output[:taken]):
        raise OrderRefused("the output is not the one that the move began with")
    _take(req, output, len(output))
    setattr(req, _KNOWN, None)


def _take(req: Req, output: Sequence[int], end: int) -> None:
    taken = getattr(req, _TAKEN, 0)
    try:
        for token in output[taken:end]:
            req.grammar.accept_token(token)
    except ValueError as error:
        raise OrderRefused(f"the grammar does not accept the output so far: {error}") from error
    setattr(req, _TAKEN, max(taken, end))
