"""States of other layers, read again for a collection."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sglang_star.errors import ConfigError
from sglang_star.predictor.samples import RequestRecord, Samples, load_samples, write_shard
from sglang_star_bench.reasoning.model import WEIGHTS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
layers = pytest.importorskip("sglang_star_bench.layers")

LAST = 4


def collection(folder: Path, hidden_size: int = 192) -> Samples:
    generator = np.random.default_rng(0)
    tokens = np.array([1, 4, 7], np.int32)
    states = np.zeros((3, hidden_size), np.float16)
    records = [
        RequestRecord(
            rid=f"{number:016x}#0",
            prompt_ids=generator.integers(3, 200, 5 + number).astype(np.int32),
            output_ids=generator.integers(3, 200, 9).astype(np.int32),
            max_new_tokens=64,
            censored=False,
            tokens=tokens,
            hidden=states,
            pooled=states,
        )
        for number in range(2)
    ]
    write_shard(folder / "shard-000000.safetensors", records)
    return load_samples(folder)


def test_states_are_those_each_token_was_sampled_from(tmp_path: Path) -> None:
    samples = collection(tmp_path)
    network = transformers.AutoModel.from_pretrained(WEIGHTS, dtype=torch.float32)
    found = layers.reread(samples, WEIGHTS, [0, 2, LAST])
    assert layers.count(WEIGHTS) == LAST
    for layer, again in found.items():
        for row, (request, tokens) in enumerate(zip(samples.request, samples.tokens, strict=True)):
            prompt, output = samples.prompt_ids[request], samples.output_ids[request]
            since = int(samples.tokens[row - 1]) if tokens > 1 else 0
            states = []
            for n in range(since + 1, int(tokens) + 1):
                # What the engine had read when it sampled output token n.
                ids = torch.tensor(np.concatenate([prompt, output[: n - 1]])[None].astype(int))
                with torch.inference_mode():
                    out = network(input_ids=ids, output_hidden_states=True)
                states.append(out.hidden_states[layer][0, -1].numpy())
            assert again.hidden[row] == pytest.approx(states[-1], abs=0.02)
            assert again.pooled[row] == pytest.approx(np.mean(states, axis=0), abs=0.02)


def test_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="192 numbers, the collection 12"):
        layers.reread(collection(tmp_path, 12), WEIGHTS, [1])
    with pytest.raises(ConfigError, match="cannot be read"):
        layers.count(tmp_path)
