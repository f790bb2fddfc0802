"""The names of streams and moves: whoever was not told one cannot make it up."""

from __future__ import annotations

from typing import Any

from sglang_star.engine.clock import RealClock
from sglang_star.protocol import Reserve
from simulation.history import History
from simulation.plan import EngineShape, Event, Plan
from simulation.run import quiet
from simulation.tokens import Spec

REQUESTS = [(0.0, "a", Spec(f"r{i}", (5, 6, 7 + i), 120, 10**9, -1, 0.0)) for i in range(3)]


def reservations(clock: RealClock | None) -> list[Reserve]:
    """What is asked in a history of three streams, each of which moves twice."""
    quiet()
    shape = EngineShape(page_size=4, pages=100, rows=8, overlap=True, step_s=0.02)
    events = tuple(Event(0.3, "follow", (f"r{i}", "bc", 0, 0.1), False) for i in range(3))
    history = History(Plan(1, dict.fromkeys("abc", shape), 16, tuple(REQUESTS), events))
    if clock is not None:
        for node in history.nodes.values():
            node.engine.new_id = clock.new_id  # type: ignore[method-assign]
    assert not history.run(), history.trace
    said: list[Any] = [details[0] for _, _, what, details in history.trace if what == "sends"]
    return [message for message in said if isinstance(message, Reserve)]


def test_a_stream_and_a_move_have_names_that_nobody_can_guess() -> None:
    asked = reservations(RealClock())
    streams = {message.stream_id for message in asked}
    moves = {message.migration_id for message in asked}
    assert len(streams) == 3, "a stream keeps its name from host to host"
    assert len(moves) == 6
    for name in streams | moves:
        # 128 bits, all of them random: nothing of the instance, of its start or of a count.
        assert len(bytes.fromhex(name)) == 16
    assert not streams & moves


def test_a_simulated_engine_gives_the_same_names_every_time() -> None:
    once, again = reservations(None), reservations(None)
    assert once == again
