"""The predictor's tap in a captured graph: a replay leaves what an eager step would leave."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch

from sglang_star.predictor import head as heads

NAMES = {
    "sglang.srt.arg_groups.overrides": "resolution_result",
    "sglang.srt.managers.auxiliary_output": "append_auxiliary_output",
}


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The module of the taps; where SGLang is missing, with blanks for what it takes from there."""
    if importlib.util.find_spec("sglang") is None:
        for name, attribute in NAMES.items():
            blank = types.ModuleType(name)
            setattr(blank, attribute, None)
            monkeypatch.setitem(sys.modules, name, blank)
    return pytest.importorskip("sglang_star.predictor.runner", exc_type=ImportError)


@pytest.mark.parametrize("rows", [1, 64, 256])
def test_a_replay_leaves_the_rows_of_its_own_step(
    cuda: str, runner: types.ModuleType, rows: int
) -> None:
    head = heads.load(sorted(heads.HEADS.glob("*.safetensors"))[0])
    captured, eager = (runner.ProjectionTap(256, head, cuda) for _ in range(2))
    hidden = torch.randn(rows, len(head.weights.mean), device=cuda, dtype=torch.bfloat16)
    captured.observe(hidden)  # as SGLang warms up before it captures
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.observe(hidden)
    for _ in range(3):
        hidden.normal_()
        graph.replay()
        eager.observe(hidden)
        torch.testing.assert_close(captured.latest(rows), eager.latest(rows))
    kept = captured.latest(rows)
    before = kept.clone()
    hidden.normal_()
    graph.replay()
    assert torch.equal(kept, before)


def test_an_eager_step_larger_than_the_buffers_does_not_hide_later_replays(
    cuda: str, runner: types.ModuleType
) -> None:
    head = heads.load(sorted(heads.HEADS.glob("*.safetensors"))[0])
    tap = runner.ProjectionTap(8, head, cuda)
    width = len(head.weights.mean)
    hidden = torch.randn(4, width, device=cuda)
    tap.observe(hidden)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tap.observe(hidden)
    tap.observe(torch.randn(9, width, device=cuda))
    hidden.normal_()
    graph.replay()
    expected = runner.ProjectionTap(8, head, cuda)
    expected.observe(hidden)
    torch.testing.assert_close(tap.latest(4), expected.latest(4))
