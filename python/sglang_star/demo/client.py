"""The demo's clients: streams through the OpenAI API, and a watcher of the router."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import httpx
import openai

from sglang_star.demo.prompts import Prompt

SEED: Final = 7
TIMEOUT_S: Final = 480.0


@dataclass
class Stream:
    """What one client saw.

    Attributes:
        rid: the request's name in the cluster.
        sent_s, ended_s: when, seconds of the monotonic clock.
        arrivals: (time, output tokens so far) of every chunk that brought tokens.
        token_ids: all output tokens; empty until the stream completed.
        finish_reason: ``stop`` or ``length``; empty if it broke off, and then ``error`` says why.
    """

    rid: str
    prompt: Prompt
    sent_s: float
    ended_s: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: str = ""
    error: str = ""

    @property
    def completed(self) -> bool:
        """Whether the stream came to its natural end with all its tokens."""
        return bool(self.finish_reason and self.token_ids) and not self.error

    @property
    def tokens(self) -> int:
        """Output tokens received."""
        return self.arrivals[-1][1] if self.arrivals else 0

    @property
    def ttft_ms(self) -> float | None:
        """Time to the first token, milliseconds."""
        return (self.arrivals[0][0] - self.sent_s) * 1e3 if self.arrivals else None

    @property
    def tpot_ms(self) -> float | None:
        """Time per output token after the first, milliseconds."""
        if len(self.arrivals) < 2:
            return None
        (first_s, first), (last_s, last) = self.arrivals[0], self.arrivals[-1]
        return (last_s - first_s) * 1e3 / (last - first)


@dataclass(frozen=True, slots=True)
class Sighting:
    """A request as an instance reported it while it ran.

    Attributes:
        at_s: seconds of the monotonic clock.
        output_tokens: tokens so far.
        remaining: estimated remaining tokens, five quantiles, or empty.
    """

    at_s: float
    rid: str
    instance: str
    output_tokens: int
    remaining: tuple[float, ...]


Observer = Callable[[Sequence[Stream]], None]


async def replay(
    url: str, model: str, prompts: Sequence[Prompt], *, gap_s: float, tag: str, observe: Observer
) -> list[Stream]:
    """Send ``prompts`` in order, ``gap_s`` seconds apart, and stream every answer to its end.

    ``observe`` is called after every chunk with all streams so far. A stream that breaks off is
    returned with its error; it does not disturb the others.
    """
    streams: list[Stream] = []
    async with (
        openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S
        ) as client,
        asyncio.TaskGroup() as group,
    ):
        for prompt in prompts:
            stream = Stream(f"{tag}-{prompt.name}", prompt, time.monotonic())
            streams.append(stream)
            group.create_task(_follow(client, model, stream, lambda: observe(streams)))
            await asyncio.sleep(gap_s)
    return streams


async def _follow(
    client: openai.AsyncOpenAI, model: str, stream: Stream, advanced: Callable[[], None]
) -> None:
    prompt = stream.prompt
    sampling: dict[str, Any] = {"temperature": 0} if prompt.greedy else {"seed": SEED}
    try:
        chunks = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt.text}],
            max_tokens=prompt.max_tokens,
            stream=True,
            extra_body={
                "rid": stream.rid,
                "return_output_ids_in_sglext": True,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            },
            **sampling,
        )
        async for chunk in chunks:
            _take(stream, chunk)
            advanced()
    except (openai.OpenAIError, httpx.HTTPError, OSError) as error:
        stream.error = f"{type(error).__name__}: {error}"
    stream.ended_s = time.monotonic()
    advanced()


def _take(stream: Stream, chunk: Any) -> None:
    if chunk.usage and chunk.usage.completion_tokens > stream.tokens:
        stream.arrivals.append((time.monotonic(), chunk.usage.completion_tokens))
    for choice in chunk.choices:
        stream.text += choice.delta.content or ""
        stream.finish_reason = choice.finish_reason or stream.finish_reason
    # SGLang's own field: the token ids of each choice, in the last chunk.
    if extension := (chunk.model_extra or {}).get("sglext"):
        stream.token_ids = tuple((extension.get("output_ids") or [()])[0])


class Watcher:
    """Polls the router while streams run.

    Attributes:
        sightings: every running request of every poll.
        migrations: the router's migrations, the latest first, as of the last poll.
    """

    def __init__(self, url: str, *, interval_s: float = 0.25) -> None:
        self.sightings: list[Sighting] = []
        self.migrations: list[dict[str, Any]] = []
        self._url = url
        self._interval_s = interval_s

    async def watch(self) -> None:
        """Poll until cancelled."""
        async with aiohttp.ClientSession(self._url) as session:
            while True:
                await self.poll(session)
                await asyncio.sleep(self._interval_s)

    async def poll(self, session: aiohttp.ClientSession) -> None:
        """Look once; an answer that fails to come is only a gap in the picture."""
        try:
            async with session.get("/star/cluster") as answer:
                fleet = await answer.json()
            async with session.get("/star/migrations", params={"limit": "2000"}) as answer:
                self.migrations = (await answer.json())["migrations"]
        except (aiohttp.ClientError, OSError):
            return
        now = time.monotonic()
        for instance in fleet["instances"]:
            if instance["role"] == "prefill" or not instance["status"]:
                continue
            for request in instance["status"]["requests"]:
                self.sightings.append(
                    Sighting(
                        now,
                        request["rid"],
                        instance["name"],
                        request["output_tokens"],
                        tuple(request["remaining"]),
                    )
                )


async def served_model(url: str) -> str:
    """Return the name of the model the router serves."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        models = await client.models.list()
        return models.data[0].id
