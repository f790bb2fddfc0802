"""The checksum of a model's weights: equal for equal ones, and another for every change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.layers.radix_attention import RadixAttention

from sglang_star.engine import weights
from sglang_star.engine.weights import CHUNK, Weights, checksum


class Model(torch.nn.Module):
    def __init__(self, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = torch.nn.Linear(33, 7, dtype=dtype)
        self.second = torch.nn.Linear(7, 3, bias=False, dtype=dtype)
        self.square = torch.nn.Linear(5, 5, dtype=dtype)
        self.attention = RadixAttention(2, 8, 1.0, 2, layer_id=0)
        self.register_buffer("scratch", torch.empty(100))


def test_equal_weights_have_equal_checksums_wherever_they_are() -> None:
    one, other = Model(), Model()
    with torch.no_grad():
        other.scratch.fill_(3.0)  # no weight
    for model in (one, other):
        # As quantisation leaves weights: transposed, and not by themselves in their memory.
        wide = torch.cat([model.second.weight.data, torch.randn(3, 7)]).t().contiguous()
        model.second.weight = torch.nn.Parameter(wide[:, :3])
    assert checksum(one) == checksum(other)


def flip(tensor: torch.Tensor, byte: int) -> None:
    """The smallest change there is."""
    tensor.view(torch.uint8).view(-1)[byte] ^= 1


CHANGES: dict[str, Any] = {
    "one bit": lambda model: flip(model.first.weight.data, 0),
    "the last bit, of an odd number of bytes": lambda model: flip(model.second.weight.data, 41),
    "a bias": lambda model: flip(model.first.bias.data, 13),
    "two rows exchanged": lambda model: model.first.weight.data.copy_(
        model.first.weight.data[[1, 0, 2, 3, 4, 5, 6]]
    ),
    "an order in memory": lambda model: setattr(
        model.square, "weight", torch.nn.Parameter(model.square.weight.data.t())
    ),
    "a shape": lambda model: setattr(
        model.first, "weight", torch.nn.Parameter(model.first.weight.data.view(7, 3, 11))
    ),
    "a type": lambda model: setattr(
        model.first, "weight", torch.nn.Parameter(model.first.weight.data.view(torch.float16))
    ),
    "a scale of keys": lambda model: setattr(model.attention, "k_scale_float", 0.5),
    "a scale of values": lambda model: setattr(model.attention, "v_scale_float", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_shows(change: str) -> None:
    model = Model()
    before = checksum(model)
    with torch.no_grad():
        CHANGES[change](model)
    assert checksum(model) != before


def test_other_weights_of_the_same_shape_show() -> None:
    assert checksum(Model()) != checksum(Model(seed=1))
    assert checksum(Model()) != checksum(Model(torch.float16))


@pytest.mark.parametrize("at", [0, CHUNK - 1, CHUNK, 2 * CHUNK - 1, 2 * CHUNK + 5])
def test_a_change_shows_in_every_chunk(at: int) -> None:
    model = torch.nn.Module()
    model.register_parameter("large", torch.nn.Parameter(torch.zeros(2 * CHUNK + 6)))
    before = checksum(model)
    with torch.no_grad():
        model.large[at] = 1e-45
    assert checksum(model) != before


def test_quantised_weights_count() -> None:
    model = torch.nn.Module()
    packed = torch.arange(64, dtype=torch.uint8).view(4, 16)
    for number, dtype in enumerate((torch.uint8, torch.float8_e4m3fn, torch.int32, torch.bool)):
        data = (packed % 2).bool() if dtype == torch.bool else packed.clone().view(dtype)
        model.register_parameter(str(number), torch.nn.Parameter(data, requires_grad=False))
    seen = {checksum(model)}
    for parameter in model.parameters():
        with torch.no_grad():
            flip(parameter.data, 5)
        seen.add(checksum(model))
    assert len(seen) == 5


def test_ranks_of_one_engine_have_one_checksum() -> None:
    """Whichever of them differs; and an engine of one rank has that of its model."""
    parts = [Model(seed=1), Model(seed=2), Model(seed=3)]

    def together() -> set[str]:
        own = [checksum(part) for part in parts]
        return {Weights(part, lambda _: own).checksum() for part in parts}

    [before] = together()
    with torch.no_grad():
        flip(parts[2].first.weight.data, 7)
    [after] = together()
    assert before != after
    assert Weights(parts[0]).checksum() == checksum(parts[0])


def test_it_is_computed_once_and_again_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    monkeypatch.setattr(weights, "checksum", lambda model: computed.append(1) or str(len(computed)))
    loaded = Weights(Model())
    assert [loaded.checksum(), loaded.checksum()] == ["1", "1"]
    loaded.changed()
    loaded.changed()
    assert [loaded.checksum(), loaded.checksum()] == ["2", "2"]
