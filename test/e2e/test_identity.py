"""A stream that moves says exactly what it would have said had it stayed.

Every case runs twice on the same cluster with empty prefix caches, once undisturbed and once
while armed orders send its requests around the ring of engines, each move at a token of its own.
The tiny model is in float32 and has random weights of ordinary scale, so that a wrong KV value
changes the text at once.

SGLang's overlap scheduling accumulates penalties and minimum tokens a token late, or not, depending
on what ran between two steps of a request. A request alone on its engine has nothing in between, so
its text is compared; of several penalised ones at the same time it is not determined, with or
without moves, and these run without overlap.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest

from e2e.fleet import Fleet, Hop, new_rid
from sglang_star.cluster import Cluster

pytestmark = pytest.mark.e2e

PROMPT = "The lighthouse keeper counted the ships again and wrote"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 60},
        "ages": {"type": "array", "items": {"type": "integer"}, "minItems": 12, "maxItems": 20},
        "open": {"type": "boolean"},
    },
    "required": ["name", "ages", "open"],
}
TOOL = {
    "type": "function",
    "function": {
        "name": "report_weather",
        # Strict, so that the grammar ends the call before max_tokens cuts it: SGLang's streaming
        # tool parser drops or keeps the tail of a cut call depending on how chunks fall.
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 80}},
            "required": ["city"],
        },
    },
}
MESSAGES = [{"role": "user", "content": "Tell me about the sea and its many moods."}]


def native(sampling: dict[str, Any] | None = None, **fields: Any) -> tuple[str, dict[str, Any]]:
    params = {"max_new_tokens": 120, "temperature": 0, "ignore_eos": True, **(sampling or {})}
    return "/generate", {"text": PROMPT, "sampling_params": params, **fields}


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    body = {"model": "m", "messages": MESSAGES, "max_tokens": 120, "temperature": 0}
    return "/v1/chat/completions", {**body, "ignore_eos": True, **fields}


def completion(**fields: Any) -> tuple[str, dict[str, Any]]:
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 120, "temperature": 0}
    return "/v1/completions", {**body, "ignore_eos": True, **fields}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": native(),
    "greedy-streamed": native(stream=True),
    "long": native({"max_new_tokens": 400}),
    "frequency-penalty": native({"frequency_penalty": 0.7}),
    "presence-penalty": native({"presence_penalty": 0.9}),
    "repetition-penalty": native({"repetition_penalty": 1.3}),
    "all-penalties": native(
        {"frequency_penalty": 0.3, "presence_penalty": 0.4, "repetition_penalty": 1.1}
    ),
    "min-tokens": native({"min_new_tokens": 60, "ignore_eos": False, "logit_bias": {"2": 60.0}}),
    "stop-token": native({"stop_token_ids": list(range(0, 49152, 131)), "ignore_eos": False}),
    "json-schema": native({"json_schema": json.dumps(SCHEMA), "ignore_eos": False}),
    "json-schema-streamed": native(
        {"json_schema": json.dumps(SCHEMA), "ignore_eos": False}, stream=True
    ),
    "regex": native({"regex": "([a-c]{2} ){40}", "ignore_eos": False}),
    "logprobs": native(return_logprob=True, top_logprobs_num=3),
    "logprobs-streamed": native(return_logprob=True, top_logprobs_num=2, stream=True),
    "chosen-logprobs": native(return_logprob=True, token_ids_logprob=[5, 77]),
    "penalties-and-grammar": native(
        {"json_schema": json.dumps(SCHEMA), "ignore_eos": False, "frequency_penalty": 0.5}
    ),
    "chat": chat(),
    "chat-streamed": chat(stream=True, stream_options={"include_usage": True}),
    "chat-logprobs": chat(logprobs=True, top_logprobs=2),
    "chat-tool-call": chat(tools=[TOOL], tool_choice="required", ignore_eos=False),
    "chat-tool-call-streamed": chat(
        tools=[TOOL],
        tool_choice="required",
        ignore_eos=False,
        stream=True,
        stream_options={"include_usage": True},
    ),
    "chat-json-schema": chat(
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        ignore_eos=False,
    ),
    "completion": completion(),
    "completion-streamed": completion(stream=True, stream_options={"include_usage": True}),
    "completion-n3": completion(n=3),
    "batch": ("/generate", {**native()[1], "text": [PROMPT, "In the beginning", "Numbers:"]}),
}

PENALISED_TOGETHER: dict[str, tuple[str, dict[str, Any]]] = {
    "completion-n3": completion(n=3, frequency_penalty=0.4),
    "batch": (
        "/generate",
        {
            **native({"presence_penalty": 0.6, "min_new_tokens": 30})[1],
            "text": [PROMPT, "In the beginning", "Numbers:"],
        },
    ),
}

SEEDED: dict[str, tuple[str, dict[str, Any]]] = {
    "seeded": native({"temperature": 1.0, "sampling_seed": 7}),
    "seeded-top-p": native({"temperature": 0.8, "top_p": 0.9, "top_k": 50, "sampling_seed": 11}),
    "seeded-penalties": native(
        {"temperature": 1.0, "sampling_seed": 3, "frequency_penalty": 0.5, "min_new_tokens": 30}
    ),
    "seeded-chat-n3": chat(temperature=1.0, seed=5, n=3),
}


async def answer(fleet: Fleet, path: str, body: dict[str, Any]) -> Any:
    """The response without what differs between any two runs: names, times, estimates."""
    async with fleet.session.post(fleet.router + path, json=body) as response:
        text = await response.text()
        assert response.status == 200, text
    if not body.get("stream"):
        return strip(json.loads(text))
    lines = [line for line in text.split("\n") if line.startswith("data: ")]
    assert lines[-1].strip() == "data: [DONE]", text[-300:]
    return merge([strip(json.loads(line[6:])) for line in lines[:-1]])


VOLATILE = {
    "id", "created", "rid", "star_remaining", "cached_tokens", "decode_throughput",
    "prompt_tokens_details", "cached_tokens_details", "num_retractions", "total_retractions",
}  # fmt: skip


def strip(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            k: strip(v)
            for k, v in value.items()
            if k not in VOLATILE and not k.endswith(("_time", "_ts", "_latency", "_duration"))
        }
    if isinstance(value, list):
        return [strip(v) for v in value]
    return round(value, 4) if isinstance(value, float) else value


def merge(chunks: list[Any]) -> Any:
    """Chunk boundaries depend on timing; their concatenation must not."""
    if "text" in chunks[0]:
        return chunks[-1]
    merged: dict[str, Any] = {"usage": [c["usage"] for c in chunks if c.get("usage")]}
    for chunk in chunks:
        for choice in chunk["choices"]:
            into = merged.setdefault(str(choice["index"]), {})
            delta = choice.get("delta", {"content": choice.get("text")})
            into["content"] = into.get("content", "") + (delta.get("content") or "")
            for call in delta.get("tool_calls") or ():
                function = call["function"]
                name = function.get("name") or ""
                into["call"] = into.get("call", "") + name + (function.get("arguments") or "")
            into["finish"] = choice.get("finish_reason") or into.get("finish")
    return merged


def samples(body: dict[str, Any]) -> int:
    return int(body.get("n", 1))


def length(answered: Any, body: dict[str, Any]) -> int:
    """Output tokens of the shortest stream of an answer."""
    if isinstance(answered, list):
        return min(length(one, body) for one in answered)
    if "meta_info" in answered:
        return int(answered["meta_info"]["completion_tokens"])
    usage = answered["usage"]
    # Samples that go to their limit are equally long; none of ours ends early.
    return int((usage[-1] if isinstance(usage, list) else usage)["completion_tokens"]) // samples(
        body
    )


def names(body: dict[str, Any], rid: str) -> list[str]:
    """What SGLang calls the requests it makes of a body with this ``rid``."""
    if samples(body) > 1:
        return ["*"] * samples(body)  # by names of its own
    if isinstance(body.get("text"), list):
        return [f"{rid}_{k}" for k in range(len(body["text"]))]
    return [rid]


async def check(cluster: Cluster, case: tuple[str, dict[str, Any]]) -> None:
    path, body = case
    async with Fleet.connect(cluster) as fleet:
        await fleet.settle()
        undisturbed = await answer(fleet, path, body)
        await fleet.settle()
        hops = fleet.hops(length(undisturbed, body))
        rid = new_rid("identity")
        async with fleet.tour(*names(body, rid), hops=hops):
            moved = await answer(fleet, path, {**body, "rid": rid})
        await fleet.settle()
        assert moved == undisturbed


@pytest.mark.parametrize("case", CASES)
def test_moved_stream_equals_its_twin(cluster: Cluster, case: str) -> None:
    asyncio.run(check(cluster, CASES[case]))


@pytest.mark.parametrize("case", PENALISED_TOGETHER)
def test_penalised_streams_side_by_side(cluster: Cluster, case: str) -> None:
    if "--disable-overlap-schedule" not in cluster.spec.engine_arguments:
        pytest.skip("not determined under overlap scheduling, see above")
    asyncio.run(check(cluster, PENALISED_TOGETHER[case]))


@pytest.mark.parametrize("case", SEEDED)
def test_seeded_sampling(cluster: Cluster, case: str) -> None:
    if "--enable-deterministic-inference" not in cluster.spec.engine_arguments:
        pytest.skip("SGLang honours seeds only with --enable-deterministic-inference")
    asyncio.run(check(cluster, SEEDED[case]))


def test_moves_while_prefills_take_what_decodes_along(cluster: Cluster) -> None:
    """With mixed chunks a request is in no running batch while it rides in a prefill's."""
    if "--enable-mixed-chunk" not in cluster.spec.engine_arguments:
        pytest.skip("prefills run alone here")

    async def prefill(fleet: Fleet, url: str, seed: int) -> None:
        """One prefill after the other, until cancelled; none finds its prompt in the cache."""
        body = {"sampling_params": {"max_new_tokens": 1, "ignore_eos": True}}
        for prompt in itertools.count(1000 * seed):
            ids = [prompt % 40_000 + 5 * k for k in range(40)]
            code, answer = await fleet.post(url + "/generate", {**body, "input_ids": ids})
            assert code == 200, answer

    async def scenario() -> None:
        async with Fleet.connect(cluster) as fleet:
            await fleet.settle()
            rid = new_rid("mixed")
            async with fleet.endless(rid), asyncio.TaskGroup() as busy:
                tasks = [
                    busy.create_task(prefill(fleet, url, seed))
                    for seed in range(2)
                    for url in fleet.engines.values()
                ]
                for moves in range(4):
                    source, _ = await fleet.found(rid, moves=moves)
                    order = await fleet.arm(rid, source, fleet.other(source), Hop(10, None))
                    report = await fleet.report(order)
                    assert report["outcome"] == "moved", report["detail"]
                for task in tasks:
                    task.cancel()

    asyncio.run(scenario())


def test_moves_while_decoding(cluster: Cluster) -> None:
    """Nobody is held: the answer goes on for as long as its moves take."""

    async def scenario() -> None:
        async with Fleet.connect(cluster) as fleet:
            await fleet.settle()
            rid = new_rid("long")
            hops = [Hop(20, None)] * len(fleet.engines)
            async with fleet.tour(rid, hops=hops), fleet.endless(rid):
                await fleet.found(rid, moves=fleet.laps * len(hops))
            assert all(report["precopied_tokens"] > 0 for report in fleet.moved), fleet.moved

    asyncio.run(scenario())
