"""Ballast says whose it is: what lies in the wrong place, or only half of it, shows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sgl_kernel_ext import as_token_rows, gather_kv, scatter_kv
from sglang_star.config import PREDICTOR_OFF, StarConfig
from sglang_star.errors import ConfigError
from sglang_star.launch import ATTRIBUTE
from sglang_star.platform.ballast import PER_STEP, Ballast, Inspector, beside, of

TOKENS = torch.tensor([7, 49_151, 7, 0, 3])
POSITIONS = torch.arange(20, 25)
SLOTS = torch.tensor([9, 4, 6, 31, 29])


def written() -> Ballast:
    ballast = Ballast(slots=32, token_bytes=3 * 1024 + 512)
    ballast.write(SLOTS, TOKENS, POSITIONS)
    return ballast


def test_rows_are_those_of_layers() -> None:
    assert [(b.shape[0], b[0].nbytes) for b in written().buffers] == [(32, 1024)] * 3 + [(32, 512)]


def test_what_was_written_is_found() -> None:
    assert written().wrong(SLOTS, TOKENS, POSITIONS) == []


def test_other_tokens_positions_and_slots_are_not() -> None:
    ballast = written()
    assert ballast.wrong(SLOTS, TOKENS + 1, POSITIONS) == [20, 21, 22, 23, 24]
    assert ballast.wrong(SLOTS, TOKENS, POSITIONS + 1) == [21, 22, 23, 24, 25]
    assert ballast.wrong(torch.tensor([9, 6, 6, 31, 29]), TOKENS, POSITIONS) == [21]
    assert ballast.wrong(SLOTS - 1, TOKENS, POSITIONS) == [20, 21, 22, 23, 24]


@pytest.mark.parametrize("buffer", range(4))
@pytest.mark.parametrize("word", [0, 63])
def test_one_word_of_the_last_position_is_missed_by_nobody(buffer: int, word: int) -> None:
    ballast = written()
    ballast.buffers[buffer][29, word] += 1
    assert ballast.wrong(SLOTS, TOKENS, POSITIONS) == [24]


def test_it_moves_as_kv_does() -> None:
    source, target = written(), Ballast(slots=40, token_bytes=3 * 1024 + 512)
    staging = torch.empty(5 * (3 * 1024 + 512), dtype=torch.uint8)
    arrived = torch.tensor([1, 3, 2, 39, 0])
    gather_kv([as_token_rows(b) for b in source.buffers], SLOTS, staging)
    scatter_kv([as_token_rows(b) for b in target.buffers], arrived, staging)
    assert target.wrong(arrived, TOKENS, POSITIONS) == []


def pool() -> Any:
    return SimpleNamespace(size=64, page_size=1)


def server_args(mode: str = "null", **star: Any) -> Any:
    config = StarConfig(predictor=PREDICTOR_OFF, **star)
    return SimpleNamespace(**{ATTRIBUTE: config, "disaggregation_mode": mode})


def test_a_pool_gets_what_it_lacks() -> None:
    made = pool()
    buffers = beside(made, 512, server_args(paced="24gb-7b", paced_kv_bytes=57344))
    assert sum(buffer[0].nbytes for buffer in buffers) == 57344 - 512
    ballast = of(made)
    assert ballast is not None
    assert ballast.buffers is buffers


def test_a_pool_gets_nothing_unasked() -> None:
    made = pool()
    assert beside(made, 512, server_args(paced="24gb-7b")) == []
    assert of(made) is None


def test_what_cannot_be_is_refused() -> None:
    wide = {"paced": "24gb-7b", "paced_kv_bytes": 512}
    with pytest.raises(ConfigError, match="512"):
        beside(pool(), 512, server_args(**wide))
    with pytest.raises(ConfigError, match="both phases"):
        beside(pool(), 256, server_args("decode", **wide))


def test_an_inspector_comes_by_every_position() -> None:
    length = PER_STEP + 500
    ballast = Ballast(slots=4096, token_bytes=1024)
    row = torch.randperm(4096)[:length]
    tokens = torch.randint(49_152, (length,))
    ballast.write(row, tokens, torch.arange(length))
    prompt, output = tokens[:900].tolist(), [*tokens[900:].tolist(), 5]
    req: Any = SimpleNamespace(
        rid="r",
        finished=lambda: False,
        origin_input_ids=prompt,
        output_ids=output,
        kv=SimpleNamespace(req_pool_idx=1),
    )
    req_to_token = torch.stack([torch.zeros_like(row), row]).to(torch.int32)
    inspector = Inspector(ballast, req_to_token)
    inspector.step([req])
    inspector.step([req])
    ballast.buffers[0][row[10]] += 1
    with pytest.raises(ValueError, match="first 10"):
        inspector.step([req])
    ballast.buffers[0][row[10]] -= 1
    ballast.buffers[0][row[PER_STEP + 52]] += 1
    with pytest.raises(ValueError, match=f"first {PER_STEP + 52}"):
        inspector.step([req])
