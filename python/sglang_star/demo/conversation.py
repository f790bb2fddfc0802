"""A dozen chat answers of the default model, moved live on order, then again without moving."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from sglang_star.cluster import Cluster
from sglang_star.cluster_layout import ClusterSpec, Engine
from sglang_star.demo.client import Stream, chat, served_model
from sglang_star.demo.comparison import LAST_REPORTS_S, flush
from sglang_star.demo.prompts import CHAT, Prompt
from sglang_star.demo.screen import Screen
from sglang_star.demo.side import moves_of
from sglang_star.demo.twins import Twin, twins_of
from sglang_star.demo.watch import Watcher
from sglang_star.errors import PeerError
from sglang_star.model import default_model

MOVE_AT_TOKENS: Final = 8
"""A stream leaves each of the two instances once it has decoded so many tokens there."""

HOLD_AFTER_TOKENS: Final = 4
"""So many tokens later it is taken out of the batch, so that no move loses a race to the end."""

QUESTION: Final = "Tell me about the tides."


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
    asyncio.run(arm(cluster.engines, "chat", CHAT))
    streams, moves = asyncio.run(_ask(cluster.url, "chat"))
    asyncio.run(disarm(cluster.engines))
    flush(cluster)
    stills, none = asyncio.run(_ask(cluster.url, "still"))
    cluster.check()
    return Conversation(streams, stills, moves, twins_of(streams, stills, [*moves, *none]))


async def _ask(url: str, tag: str) -> tuple[list[Stream], list[dict[str, Any]]]:
    watcher = Watcher(url)
    screen = Screen(watcher, len(CHAT))
    async with watcher.watching():
        model = await served_model(url)
        streams = await chat(url, model, CHAT, tag=tag, observe=screen.show)
        await asyncio.sleep(LAST_REPORTS_S)
    screen.end(streams)
    return streams, moves_of(streams, watcher.moves)


async def arm(engines: Sequence[Engine], tag: str, prompts: Sequence[Prompt]) -> None:
    """Order every stream there and back before it exists: wherever it starts, it moves.

    Raises:
        PeerError: an engine refused.
    """
    here, there = engines
    async with aiohttp.ClientSession() as session:
        for source, target in ((here, there), (there, here)):
            for prompt in prompts:
                order = {
                    "rid": f"{tag}-{prompt.name}",
                    "target": target.url,
                    "reason": "ordered",
                    "at_tokens": MOVE_AT_TOKENS,
                    "hold_after": HOLD_AFTER_TOKENS,
                }
                await _post(session, f"{source.url}/star/migrate", order)


async def disarm(engines: Sequence[Engine]) -> None:
    """Forget the orders of streams that ended before they were due."""
    async with aiohttp.ClientSession() as session:
        for engine in engines:
            await _post(session, f"{engine.url}/star/disarm", {})


async def _post(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> None:
    async with session.post(url, json=body) as answer:
        if answer.status >= 400:
            raise PeerError(f"{url} answered {answer.status}: {await answer.text()}")
