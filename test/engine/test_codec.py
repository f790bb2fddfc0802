"""The request as it travels, with SGLang's real message type and no engine."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from sglang_star.errors import MalformedMessage
from sglang_star.star_request import StarRequest

pytestmark = pytest.mark.engine

codec = pytest.importorskip("sglang_star.engine.codec")
io_struct = pytest.importorskip("sglang.srt.managers.io_struct")
sampling = pytest.importorskip("sglang.srt.sampling.sampling_params")


UNUSED = (
    "multimodal_inputs",
    "session",
    "session_id",
    "beam_group",
    "input_embeds",
    "positional_embed_overrides",
    "custom_logit_processor",
    "lora_id",
)


def message(**fields: Any) -> Any:
    return io_struct.TokenizedGenerateReqInput(
        rid="client",
        input_text="hello",
        input_ids=array("q", [5, 6, 7]),
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=sampling.SamplingParams(temperature=0.5, stop=["end"], top_k=20),
        return_logprob=True,
        logprob_start_len=-1,
        top_logprobs_num=2,
        token_ids_logprob=[9],
        stream=True,
        bootstrap_host="127.0.0.1",
        bootstrap_room=77,
        **fields,
    )


def request(**changes: Any) -> Any:
    origin = message()
    plain: dict[str, Any] = dict.fromkeys(UNUSED)
    return SimpleNamespace(
        **{
            **plain,
            "_star": StarRequest(origin=origin),
            "sampling_params": origin.sampling_params,
            "origin_input_ids": array("q", [5, 6, 7]),
            "return_hidden_states": False,
            "return_routed_experts": False,
            "return_indexer_topk": False,
            "return_sampling_mask": False,
            "kv": SimpleNamespace(holds_mamba=False),
            "grammar": None,
            "output_ids": array("q", [11, 12]),
            "is_dllm": lambda: False,
            **changes,
        }
    )


def test_round_trip_under_a_new_name() -> None:
    data, prompt = codec.encode_request(request())
    rebuilt, output = codec.decode_request(data, prompt, "guest")
    assert not output, "it is sent when it is committed"
    assert rebuilt.rid == "guest"
    assert list(rebuilt.input_ids) == [5, 6, 7]
    assert rebuilt.sampling_params.top_k == 20
    assert (rebuilt.top_logprobs_num, rebuilt.token_ids_logprob) == (2, [9])
    assert rebuilt.bootstrap_room == 77
    assert rebuilt.time_stats is None


def test_output_travels_ahead_for_a_grammar() -> None:
    data, prompt = codec.encode_request(request(grammar=object()))
    assert list(codec.decode_request(data, prompt, "guest")[1]) == [11, 12]
    data = msgspec.msgpack.encode(codec.Travelling(codec_message(), b"\0" * 9))
    with pytest.raises(MalformedMessage):
        codec.decode_request(data, prompt, "guest")


def codec_message() -> bytes:
    stripped = msgspec.structs.replace(message(), input_ids=None)
    return msgspec.msgpack.encode(stripped)


def test_what_could_carry_an_object_is_refused() -> None:
    for field, value in (
        ("custom_logit_processor", "cos\nsystem\n"),
        ("time_stats", io_struct.PickleWrapper(data=b"cos\nsystem\n(S'true'\ntR.")),
    ):
        stripped = msgspec.structs.replace(message(), input_ids=None, **{field: value})
        data = msgspec.msgpack.encode(codec.Travelling(msgspec.msgpack.encode(stripped)))
        with pytest.raises(MalformedMessage):
            codec.decode_request(data, b"\0" * 8, "guest")


@pytest.mark.parametrize(("data", "prompt"), [(b"noise", b"\0" * 8), (b"", b"\0" * 8)])
def test_noise_is_refused(data: bytes, prompt: bytes) -> None:
    with pytest.raises(MalformedMessage):
        codec.decode_request(data, prompt, "guest")


def test_a_prompt_of_half_a_token_is_refused() -> None:
    data, _ = codec.encode_request(request())
    with pytest.raises(MalformedMessage):
        codec.decode_request(data, b"\0" * 5, "guest")


def test_an_ordinary_request_may_move() -> None:
    assert codec.pinned(request()) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"_star": StarRequest()}, "original message"),
        ({"multimodal_inputs": object()}, "multimodal"),
        ({"session": object()}, "session"),
        ({"session_id": "s"}, "session"),
        ({"beam_group": object()}, "beam"),
        ({"sampling_params": sampling.SamplingParams(beam_width=2)}, "beam"),
        ({"sampling_params": SimpleNamespace(beam_width=None, watermark="w")}, "watermark"),
        ({"input_embeds": [[0.0]]}, "input_embeds"),
        ({"positional_embed_overrides": object()}, "embedding overrides"),
        ({"custom_logit_processor": "x"}, "logit processor"),
        ({"lora_id": "l"}, "LoRA"),
        ({"return_hidden_states": True}, "hidden_states"),
        ({"return_hidden_states": "last"}, "hidden_states"),
        ({"return_routed_experts": True}, "routing capture"),
        ({"return_indexer_topk": True}, "routing capture"),
        ({"return_sampling_mask": True}, "sampling_mask"),
        ({"is_dllm": lambda: True}, "diffusion"),
        ({"kv": SimpleNamespace(holds_mamba=True)}, "recurrent"),
    ],
)
def test_a_feature_that_cannot_move_is_named(changes: dict[str, Any], reason: str) -> None:
    assert reason in codec.pinned(request(**changes))
