"""A small share of ``python -m fuzz``: nothing ends, nothing is answered 500, members are heard."""

from __future__ import annotations

import asyncio

from fuzz import engine, router
from fuzz.found import Found
from simulation.run import quiet


def test_changed_messages_cost_an_engine_nothing() -> None:
    quiet()
    found = Found()
    engine.run(0.01, 7, found)
    assert not found.kinds, found.examples
    assert found.sent > 700
    assert 0 < found.taken < found.sent


def test_changed_requests_and_statuses_cost_the_router_nothing() -> None:
    found = Found()
    asyncio.run(router.run(0.004, 7, found))
    assert not found.kinds, found.examples
    assert found.sent > 300
    assert 0 < found.taken < found.sent
