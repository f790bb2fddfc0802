"""The device half: static buffers, their clones, and what SGLang's border does with them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sglang_star.predictor import runner
from sglang_star.predictor.runner import Attachment, DeviceRows, HiddenTap, ProjectionTap
from unit import predictor_cases as cases


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_the_projection_is_the_heads(count: int, dtype: torch.dtype) -> None:
    head = cases.head()
    tap = ProjectionTap(4, head, "cpu")
    hidden = torch.randn(count, cases.HIDDEN).to(dtype)
    tap.observe(hidden)
    wanted = (hidden.float().numpy() - head.weights.mean) @ head.weights.projection
    assert tap.latest(count).numpy() == pytest.approx(wanted, abs=1e-4)


def test_rows_handed_out_are_not_overwritten_by_the_next_step() -> None:
    tap = HiddenTap(4, 3, "cpu")
    tap.observe(torch.ones(2, 3))
    kept = tap.latest(2)
    tap.observe(torch.zeros(2, 3))
    assert torch.equal(kept, torch.ones(2, 3))


def test_the_buffers_hold_the_largest_batch_that_a_graph_captures() -> None:
    server_args = pytest.importorskip("sglang.srt.server_args")
    graphs = pytest.importorskip("sglang.srt.model_executor.cuda_graph_config").CudaGraphConfig()
    args = server_args.ServerArgs(model_path="none", cuda_graph_config=graphs)
    assert runner._rows(args) == runner.MIN_ROWS
    graphs.decode.max_bs = 512
    assert runner._rows(args) == 512
    graphs.decode.bs = [1, 600]
    assert runner._rows(args) == 600
    graphs.prefill.full_prefill_max_req = 650
    assert runner._rows(args) == 650
    args = server_args.ServerArgs(model_path="none", max_running_requests=700)
    assert runner._rows(args) == 700


def test_an_oversize_batch_does_not_outlive_its_step() -> None:
    tap = HiddenTap(2, 3, "cpu")
    tap.observe(torch.ones(5, 3))
    assert torch.equal(tap.latest(5), torch.ones(5, 3))
    tap.observe(torch.zeros(2, 3))
    assert torch.equal(tap.latest(2), torch.zeros(2, 3))


class Captured:
    """A decode graph: what is done in the capture is repeated by replays, and no Python is run.

    A CUDA graph keeps the addresses of the capture; here its operations on them are repeated.
    """

    def __init__(self, tap: HiddenTap, rows: int) -> None:
        self._states = torch.zeros(rows, tap._hidden.shape[1])
        tap.observe(self._states)
        self._hidden, self._update = tap._hidden[:rows], lambda: type(tap)._update(tap, rows)

    def replay(self, states: torch.Tensor) -> None:
        self._states[: len(states)] = states
        self._hidden.copy_(self._states)
        self._update()


@pytest.mark.parametrize("eager", [9, 5, 4, 3])
@pytest.mark.parametrize("kind", ["hidden", "projected"])
def test_replays_are_seen_after_an_eager_batch_of_any_size(kind: str, eager: int) -> None:
    head = cases.head()
    tap = HiddenTap(4, 12, "cpu") if kind == "hidden" else ProjectionTap(4, head, "cpu")
    graph = Captured(tap, 4)

    def wanted(hidden: torch.Tensor) -> torch.Tensor:
        return tap._of(hidden) if kind == "projected" else hidden

    for seed in range(3):
        torch.manual_seed(seed)
        large = torch.randn(eager, 12)
        tap.observe(large)
        assert torch.allclose(tap.latest(eager), wanted(large), atol=1e-5)
        # Nothing samples from some forwards, so that nobody takes their rows.
        tap.observe(torch.randn(eager, 12))
        for count in (3, 1, 4):
            states = torch.randn(count, 12)
            graph.replay(states)
            assert torch.allclose(tap.latest(count), wanted(states), atol=1e-5)


def test_steps_within_the_buffer_allocate_no_new_storage() -> None:
    tap = ProjectionTap(8, cases.head(), "cpu")
    before = tap._static().data_ptr()
    for count in (1, 8, 3):
        tap.observe(torch.randn(count, cases.HIDDEN))
        assert tap._static().data_ptr() == before


def test_a_failing_consumer_is_counted_and_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "failures", 0)

    def take(*_: object) -> None:
        raise ZeroDivisionError

    rows = DeviceRows(torch.zeros(1, 2), take).copy_to_host(lambda tensor: tensor)
    rows.consume(SimpleNamespace(reqs=[cases.request()]), [None])
    rows.consume(SimpleNamespace(reqs=[cases.request()]), [None])
    assert runner.failures == 2


def test_both_consumers_ride_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[str, np.ndarray, list[int | None]]] = []

    def take(name: str) -> runner.Take:
        return lambda rows, reqs, visible: taken.append((name, rows, list(visible)))

    taps = (HiddenTap(4, 3, "cpu"), HiddenTap(4, 3, "cpu"))
    attached = tuple(Attachment(tap, take(str(i))) for i, tap in enumerate(taps))
    monkeypatch.setattr(runner, "_attached", attached)
    last = torch.arange(12.0).view(4, 3)
    runner.get_pruned_states((last, None, None, torch.tensor([1, 3]), None, None))
    output = SimpleNamespace(next_token_logits=torch.zeros(2, 5), auxiliary_device_output=None)
    runner.sample(None, None, output, None)
    host = output.auxiliary_device_output.copy_to_host(lambda tensor: tensor)
    commit = SimpleNamespace(output_index=4, token_ids=(9,))
    host.consume(SimpleNamespace(reqs=[cases.request()] * 2), [commit, None])
    assert [name for name, _, _ in taken] == ["0", "1"]
    for _, rows, visible in taken:
        assert rows.tolist() == last[[1, 3]].tolist()
        assert visible == [5, None]
