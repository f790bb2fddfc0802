"""What a copy from a peer goes through: its bytes come, are copied, and were intact, or not."""

from __future__ import annotations

import pytest
import torch

from sglang_star.engine.copies import Begun, Lane, Unloading
from sglang_star.engine.tickets import Tickets
from sglang_star.errors import PeerError


class Fetch:
    """One whose bytes come when the test says so."""

    def __init__(self) -> None:
        self.data: torch.Tensor | None = None
        self.error = ""
        self.good = True
        self.closed = 0

    def arrived(self) -> torch.Tensor | None:
        if self.error:
            raise PeerError(self.error)
        return self.data

    def intact(self) -> bool:
        return self.good

    def cancel(self) -> None:
        self.error = "nobody wants it any more"

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def pool() -> torch.Tensor:
    return torch.zeros(4, dtype=torch.uint8)


def unloading(fetch: Fetch, pool: torch.Tensor) -> Unloading:
    lane = Lane(pool.device)

    def scatter(data: torch.Tensor) -> Begun:
        return lane.run(lambda: pool.copy_(data))

    return Unloading(fetch, scatter)


def test_it_is_copied_when_it_has_come_and_closed_once(pool: torch.Tensor) -> None:
    fetch, tickets = Fetch(), Tickets()
    ticket = tickets.begin(unloading(fetch, pool))
    tickets.poll()
    assert not tickets.is_over(ticket)
    assert fetch.closed == 0
    fetch.data = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    tickets.poll()
    assert tickets.is_over(ticket)
    assert pool.tolist() == [1, 2, 3, 4]
    assert (tickets.failure(ticket), fetch.closed) == ("", 1)
    tickets.poll()
    assert fetch.closed == 1


def test_one_that_is_here_is_over_at_once(pool: torch.Tensor) -> None:
    fetch, tickets = Fetch(), Tickets()
    fetch.data = torch.ones(4, dtype=torch.uint8)
    assert tickets.is_over(tickets.begin(unloading(fetch, pool)))
    assert pool.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("how", ["lost", "cancelled", "overwritten"])
def test_one_that_goes_wrong_fails_its_ticket_and_is_closed_once(
    pool: torch.Tensor, how: str
) -> None:
    fetch, tickets = Fetch(), Tickets()
    ticket = tickets.begin(unloading(fetch, pool))
    if how == "lost":
        fetch.error = "the link is cut"
    elif how == "cancelled":
        fetch.cancel()
    else:
        fetch.data, fetch.good = torch.ones(4, dtype=torch.uint8), False
    tickets.poll()
    told = {"lost": "cut", "cancelled": "nobody wants", "overwritten": "used the slot again"}[how]
    assert told in tickets.failure(ticket)
    assert fetch.closed == 1
    assert pool.any() == (how == "overwritten"), "its pages are given back, whatever they hold"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device")
def test_on_a_device_a_copy_runs_beside_what_the_current_stream_does() -> None:
    device = torch.device("cuda")
    lane, pool = Lane(device), torch.zeros(1 << 20, dtype=torch.uint8, device=device)
    source = torch.ones(1 << 20, dtype=torch.uint8).pin_memory()
    torch.cuda._sleep(100_000_000)  # the current stream's, which the copy must follow
    begun = lane.run(lambda: pool.copy_(source, non_blocking=True))
    assert not begun.is_over()
    torch.cuda.synchronize()
    assert begun.is_over()
    assert int(pool.sum(dtype=torch.int64)) == 1 << 20
