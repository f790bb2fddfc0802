"""All that STAR keeps on a request, in one record under one attribute of it.

Whoever holds a request, SGLang's or the simulation's, finds the record by :func:`star_of`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from sglang_star.migration.report import MoveClock
    from sglang_star.predictor.recorder import Track
    from sglang_star.predictor.state import Fusion

ATTRIBUTE: Final = "_star"


@dataclass(slots=True)
class StarRequest:
    """What STAR knows of one request.

    Attributes:
        origin: SGLang's message that the request was made of; what a move rebuilds it from.
        guest: it was made for a stream of another home.
        moves: how often it has moved.
        arrived: output tokens it came here with; 0 if it began here.
        clock: times its stalls; None until it moves.
        estimate: remaining output tokens at ``QUANTILE_LEVELS``; empty while there is none.
        fusion: what the predictor remembers of its hidden states.
        track: what is being recorded of it as training data.
        penalty_log: token ids its penalties have accumulated, in order; None if it has none.
        nothing_in_flight: it joins the batch with no step of its own under way, so that its
            penalties lag no token.
        unbacked: the engine gave its KV back for want of memory, and kept no copy to resume from.
        known_output: of a request that arrives and has a grammar: its output when the move began.
        grammar_taken: how many of these its grammar has taken in.
    """

    origin: Any = None
    guest: bool = False
    moves: int = 0
    arrived: int = 0
    clock: MoveClock | None = None
    estimate: tuple[float, ...] = ()
    fusion: Fusion | None = None
    track: Track | None = None
    penalty_log: array[int] | None = None
    nothing_in_flight: bool = False
    unbacked: bool = False
    known_output: Sequence[int] | None = None
    grammar_taken: int = 0


def star_of(req: Any) -> StarRequest:
    """The record of ``req``, begun now if it has none."""
    found: StarRequest | None = getattr(req, ATTRIBUTE, None)
    if found is None:
        found = StarRequest()
        setattr(req, ATTRIBUTE, found)
    return found
