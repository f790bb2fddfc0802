"""Traces: native parquet, the public formats, windows, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_star.errors import ConfigError
from sglang_star.platform.profile import find
from sglang_star_bench import traces
from sglang_star_bench.simulator.saturation import saturation_rate, scale_for_load


def test_parquet_round_trip(tmp_path: Path) -> None:
    trace = traces.synthetic(7, duration_s=100.0)
    traces.save(trace, tmp_path / "t.parquet")
    again = traces.load(tmp_path / "t.parquet")
    assert (again.arrival_s == trace.arrival_s).all()
    assert (again.input_len == trace.input_len).all()
    assert (again.output_len == trace.output_len).all()


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
60,GPT-4,12,0,12,API log
"""
SERVEGEN = """timestamp,input_tokens,output_tokens
1.5,10,20
2.5,30,40
"""
MOONCAKE = """{"timestamp": 1000, "input_length": 6758, "output_length": 500, "hash_ids": [0]}
{"timestamp": 3000, "input_length": 7322, "output_length": 490, "hash_ids": [0, 1]}
"""


@pytest.mark.parametrize(
    ("name", "text", "arrivals", "prompts", "outputs"),
    [
        ("azure.csv", AZURE, [0.0, 4.314579], [374, 396], [44, 109]),
        ("burst.csv", BURSTGPT, [0.0, 40.0], [472, 1087], [18, 230]),
        ("servegen.csv", SERVEGEN, [0.0, 1.0], [10, 30], [20, 40]),
        ("mooncake.jsonl", MOONCAKE, [0.0, 2.0], [6758, 7322], [500, 490]),
    ],
)
def test_public_formats(
    tmp_path: Path,
    name: str,
    text: str,
    arrivals: list[float],
    prompts: list[int],
    outputs: list[int],
) -> None:
    (tmp_path / name).write_text(text)
    trace = traces.load(tmp_path / name)
    assert trace.arrival_s == pytest.approx(arrivals, abs=1e-4)
    assert trace.input_len.tolist() == prompts
    assert trace.output_len.tolist() == outputs


@pytest.mark.parametrize(
    ("arrival", "prompt", "output", "says"),
    [
        ([], [], [], "no requests"),
        ([0.0, 2.0, 1.0], [1, 1, 1], [1, 1, 1], "row 2 arrives before"),
        ([-1.0], [1], [1], "not negative"),
        ([float("nan")], [1], [1], "finite"),
        ([0.0], [0], [1], "input_len must be at least 1"),
        ([0.0], [1], [float("nan")], "output_len"),
        ([0.0, 1.0], [1], [1, 1], "differ in length"),
        (["x"], [1], [1], "numbers"),
    ],
)
def test_bad_columns_are_refused(
    arrival: list[float], prompt: list[int], output: list[float], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        traces.checked("bad", arrival, prompt, output)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.parquet", b"not parquet"),
        ("t.csv", b"a,b\n1,2\n"),
        ("t.csv", b"timestamp,input_tokens,output_tokens\n1,x,3\n"),
        ("t.csv", b""),
        ("t.jsonl", b"{\n"),
        ("t.jsonl", b""),
        ("t.txt", b"1 2 3"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError):
        traces.load(tmp_path / name)
    with pytest.raises(ConfigError, match="no trace file"):
        traces.load(tmp_path / "missing.parquet")


def test_synthetic_is_seeded_and_has_the_rate_asked_for() -> None:
    first, second = traces.synthetic(1, rate=5.0), traces.synthetic(1, rate=5.0)
    assert (first.arrival_s == second.arrival_s).all()
    assert first.rate == pytest.approx(5.0, rel=0.05)
    assert np.median(first.output_len) == pytest.approx(2500, rel=0.05)
    bursty = traces.synthetic(1, rate=5.0, burstiness=3.0)
    gaps = np.diff(bursty.arrival_s)
    assert gaps.std() / gaps.mean() == pytest.approx(3.0, rel=0.15)


@settings(deadline=None)
@given(st.floats(0.05, 20.0), st.floats(1.0, 2000.0), st.integers(0, 50))
def test_windows_keep_order_rate_and_rows(scale: float, duration: float, seed: int) -> None:
    trace = traces.synthetic(2, rate=3.0, duration_s=300.0)
    window = trace.window(scale, duration, seed)
    assert (np.diff(window.arrival_s) >= 0).all()
    assert (window.arrival_s >= 0).all()
    assert (window.arrival_s <= duration).all()
    expected = trace.rate * scale * duration
    assert window.arrival_s.size == pytest.approx(expected, abs=6 * expected**0.5 + 3)
    pairs = set(zip(trace.input_len, trace.output_len, strict=True))
    assert set(zip(window.input_len, window.output_len, strict=True)) <= pairs


def test_scale_for_load_offers_that_load() -> None:
    trace = traces.synthetic(4, rate=3.0)
    decode = (find("24gb-7b"),) * 8
    scale = scale_for_load(trace, decode, 0.8, 600.0, 1)
    window = trace.window(scale, 600.0, 1)
    offered = window.arrival_s.size / 600.0 / saturation_rate(window, decode)
    assert offered == pytest.approx(0.8, rel=0.05)
