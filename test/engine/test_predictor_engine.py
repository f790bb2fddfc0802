"""The predictor inside a real SGLang engine: a random head on the tiny model."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from multiprocessing import resource_tracker
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_star.model import tiny_model
from unit.tiny_head import head_for

pytestmark = pytest.mark.engine

CHUNK = 64
GREEDY = {"temperature": 0.0, "max_new_tokens": 24, "ignore_eos": True}
SHORT, LONG = list(range(100, 120)), list(range(200, 200 + 3 * CHUNK))


@pytest.fixture(scope="module", params=["overlap", "no-overlap"])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.server_args import ServerArgs

    from sglang_star.config import StarConfig
    from sglang_star.launch import enable

    head = head_for(tiny_model(), tmp_path_factory.mktemp("head") / "tiny.safetensors")
    args = ServerArgs(
        model_path=str(tiny_model()),
        log_level="error",
        max_total_tokens=8192,
        max_running_requests=8,
        chunked_prefill_size=CHUNK,
        disable_radix_cache=True,
        disable_overlap_schedule=request.param == "no-overlap",
        sleep_on_idle=True,
    )
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = Engine(server_args=enable(args, StarConfig(predictor=str(head))))
    try:
        yield started
    finally:
        started.shutdown()
        renew_resource_tracker()


def renew_resource_tracker() -> None:
    """SGLang's shutdown kills every child of this process, and Python's resource tracker is one.

    Python notices when it next needs it, complains in whatever runs then, and starts another.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "resource_tracker: process died")
        resource_tracker.ensure_running()


def check(remaining: dict[str, float], left: int) -> None:
    assert 0 <= remaining["p10"] <= remaining["p50"] <= remaining["p90"] <= left


def test_a_finished_answer_and_every_streamed_piece_carry_the_estimate(engine: Any) -> None:
    whole = engine.generate(input_ids=SHORT, sampling_params=GREEDY)["meta_info"]
    check(whole["star_remaining"], 0)
    seen = set()
    for piece in engine.generate(input_ids=SHORT, sampling_params=GREEDY, stream=True):
        meta = piece["meta_info"]
        check(meta["star_remaining"], GREEDY["max_new_tokens"] - meta["completion_tokens"])
        seen.add(meta["star_remaining"]["p50"])
    assert len(seen) > 1


def estimates(engine: Any, prompts: list[list[int]]) -> list[dict[str, float]]:
    """The estimate at the first token, where ``max_new_tokens`` has not cut it."""
    params = {**GREEDY, "max_new_tokens": 4000}

    async def first(prompt: list[int]) -> dict[str, float]:
        stream = await engine.async_generate(input_ids=prompt, sampling_params=params, stream=True)
        async with contextlib.aclosing(stream):
            async for piece in stream:
                if piece["meta_info"]["completion_tokens"] == 1:
                    return dict(piece["meta_info"]["star_remaining"])
        raise AssertionError("the stream ended before its first token")

    async def all_of_them() -> list[dict[str, float]]:
        import asyncio

        found = await asyncio.gather(*map(first, prompts))
        engine.tokenizer_manager.abort_request(abort_all=True)
        return found

    return list(engine.loop.run_until_complete(all_of_them()))


def test_requests_in_a_batch_and_chunked_prompts_get_their_own_estimates(engine: Any) -> None:
    prompts = [SHORT, LONG, SHORT[::-1]]
    together = estimates(engine, prompts)
    alone = [estimates(engine, [prompt])[0] for prompt in prompts]
    for joint, single in zip(together, alone, strict=True):
        assert joint == pytest.approx(single, rel=1e-2)
    assert len({one["p50"] for one in together}) == 3


def test_input_logprobs_do_not_shift_the_rows(engine: Any) -> None:
    # With input logprobs SGLang's pruned states hold more than the last token of a prompt.
    plain = engine.generate(input_ids=SHORT, sampling_params={**GREEDY, "max_new_tokens": 8})
    logged = engine.generate(
        input_ids=SHORT,
        sampling_params={**GREEDY, "max_new_tokens": 8},
        return_logprob=True,
        logprob_start_len=0,
    )
    assert logged["output_ids"] == plain["output_ids"]
    assert logged["meta_info"]["star_remaining"] == pytest.approx(
        plain["meta_info"]["star_remaining"], rel=1e-3
    )


def test_switched_off_it_allocates_nothing_and_attaches_nothing() -> None:
    from sglang_star.config import StarConfig
    from sglang_star.launch import ATTRIBUTE
    from sglang_star.predictor import runner

    args = SimpleNamespace(**{ATTRIBUTE: StarConfig(predictor="off")})
    runner.init_tp_model_worker(None, SimpleNamespace(server_args=args))
    assert runner._attached == ()
    output = SimpleNamespace(next_token_logits=torch.zeros(2, 3), auxiliary_device_output=None)
    runner.get_pruned_states((torch.zeros(2, 3), None, None, None, None, None))
    runner.sample(None, None, output, None)
    assert output.auxiliary_device_output is None
