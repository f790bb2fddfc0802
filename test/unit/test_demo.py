"""The demo against a fake router that speaks SGLang's dialect of the OpenAI API."""

from __future__ import annotations

import asyncio
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from sglang_star.demo import charts, page, report
from sglang_star.demo.client import Sighting, Stream, Watcher, replay, served_model
from sglang_star.demo.progress import Progress
from sglang_star.demo.prompts import PROMPTS, Prompt
from sglang_star.demo.report import Estimate, Twin
from sglang_star.demo.run import RESCHEDULER_ARGUMENTS, ROUTER_ARGUMENTS, verdict

WORDS = ["One", " two", " three"]
IDS = [11, 12, 13]


def event(**fields: Any) -> bytes:
    chunk = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return b"data: " + json.dumps({**chunk, "choices": [], **fields}).encode() + b"\n\n"


async def completions(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert body["return_output_ids_in_sglext"] is True
    assert ("seed" in body) != (body.get("temperature") == 0)
    question = body["messages"][0]["content"]
    if question == "refuse":
        return web.json_response({"error": {"message": "no room"}}, status=503)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for number, word in enumerate(WORDS, 1):
        usage = {"prompt_tokens": 5, "completion_tokens": number, "total_tokens": 5 + number}
        choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
        await response.write(event(choices=[choice], usage=usage))
        await asyncio.sleep(0.01)
        if question == "break off" and number == 2:
            assert request.transport
            request.transport.abort()
            return response
    last = {"index": 0, "delta": {}, "finish_reason": "stop"}
    await response.write(event(choices=[last]))
    await response.write(event(sglext={"output_ids": [IDS]}))
    await response.write(b"data: [DONE]\n\n")
    return response


def row(rid: str, **fields: Any) -> dict[str, Any]:
    return {
        "rid": rid, "source": "decode-0", "target": "decode-1", "reason": "overflow",
        "state": "moved", "detail": "", "migration_id": f"m-{rid}", "ordered_at": 1.0,
        "finished_at": 2.0, "context_tokens": 40, "precopied_tokens": 30, "stall_ms": 12.5,
        "stall_steps": 0.25, **fields,
    }  # fmt: skip


async def cluster(_request: web.Request) -> web.Response:
    seen = {"rid": "demo-a", "output_tokens": 1, "remaining": [1, 1, 2, 3, 4]}
    return web.json_response(
        {
            "instances": [
                {"name": "prefill-0", "role": "prefill", "status": {"requests": [seen]}},
                {"name": "decode-0", "role": "decode", "status": {"requests": [seen]}},
                {"name": "decode-1", "role": "decode", "status": None},
            ]
        }
    )


async def migrations(_request: web.Request) -> web.Response:
    return web.json_response({"migrations": [row("demo-a"), row("other")]})


async def models(_request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": "m", "object": "model"}]})


def with_router(use: Callable[[str], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        app = web.Application()
        app.add_routes(
            [
                web.post("/v1/chat/completions", completions),
                web.get("/v1/models", models),
                web.get("/star/cluster", cluster),
                web.get("/star/migrations", migrations),
            ]
        )
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert runner.addresses
        try:
            return await use(f"http://127.0.0.1:{runner.addresses[0][1]}")
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def prompt(name: str, text: str = "count", *, greedy: bool = True) -> Prompt:
    return Prompt(name, text, max_tokens=8, greedy=greedy)


def test_streams_keep_what_the_client_saw() -> None:
    calls = 0

    def observe(_streams: object) -> None:
        nonlocal calls
        calls += 1

    async def use(url: str) -> list[Stream]:
        assert await served_model(url) == "m"
        prompts = [
            prompt("a"),
            prompt("sampled", greedy=False),
            prompt("b", "break off"),
            prompt("c", "refuse"),
        ]
        return await replay(url, "m", prompts, gap_s=0, tag="demo", observe=observe)

    good, sampled, broken, refused = with_router(use)
    assert good.rid == "demo-a"
    assert good.completed
    assert sampled.completed
    assert (good.text, good.token_ids, good.finish_reason) == (
        "One two three",
        (11, 12, 13),
        "stop",
    )
    assert [tokens for _, tokens in good.arrivals] == [1, 2, 3]
    assert good.ttft_ms > 0
    first, last = good.arrivals[0][0], good.arrivals[-1][0]
    assert good.tpot_ms == pytest.approx((last - first) * 1e3 / 2)
    assert not broken.completed
    assert broken.error
    assert broken.tokens == 2
    assert "no room" in refused.error
    assert refused.ttft_ms is None
    assert calls > 12


def test_watcher_sees_decode_instances_only() -> None:
    async def use(url: str) -> Watcher:
        watcher = Watcher(url, interval_s=0.01)
        task = asyncio.create_task(watcher.watch())
        while len(watcher.sightings) < 3:
            await asyncio.sleep(0.01)
        task.cancel()
        return watcher

    watcher = with_router(use)
    assert {(seen.rid, seen.instance) for seen in watcher.sightings} == {("demo-a", "decode-0")}
    assert watcher.sightings[0].remaining == (1, 1, 2, 3, 4)
    assert [move["rid"] for move in watcher.migrations] == ["demo-a", "other"]


def stream(name: str, tokens: int = 30, *, sent: float = 0.0, greedy: bool = True) -> Stream:
    return Stream(
        rid=f"demo-{name}",
        prompt=prompt(name, greedy=greedy),
        sent_s=sent,
        ended_s=sent + tokens * 0.1 + 0.2,
        arrivals=[(sent + 0.2 + 0.1 * n, n + 1) for n in range(tokens)],
        text="text <b>" * 9,
        token_ids=tuple(range(tokens)),
        finish_reason="stop",
    )


def test_moves_are_ours_completed_and_in_order() -> None:
    rows = [
        row("demo-a", finished_at=9.0),
        row("demo-a", finished_at=3.0, migration_id="1st"),
        row("demo-a", state="refused"),
        row("twin-a"),
    ]
    assert [m["finished_at"] for m in report.moves_of([stream("a")], rows)] == [3.0, 9.0]


def test_estimates_are_scored_once_per_stretch_up_to_the_limit_of_cut_answers() -> None:
    cut = replace(stream("cut"), finish_reason="length")
    seen = [
        Sighting(0.1, "demo-a", "decode-0", 10, (5, 8, 18, 22, 40)),
        Sighting(0.2, "demo-a", "decode-0", 11, (5, 8, 99, 99, 99)),
        Sighting(0.3, "demo-a", "decode-0", 25, (1, 2, 3, 4, 4)),
        Sighting(0.4, "demo-a", "decode-0", 29, ()),
        Sighting(0.1, "demo-cut", "decode-0", 10, (1, 1, 1, 1, 1)),
    ]
    found = report.estimates([stream("a"), cut], seen)
    assert found == [
        Estimate("demo-a", 5, 18, 40, 20),
        Estimate("demo-a", 1, 3, 4, 5),
        Estimate("demo-cut", 1, 1, 1, 20),
    ]
    result = report.build([stream("a"), cut], [], found, [], 1.0)
    assert result["predictor"] == {"n": 3, "mae": 7.67, "coverage": 0.333}


def test_report_has_exactly_the_documented_fields() -> None:
    failed = replace(stream("b"), error="gone", token_ids=())
    moves = report.moves_of([stream("a")], [row("demo-a")])
    result = report.build([stream("a"), failed], moves, [], [Twin(stream("a"), stream("a"))], 12.34)
    assert set(result) == {
        "requests", "completed", "failed", "output_tokens", "ttft_ms", "tpot_ms", "predictor",
        "migrations", "identity", "wall_s", "versions",
    }  # fmt: skip
    assert (result["requests"], result["completed"], result["failed"]) == (2, 1, 1)
    assert result["ttft_ms"]["p50"] == pytest.approx(200, abs=0.1)
    assert result["tpot_ms"]["p99"] == pytest.approx(100, abs=0.1)
    assert set(result["migrations"][0]) == {
        "rid", "source", "target", "reason", "context_tokens", "precopied_tokens", "stall_ms",
        "stall_steps",
    }  # fmt: skip
    assert result["identity"] == {"checked": 1, "mismatched": 0}
    assert {"sglang", "torch", "sglang_star"} <= set(result["versions"])
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize(
    ("changes", "position"),
    [
        ({}, None),
        ({"token_ids": (0, 1, 99, *range(3, 30))}, 2),
        ({"token_ids": tuple(range(29))}, 29),
        ({"finish_reason": "length"}, None),
        ({"error": "broke"}, None),
    ],
)
def test_twins(changes: dict[str, Any], position: int | None) -> None:
    twin = Twin(stream("a"), replace(stream("a"), **changes))
    assert twin.identical == (not changes)
    assert twin.first_difference == position


def test_verdict_needs_every_stream_and_some_proof(capsys: pytest.CaptureFixture[str]) -> None:
    good, twin = stream("a"), Twin(stream("a"), stream("a"))
    other = Twin(stream("a"), replace(stream("a"), token_ids=(1,)))
    broken = replace(stream("b"), error="reset")
    assert verdict([good], [{}], [twin]) == 0
    assert verdict([good], [{}], [twin, other]) == 1
    assert verdict([good, broken], [{}], [twin]) == 1
    assert verdict([good], [], []) == 1
    assert "reset" in capsys.readouterr().out


def test_page_is_self_contained_and_well_formed() -> None:
    streams = [stream("a"), stream("b", 5, sent=0.4), replace(stream("c", 9), arrivals=[])]
    sightings = [
        Sighting(0.3, "demo-a", "decode-0", 2, (1, 2, 3, 4, 5)),
        Sighting(0.6, "demo-b", "decode-1", 2, (1, 2, 3, 4, 5)),
        Sighting(1.1, "demo-a", "decode-1", 9, (1, 2, 3, 4, 5)),
    ]
    moves = report.moves_of(streams, [row("demo-a")])
    scored = report.estimates(streams, sightings)
    twins = [Twin(stream("a"), replace(stream("a"), token_ids=(5,)))]
    result = report.build(streams, moves, scored, twins, 3.0)
    text = page.render(result, streams, sightings, moves, scored, twins)
    assert "http" not in text.replace("http-equiv", "")
    assert "<b>text" not in text
    figures = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    assert len(figures) == 4
    assert sum(mark.get("class") == "move" for mark in figures[0].iter()) == 1
    assert "differs at token 0" in text
    assert "12.50" not in report.as_text(result, twins)
    assert "differs from its twin at token 0" in report.as_text(result, twins)


def test_page_without_anything_to_show() -> None:
    lost = replace(stream("a"), arrivals=[], token_ids=(), error="refused")
    result = report.build([lost], [], [], [], 1.0)
    text = page.render(result, [lost], [], [], [], [])
    assert "Not everything went well" in text
    assert "no values" in report.as_text(result, [])


@pytest.mark.parametrize("maximum", [0.3, 1.0, 7.0, 36, 99.5, 100, 4321])
def test_ticks_are_few_round_and_within(maximum: float) -> None:
    values = charts.ticks(maximum)
    assert 3 <= len(values) <= 7
    assert values[0] == 0
    assert values[-1] <= maximum


def test_progress_announces_each_move_once(capsys: pytest.CaptureFixture[str]) -> None:
    watcher = Watcher("http://127.0.0.1:9")
    progress = Progress(2, watcher)
    watcher.migrations = [row("demo-a", state="accepted")]
    progress.show([stream("a")])
    watcher.migrations = [row("demo-a"), row("demo-b", state="refused", detail="full")]
    progress.show([stream("a")])
    progress.end([stream("a"), stream("b")])
    out = capsys.readouterr().out
    assert out.count("demo-a: decode-0 -> decode-1") == 1
    assert "refused: full" in out
    assert "2/2 answers" in out


def test_the_router_takes_the_demos_flags() -> None:
    from sglang_star.cluster_layout import ClusterSpec, engines, router_command
    from sglang_star_router.config import parse_args
    from sglang_star_router.policy.registry import make_rescheduler

    flags = (*ROUTER_ARGUMENTS, *RESCHEDULER_ARGUMENTS)
    spec = ClusterSpec(model="m", prefill=1, decode=2, router_arguments=flags)
    config = parse_args(list(router_command(spec, tuple(engines(spec)), 30000)[3:]))
    assert (config.policy, config.rescheduler) == ("round-robin", "star")
    make_rescheduler(config.rescheduler, **config.rescheduler_params)


def test_prompts_alternate_and_have_distinct_names() -> None:
    assert len({p.name for p in PROMPTS}) == len(PROMPTS) == 36
    assert all(p.max_tokens > 200 for p in PROMPTS[::2])
    assert all(p.max_tokens < 100 for p in PROMPTS[1::2])
    assert any(not p.greedy for p in PROMPTS[::2])
