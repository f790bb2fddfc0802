"""Orders that wait for their request to come to a token.

An order is armed for a name, before or while a request of that name runs. It starts at the first
step boundary at which the request has decoded the wanted number of tokens on this instance; that
makes a move an event of the stream instead of one of the clock, and is looked at between any two
steps, so nothing here may be slow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sglang_star.errors import OrderRefused
from sglang_star.protocol import MoveReport, Peer

MAX_ARMED = 256
MAX_WAIT_S = 86_400.0
WILDCARD = "*"


@dataclass(slots=True, eq=False)
class ArmedOrder:
    """One move that is to be.

    Attributes:
        migration_id: of the move once it starts.
        rid: the name to wait for; with a final ``*``, what it must begin with.
        at_tokens: output tokens decoded on this instance at which to start.
        hold_after: see :class:`~sglang_star.protocol.MigrateOrder`; None never.
        armed_at: wall clock; expires_at: monotonic seconds.
        obstacle: why it did not start when it was due, if so.
    """

    migration_id: str
    rid: str
    target: Peer
    reason: str
    at_tokens: int
    hold_after: int | None
    armed_at: float
    expires_at: float
    obstacle: str = ""

    def fits(self, rid: str, tokens: int) -> bool:
        """Whether it is due for a request of that name with so many tokens."""
        if tokens < self.at_tokens:
            return False
        if self.rid.endswith(WILDCARD):
            return rid.startswith(self.rid[: -len(WILDCARD)])
        return rid == self.rid

    def unstarted(self, source: str, outcome: str, detail: str, now: float) -> MoveReport:
        """The report of an order that never became a move; ``now`` by the wall clock."""
        return MoveReport(
            migration_id=self.migration_id,
            rid=self.rid,
            source=source,
            target=self.target.instance_id,
            outcome=outcome,
            reason=self.reason,
            detail=detail,
            started_at=self.armed_at,
            finished_at=now,
        )


class ArmedOrders:
    """The table, oldest order first."""

    def __init__(self) -> None:
        self._orders: list[ArmedOrder] = []

    def __len__(self) -> int:
        return len(self._orders)

    def add(self, order: ArmedOrder) -> None:
        """Arm one.

        Raises:
            OrderRefused: the table is full.
        """
        if len(self._orders) >= MAX_ARMED:
            raise OrderRefused(
                f"{MAX_ARMED} orders are armed here, the most allowed",
                hint="disarm those that are no longer wanted: POST /star/disarm",
            )
        self._orders.append(order)

    def due(self, running: Iterable[tuple[str, int]]) -> list[tuple[ArmedOrder, str]]:
        """Pair orders with requests, each at most once, in the order they were armed.

        Args:
            running: name and tokens decoded here of the requests that could move now.
        """
        free = dict(running)
        pairs = []
        for order in self._orders:
            rid = next((rid for rid, tokens in free.items() if order.fits(rid, tokens)), None)
            if rid is not None:
                del free[rid]
                pairs.append((order, rid))
        return pairs

    def remove(self, order: ArmedOrder) -> None:
        """It has started, or cannot."""
        self._orders.remove(order)

    def expire(self, now: float) -> list[ArmedOrder]:
        """Take out those whose time is over; ``now`` in monotonic seconds."""
        return self._take([order for order in self._orders if order.expires_at <= now])

    def disarm(self, rid: str) -> list[ArmedOrder]:
        """Take out those that were armed for exactly this name; all of them if it is empty."""
        return self._take([order for order in self._orders if rid in ("", order.rid)])

    def _take(self, gone: list[ArmedOrder]) -> list[ArmedOrder]:
        if gone:
            self._orders = [order for order in self._orders if order not in gone]
        return gone
