"""Moves between instances: reserve, pre-copy over finite links, park, tail, join.

The state machine is the engine's, seen from outside: the request decodes on while its KV is
copied, leaves the source's batch at a step boundary, sends what it produced meanwhile and joins
the target's batch at its next boundary. What makes a move fail: it finished or was retracted
meanwhile, or the target has no room.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang_star_bench.simulator.instance import Instance
from sglang_star_bench.simulator.links import Links
from sglang_star_bench.simulator.prefill import PrefillPool
from sglang_star_bench.simulator.recorder import Recorder
from sglang_star_bench.simulator.request import Request, State

HEADROOM_TOKENS = 64
"""Reserved beyond the context, for what is decoded during the copy."""


@dataclass(slots=True)
class Migration:
    """One move under way."""

    request: Request
    source: Instance
    target: Instance
    tokens: int
    reserved: int
    recompute: bool


class Mover:
    """Carries orders out on the fleet.

    Args:
        links: what KV travels on.
        slowdown: factor on the step time of both ends while KV is copied.
        at: schedules a call at a time.
        changed: told after a request's state, place or migration changed.
    """

    def __init__(
        self,
        recorder: Recorder,
        prefill: PrefillPool,
        links: Links,
        slowdown: float,
        at: Callable[[float, Callable[[Any], None], Any], None],
        changed: Callable[[Request], None],
    ) -> None:
        self.recorder = recorder
        self.prefill = prefill
        self.links = links
        self.slowdown = slowdown
        self.at = at
        self.changed = changed
        self.now_s = 0.0

    def start(
        self, request: Request | None, source: Instance, target: Instance, mode: str, now_s: float
    ) -> bool:
        """Begin a move; False if it is refused."""
        if (
            request is None
            or request.state != State.RUNNING
            or request.instance is not source
            or request.migration is not None
            or source is target
        ):
            self.recorder.refused_moves += 1
            return False
        source.sync(now_s)
        tokens = request.kv(source.steps)
        if not target.can_reserve(tokens):
            self.recorder.refused_moves += 1
            return False
        move = Migration(
            request, source, target, tokens, tokens + HEADROOM_TOKENS, mode == "recompute"
        )
        request.migration = move
        source.moves_out += 1
        target.moves_in += 1
        target.reserved_kv += move.reserved
        target.poke(now_s)
        self.changed(request)
        if move.recompute:
            source.park(request, now_s)
        else:
            source.copying(+1, self.slowdown, now_s)
            target.copying(+1, self.slowdown, now_s)
            self.links.send(source, target, tokens, now_s, self._copied, move)
        return True

    def _copied(self, move: Migration) -> None:
        move.source.copying(-1, self.slowdown, self.now_s)
        move.target.copying(-1, self.slowdown, self.now_s)
        move.source.park(move.request, self.now_s)

    def parked(self, request: Request, now_s: float) -> None:
        """The source's boundary came: send the tail, or give up if the request is gone."""
        move: Migration | None = request.migration
        if move is None:
            return
        if request.state != State.PARKED:
            self._end(move, now_s)
            self.recorder.cancelled_moves += 1
            return
        tail = request.kv(move.source.steps) - move.tokens
        if move.recompute:
            tokens = request.kv(move.source.steps)
            self.recorder.recomputed_tokens += tokens
            for when, chunk, last in self.prefill.submit(tokens, now_s):
                self.at(when, self._recomputed, (move, chunk, last))
            return
        self.links.send(move.source, move.target, max(tail, 0), now_s, self._landed, move)

    def _recomputed(self, chunk: tuple[Migration, int, bool]) -> None:
        move, tokens, last = chunk
        arrived = self._landed if last else _nothing
        self.links.send(None, move.target, tokens, self.now_s, arrived, move)

    def _landed(self, move: Migration) -> None:
        request, source, target = move.request, move.source, move.target
        tokens = request.kv(source.steps)
        source.held_kv -= tokens
        target.held_kv += tokens
        self.recorder.migrations += 1
        self.recorder.migrated_tokens += 0 if move.recompute else tokens
        request.moved_s = self.now_s
        target.arrive(request, self.now_s, from_prefill=False)
        self._end(move, self.now_s)

    def _end(self, move: Migration, now_s: float) -> None:
        move.target.reserved_kv -= move.reserved
        move.source.moves_out -= 1
        move.target.moves_in -= 1
        move.request.migration = None
        move.source.poke(now_s)
        move.target.poke(now_s)
        self.changed(move.request)


def _nothing(_: Any) -> None:
    """An earlier chunk has arrived: the last one is waited for."""
