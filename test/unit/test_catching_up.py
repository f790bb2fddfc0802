"""A pre-copy catches up though each piece of it takes several steps, as a device's copies do."""

from __future__ import annotations

from collections import deque

import pytest

from sglang_star.migration.states import Sending
from sglang_star.protocol import PagesReady, PagesTaken, Reserved
from unit.no_faults import NoFaults
from unit.test_hold import PROMPT, Engine


class TokenPages(Engine):
    """One whose every token can be copied at once."""

    page_size = 1


@pytest.mark.parametrize("latency", [1, 3, 6])
def test_a_request_leaves_the_batch_when_little_is_left(latency: int) -> None:
    engine = TokenPages()
    req = engine.request()
    move = engine.start(req, hold_after=None)
    engine.sender.on_reserved(engine.answer(Reserved, move, transport="shm"))
    told: deque[list[int]] = deque([[] for _ in range(latency)], maxlen=latency)
    steps = 0
    while move.machine.state is Sending.COPYING:
        for stamp in told[0]:
            engine.sender.on_taken(engine.answer(PagesTaken, move, stamp=stamp))
        req.output_ids.append(0)
        before = len(engine.all_of(PagesReady))
        engine.sender.step(NoFaults())
        told.append([message.stamp for message in engine.all_of(PagesReady)[before:]])
        steps += 1
        assert steps < 100, "it never leaves the batch"
    assert move.sent >= PROMPT
    assert move.on_their_way <= 1
