"""The clients of ``star bench chaos``: streams all the time, every token of which is checked."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from dataclasses import dataclass, field

import aiohttp

from sglang_star_bench.chaos_engine import token

LAST_WAIT_S = 40.0
"""Streams still open when the load ends are waited for so long; then they count as hung."""
REFUSED_WAIT_S = 0.5


@dataclass(slots=True)
class Stream:
    """One request as its client saw it; times are monotonic seconds.

    Attributes:
        first_at: first token, 0 if none came; engine: who made it.
        tokens: received; wrong: they are not what the prompt is answered with.
        verdict: ``ok``, ``wrong``, ``failed``, ``refused`` (503 or 429 with ``Retry-After``),
            or ``hung``.
    """

    sent_at: float
    first_at: float = 0.0
    ended_at: float = 0.0
    tokens: int = 0
    engine: str = ""
    wrong: bool = False
    verdict: str = "hung"
    detail: str = ""


@dataclass
class Load:
    """So many clients that each keep one stream open.

    Attributes:
        streams: every request sent.
    """

    url: str
    clients: int
    tokens: int
    refusals_are_answers: bool = False
    streams: list[Stream] = field(default_factory=list)

    async def run(self, stop: asyncio.Event) -> None:
        """Send until ``stop`` is set, and wait for what is open then."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
        connector = aiohttp.TCPConnector(limit=0)
        numbers = itertools.count()
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            tasks = [
                asyncio.create_task(self._client(session, numbers, stop, i))
                for i in range(self.clients)
            ]
            await stop.wait()
            _, open_ones = await asyncio.wait(tasks, timeout=LAST_WAIT_S)
            for task in open_ones:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for stream in self.streams:
            stream.ended_at = stream.ended_at or time.monotonic()

    async def _client(
        self,
        session: aiohttp.ClientSession,
        numbers: itertools.count[int],
        stop: asyncio.Event,
        place: int,
    ) -> None:
        # Spread over the time that a stream takes, so that they do not all begin at once.
        await asyncio.sleep(place / self.clients)
        while not stop.is_set():
            stream = Stream(time.monotonic())
            self.streams.append(stream)
            try:
                await self._stream(session, f"prompt {next(numbers)}", stream)
            except (aiohttp.ClientError, ConnectionError, ValueError) as error:
                stream.verdict, stream.detail = "failed", f"{type(error).__name__}: {error}"[:200]
            stream.ended_at = time.monotonic()
            if stream.wrong:
                stream.verdict = "wrong"
            if stream.verdict in ("failed", "refused"):
                await asyncio.sleep(REFUSED_WAIT_S)

    async def _stream(self, session: aiohttp.ClientSession, prompt: str, stream: Stream) -> None:
        body = {
            "model": "fake", "stream": True, "max_tokens": self.tokens,
            "messages": [{"role": "user", "content": prompt}],
        }  # fmt: skip
        async with session.post(self.url + "/v1/chat/completions", json=body) as answer:
            if answer.status != 200:
                polite = answer.status in (429, 503) and "Retry-After" in answer.headers
                stream.verdict = "refused" if polite and self.refusals_are_answers else "failed"
                stream.detail = f"{answer.status}: {(await answer.text())[:200]}"
                return
            async for line in answer.content:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    stream.wrong |= stream.tokens != self.tokens
                    stream.verdict = "ok"
                    return
                event = json.loads(data)
                if "error" in event:
                    stream.verdict, stream.detail = "failed", str(event["error"])[:200]
                    return
                self._token(prompt, event, stream)
        stream.verdict, stream.detail = "failed", "it ended without [DONE]"

    def _token(self, prompt: str, event: dict[str, object], stream: Stream) -> None:
        choices = event["choices"]
        assert isinstance(choices, list)
        expected = token(prompt, stream.tokens) + " "
        stream.wrong |= choices[0]["delta"].get("content") != expected
        if not stream.tokens:
            stream.first_at, stream.engine = time.monotonic(), str(event["model"])
        stream.tokens += 1
