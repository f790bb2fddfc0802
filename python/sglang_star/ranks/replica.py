"""Every rank's part of a step boundary: the same on all of them, from the same input."""

from __future__ import annotations

from collections.abc import Callable

from sglang_star.errors import RankDivergence
from sglang_star.faults import Faults
from sglang_star.migration.mailbox import OrderEnvelope
from sglang_star.migration.mover import Mover
from sglang_star.orders import Orders
from sglang_star.protocol import OrderReply
from sglang_star.ranks.clock import StepClock
from sglang_star.ranks.group import Ranks
from sglang_star.ranks.ledger import Ledger
from sglang_star.ranks.posts import HeldPost
from sglang_star.ranks.step import StepInput


class Replica:
    """One rank's mover and orders, in step with those of the other ranks.

    Args:
        copies: how many copies of KV the engine has begun so far.
    """

    def __init__(
        self,
        ranks: Ranks,
        clock: StepClock,
        post: HeldPost,
        ledger: Ledger,
        mover: Mover,
        orders: Orders,
        faults: Faults,
        copies: Callable[[], int],
    ) -> None:
        self._ranks = ranks
        self._clock = clock
        self._post = post
        self._ledger = ledger
        self._mover = mover
        self._orders = orders
        self._faults = faults
        self._copies = copies

    @property
    def needs_step(self) -> bool:
        """Whether the next step boundary has work though nothing came; rank 0 asks."""
        return self._mover.busy or self._orders.pending

    def tick(self, step: StepInput) -> list[tuple[OrderEnvelope, OrderReply]]:
        """Handle what came and advance moves; returns the answers to orders.

        Raises:
            RankDivergence: the ranks have not done the same.
        """
        self._clock.advance(step)
        # Looked at before anything happens, when it is the same on all ranks for certain.
        together = self._mover.busy or step.moves
        answers: list[tuple[OrderEnvelope, OrderReply]] = []
        self._mover.poll()
        self._post.hold()
        for item in step.items:
            if isinstance(item, OrderEnvelope):
                with self._faults.contained("an order"):
                    answers.append((item, self._orders.obey(item.message)))
            else:
                self._mover.handle(item)
        self._mover.step()
        with self._faults.contained("orders"):
            self._orders.step()
        if together:
            self._meet()
        self._post.release()
        self._mover.flush()
        return answers

    def _meet(self) -> None:
        """Wait for the other ranks, and make sure that all have done the same."""
        done = (self._ledger.sum, self._copies(), self._faults.counts.total())
        least = self._ranks.least(*done, *(-one for one in done))
        if tuple(-one for one in least[len(done) :]) != least[: len(done)]:
            raise RankDivergence(
                f"rank {self._ranks.rank} of this engine has not done what the others did",
                hint="a defect of STAR, or a rank out of memory: see what each rank logged",
            )
