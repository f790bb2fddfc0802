"""Copies under way: numbers as they begin, ends at a boundary and nowhere else."""

from __future__ import annotations

from sglang_star.engine.tickets import KEPT_FAILURES, Copying, Tickets
from sglang_star.errors import PeerError


class Copy:
    """One that is over when the test says so."""

    def __init__(self) -> None:
        self.over = False
        self.error = ""
        self.asked = 0

    def is_over(self) -> bool:
        self.asked += 1
        if self.error:
            raise PeerError(self.error)
        return self.over


def test_a_copy_is_over_at_the_boundary_at_which_that_is_seen() -> None:
    tickets, one, other = Tickets(), Copy(), Copy()
    first, second = tickets.begin(one), tickets.begin(other)
    assert (first, second) == (1, 2)
    other.over = True
    assert not tickets.is_over(second), "between two boundaries nothing changes"
    tickets.poll()
    assert tickets.is_over(second)
    assert not tickets.is_over(first), "and the slow one holds nobody up"
    one.over = True
    tickets.poll()
    assert tickets.is_over(first)
    assert not tickets
    asked = one.asked
    tickets.poll()
    assert one.asked == asked, "not looked at any more"


def test_what_is_over_as_it_begins_is_known_at_once() -> None:
    tickets, copy = Tickets(), Copy()
    copy.over = True
    assert tickets.is_over(tickets.begin(copy))
    assert not tickets


def test_a_failure_is_told_of_its_ticket_and_not_raised() -> None:
    tickets, copy = Tickets(), Copy()
    ticket = tickets.begin(copy)
    assert tickets.failure(ticket) == ""
    copy.error = "the link is cut"
    tickets.poll()
    assert tickets.is_over(ticket)
    assert tickets.failure(ticket) == "the link is cut"
    for _ in range(KEPT_FAILURES):
        tickets.begin(copy)
    assert tickets.failure(ticket) == "", "not kept for ever"


def test_ranks_see_a_copy_end_at_the_same_boundary_and_alike() -> None:
    """Two ranks: each is told the minimum of both."""
    told: list[list[int]] = []
    elsewhere: list[Copying] = []

    def agree(here: object) -> list[int]:
        told.append(list(here))  # type: ignore[call-overload]
        return [min(pair) for pair in zip(told[-1], elsewhere, strict=True)]

    tickets, one, other = Tickets(agree), Copy(), Copy()
    one.over = True
    first, second = tickets.begin(one), tickets.begin(other)
    assert not tickets.is_over(first), "what is over here at once may not be elsewhere"
    elsewhere = [Copying.UNDER_WAY, Copying.FAILED]
    tickets.poll()
    assert told == [[Copying.DONE, Copying.UNDER_WAY]]
    assert not tickets.is_over(first)
    assert not tickets.is_over(second)
    other.over = True
    elsewhere = [Copying.DONE, Copying.FAILED]
    tickets.poll()
    assert tickets.failure(first) == ""
    assert "another rank" in tickets.failure(second)
    assert not tickets
