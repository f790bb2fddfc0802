"""What a move carries: KV into the carrier's slots piece by piece, and at the end the state."""

from __future__ import annotations

from sglang_star.engine.verbs import Engine
from sglang_star.errors import PeerError
from sglang_star.migration.outgoing import Outgoing
from sglang_star.migration.piece import Piece
from sglang_star.migration.post import Post
from sglang_star.migration.states import SendingEvent
from sglang_star.protocol import Commit, MoveMessage, PagesReady, Parked


class Cargo:
    """Loads the outgoing moves of this instance."""

    def __init__(self, engine: Engine, post: Post) -> None:
        self._engine = engine
        self._post = post
        # No more than this is a last bit, not worth another step of waiting.
        self._small = max(engine.page_size, 2)

    def load(self, move: Outgoing, budget: int) -> int:
        """Gather what is complete into free slots and return how many tokens that were.

        At most ``budget`` tokens, to the end of a slot; the last bit of a request that is out of
        the batch goes in any case, since its client waits for it.
        """
        ready = self._ready(move)
        loaded = 0
        while move.free_slots and move.sent < ready:
            last_bit = move.off_batch and ready - move.sent <= self._small
            if loaded >= budget and not last_bit:
                break
            end = min(ready, move.sent + move.slot_tokens)
            loaded += end - move.sent
            slot = move.free_slots.pop()
            ticket = self._engine.gather(move.req, move.sent, end, move.carrier.slot(slot))
            move.loading.append(Piece(ticket, move.sent, end, slot))
            move.sent = end
        return loaded

    def announce(self, move: Outgoing) -> None:
        """Tell the target of what has come to lie in its slot.

        Raises:
            PeerError: something could not be copied there.
        """
        while move.loading and self._engine.copied(move.loading[0].ticket):
            piece = move.loading.popleft()
            if why := self._engine.failure(piece.ticket):
                raise PeerError(why)
            move.filled[piece.slot] = piece.end
            self._send(
                PagesReady(route=move.route, start=piece.start, end=piece.end, slot=piece.slot),
                move,
            )

    def nearly_all(self, move: Outgoing) -> bool:
        """Whether what the request decodes is all that is left to gather."""
        return self._ready(move) - move.sent < self._small

    def seal(self, move: Outgoing) -> None:
        """Of a parked request: announce the commit, and send it once all KV was announced."""
        req = move.req
        length = self._engine.written(req)
        if length - move.sent <= self._small and not move.announced:
            move.announced = True
            self._send(Parked(route=move.route, step_ms=move.step_ms), move)
        if move.sent < length or move.loading or not self._engine.is_settled(req):
            return
        move.machine.fire(SendingEvent.COMMIT)
        penalty_log, predictor = self._engine.state(req)
        self._send(
            Commit(
                route=move.route,
                weights=self._engine.weights(),
                committed_tokens=length,
                output_ids=tuple(req.output_ids),
                penalty_log=penalty_log,
                predictor=predictor,
                facts=move.facts(),
            ),
            move,
        )

    def _ready(self, move: Outgoing) -> int:
        """Positions whose KV can be gathered: of a request that goes on growing, whole pages."""
        complete = self._engine.written(move.req)
        if move.off_batch and self._engine.is_settled(move.req):
            return complete
        return complete // self._engine.page_size * self._engine.page_size

    def _send(self, message: MoveMessage, move: Outgoing) -> None:
        self._post.send(move.target, message)
