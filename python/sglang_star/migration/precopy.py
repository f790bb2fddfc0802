"""When a pre-copy has caught up, whether it ever will, and who waits while one ends.

A request that decodes makes KV while what it has is on its way. Its copy catches up if KV travels
faster than it is made; then the request leaves the batch for the last bit, and its client waits for
as long as that bit and all that is ahead of it on the way take. So other moves to the same target
put nothing more on the way while one is about to end.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from sglang_star.config import StarConfig
from sglang_star.migration.outgoing import SLOTS, Outgoing
from sglang_star.migration.states import Sending
from sglang_star.protocol import Peer

MAX_BYTES: Final = 1 << 40
WINDOW_S: Final = 2.0
"""Of being busy, after which what was measured before counts half."""
PROVEN_S: Final = 1.0
"""Of being busy, before which nothing is concluded from what was measured."""
GUESSED_S: Final = 0.2
"""Of being busy, before which sizes are not chosen by what was measured."""
AHEAD_STEPS: Final = 4
"""What is on its way at once lasts for so many steps: a piece waits for a step boundary at either
end, and more would only be ahead of the last bit of a request whose client waits."""
MIN_PIECE: Final = 1 << 18
"""A piece is not cut smaller."""
FRESH_S: Final = 60.0
"""How long what was measured is believed of a way that nothing took since."""
PATIENCE: Final = 3
"""Steps that a request with nearly all of its KV copied goes on decoding until its way is clear."""
YIELD_S: Final = 1.0
"""How long others wait for a move that is about to end."""


class Meter:
    """How fast KV comes to one target while as much as may be is on its way.

    A piece waits for a step boundary at either end: while little is on its way, that is all one
    would measure.

    Attributes:
        taken: bytes; busy_s: seconds; older ones count less.
        looked_at: when a move was under way there last, monotonic seconds.
        busy: whether the way was full when the last step boundary was left.
    """

    def __init__(self) -> None:
        self.taken = 0.0
        self.busy_s = 0.0
        self.looked_at = 0.0
        self.busy = False

    def look(self, now: float) -> None:
        """A step begins."""
        if self.busy:
            self.busy_s += now - self.looked_at
        self.looked_at = now
        if self.busy_s > WINDOW_S:
            self.taken /= 2
            self.busy_s /= 2

    @property
    def rate(self) -> float:
        """Bytes per second; 0 while it is not known."""
        return self.taken / self.busy_s if self.busy_s >= PROVEN_S else 0.0

    @property
    def guess(self) -> float:
        """The same, sooner: good enough to choose sizes by."""
        return self.taken / self.busy_s if self.busy_s >= GUESSED_S else 0.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """What of a move may be on its way at once.

    Attributes:
        pieces: how many; piece: bytes of one; ahead: of all together.
    """

    pieces: int
    piece: int
    ahead: int


class Precopy:
    """Judges the moves of one engine."""

    def __init__(self, config: StarConfig) -> None:
        self._config = config
        self._meters: dict[Peer, Meter] = {}
        self._ending: dict[str, tuple[float, int]] = {}

    def look(self, moves: Collection[Outgoing], now: float) -> None:
        """A step begins."""
        for target in dict.fromkeys(move.target for move in moves):
            self._meters.setdefault(target, Meter()).look(now)
        present = {move.migration_id for move in moves}
        self._ending = {key: one for key, one in self._ending.items() if key in present}

    def leave(self, moves: Collection[Outgoing]) -> None:
        """The step boundary is left with these moves."""
        for target, meter in self._meters.items():
            meter.busy = any(move.full for move in moves if move.target == target)

    def took(self, target: Peer, size: int) -> None:
        """The target has taken so many bytes in."""
        if (meter := self._meters.get(target)) is not None and meter.busy:
            meter.taken += size

    def forget(self, target: Peer) -> None:
        """It is gone."""
        self._meters.pop(target, None)

    # ------------------------------------------------------------------ decisions

    def refusal(
        self, target: Peer, missing: int, made_per_s: float, seconds: float, now: float
    ) -> str:
        """Why KV cannot be there in time, by what is known of the way; empty if it can.

        Args:
            target: where to.
            missing: bytes that are still to come there.
            made_per_s: bytes that are made meanwhile; 0 of a request that does not decode.
            seconds: until the move's deadline.
            now: monotonic seconds.
        """
        meter = self._meters.get(target)
        if meter is None or now - meter.looked_at > FRESH_S or not (rate := meter.rate):
            return ""
        if self._config.copy_bytes_per_s:
            rate = min(rate, self._config.copy_bytes_per_s)
        if rate <= made_per_s:
            return (
                f"the copy would never catch up: KV is made at {made_per_s / 1e6:.2f} MB/s "
                f"and travels at {rate / 1e6:.2f} MB/s"
            )
        if (needs := missing / (rate - made_per_s)) > seconds:
            return (
                f"{missing / 1e6:.0f} MB of KV would take {needs:.1f} s at {rate / 1e6:.2f} MB/s, "
                f"and {max(seconds, 0.0):.1f} s are left"
            )
        return ""

    def sizes(self, move: Outgoing, moves: Collection[Outgoing]) -> Sizes:
        """How much of a move is to be on its way at once, and in what pieces.

        A piece is what travels in about a step, so that the last one is not behind a long one.
        """
        meter = self._meters.get(move.target)
        rate = meter.guess if meter is not None else 0.0
        pieces = max(SLOTS, SLOTS * self._config.max_moves // max(1, len(moves)))
        if not rate or not move.step_ms:
            return Sizes(pieces=SLOTS, piece=MAX_BYTES, ahead=MAX_BYTES)
        sharing = sum(1 for other in moves if other.target == move.target)
        per_step = rate * move.step_ms / 1e3 / max(1, sharing)
        piece = max(MIN_PIECE, int(per_step))
        return Sizes(pieces=pieces, piece=piece, ahead=max(2 * piece, int(AHEAD_STEPS * per_step)))

    def may_park(self, move: Outgoing, moves: Collection[Outgoing], now: float) -> bool:
        """Whether a request of which nearly all is copied is to leave the batch now."""
        since, waited = self._ending.get(move.migration_id, (now, 0))
        self._ending[move.migration_id] = since, waited + 1
        if move.on_their_way > 1:
            return False
        ahead = sum(other.ahead for other in moves if other.target == move.target)
        meter = self._meters.get(move.target)
        rate = meter.guess if meter is not None else 0.0
        return not rate or ahead / rate <= move.step_ms / 1e3 or waited >= PATIENCE

    def yields(self, move: Outgoing, moves: Collection[Outgoing], now: float) -> bool:
        """Whether this move puts nothing on the way now, since another's client waits for it."""
        if move.off_batch or move.migration_id in self._ending:
            return False
        return any(
            other.target == move.target
            and (begun := self._ending.get(other.migration_id)) is not None
            and other.machine.state in (Sending.COPYING, Sending.PARKED)
            and now - begun[0] < YIELD_S
            for other in moves
        )
