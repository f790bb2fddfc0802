"""Made-up collections whose truth is known, for the predictor's tests."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from sglang_star.predictor.fingerprint import ModelFingerprint
from sglang_star.predictor.hazard import bin_edges
from sglang_star.predictor.head import BLOCKS, FEATURES, Head, HeadCard, Weights
from sglang_star.predictor.prompts import prompt_key
from sglang_star.predictor.samples import RequestRecord
from sglang_star.protocol import QUANTILE_LEVELS

HIDDEN = 12
INTERVAL = 20

MODEL = ModelFingerprint(
    architecture="Made", hidden_size=HIDDEN, layers=2, vocab_size=100, norms="0" * 16
)


def records(count: int, seed: int = 0, limit: int = 400, wordings: int = 1) -> list[RequestRecord]:
    """Requests whose length is log-normal around ``40 * 2**z``, with ``z`` in the hidden state.

    So many one after another are wordings of one instance.
    """
    generator = np.random.default_rng(seed)
    mix = generator.standard_normal((3, HIDDEN))
    result = []
    for number in range(count):
        kind = generator.standard_normal()
        wanted = int(np.ceil(60 * np.exp(kind + 0.3 * generator.standard_normal())))
        length = min(wanted, limit)
        tokens = np.arange(1, length, INTERVAL) if length > 1 else np.array([], int)
        if not len(tokens):
            continue
        progress = tokens / 100.0
        noise = 0.3 * generator.standard_normal(len(tokens))
        hidden = (np.stack([np.full(len(tokens), kind), progress, noise], 1) @ mix).astype("f4")
        result.append(
            RequestRecord(
                rid=_instance(number // wordings, wordings) + f"{prompt_key(f'{seed} {number}')}#0",
                prompt_ids=generator.integers(0, 100, 10),
                output_ids=generator.integers(0, 100, length),
                max_new_tokens=limit,
                censored=wanted > limit,
                tokens=tokens,
                hidden=hidden.astype(np.float16),
                pooled=hidden.astype(np.float16),
            )
        )
    return result


def _instance(number: int, wordings: int) -> str:
    return f"{prompt_key(f'instance {number}')}-" if wordings > 1 else ""


def head(width: int = 4, fingerprint: ModelFingerprint = MODEL, seed: int = 0) -> Head:
    """A valid head with random weights."""
    generator = np.random.default_rng(seed)
    members, inner, edges = 2, 8, bin_edges(1024)
    bins, q = len(edges) - 1, len(QUANTILE_LEVELS)

    def draw(*shape: int) -> Any:
        return (0.3 * generator.standard_normal(shape)).astype(np.float32)

    weights = Weights(
        mean=draw(fingerprint.hidden_size),
        projection=draw(fingerprint.hidden_size, width),
        w1=draw(members, BLOCKS * width + FEATURES, inner),
        b1=draw(members, 1, inner),
        w2=draw(members, inner, bins),
        b2=draw(members, 1, bins) - 2.0,
        edges=edges,
        levels=np.array(QUANTILE_LEVELS),
        age_edges=np.array([0.0, 50.0]),
        age_quantiles=np.array([[1.0, 2, 3, 4, 5], [6.0, 7, 8, 9, 10]])[:, :q],
    )
    card = HeadCard(model="made", fingerprint=fingerprint, provenance={}, metrics={})
    return Head(card, weights)


def request(prompt: int = 10, output: int = 0, limit: int = 100, rid: str = "r") -> Any:
    """What the predictor reads of an SGLang request."""
    return SimpleNamespace(
        rid=rid,
        origin_input_ids=[0] * prompt,
        output_ids=[0] * output,
        sampling_params=SimpleNamespace(max_new_tokens=limit),
        finished_len=None,
        finished_reason=None,
        finished=lambda: False,
    )


def shard_count(folder: Path) -> int:
    return len(list(folder.glob("shard-*.safetensors")))
