"""The demo against a fake router that speaks SGLang's dialect of the OpenAI API."""

from __future__ import annotations

import asyncio
import io
import json
import re
import shlex
import xml.etree.ElementTree as ElementTree
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from sglang_star.cluster_layout import Engine
from sglang_star.demo import (
    charts,
    comparison,
    conversation,
    estimates,
    forecast,
    page,
    phases,
    picture,
    report,
    setting,
)
from sglang_star.demo.client import Stream, chat, served_model
from sglang_star.demo.conversation import Conversation
from sglang_star.demo.estimates import Estimate
from sglang_star.demo.prompts import CHAT, Prompt
from sglang_star.demo.replay import replay
from sglang_star.demo.report import Findings
from sglang_star.demo.run import parser, stay
from sglang_star.demo.screen import Screen, bar, move_line
from sglang_star.demo.side import Side, Slo, moves_of, summary
from sglang_star.demo.twins import Twin, twins_of
from sglang_star.demo.watch import Load, Sighting, Watcher
from sglang_star.demo.workload import Workload, problems
from sglang_star.errors import PeerError

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
    request = {"rid": "demo-a", "prompt_tokens": 9, "output_tokens": 1, "queued": False,
               "remaining": [1, 1, 2, 3, 4]}  # fmt: skip
    status = {
        "kv_used_tokens": 10, "kv_reserved_tokens": 2, "kv_capacity_tokens": 100, "running": 1,
        "queued": 1, "retracted": 2, "retractions": 5, "paced_late": 0,
        "requests": [request, {**request, "rid": "waits", "queued": True}],
    }  # fmt: skip
    return web.json_response(
        {
            "instances": [
                {"name": "prefill-0", "role": "prefill", "status": status},
                {"name": "decode-0", "role": "decode", "status": status},
                {"name": "decode-1", "role": "decode", "status": None},
            ]
        }
    )


async def migrations(_request: web.Request) -> web.Response:
    return web.json_response({"migrations": [row("demo-a"), row("other")]})


async def models(_request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": "m", "object": "model"}]})


def with_router(use: Callable[[str], Awaitable[Any]], orders: list[Any] | None = None) -> Any:
    async def migrate(request: web.Request) -> web.Response:
        assert orders is not None
        orders.append(await request.json())
        return web.json_response({}, status=202)

    async def run() -> Any:
        app = web.Application()
        app.add_routes(
            [
                web.post("/v1/chat/completions", completions),
                web.get("/v1/models", models),
                web.get("/star/cluster", cluster),
                web.get("/star/migrations", migrations),
                web.post("/star/migrate", migrate),
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


def prompt(name: str, text: str = "count", *, seed: int | None = None) -> Prompt:
    return Prompt(name, text, max_tokens=8, seed=seed)


# --------------------------------------------------------------------------- clients


@pytest.mark.parametrize("client", [chat, replay])
def test_streams_keep_what_the_client_saw(client: Any) -> None:
    calls = 0

    def observe(_streams: object) -> None:
        nonlocal calls
        calls += 1

    async def use(url: str) -> list[Stream]:
        assert await served_model(url) == "m"
        prompts = [
            prompt("a"), prompt("sampled", seed=3), prompt("b", "break off"), prompt("c", "refuse"),
        ]  # fmt: skip
        return await client(url, "m", prompts, tag="demo", observe=observe)

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
    assert (last - first) * 1e3 / 2 <= good.longest_gap_ms <= (last - first) * 1e3
    assert not broken.completed
    assert broken.error
    assert broken.tokens == 2
    assert "no room" in refused.error
    assert refused.ttft_ms is None
    assert not refused.completed
    assert calls > 12


def test_requests_are_sent_in_order_of_their_times() -> None:
    async def use(url: str) -> list[Stream]:
        later = replace(prompt("later"), at_s=0.05)
        return await replay(url, "m", [prompt("a"), later], tag="x", observe=lambda _: None)

    first, later = with_router(use)
    assert later.sent_s - first.sent_s >= 0.04


def test_watcher_sees_what_decodes_and_what_waits() -> None:
    async def use(url: str) -> Watcher:
        watcher = Watcher(url)
        polled = asyncio.Event()
        async with watcher.watching(polled.set):
            await polled.wait()
        return watcher

    watcher = with_router(use)
    assert {(seen.rid, seen.instance) for seen in watcher.sightings} == {("demo-a", "decode-0")}
    assert watcher.sightings[0].remaining == (1, 1, 2, 3, 4)
    assert [move["rid"] for move in watcher.moves] == ["demo-a", "other"]
    load = watcher.latest()["decode-0"]
    assert list(watcher.latest()) == ["decode-0"]
    assert (load.used, load.capacity, load.running, load.waiting) == (12, 100, 1, 3)
    assert load.ahead >= 10


def test_every_stream_is_ordered_there_and_back_before_it_exists() -> None:
    orders: list[Any] = []

    async def use(url: str) -> None:
        engines = [Engine(name, "aggregated", url, 0, ()) for name in ("a", "b")]
        await conversation.arm(engines, "chat", [prompt("x"), prompt("y")])
        with pytest.raises(PeerError, match="404"):
            await conversation.disarm(engines)

    with_router(use, orders)
    assert [order["rid"] for order in orders] == ["chat-x", "chat-y"] * 2
    assert {order["at_tokens"] for order in orders} == {conversation.MOVE_AT_TOKENS}
    assert CHAT[0].max_tokens > 2 * (conversation.MOVE_AT_TOKENS + conversation.HOLD_AFTER_TOKENS)


# --------------------------------------------------------------------------- sides


def stream(name: str, tokens: int = 30, *, sent: float = 0.0, tag: str = "demo") -> Stream:
    return Stream(
        rid=f"{tag}-{name}",
        prompt=prompt(name),
        sent_s=sent,
        ended_s=sent + tokens * 0.1 + 0.2,
        arrivals=[(sent + 0.2 + 0.1 * n, n + 1) for n in range(tokens)],
        text="text <b>" * 9,
        token_ids=tuple(range(tokens)),
        finish_reason="stop",
    )


def load(instance: str, at_s: float = 0.0, **fields: Any) -> Load:
    known = {"used": 10, "ahead": 20.0, "capacity": 100, "running": 1, "waiting": 0,
             "retractions": 0, "late": 0}  # fmt: skip
    return Load(at_s, instance, **{**known, **fields})


def side(name: str, moves: Sequence[dict[str, Any]] = (), **changes: Any) -> Side:
    """Two streams on two instances, the first of which retracts three times."""
    loads = [
        load("decode-0", 0.5, retractions=4), load("decode-1", 0.5, used=90),
        load("decode-0", 1.5, retractions=7, used=100), load("decode-1", 1.5, late=2),
    ]  # fmt: skip
    known = {
        "streams": [stream("a", tag=name), stream("b", 5, sent=0.4, tag=name)],
        "loads": loads,
        "sightings": [Sighting(0.3, f"{name}-a", "decode-0", 2, (1, 2, 3, 4, 5))],
        "moves": moves,
        "clock_offset_s": 1000.0,
        "slo": Slo(ttft_ms=250.0, tpot_ms=150.0),
    }
    return Side(name, **{**known, **changes})


def findings(**changes: Any) -> Findings:
    known: dict[str, Any] = {
        "without": side("without"),
        "rescheduled": side("with", [row("with-a", finished_at=1001.5)]),
        "phases": [("playing", 12.34)],
        "wall_s": 12.34,
    }
    return Findings(**{**known, **changes})


def test_a_side_counts_what_grew_while_it_ran() -> None:
    found = side("without")
    numbers = summary(found)
    assert numbers["retractions"] == 3
    assert numbers["late_forwards"] == 2
    assert found.retractions("decode-0") == [(1.5, 3)]
    assert found.retractions("decode-1") == []
    assert numbers["longest_gap_ms"] == pytest.approx(100, abs=0.1)
    assert numbers["slo_attainment"] == 1.0


def test_slo_needs_both_limits_and_an_end() -> None:
    slo, good = Slo(ttft_ms=250.0, tpot_ms=150.0), stream("a")
    assert slo.met(good)
    assert not replace(slo, ttft_ms=150.0).met(good)
    assert not replace(slo, tpot_ms=50.0).met(good)
    assert not slo.met(replace(good, error="gone"))
    assert not slo.met(replace(good, arrivals=[], token_ids=()))


def test_moves_are_ours_completed_and_in_order() -> None:
    rows = [
        row("demo-a", finished_at=9.0),
        row("demo-a", finished_at=3.0, migration_id="1st"),
        row("demo-a", state="refused"),
        row("twin-a"),
    ]
    assert [m["finished_at"] for m in moves_of([stream("a")], rows)] == [3.0, 9.0]


def test_estimates_are_scored_once_per_stretch_up_to_the_limit_of_cut_answers() -> None:
    cut = replace(stream("cut"), finish_reason="length")
    seen = [
        Sighting(0.1, "demo-a", "decode-0", 10, (5, 8, 18, 22, 40)),
        Sighting(0.2, "demo-a", "decode-0", 11, (5, 8, 99, 99, 99)),
        Sighting(0.3, "demo-a", "decode-0", 25, (1, 2, 3, 4, 4)),
        Sighting(0.4, "demo-a", "decode-0", 29, ()),
        Sighting(0.1, "demo-cut", "decode-0", 10, (1, 1, 1, 1, 1)),
    ]
    found = estimates.pair([stream("a"), cut], seen)
    assert found == [
        Estimate("demo-a", 5, 18, 40, 20),
        Estimate("demo-a", 1, 3, 4, 5),
        Estimate("demo-cut", 1, 1, 1, 20),
    ]
    assert estimates.score(found) == {"n": 3, "mae": 7.67, "coverage": 0.333}


# --------------------------------------------------------------------------- forecast


def test_a_request_without_estimate_is_taken_to_stay() -> None:
    assert forecast.alive((), 1e6) == 1.0
    assert forecast.peak_tokens([(100, ())]) == 100 + forecast.HORIZON_STEPS


def test_survival_falls_through_the_quantiles() -> None:
    remaining = (10.0, 20.0, 40.0, 80.0, 100.0)
    assert forecast.alive(remaining, 0) == 1.0
    for level, steps in zip(forecast.LEVELS, remaining, strict=True):
        assert forecast.alive(remaining, steps) == pytest.approx(1 - level)
    assert forecast.alive(remaining, 1000) == 0.0


def test_the_peak_lies_ahead_only_while_requests_outlive_their_growth() -> None:
    assert forecast.peak_tokens([(500, (1.0, 2.0, 3.0, 4.0, 5.0))]) == 500
    assert forecast.peak_tokens([(100, (400.0, 500.0, 600.0, 700.0, 800.0))]) > 300
    assert forecast.peak_tokens([]) == 0


# --------------------------------------------------------------------------- report


def test_report_has_exactly_the_documented_fields() -> None:
    failed = replace(stream("b", tag="with"), error="gone", token_ids=())
    streams = [stream("a", tag="with"), failed]
    moves = [row("with-a", finished_at=1001.5)]
    result = report.build(findings(rescheduled=side("with", moves, streams=streams)))
    assert set(result) == {
        "requests", "completed", "failed", "output_tokens", "ttft_ms", "tpot_ms", "predictor",
        "migrations", "identity", "without", "with", "phases", "wall_s", "versions",
    }  # fmt: skip
    assert (result["requests"], result["completed"], result["failed"]) == (4, 3, 1)
    assert result["ttft_ms"]["p50"] == pytest.approx(200, abs=0.1)
    assert result["tpot_ms"]["p99"] == pytest.approx(100, abs=0.1)
    assert set(result["migrations"][0]) == {
        "rid", "source", "target", "reason", "context_tokens", "precopied_tokens", "stall_ms",
        "stall_steps",
    }  # fmt: skip
    assert result["identity"] == {"checked": 1, "mismatched": 0}
    for name in ("without", "with"):
        assert {
            "requests", "completed", "failed", "output_tokens", "ttft_ms", "tpot_ms",
            "longest_gap_ms", "retractions", "slo", "slo_attainment", "migrations",
        } <= set(result[name])  # fmt: skip
    assert result["with"]["failed"] == result["with"]["migrations"] == 1
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


def test_a_twin_is_a_still_answer_to_the_same_question() -> None:
    moved, other, still = stream("a"), stream("b"), stream("a", tag="still")
    assert twins_of([moved, other], [still], [row("demo-a")]) == [Twin(moved, still)]
    assert twins_of([moved], [still], [row("demo-a"), row("still-a")]) == []


def test_verdict_needs_every_stream_and_some_proof() -> None:
    assert report.verdict(findings()) == []
    lost = replace(stream("c"), error="reset")
    talk = Conversation(streams=[lost])
    assert "reset" in report.verdict(findings(conversation=talk))[0]
    other = Twin(stream("a"), replace(stream("a"), token_ids=(1,)))
    talk = Conversation(twins=[other])
    assert "1 migrated" in report.verdict(findings(conversation=talk))[0]
    assert "no stream" in report.verdict(findings(rescheduled=side("with")))[0]


def test_verdict_does_not_ask_who_was_faster() -> None:
    slow = side("with", [row("with-a")], slo=Slo(ttft_ms=1.0, tpot_ms=1.0))
    assert report.verdict(findings(rescheduled=slow)) == []


def test_the_summary_fits_a_terminal() -> None:
    found = findings()
    text = report.as_text(report.build(found), found.twins)
    assert max(map(len, text.splitlines())) <= 79
    assert re.search(r"retractions +3 +3", text)
    different = Twin(stream("a"), replace(stream("a"), token_ids=(5,)))
    text = report.as_text(report.build(found), [different])
    assert "demo-a differs from its twin at token 0" in text


# --------------------------------------------------------------------------- page


def figures(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def drawn(found: Findings) -> tuple[str, str]:
    sides = [(one, summary(one)) for one in (found.without, found.rescheduled)]
    svg = picture.render(sides, "what <ran>")
    return svg, page.render(found, report.build(found), svg, ["a < b"])


def classes(figure: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [mark for mark in figure.iter() if mark.get("class") == name]


def test_the_picture_stands_alone_and_marks_what_happened() -> None:
    svg, _ = drawn(findings())
    figure = ElementTree.fromstring(svg)
    assert figure.tag == "{http://www.w3.org/2000/svg}svg"
    # One of each is the legend's.
    assert len(classes(figure, "line")) == 4 + 1
    assert len(classes(figure, "full")) == 4 + 1
    assert len(classes(figure, "bad")) == 2 + 1  # one mark for the three retractions of each side
    assert len(classes(figure, "move")) == 1 + 1
    text = "".join(figure.itertext())
    assert "what <ran>" in text
    assert "Rescheduling on: 1 live move" in text
    assert "retractions" in text


def test_page_is_self_contained_and_well_formed() -> None:
    twins = [Twin(stream("a"), replace(stream("a"), token_ids=(5,)))]
    _, text = drawn(findings(conversation=Conversation(twins=twins)))
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert "<b>text" not in text
    assert "a &lt; b" in text
    assert len(figures(text)) == 3
    assert "differs at token 0" in text
    assert "1 migrated streams differ" in text


def test_page_without_anything_to_show() -> None:
    lost = replace(stream("a"), arrivals=[], token_ids=(), error="refused")
    empty = {"streams": [lost], "sightings": []}
    found = findings(without=side("without", **empty), rescheduled=side("with", **empty))
    _, text = drawn(found)
    assert "refused" in text
    assert "Nothing moved" in text
    assert "no values" in report.as_text(report.build(found), [])


@pytest.mark.parametrize("maximum", [0.3, 1.0, 7.0, 36, 99.5, 100, 4321])
def test_ticks_are_few_round_and_within(maximum: float) -> None:
    values = charts.ticks(maximum)
    assert 3 <= len(values) <= 7
    assert values[0] == 0
    assert values[-1] <= maximum


def test_decades_lie_within() -> None:
    assert charts.decades(30, 2500) == [50, 100, 200, 500, 1000, 2000]


# --------------------------------------------------------------------------- terminal


def test_a_bar_shows_use_and_forecast_and_fits() -> None:
    half = bar(load("decode-0", used=50, ahead=75.0), 80, colour=False)
    assert len(half) <= 80
    used, ahead, free = (half.count(mark) for mark in "█▒·")
    assert used == pytest.approx(2 * ahead, abs=1)
    assert free == pytest.approx(ahead, abs=1)
    assert "!" not in half
    over = bar(load("decode-0", used=99, ahead=140.0), 80, colour=False)
    assert "!" in over
    assert "·" not in over
    assert len(bar(load("decode-0", used=100), 120, colour=False)) <= 120


def test_screen_announces_each_move_once_in_plain_lines() -> None:
    watcher, out = Watcher("http://127.0.0.1:9"), io.StringIO()
    watcher.loads = [load("decode-0", used=50)]
    screen = Screen(watcher, 2, out)
    watcher.moves = [row("demo-a", state="accepted")]
    screen.show([stream("a")])
    full = row("demo-b", state="refused", detail="full")
    watcher.moves = [full, row("demo-a"), row("earlier-run")]
    screen.end([stream("a")])
    screen.end([stream("a"), stream("b")])
    text = out.getvalue()
    assert text.count("demo-a: decode-0 to decode-1") == 1
    assert "refused: full" in text
    assert "earlier-run" not in text
    assert "2/2 answers" in text
    assert "decode-0 50%" in text
    assert "\033" not in text


def test_screen_redraws_in_place_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    watcher, out = Watcher("http://127.0.0.1:9"), Terminal()
    watcher.loads = [load("decode-0"), load("decode-1")]
    screen = Screen(watcher, 1, out)
    screen.end([stream("a")])
    assert "\033[3F" not in out.getvalue()
    screen.show([stream("a")])
    screen.end([stream("a")])
    assert "█" in out.getvalue()


def test_a_move_that_failed_says_why() -> None:
    assert "cancelled: late" in move_line(row("demo-a", state="cancelled", detail="late"))


def test_phases_are_numbered_and_timed() -> None:
    said: list[str] = []
    steps = phases.Phases(2, said.append)
    with steps.phase("one"):
        pass
    with pytest.raises(RuntimeError), steps.phase("two"):
        raise RuntimeError
    assert said[0] == "[1/2] one"
    assert said[-1] == "[2/2] two"
    assert [name for name, _ in steps.took] == ["one"]


def test_more_cores_start_faster_but_play_no_faster() -> None:
    assert phases.expected_s(2, 100, 2) > phases.expected_s(2, 100, 4)
    assert phases.expected_s(2, 100, 64) == 2 * phases.LEAST_START_S + 100


# --------------------------------------------------------------------------- setting


def test_the_workload_is_the_same_every_time_and_bursty() -> None:
    load_ = comparison.FULL
    prompts = load_.prompts()
    assert prompts == load_.prompts()
    assert len(prompts) == load_.requests == len({p.name for p in prompts})
    assert len({p.seed for p in prompts}) == len(prompts)
    assert {p.max_tokens for p in prompts} == {load_.max_tokens}
    times = [p.at_s for p in prompts]
    assert times == sorted(times)
    bursts = {int(at_s // load_.gap_s) for at_s in times}
    assert bursts == set(range(load_.bursts))
    assert all(at_s % load_.gap_s <= load_.spread_s for at_s in times)


def test_there_are_problems_for_every_request() -> None:
    assert len(problems()) >= max(comparison.FULL.requests, comparison.QUICK.requests)
    assert len(set(problems())) == len(problems())


def test_the_router_takes_the_demos_flags() -> None:
    from sglang_star.cluster_layout import engines, router_command
    from sglang_star_router.command_line import parse_args
    from sglang_star_router.policy.registry import make_rescheduler

    spec = comparison.spec("off")
    flags = (*comparison.ROUTING, *comparison.RESCHEDULING)
    spec = replace(spec, rescheduler="star", router_arguments=flags)
    config = parse_args(list(router_command(spec, tuple(engines(spec)), 30000)[3:]))
    assert (config.policy, config.rescheduler) == ("least-tokens", "star")
    params = make_rescheduler(config.rescheduler, **config.rescheduler_params).params
    assert params.tpot_slo_ms == comparison.SLO.tpot_ms


def test_the_page_says_how_the_engines_are_paced_and_what_is_equal() -> None:
    text = " ".join(setting.paragraphs(Workload(2, 3, 4.0, 500)))
    for needed in ("6 requests", "24 GB card", "Only the rescheduler differs", "least-tokens"):
        assert needed in text


def test_chat_prompts_are_a_dozen_greedy_ones() -> None:
    assert len({p.name for p in CHAT}) == len(CHAT) == 12
    assert all(p.seed is None for p in CHAT)


def test_a_kept_cluster_tells_how_to_ask_it(capsys: pytest.CaptureFixture[str]) -> None:
    class Kept:
        url = "http://127.0.0.1:9"
        changes: dict[str, Any] = {}  # noqa: RUF012

        def replace_router(self, **changes: Any) -> None:
            self.changes = changes

        def check(self) -> None:
            raise KeyboardInterrupt

    kept = Kept()
    stay(kept, conversation.QUESTION)  # type: ignore[arg-type]
    assert kept.changes == {"rescheduler": "star"}
    words = shlex.split(capsys.readouterr().out.partition("  curl")[2])
    assert "http://127.0.0.1:9/v1/chat/completions" in words
    assert json.loads(words[-1])["messages"][0]["role"] == "user"


def test_options() -> None:
    arguments = parser().parse_args(["--quick", "--keep", "--out", "x"])
    assert arguments.quick
    assert arguments.keep
    assert str(arguments.out) == "x"
