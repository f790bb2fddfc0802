"""Every path that SGLang generates at: dispatched, paired in PD, or refused clearly."""

from __future__ import annotations

import asyncio
import base64
import os

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.fleet import FakeEngine, eventually, fleet, request_status
from router.test_proxy import run
from sglang_star_router import calls
from sglang_star_router.calls import read_call
from sglang_star_router.paths import PATHS

MESSAGES = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
IMAGE = "data:image/png;base64," + base64.b64encode(os.urandom(300_000)).decode()

DISPATCHED = [
    ("/v1/messages", MESSAGES),
    ("/invocations", MESSAGES),
    ("/v1/responses", {"input": "hi"}),
    ("/api/chat", MESSAGES),
    ("/api/generate", {"model": "m", "prompt": "hi"}),
    ("/vertex_generate", {"instances": [{"text": "a"}, {"text": "b"}]}),
    ("/v1/embeddings", {"input": "a"}),
    ("/v1/classify", {"input": "a"}),
    ("/v1/score", {"query": "a", "items": ["b"]}),
    ("/v1/rerank", {"query": "a", "documents": ["b"]}),
    ("/v1/decisions", {"input": "a"}),
    ("/v1/systemone", {"input": "a"}),
    ("/encode", {"text": "a"}),
    ("/classify", {"text": "a"}),
]
PAIRED = {"/v1/messages", "/invocations", "/v1/responses"}


@pytest.mark.parametrize(("path", "body"), DISPATCHED, ids=[path for path, _ in DISPATCHED])
def test_every_path_that_runs_the_model_is_dispatched(path, body):
    async def check():
        async with fleet(FakeEngine()) as running:
            assert (await running.post(path, body))[0] == 200
            assert running.router.dispatcher.sequence == 1
            text = (await running.get("/metrics"))[1].decode()
            assert f'star_router_requests_total{{path="{path}",status="200"}} 1.0' in text

    run(check())


@pytest.mark.parametrize(("path", "body"), DISPATCHED, ids=[path for path, _ in DISPATCHED])
def test_in_pd_each_is_paired_or_refused_clearly(path, body):
    async def check():
        prefill, decode = FakeEngine("prefill"), FakeEngine("decode")
        async with fleet(prefill, decode) as running:
            status, answer = await running.post(path, body)
            if path in PAIRED:
                assert status == 200
                await eventually(lambda: prefill.requests)
                assert prefill.requests == decode.requests
                assert decode.requests[0]["bootstrap_room"] >= 0
            else:
                assert status == 501
                assert "prefill and decode" in orjson.loads(answer)["error"]["message"]
                assert prefill.others == decode.others == []
                assert prefill.requests == decode.requests == []

    run(check())


def test_audio_goes_through_dispatch_and_is_refused_in_pd():
    form = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        + os.urandom(300_000)
        + b"\r\n--b--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=b"}

    async def check():
        engine = FakeEngine()
        async with fleet(engine) as running:
            async with running.session.post(
                running.url + "/v1/audio/transcriptions", data=form, headers=headers
            ) as answer:
                assert answer.status == 200
            assert engine.others[-1] == ("POST", "/v1/audio/transcriptions", form)
            assert running.router.dispatcher.sequence == 1
        async with (
            fleet(FakeEngine("prefill"), FakeEngine("decode")) as running,
            running.session.post(
                running.url + "/v1/audio/transcriptions", data=form, headers=headers
            ) as answer,
        ):
            assert answer.status == 501

    run(check())


def test_a_websocket_is_refused_clearly():
    async def check():
        engine = FakeEngine()
        async with fleet(engine) as running:
            status, answer = await running.get("/v1/realtime", headers={"Upgrade": "websocket"})
            assert status == 501
            assert "WebSocket" in orjson.loads(answer)["error"]["message"]
            assert engine.others == []

    run(check())


@pytest.mark.parametrize("more", [{"previous_response_id": "resp_1"}, {"background": True}])
def test_pd_has_no_stored_responses(more):
    async def check():
        prefill, decode = FakeEngine("prefill"), FakeEngine("decode")
        async with fleet(prefill, decode) as running:
            status, _ = await running.post("/v1/responses", {"input": "hi"} | more)
            assert status == 501
            assert (await running.get("/v1/responses/resp_1"))[0] == 501
            assert decode.requests == decode.others == []

    run(check())


@pytest.mark.parametrize(
    ("path", "body", "begins"),
    [
        ("/v1/messages", MESSAGES, b"event: error\ndata: {"),
        ("/v1/responses", {"input": "a"}, b"data: {"),
        ("/v1/chat/completions", MESSAGES, b"data: {"),
    ],
)
def test_a_stream_that_breaks_ends_with_an_event_that_the_apis_clients_know(path, body, begins):
    async def check():
        engine = FakeEngine(chunks=[b"data: 1\n\n"] * 5, die_after=2)
        async with fleet(engine) as running:
            _, answer = await running.post(path, body | {"stream": True})
            assert answer.split(b"\n\n")[2].startswith(begins)

    run(check())


def test_a_stored_response_is_asked_of_the_engine_that_has_it():
    async def check():
        engines = [FakeEngine() for _ in range(3)]
        async with fleet(*engines) as running:
            names = []
            for _ in range(6):
                assert (await running.post("/v1/responses", {"input": "hi"}))[0] == 200
            for engine in engines:
                assert len(engine.requests) == 2
                for request in engine.requests:
                    assert request["request_id"].startswith("resp_")
                    engine.stored.add(request["request_id"])
                    names.append((engine, request["request_id"]))
            for engine, name in names:
                status, answer = await running.get(f"/v1/responses/{name}")
                assert (status, orjson.loads(answer)["engine"]) == (200, engine.name)
                status, answer = await running.post(f"/v1/responses/{name}/cancel", {})
                assert (status, orjson.loads(answer)["engine"]) == (200, engine.name)
                await running.post("/v1/responses", {"input": "on", "previous_response_id": name})
                assert engine.requests[-1]["previous_response_id"] == name

    run(check())


def test_a_response_that_another_router_made_is_found():
    async def check():
        engines = [FakeEngine() for _ in range(3)]
        engines[2].stored.add("resp_old")
        async with fleet(*engines) as running:
            for _ in range(3):
                body = {"input": "on", "previous_response_id": "resp_old"}
                assert (await running.post("/v1/responses", body))[0] == 200
            assert len(engines[2].requests) == 3
            status, answer = await running.post(
                "/v1/responses", {"input": "on", "previous_response_id": "resp_unknown"}
            )
            assert status == 404
            assert "resp_unknown" in orjson.loads(answer)["error"]["message"]

    run(check())


def test_no_other_engine_is_asked_when_the_one_that_has_it_is_gone():
    async def check():
        engines = [FakeEngine(), FakeEngine()]
        async with fleet(*engines) as running:
            body = {"input": "hi", "request_id": "resp_mine"}
            assert (await running.post("/v1/responses", body))[0] == 200
            home = next(engine for engine in engines if engine.requests)
            other = next(engine for engine in engines if engine is not home)
            await home.stop()
            await eventually(lambda: not running.instance(home).healthy)
            status, answer = await running.post(
                "/v1/responses", {"input": "on", "previous_response_id": "resp_mine"}
            )
            assert status == 503
            assert home.name in orjson.loads(answer)["error"]["message"]
            assert other.requests == []

    run(check())


# --------------------------------------------------------------------------- what is prompt


def content(*parts):
    return [{"role": "user", "content": [{"type": "text", "text": "what is this?"}, *parts]}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions",
         {"messages": content({"type": "image_url", "image_url": {"url": IMAGE}})}),
        ("/v1/chat/completions",
         {"messages": content({"type": "input_audio", "input_audio": {"data": IMAGE}})}),
        ("/v1/messages",
         {"messages": content({"type": "image", "source": {"type": "base64", "data": IMAGE}})}),
        ("/v1/messages",
         {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t",
          "content": [{"type": "image", "source": {"data": IMAGE}}]}]}]}),
        ("/v1/responses",
         {"input": content({"type": "input_image", "image_url": IMAGE})}),
        ("/v1/responses",
         {"input": [{"type": "function_call_output", "call_id": "c",
                     "output": [{"type": "input_image", "image_url": IMAGE}]}]}),
        ("/api/chat", {"messages": [{"role": "user", "content": "a", "images": [IMAGE]}]}),
        ("/api/generate", {"prompt": "a", "images": [IMAGE]}),
        ("/generate", {"text": "a", "image_data": IMAGE}),
        ("/vertex_generate", {"instances": [{"text": "a", "image_data": IMAGE}]}),
    ],
)  # fmt: skip
def test_media_are_not_prompt_text(path, body):
    call = read_call(path, orjson.dumps(body))
    assert call is not None
    assert call.prompt_bytes < 1000
    assert call.media == 1
    assert call.learnable_bytes == 0


def test_text_is_prompt_whatever_it_says():
    for body in (
        {"messages": [{"role": "user", "content": IMAGE}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": IMAGE}]}]},
        {"messages": [], "tools": [{"description": IMAGE}]},
        {"messages": [], "system": IMAGE},
    ):
        call = read_call("/v1/messages", orjson.dumps(body))
        assert call is not None
        assert call.prompt_bytes > len(IMAGE)
        assert call.learnable_bytes == call.prompt_bytes


def test_ids_and_embeddings_count_as_what_they_are():
    embeds = [[0.125] * 64] * 10
    for path, body, batch, ids in (
        ("/generate", {"input_ids": [1, 2, 3]}, 1, 3),
        ("/generate", {"input_ids": [[1, 2], [3, 4, 5]]}, 2, 5),
        ("/generate", {"input_embeds": embeds}, 1, 10),
        ("/generate", {"input_embeds": [embeds, embeds]}, 2, 20),
        ("/v1/completions", {"prompt": [7]}, 1, 1),
        ("/v1/completions", {"prompt": [[7], [8, 9]]}, 2, 3),
    ):
        call = read_call(path, orjson.dumps(body))
        assert call is not None
        assert (call.batch, call.prompt_ids) == (batch, ids)
        assert call.learnable_bytes == 0


FIELDS = calls._Fields.__struct_fields__
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats()
    | st.text('a"\\[é', max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["type", "content", "output", "image_url", "source", "n", "images"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(PATHS)), st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6))
def test_whatever_a_body_says_it_is_read_or_refused(path, body):
    data = orjson.dumps(body, option=orjson.OPT_PASSTHROUGH_SUBCLASS, default=str)
    call = read_call(path, data)
    assert call is not None
    assert call.batch >= 1
    assert call.samples >= 1
    assert call.prompt_bytes >= 0
    assert call.prompt_tokens(lambda size: size) >= 0
    for facts in (call.naming(call.name()), call.bootstrap("h", 1)):
        assert orjson.loads(b"".join(call.with_fields(facts))) == orjson.loads(data) | facts


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(PATHS)), st.binary(max_size=200))
def test_what_is_no_json_is_refused(path, data):
    call = read_call(path, b"\xff" + data)
    assert (call is None) == PATHS[path].json


def test_names_of_any_length_are_no_trouble():
    async def check():
        engine = FakeEngine()
        async with fleet(engine) as running:
            for body in ({"text": "a", "rid": "r" * 600_000}, {"text": "a" * 600_000, "rid": "r"}):
                assert (await running.post("/generate", body))[0] == 200
                assert engine.requests[-1] == body
            pid = running.router.intake.reader.pid
            body = {"input": "a", "previous_response_id": "r" * 600_000}
            assert (await running.post("/v1/responses", body))[0] == 404
            assert running.router.intake.reader.pid == pid

    run(check())


def test_nesting_without_end_is_refused_without_harm():
    for body in (b'{"messages": ' + b"[" * 100_000, b'{"a":' * 100_000):
        assert read_call("/v1/chat/completions", body) is None
    deep = b'{"messages": ' + b'[{"content": ' * 400 + b'"x"' + b"}]" * 400 + b"}"
    assert read_call("/v1/chat/completions", deep) is not None


def test_one_image_makes_no_instance_look_full_nor_spoils_bytes_per_token():
    async def check():
        engine = FakeEngine(stall=True)
        async with fleet(engine) as running:
            body = {"messages": content({"type": "image_url", "image_url": {"url": IMAGE}})}
            asked = asyncio.create_task(running.post("/v1/chat/completions", body | {"rid": "r"}))
            await eventually(lambda: engine.requests)
            (sent,) = running.instance(engine).dispatches
            assert sent.prompt_tokens < 3000, "of a KV pool of 10,000"
            before = running.router.fleet.prompts.tokens_of(100_000)
            await running.publish(engine, request_status("r", prompt=1500))
            assert running.router.fleet.prompts.tokens_of(100_000) == before
            asked.cancel()

    run(check())


def test_no_prompt_counts_as_longer_than_an_instance_takes():
    async def check():
        engine = FakeEngine(stall=True)
        async with fleet(engine) as running:
            asked = asyncio.create_task(running.post("/generate", {"text": "a" + " " * 900_000}))
            await eventually(lambda: engine.requests)
            (sent,) = running.instance(engine).dispatches
            assert sent.prompt_tokens <= 4000
            asked.cancel()

    run(check())
