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

from e2e.conftest import LAYOUTS, in_one_layout
from e2e.fleet import Fleet, Hop, new_rid
from e2e.test_identity import TOOL
from sglang_star.cluster import Cluster

pytestmark = pytest.mark.e2e

TOKENS = 100
PROMPTS = (
    "Tell me about the sea and its many moods.",
    "Name the parts of a bicycle.",
    "Write a letter to a lighthouse keeper.",
)
BENCHMARK_PROMPTS = 10
BENCHMARK_TOKENS = 256
"""Enough for one request to make all the moves of the tour: any may take any of its orders."""
SAMPLES = 2
"""Of the chat that asks for more than one."""

# Clients cannot see page size and scheduling: one layout of each mode will do. All are named here,
# so that pytest groups these tests with the others that share a cluster.
one_layout_of_each_mode = pytest.mark.parametrize(
    "cluster",
    [
        pytest.param(name, marks=() if "page1-" in name else pytest.mark.skip("as page 1"))
        for name in LAYOUTS
    ],
    indirect=True,
    scope="session",
)


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


async def conversations(client: AsyncOpenAI, run: str) -> dict[str, dict[str, Any]]:
    """All chats at once, by name; their requests are called after it and the run."""

    def named(name: str, **fields: Any) -> dict[str, Any]:
        return {"extra_body": {"rid": f"{run}-{name}", **fields}}

    def said(name: str, **fields: Any) -> Any:
        return streamed(client, messages=user(name), **named(name, ignore_eos=True), **fields)

    tool = {"tools": [TOOL], "tool_choice": "required", **named("tool")}
    pending = {
        **{prompt: said(prompt) for prompt in PROMPTS},
        "tool": streamed(client, messages=user("Weather?"), **tool),
        "pair": said("pair", n=SAMPLES),
    }
    return dict(zip(pending, await asyncio.gather(*pending.values()), strict=True))


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@one_layout_of_each_mode
def test_openai_client(cluster: Cluster) -> None:
    async def scenario() -> None:
        async with (
            Fleet.connect(cluster) as fleet,
            AsyncOpenAI(base_url=fleet.router + "/v1", api_key="none", max_retries=0) as client,
        ):
            await fleet.settle()
            alone = await conversations(client, new_rid("alone"))
            await fleet.settle()
            run = new_rid("moved")
            # The samples have names of SGLang's own.
            rids = [*(f"{run}-{name}" for name in (*PROMPTS, "tool")), *["*"] * SAMPLES]
            hops = fleet.hops(alone["tool"]["usage"][1])
            async with fleet.tour(*rids, hops=hops):
                moved = await conversations(client, run)
            await fleet.settle()
        assert moved == alone
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


@in_one_layout
def test_sglang_benchmark(cluster: Cluster, tmp_path: Path) -> None:
    result = tmp_path / "result.jsonl"
    command = (
        *(sys.executable, "-m", "sglang.benchmark.serving"),
        *("--backend", "sglang-oai-chat", "--base-url", cluster.url),
        *("--model", cluster.spec.model, "--tokenizer", cluster.spec.model),
        *("--dataset-name", "random-ids", "--num-prompts", str(BENCHMARK_PROMPTS)),
        *("--random-input-len", "40", "--random-output-len", str(BENCHMARK_TOKENS)),
        *("--random-range-ratio", "1", "--max-concurrency", "5", "--disable-tqdm"),
        *("--output-file", str(result)),
    )

    async def scenario() -> None:
        async with Fleet.connect(cluster) as fleet:
            await fleet.settle()
            hops = [Hop(10, 0 if k % 2 else 10) for k in range(len(fleet.engines))]
            async with fleet.tour("*", "*", "*", hops=hops):
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

    asyncio.run(scenario())
    measured = json.loads(result.read_text().splitlines()[-1])
    assert measured["completed"] == BENCHMARK_PROMPTS
    assert measured["total_output_tokens"] == BENCHMARK_PROMPTS * BENCHMARK_TOKENS
