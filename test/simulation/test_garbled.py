"""What members say that no member would: it costs the streams it is about, and no other."""

from __future__ import annotations

import random
from dataclasses import fields, replace

import pytest
from msgspec import structs

from sglang_star.protocol import Inserted, Message, MoveFacts, Peer, PeerMessage, Reserve, Route
from simulation import garble
from simulation.garbled import Garbled
from simulation.plan import Allowed, draw
from simulation.run import quiet
from simulation.test_contained import SPEC, there_and_on
from unit.test_protocol import MESSAGES

SHARE = 0.15
CALM = Allowed(**{field.name: False for field in fields(Allowed)})
LONG = replace(SPEC, max_new_tokens=380)
COPIES = 100_000


def garbled(seed: int) -> Garbled:
    """Half of the histories have other faults, too."""
    return Garbled(draw(seed, CALM if seed % 2 else Allowed()), SHARE)


def test_no_engine_ends_and_no_other_stream_changes() -> None:
    quiet()
    said = victims = spared = 0
    for seed in range(300):
        history = garbled(seed)
        assert history.run() == "", seed
        said += history.said
        victims += len(history.victims)
        spared += len(history.clients) - len(history.victims & set(history.clients))
    assert said > 500
    assert victims > 100
    assert spared > 100


def test_whatever_bytes_come_are_a_message_or_refused() -> None:
    dice = random.Random(0)
    heard = 0
    for _ in range(COPIES):
        message = garble.understood(garble.changed(dice.choice(MESSAGES), dice))
        heard += isinstance(message, Message)
    # Both happen, or nothing was tried.
    assert COPIES / 10 < heard < COPIES * 9 / 10


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_changed_copy_is_another_message(message: Message) -> None:
    dice = random.Random(1)
    copies = [garble.understood(garble.changed(message, dice)) for _ in range(300)]
    assert sum(copy is not None and copy != message for copy in copies) > 10


def test_the_streams_of_a_message_are_found_wherever_it_names_them() -> None:
    for message in MESSAGES:
        if isinstance(message, PeerMessage) and hasattr(message, "route"):
            assert message.route.stream_id in garble.streams_of(message)


def test_a_stream_whose_home_was_told_of_a_host_that_has_it_not_is_taken_back() -> None:
    quiet()
    history = there_and_on(path="b", spec=LONG)
    history.gentle = False
    home = history.nodes["a"]

    def lie() -> None:
        (shadow,) = home.mover.home.shadows.values()
        facts = MoveFacts(
            source="b",
            reason="none",
            context_tokens=home.engine.tokens(shadow.req) - 1,
            precopied_tokens=0,
            transport_bytes=0,
            step_ms=1.0,
            started_at=0.0,
        )
        hand_over = Inserted(
            route=Route(migration_id="never", stream_id=shadow.stream_id, receiver=1),
            host=shadow.host,
            home=home.peer,
            facts=facts,
            moves=9,
        )
        home.arrived(hand_over, urgent=True)

    history.clock.at(1.0, lie)
    assert not history.run(), history.trace
    assert history.clients["r0"].seen == LONG.max_new_tokens
    assert home.mover.log.outcomes["reclaimed"] == 1


def test_a_stream_whose_host_is_told_by_another_name_is_taken_back() -> None:
    quiet()
    history = there_and_on(path="b", spec=LONG)
    history.gentle = False

    def forget() -> None:
        """Its host goes on under an epoch that home does not know."""
        (shadow,) = history.nodes["a"].mover.home.shadows.values()
        shadow.host = structs.replace(shadow.host, instance_id="bb")
        shadow.migration_id += "x"

    history.clock.at(1.0, forget)
    assert not history.run(), history.trace
    assert history.clients["r0"].seen == LONG.max_new_tokens
    assert history.nodes["a"].mover.log.outcomes["reclaimed"] == 1


def test_a_stream_that_comes_home_has_the_limit_that_home_knows() -> None:
    quiet()
    history = there_and_on(path="ba")
    link = history.nodes["b"].link
    send = link.send

    def lie(peer: Peer, message: Message) -> None:
        if isinstance(message, Reserve):
            message = structs.replace(message, max_new_tokens=message.max_new_tokens + 100)
        send(peer, message)

    link.send = lie  # type: ignore[method-assign]
    assert not history.run(), history.trace
    assert history.clients["r0"].seen == SPEC.max_new_tokens
