"""What a move carries: KV into slots of staging memory, piece by piece; at the end the state."""

from __future__ import annotations

from typing import Final

from sglang_star.config import StarConfig
from sglang_star.engine.verbs import Engine
from sglang_star.errors import PeerError
from sglang_star.migration.outgoing import Outgoing
from sglang_star.migration.piece import Loaded
from sglang_star.migration.post import Post
from sglang_star.migration.precopy import Sizes
from sglang_star.migration.states import SendingEvent
from sglang_star.migration.transport.base import Region
from sglang_star.protocol import Commit, MoveMessage, PagesReady, Parked

MAX_TOKENS: Final = 1024
"""Positions that a piece has at most: the grammar of a guest follows it in one step."""


class Cargo:
    """Loads the outgoing moves of this instance."""

    def __init__(self, engine: Engine, post: Post, config: StarConfig) -> None:
        self._engine = engine
        self._post = post
        self._config = config
        # Of moves that are over: pieces that are still being copied into their slots.
        self._draining: list[Loaded] = []
        # No more than this is a last bit, not worth another step of waiting.
        self._small = max(engine.page_size, 2)

    def load(self, move: Outgoing, budget: int, sizes: Sizes) -> int:
        """Begin to gather what is complete into free slots; return how many bytes that were.

        At most ``budget`` bytes, to the end of a piece; the last bit of a request that is out of
        the batch goes in any case, since its client waits for it.

        Raises:
            PeerError: a slot cannot hold a page.
        """
        region = move.region
        assert region is not None, "pages go before the target has chosen a transport"
        ready = self._ready(move)
        loaded = 0
        move.full = False
        while move.sent < ready:
            last_bit = move.off_batch and ready - move.sent <= self._small
            move.full = move.on_their_way >= sizes.pieces or move.ahead >= sizes.ahead
            if move.on_their_way >= sizes.pieces or (
                (move.full or loaded >= budget) and not last_bit
            ):
                break
            piece = self._piece(region, sizes.piece)
            if move.on_their_way and not move.off_batch and ready - move.sent < piece:
                # It would be followed by as little in every step, and the way never clear.
                move.full = False
                break
            end = min(ready, move.sent + piece)
            if (grant := region.grant()) is None:
                move.full = True
                break
            loaded += (end - move.sent) * move.token_bytes
            try:
                ticket = self._engine.gather(move.req, move.sent, end, region.view(grant))
            except Exception:
                region.give(grant)
                raise
            move.loading.append(Loaded(ticket, move.sent, end, region, grant))
            move.sent = end
        return loaded

    def announce(self, move: Outgoing) -> None:
        """Tell the target of what has come to lie in its slot.

        Raises:
            PeerError: something could not be copied there.
        """
        while move.loading and self._engine.copied(move.loading[0].ticket):
            piece = move.loading[0]
            if why := self._engine.failure(piece.ticket):
                raise PeerError(why)
            del move.loading[0]
            move.filled[piece.grant.stamp] = piece
            size = (piece.end - piece.start) * move.token_bytes
            self._send(
                PagesReady(
                    route=move.route,
                    start=piece.start,
                    end=piece.end,
                    slot=piece.grant.index,
                    stamp=piece.grant.stamp,
                    checksum=(
                        piece.region.checksum(piece.grant, size) if self._config.checksum else 0
                    ),
                ),
                move,
            )

    def _piece(self, region: Region, wanted: int) -> int:
        """Positions that one piece has at most: whole pages, in a slot and within a step's budget.

        ``wanted`` is in bytes; it has a page at least.

        Raises:
            PeerError: not even one page.
        """
        page = self._engine.page_size
        page_bytes = page * self._engine.token_bytes
        if region.slot_bytes < page_bytes:
            raise PeerError(
                f"a KV page of {page_bytes} bytes does not fit a slot of {region.slot_bytes}",
                hint="raise --star-staging-mb",
            )
        budget = min(region.slot_bytes, self._config.copy_bytes_per_step, wanted)
        return max(1, min(budget // page_bytes, MAX_TOKENS // page)) * page

    @property
    def draining(self) -> bool:
        """Whether slots of moves that are over are still being filled."""
        return bool(self._draining)

    def unload(self, move: Outgoing) -> None:
        """A move is over: give its slots up; those that are being filled, once that is over.

        The target may still read one. It will see by the stamp that it read too late.
        """
        for piece in move.filled.values():
            piece.region.give(piece.grant)
        move.filled.clear()
        self._draining += move.loading
        move.loading.clear()
        self.drain()

    def drain(self) -> None:
        """Give up what was still being filled when its move ended, and is not any more."""
        waiting, self._draining = self._draining, []
        for piece in waiting:
            if self._engine.copied(piece.ticket):
                piece.region.give(piece.grant)
            else:
                self._draining.append(piece)

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
