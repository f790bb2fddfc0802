"""Whether an engine takes a request that wants to come."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from sglang_star.engine.verbs import Engine
from sglang_star.errors import OrderRefused
from sglang_star.migration.kind import difference
from sglang_star.protocol import DRAIN, Reserve

HEADROOM_TOKENS: Final = 64
"""Free KV a target keeps beyond a guest's context, so that it can decode at all."""


def check_kind(engine: Engine, message: Reserve, kind: str) -> None:
    """Whether its KV would be of use here.

    Raises:
        OrderRefused: it would not, and why.
    """
    if unlike := difference(message.fingerprint, kind):
        raise OrderRefused(
            f"KV of another kind is of no use here: {unlike}",
            hint="give both instances the same model, arguments and releases; those whose "
            "star.fingerprint in /server_info is equal can exchange requests",
        )
    check_weights(engine, message.weights)


def check_weights(engine: Engine, theirs: str) -> None:
    """Whether KV was made with the weights that are here now.

    Raises:
        OrderRefused: it was made with others.
    """
    ours = engine.weights()
    if theirs != ours:
        raise OrderRefused(
            f"KV of weights {theirs!r} is of no use here, where they are {ours!r}",
            hint="update the weights of all instances",
        )


def check_room(engine: Engine, message: Reserve, arriving: Collection[Reserve]) -> None:
    """Whether there is a slot and KV memory for one more than those that are ``arriving``.

    Raises:
        OrderRefused: there is not.
    """
    if not engine.has_slot(len(arriving)):
        raise OrderRefused("no request slot is free")
    if waiting := engine.retracted():
        raise OrderRefused(f"KV memory is full: {waiting} requests wait for it here")
    promised = sum(other.context_tokens for other in arriving)
    kept = HEADROOM_TOKENS
    # Off an instance that is to go: better here and retracted than lost with it.
    if message.reason != DRAIN:
        kept = max(kept, engine.kept_free(len(arriving) + 1))
    free = engine.free_tokens()
    if free - promised < message.context_tokens + kept:
        raise OrderRefused(
            f"KV memory is full: {free} tokens free, {promised} of them promised, "
            f"{kept} kept for requests to grow"
        )
