"""Requests at their times, streamed by a client light enough not to be what is measured.

OpenAI's client builds objects for every token; at a thousand tokens a second it would take as much
of a small machine as an engine does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import aiohttp
import orjson

from sglang_star.demo.client import TIMEOUT_S, Observer, Stream, at_their_times, body, extras
from sglang_star.demo.prompts import Prompt


async def replay(
    url: str, model: str, prompts: Sequence[Prompt], *, tag: str, observe: Observer
) -> list[Stream]:
    """Send every prompt at its time; see :func:`client.at_their_times`."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        follow = partial(_follow, session, model)
        return await at_their_times(prompts, tag=tag, observe=observe, follow=follow)


async def _follow(
    session: aiohttp.ClientSession, model: str, stream: Stream, advanced: Callable[[], None]
) -> None:
    fields = body(model, stream.prompt) | extras(stream.rid)
    try:
        async with session.post("/v1/chat/completions", json=fields) as answer:
            if answer.status != 200:
                stream.error = f"{answer.status}: {(await answer.text())[:200]}"
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    chunk = orjson.loads(line[6:])
                    if "error" in chunk:
                        stream.error = str(chunk["error"])
                    stream.take(chunk)
                    advanced()
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        stream.error = f"{type(error).__name__}: {error}"
    stream.ended_s = time.monotonic()
    advanced()
