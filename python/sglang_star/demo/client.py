"""What a client sees of one stream, and the demo's chat client: OpenAI's own."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import httpx
import openai

from sglang_star.demo.prompts import Prompt

TIMEOUT_S: Final = 300.0
STREAM_OPTIONS: Final = {"include_usage": True, "continuous_usage_stats": True}


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
        """Whether the stream came to its end with all its tokens."""
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

    @property
    def longest_gap_ms(self) -> float:
        """Longest time without a new token between two that came, milliseconds."""
        times = [at for at, _ in self.arrivals]
        return max((b - a for a, b in itertools.pairwise(times)), default=0.0) * 1e3

    def take(self, chunk: dict[str, Any]) -> None:
        """Take in one chunk of a chat completion's stream."""
        usage = chunk.get("usage")
        if usage and usage["completion_tokens"] > self.tokens:
            self.arrivals.append((time.monotonic(), usage["completion_tokens"]))
        for choice in chunk.get("choices", ()):
            self.text += choice["delta"].get("content") or ""
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        # SGLang's own field: the token ids of each choice, in the last chunk.
        if extension := chunk.get("sglext"):
            self.token_ids = tuple((extension.get("output_ids") or [()])[0])


Observer = Callable[[Sequence[Stream]], None]
Follow = Callable[[Stream, Callable[[], None]], Coroutine[Any, Any, None]]
"""Streams one answer to its end and calls the function after every chunk."""


def body(model: str, prompt: Prompt) -> dict[str, Any]:
    """Return the fields of a chat completion request that the OpenAI API knows."""
    sampling = {"temperature": 0} if prompt.seed is None else {"seed": prompt.seed}
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt.text}],
        "max_tokens": prompt.max_tokens,
        "stream": True,
        **sampling,
    }


def extras(rid: str) -> dict[str, Any]:
    """Return the fields that SGLang knows beyond it."""
    return {"rid": rid, "return_output_ids_in_sglext": True, "stream_options": STREAM_OPTIONS}


async def at_their_times(
    prompts: Sequence[Prompt], *, tag: str, observe: Observer, follow: Follow
) -> list[Stream]:
    """Let ``follow`` stream every prompt from its time on; return all streams once they ended.

    ``observe`` is called after every chunk with all streams so far. A stream that breaks off is
    returned with its error; it does not disturb the others.
    """
    streams: list[Stream] = []
    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for prompt in prompts:
            await asyncio.sleep(began + prompt.at_s - time.monotonic())
            stream = Stream(f"{tag}-{prompt.name}", prompt, time.monotonic())
            streams.append(stream)
            group.create_task(follow(stream, lambda: observe(streams)))
    return streams


async def chat(
    url: str, model: str, prompts: Sequence[Prompt], *, tag: str, observe: Observer
) -> list[Stream]:
    """Ask ``prompts`` through the official client; see :func:`at_their_times`."""
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S
    ) as client:
        follow = partial(_follow, client, model)
        return await at_their_times(prompts, tag=tag, observe=observe, follow=follow)


async def _follow(
    client: openai.AsyncOpenAI, model: str, stream: Stream, advanced: Callable[[], None]
) -> None:
    try:
        chunks = await client.chat.completions.create(
            **body(model, stream.prompt), extra_body=extras(stream.rid)
        )
        async for chunk in chunks:
            stream.take(chunk.model_dump())
            advanced()
    except (openai.OpenAIError, httpx.HTTPError, OSError) as error:
        stream.error = f"{type(error).__name__}: {error}"
    stream.ended_s = time.monotonic()
    advanced()


async def served_model(url: str) -> str:
    """Return the name of the model the router serves."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        models = await client.models.list()
        return models.data[0].id
