"""Clients that others wrote notice nothing: the `openai` package and SGLang's own benchmark."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from e2e.fleet import Fleet
from sglang_star.cluster import Cluster

pytestmark = pytest.mark.e2e

TOKENS = 160
PROMPTS = (
    "Tell me about the sea and its many moods.",
    "Name the parts of a bicycle.",
    "How is paper made?",
    "Write a letter to a lighthouse keeper.",
)
TOOL = {
    "type": "function",
    "function": {
        "name": "report_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 120}},
            "required": ["city"],
        },
    },
}

# Chosen so that both modes of serving and both of the benchmark's protocols are covered.
BENCHMARK_BACKENDS = {
    "aggregated-page1-overlap": "sglang",
    "disaggregated-page1-overlap": "sglang-oai-chat",
}
BENCHMARK_PROMPTS = 16


@pytest.fixture
def layout(request: pytest.FixtureRequest, cluster: Cluster) -> str:
    """Name of the cluster's layout, if clients are tried on it."""
    name = str(request.node.callspec.params["cluster"])
    if name not in BENCHMARK_BACKENDS:
        pytest.skip("clients see page size and overlap of one layout of each mode")
    return name


async def streamed(client: AsyncOpenAI, **fields: Any) -> dict[str, Any]:
    """One streamed chat: what each choice said, why it ended, and the usage."""
    stream = await client.chat.completions.create(
        model="m",
        temperature=0,
        max_tokens=TOKENS,
        stream=True,
        stream_options={"include_usage": True},
        **fields,
    )
    said: dict[int, str] = {}
    called: dict[int, str] = {}
    ended: dict[int, str] = {}
    usage = None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            delta, index = choice.delta, choice.index
            said[index] = said.get(index, "") + (delta.content or "")
            for call in delta.tool_calls or ():
                part = f"{call.function.name or ''}{call.function.arguments or ''}"
                called[index] = called.get(index, "") + part
            if choice.finish_reason:
                ended[index] = choice.finish_reason
    assert usage is not None, "the stream ended without its usage"
    counts = (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)
    return {"said": said, "called": called, "ended": ended, "usage": counts}


async def conversations(client: AsyncOpenAI) -> dict[str, dict[str, Any]]:
    """All chats at once, by name."""
    to_the_end = {"extra_body": {"ignore_eos": True}}
    pending = {
        **{prompt: streamed(client, messages=user(prompt), **to_the_end) for prompt in PROMPTS},
        "tool": streamed(client, messages=user("Weather?"), tools=[TOOL], tool_choice="required"),
        "pair": streamed(client, messages=user("Twice."), n=2, frequency_penalty=0.4, **to_the_end),
    }
    return dict(zip(pending, await asyncio.gather(*pending.values()), strict=True))


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_openai_client(cluster: Cluster, layout: str) -> None:
    async def scenario() -> None:
        async with (
            Fleet.connect(cluster) as fleet,
            AsyncOpenAI(base_url=fleet.router + "/v1", api_key="none", max_retries=0) as client,
        ):
            await fleet.settle()
            alone = await conversations(client)
            await fleet.settle()
            async with fleet.moving():
                moved = await conversations(client)
            await fleet.settle()
        assert moved == alone
        assert len({report["rid"] for report in fleet.moved}) > len(PROMPTS)
        for prompt in PROMPTS:
            check_ended(moved[prompt], {0: "length"}, TOKENS)
        check_ended(moved["pair"], {0: "length", 1: "length"}, 2 * TOKENS)
        assert "report_weather" in moved["tool"]["called"][0]
        check_usage(moved["tool"]["usage"])

    asyncio.run(scenario())


def check_ended(answer: dict[str, Any], reasons: dict[int, str], tokens: int) -> None:
    assert answer["ended"] == reasons
    assert all(answer["said"][index] for index in reasons)
    assert answer["usage"][1] == tokens
    check_usage(answer["usage"])


def check_usage(usage: Iterable[int]) -> None:
    prompt, completion, total = usage
    assert prompt > 0
    assert completion > 0
    assert prompt + completion == total


def test_sglang_benchmark(cluster: Cluster, layout: str, tmp_path: Path) -> None:
    result = tmp_path / "result.jsonl"
    command = (
        *(sys.executable, "-m", "sglang.benchmark.serving"),
        *("--backend", BENCHMARK_BACKENDS[layout], "--base-url", cluster.url),
        *("--model", cluster.spec.model, "--tokenizer", cluster.spec.model),
        *("--dataset-name", "random-ids", "--num-prompts", str(BENCHMARK_PROMPTS)),
        *("--random-input-len", "40", "--random-output-len", "120", "--random-range-ratio", "1"),
        *("--max-concurrency", "8", "--disable-tqdm", "--output-file", str(result)),
    )

    async def scenario() -> None:
        async with Fleet.connect(cluster) as fleet:
            await fleet.settle()
            async with fleet.moving():
                process = await asyncio.create_subprocess_exec(
                    *command,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                    # Whatever it needs is here; a name it fails to find must not become a download.
                    env={**os.environ, "HF_HUB_OFFLINE": "1"},
                )
                output, _ = await process.communicate()
            await fleet.settle()
        assert process.returncode == 0, output.decode(errors="replace")[-3000:]
        assert fleet.moved, "nothing moved: the benchmark proves nothing"

    asyncio.run(scenario())
    measured = json.loads(result.read_text().splitlines()[-1])
    assert measured["completed"] == BENCHMARK_PROMPTS
    assert measured["total_output_tokens"] == BENCHMARK_PROMPTS * 120
