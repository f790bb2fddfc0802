"""A dozen chat answers of the default model, moved live on order, then again without moving."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

from sglang_star.cluster import Cluster
from sglang_star.cluster_layout import ClusterSpec
from sglang_star.demo.client import Stream, chat, served_model
from sglang_star.demo.comparison import flush
from sglang_star.demo.prompts import CHAT
from sglang_star.demo.screen import Screen
from sglang_star.demo.side import moves_of
from sglang_star.demo.twins import Twin, twins_of
from sglang_star.demo.watch import POLL_S, Watcher
from sglang_star.model import default_model

MOVE_AT_TOKENS: Final = 8
"""A stream is ordered to move once its client has so many tokens."""

_LAST_REPORTS_S: Final = 0.75


def spec(predictor: str) -> ClusterSpec:
    """Return two engines that do both phases: the fewest between which a request can move."""
    return ClusterSpec(
        model=str(default_model()),
        aggregated=2,
        rescheduler="off",
        predictor=predictor,
        # In bfloat16 a token can depend on which others share its batch, with or without STAR, and
        # the comparison with the twins would prove nothing.
        engine_arguments=("--dtype", "float32"),
    )


@dataclass(frozen=True, slots=True)
class Conversation:
    """What both passes gave: streams that were to move, and their still repetitions."""

    streams: Sequence[Stream] = ()
    stills: Sequence[Stream] = ()
    moves: Sequence[dict[str, Any]] = ()
    twins: Sequence[Twin] = ()


def run(cluster: Cluster) -> Conversation:
    """Ask all questions twice, from empty caches."""
    flush(cluster)
    streams, moves = asyncio.run(_ask(cluster.url, "chat", move=True))
    flush(cluster)
    stills, none = asyncio.run(_ask(cluster.url, "still", move=False))
    cluster.check()
    return Conversation(streams, stills, moves, twins_of(streams, stills, [*moves, *none]))


async def _ask(url: str, tag: str, *, move: bool) -> tuple[list[Stream], list[dict[str, Any]]]:
    watcher = Watcher(url)
    screen = Screen(watcher, len(CHAT))
    async with aiohttp.ClientSession(url) as session, watcher.watching():
        mover = Mover(session, watcher)

        def observe(streams: Sequence[Stream]) -> None:
            if move:
                mover.look(streams)
            screen.show(streams)

        streams = await chat(url, await served_model(url), CHAT, tag=tag, observe=observe)
        await mover.done()
        await asyncio.sleep(_LAST_REPORTS_S + POLL_S)
    screen.end(streams)
    return streams, moves_of(streams, watcher.moves)


@dataclass
class Mover:
    """Orders every stream to the other instance, once, when its client has a few tokens."""

    session: aiohttp.ClientSession
    watcher: Watcher
    _orders: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    def look(self, streams: Sequence[Stream]) -> None:
        """Order what is due and not ordered yet."""
        where = {seen.rid: seen.instance for seen in self.watcher.sightings}
        names = sorted({load.instance for load in self.watcher.loads})
        for stream in streams:
            rid = stream.rid
            if stream.tokens >= MOVE_AT_TOKENS and rid in where and rid not in self._orders:
                target = names[1 - names.index(where[rid])]
                self._orders[rid] = asyncio.create_task(self._order(rid, target))

    async def _order(self, rid: str, target: str) -> None:
        # A refused order costs nothing: the stream goes on where it is, and is not counted.
        with contextlib.suppress(aiohttp.ClientError):
            order = {"rid": rid, "target": target}
            async with self.session.post("/star/migrate", json=order) as answer:
                await answer.read()

    async def done(self) -> None:
        """Wait until every order was answered."""
        await asyncio.gather(*self._orders.values())
