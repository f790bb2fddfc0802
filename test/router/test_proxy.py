"""Requests through the router: untouched on the way back, retried only while nothing is lost."""

from __future__ import annotations

import asyncio

import orjson
import pytest
import uvloop

from router.fleet import WAIT_S, FakeEngine, eventually, fleet

STREAM = {"text": "hi", "stream": True, "sampling_params": {"max_new_tokens": 4}}


def run(coroutine):
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(asyncio.wait_for(coroutine, 2 * WAIT_S))


async def raw_exchange(url: str, request: bytes) -> bytes:
    """Talk HTTP over a bare socket and return every byte of the answer until it closes."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    answer = await reader.read()
    writer.close()
    return answer


def raw_request(path: str, body: bytes, version: str = "1.1") -> bytes:
    return (
        f"POST {path} HTTP/{version}\r\nHost: x\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


AWKWARD = [b"data: \xc3", b"\xa9\r\n\r\n", b"\x00\xff" * 5000, b"x", b"data: [DONE]\n\n"]


@pytest.mark.parametrize("mode", ["aggregated", "pd"])
def test_stream_arrives_byte_for_byte(mode):
    async def check():
        if mode == "pd":
            engines = [FakeEngine("prefill"), FakeEngine("decode", chunks=AWKWARD)]
        else:
            engines = [FakeEngine(chunks=AWKWARD)]
        async with fleet(*engines) as running:
            direct = await raw_exchange(
                engines[-1].url, raw_request("/generate", orjson.dumps(STREAM))
            )
            routed = await raw_exchange(running.url, raw_request("/generate", orjson.dumps(STREAM)))
            direct_head, _, direct_body = direct.partition(b"\r\n\r\n")
            routed_head, _, routed_body = routed.partition(b"\r\n\r\n")
            # Chunk boundaries and all.
            assert routed_body == direct_body
            names = {line.split(b":")[0].lower() for line in routed_head.split(b"\r\n")[1:]}
            assert {b"content-type", b"x-engine", b"transfer-encoding"} <= names
            assert routed_head.split(b"\r\n")[0] == direct_head.split(b"\r\n")[0]

    run(check())


def test_http_1_0_client_gets_the_stream_without_chunks():
    async def check():
        async with fleet(FakeEngine(chunks=AWKWARD)) as running:
            answer = await raw_exchange(
                running.url, raw_request("/generate", orjson.dumps(STREAM), "1.0")
            )
            head, _, body = answer.partition(b"\r\n\r\n")
            assert body == b"".join(AWKWARD)
            assert b"transfer-encoding" not in head.lower()

    run(check())


def test_plain_answer_and_errors_of_the_engine_pass_through_unchanged():
    async def check():
        engine = FakeEngine()
        async with fleet(engine) as running:
            assert await running.post("/generate", {"text": "hi"}) == (
                200,
                b'{"text": "hello",  "meta_info": {}}',
            )
            engine.reply_status, engine.reply_body = 400, b'{"object":"error","message":"no"}'
            assert await running.post("/v1/chat/completions", {"messages": []}) == (
                400,
                engine.reply_body,
            )
            assert len(engine.requests) == 2

    run(check())


def test_body_and_authorization_reach_the_engine_as_they_were():
    body = b'{ "model":"m", "prompt" : "caf\\u00e9 1e2", "seed": 1E2, "stream":false }  '

    async def check():
        engine = FakeEngine()
        async with fleet(engine) as running:
            async with running.session.post(
                running.url + "/v1/completions?x=%2F",
                data=body,
                headers={"Authorization": "Bearer secret", "X-Mine": "1"},
            ) as response:
                assert response.status == 200
            sent = engine.bodies[0]
            assert sent.startswith(body.rstrip()[:-1].rstrip())
            assert len(engine.requests[0].pop("rid")) == 32
            assert engine.requests[0] == orjson.loads(body)
            assert engine.headers[0]["Authorization"] == "Bearer secret"
            assert engine.headers[0]["X-Mine"] == "1"

    run(check())


def test_a_body_that_names_or_multiplies_its_requests_is_not_touched():
    bodies = [
        {"text": "a", "rid": "mine"},
        {"text": ["a", "b"]},
        {"text": "a", "sampling_params": {"n": 2}},
        {"input_ids": [[1, 2], [3]], "rid": ["x", "y"]},
    ]

    async def check():
        engine = FakeEngine()
        async with fleet(engine) as running:
            for body in bodies:
                assert (await running.post("/generate", body))[0] == 200
            assert engine.requests == bodies

    run(check())


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'{"a": }', b"\xff\xfe"])
def test_malformed_json_is_refused_in_openai_shape(body):
    async def check():
        engine = FakeEngine()
        async with fleet(engine) as running:
            async with running.session.post(running.url + "/generate", data=body) as response:
                error = await response.json()
            assert response.status == 400
            assert error["object"] == "error"
            assert error["error"]["type"] == "invalid_request_error"
            assert engine.requests == []

    run(check())


def test_pd_pairs_both_halves_in_one_room():
    async def check():
        prefill, decode = FakeEngine("prefill"), FakeEngine("decode")
        async with fleet(prefill, decode) as running:
            for body in ({"text": "a"}, {"input_ids": [1, 2, 3]}):
                assert (await running.post("/generate", body))[0] == 200
            await running.post("/v1/chat/completions", {"messages": [{"role": "user"}]})
            await running.post("/v1/completions", {"prompt": [5, 6, 7]})
            await eventually(lambda: len(prefill.requests) == 4)
            assert prefill.requests == decode.requests
            rooms = {request["bootstrap_room"] for request in decode.requests}
            assert len(rooms) == 4
            for request in decode.requests:
                assert request["bootstrap_host"] == "127.0.0.1"
                assert request["bootstrap_port"] == 9123
                assert 0 <= request["bootstrap_room"] < 2**63

    run(check())


@pytest.mark.parametrize(
    ("path", "body", "batch", "samples"),
    [
        ("/generate", {"text": ["a", "b", "c"]}, 3, 1),
        ("/generate", {"input_ids": [[1], [2]], "sampling_params": {"n": 3}}, 2, 3),
        ("/generate", {"text": "a", "sampling_params": [{"n": 2}]}, 1, 2),
        ("/v1/completions", {"prompt": ["a", "b"]}, 2, 1),
        ("/v1/completions", {"prompt": [[1], [2]], "n": 2}, 2, 2),
        ("/v1/chat/completions", {"messages": [], "n": 4}, 1, 4),
    ],
)
def test_pd_gives_every_prompt_of_a_batch_its_own_rooms(path, body, batch, samples):
    async def check():
        prefill, decode = FakeEngine("prefill"), FakeEngine("decode")
        async with fleet(prefill, decode) as running:
            assert (await running.post(path, body))[0] == 200
            await eventually(lambda: prefill.requests)
            request = decode.requests[0]
            assert prefill.requests[0] == request
            rooms = request["bootstrap_room"]
            assert len(rooms) == batch
            # Room for every sample and the warm-up before them, clear of the next prompt's.
            used = {room + k for room in rooms for k in range(samples + 1)}
            assert len(used) == batch * (samples + 1)
            assert request["bootstrap_host"] == ["127.0.0.1"] * batch
            assert request["bootstrap_port"] == [9123] * batch

    run(check())


def test_pd_merges_prompt_logprobs_of_prefill():
    async def check():
        prefill, decode = FakeEngine("prefill"), FakeEngine("decode")
        prefill.reply_body = orjson.dumps(
            {"text": "x", "meta_info": {"input_token_logprobs": [[-1.0, 5, None]]}}
        )
        decode.reply_body = orjson.dumps(
            {"text": "xyz", "meta_info": {"input_token_logprobs": [], "id": "r"}}
        )
        async with fleet(prefill, decode) as running:
            body = {"text": "a", "return_logprob": True, "logprob_start_len": 0}
            status, answer = await running.post("/generate", body)
            assert status == 200
            assert orjson.loads(answer) == {
                "text": "xyz",
                "meta_info": {"input_token_logprobs": [[-1.0, 5, None]], "id": "r"},
            }

    run(check())


@pytest.mark.parametrize("mode", ["aggregated", "pd"])
def test_client_disconnect_reaches_every_instance(mode):
    async def check():
        gate = asyncio.Event()
        engines = [FakeEngine(chunks=[b"data: 1\n\n", b"data: 2\n\n"], gate=gate)]
        if mode == "pd":
            engines[0].role = "decode"
            engines.insert(0, FakeEngine("prefill", stall=True))
        async with fleet(*engines) as running:
            if mode == "pd":
                # Gone while prefill is still busy: nothing has come back yet.
                engines[1].stall = True
                request = asyncio.create_task(running.post("/generate", STREAM))
                await eventually(lambda: all(engine.active for engine in engines))
                request.cancel()
            else:
                response = await running.session.post(running.url + "/generate", json=STREAM)
                assert await response.content.readany() == b"data: 1\n\n"
                response.close()
            for engine in engines:
                await eventually(lambda one=engine: one.disconnects == 1, "abort upstream")
            assert all(not instance.dispatches for instance in running.router.fleet)

    run(check())


def test_death_mid_stream_ends_with_an_error_event_and_no_hang():
    async def check():
        engine = FakeEngine(chunks=[b"data: 1\n\n"] * 5, die_after=2)
        async with fleet(engine) as running:
            status, body = await running.post("/v1/chat/completions", {"stream": True})
            assert status == 200
            events = body.split(b"\n\n")
            assert events[:2] == [b"data: 1"] * 2
            error = orjson.loads(events[2].removeprefix(b"data: "))["error"]
            assert error["type"] == "upstream_error"
            assert engine.url in error["message"]
            text = (await running.get("/metrics"))[1].decode()
            assert "star_router_lost_streams_total 1.0" in text

    run(check())


def test_truncated_plain_answer_looks_truncated():
    async def check():
        async def half(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            # Too large to be waited for as a whole; a smaller one would be asked for elsewhere.
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\nhalf")
            await writer.drain()
            writer.close()

        engine = FakeEngine()
        async with fleet(engine) as running:
            await running.router.health.close()
            await engine.stop()
            server = await asyncio.start_server(half, "127.0.0.1", engine.port)
            body = raw_request("/generate", b'{"text":"a"}')
            answer = await raw_exchange(running.url, body)
            assert answer.endswith(b"half")
            assert b"Content-Length: 100000000" in answer
            server.close()

    run(check())


def test_failure_before_the_first_byte_is_retried_elsewhere():
    async def check():
        bad, good = FakeEngine(die_after=0), FakeEngine()
        async with fleet(bad, good) as running:
            for _ in range(4):
                status, body = await running.post("/generate", STREAM)
                assert (status, body) == (200, b"".join(good.chunks))
            assert len(good.requests) == 4
            assert bad.requests, "the bad one was never tried"
            rids = {request["rid"] for request in bad.requests}
            assert rids <= {request["rid"] for request in good.requests}

    run(check())


def test_busy_instance_is_passed_over_and_its_answer_kept_if_nobody_else_can():
    async def check():
        busy, good = FakeEngine(reply_status=503, reply_body=b'{"message":"full"}'), FakeEngine()
        async with fleet(busy, good) as running:
            for _ in range(2):
                assert (await running.post("/generate", {"text": "a"}))[0] == 200
            good.reply_status, good.reply_body = 503, b'{"message":"full too"}'
            status, body = await running.post("/generate", {"text": "a"})
            assert status == 503
            assert body in (busy.reply_body, good.reply_body)

    run(check())


def test_pd_prefill_failure_frees_decode_and_tries_another_pair():
    async def check():
        broken, prefill = FakeEngine("prefill", die_after=0), FakeEngine("prefill")
        decode = FakeEngine("decode", stall=True)
        async with fleet(
            broken, prefill, decode, prefill_policy="round-robin", policy="round-robin"
        ) as running:
            broken.reply_status = 503
            request = asyncio.create_task(running.post("/generate", STREAM))
            await eventually(lambda: decode.disconnects or (prefill.requests and decode.requests))
            decode.stall = False
            if not decode.disconnects:
                # Round-robin began with the sound prefill: its partner waits; let it go and retry.
                request.cancel()
                await eventually(lambda: decode.disconnects)
            request = asyncio.create_task(running.post("/generate", STREAM))
            status, body = await request
            assert (status, body) == (200, b"".join(decode.chunks))
            rooms = [one["bootstrap_room"] for one in decode.requests]
            assert len(set(rooms)) == len(rooms), "a room must never be used twice"

    run(check())


def test_pd_bad_request_is_answered_by_prefill_without_waiting_for_decode():
    async def check():
        prefill = FakeEngine("prefill", reply_status=400, reply_body=b'{"message":"bad"}')
        decode = FakeEngine("decode", stall=True)
        async with fleet(prefill, decode) as running:
            assert await running.post("/generate", STREAM) == (400, b'{"message":"bad"}')
            await eventually(lambda: decode.disconnects == 1)
            assert len(prefill.requests) == 1

    run(check())


def test_no_instance_left_is_a_clear_error():
    async def check():
        engine = FakeEngine()
        async with fleet(engine) as running:
            await engine.stop()
            status, body = await running.post("/generate", {"text": "a"})
            error = orjson.loads(body)["error"]
            assert status == 503
            assert engine.url in error["message"]
            assert error["type"] == "service_unavailable"

    run(check())


def test_request_timeout_before_and_within_the_stream():
    async def check():
        engine = FakeEngine(stall=True)
        async with fleet(engine, request_timeout=0.3) as running:
            status, body = await running.post("/generate", STREAM)
            assert status == 504
            assert orjson.loads(body)["error"]["type"] == "timeout_error"
            engine.stall, engine.gate = False, asyncio.Event()
            # On a busy machine the limit may pass before the first chunk as well.
            while (answer := await running.post("/generate", STREAM))[0] == 504:
                pass
            status, body = answer
            assert status == 200
            assert b"time limit" in body
            await eventually(lambda: engine.disconnects == len(engine.requests))

    run(check())


def test_two_hundred_streams_at_once():
    async def check():
        chunks = [b"data: %d\n\n" % i for i in range(50)] + [b"data: [DONE]\n\n"]
        engines = [FakeEngine(chunks=chunks) for _ in range(2)]
        async with fleet(*engines) as running:
            answers = await asyncio.gather(*(running.post("/generate", STREAM) for _ in range(200)))
            assert answers == [(200, b"".join(chunks))] * 200
            assert {len(engine.requests) for engine in engines} == {100}
            assert all(not one.dispatches for one in running.router.fleet)

    run(check())


def test_slow_client_holds_the_instance_back_and_gets_every_byte():
    async def check():
        chunks = [bytes([i % 251]) * 65536 for i in range(200)]
        async with fleet(FakeEngine(chunks=chunks)) as running:
            response = await running.session.post(running.url + "/generate", json=STREAM)
            got = bytearray()
            while block := await response.content.read(65536):
                got += block
                if len(got) < 1_000_000:
                    await asyncio.sleep(0.01)
            assert bytes(got) == b"".join(chunks)

    run(check())


def test_unknown_and_other_paths():
    async def check():
        engine = FakeEngine()
        async with fleet(engine) as running:
            assert (await running.get("/v1/models"))[0] == 200
            assert (await running.get("/get_model_info"))[0] == 200
            assert (await running.post("/v1/embeddings", {"input": "a"}))[0] == 200
            assert engine.others[-1] == ("POST", "/v1/embeddings", b'{"input": "a"}')
            assert (await running.get("/update_weights_from_disk"))[0] == 404
            assert (await running.post("/flush_cache", {}))[0] == 200
            assert engine.others[-1][1] == "/flush_cache"
            info = orjson.loads((await running.get("/server_info"))[1])
            assert info["tokenizer_path"] == "fake"

    run(check())


def test_server_info_in_pd_lists_both_sides_as_bench_serving_expects():
    async def check():
        async with fleet(FakeEngine("prefill"), FakeEngine("decode")) as running:
            info = orjson.loads((await running.get("/get_server_info"))[1])
            assert info["decode"][0]["internal_states"] == [{}]
            assert info["prefill"][0]["tokenizer_path"] == "fake"

    run(check())


def test_api_key_is_demanded_and_given_to_instances():
    async def check():
        engine = FakeEngine()
        async with fleet(engine, api_key="k") as running:
            assert (await running.post("/generate", {"text": "a"}))[0] == 401
            assert (await running.get("/star/cluster"))[0] == 401
            assert (await running.get("/health"))[0] == 200
            key = {"Authorization": "Bearer k"}
            assert (await running.post("/generate", {"text": "a"}, headers=key))[0] == 200
            assert engine.headers[0]["Authorization"] == "Bearer k"

    run(check())
