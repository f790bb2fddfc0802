"""Hidden states of other layers for a collection that has the last one's.

The engine's recorder sees what the logits are made of. Which layer tells most of the remaining
length is asked here without serving anything again: the outputs are known, so the model reads
prompt and output once more, and its states are taken at the same places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sglang_star.errors import ConfigError
from sglang_star.predictor import dataset
from sglang_star.predictor.hazard import Array
from sglang_star.predictor.samples import Samples


def count(model: Path) -> int:
    """Layers of a checkpoint; :func:`reread` takes 0, the embedding, up to this, the last one.

    Raises:
        ConfigError: it is none that can be read.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the states of other layers need the model, and {model} cannot be read: {error}",
            hint="name its folder with --model, or leave it out to skip the layers",
        ) from error
    return int(config.num_hidden_layers)


def reread(samples: Samples, model: Path, layers: Sequence[int]) -> dict[int, Samples]:
    """The same samples with the states of other layers, after the final norm for the last one.

    Args:
        samples: a collection of this model.
        model: its folder.
        layers: which; ``hidden`` and ``pooled`` are of float16 as the recorder writes them.

    Raises:
        ConfigError: the model cannot be read, or is not the one of the collection.
    """
    from transformers import AutoModel

    count(model)
    network: Any = AutoModel.from_pretrained(model, local_files_only=True, dtype=torch.float32)
    if network.config.hidden_size != samples.hidden.shape[1]:
        raise ConfigError(
            f"{model} has states of {network.config.hidden_size} numbers, the collection "
            f"{samples.hidden.shape[1]}",
            hint="name the model that was collected from",
        )
    hidden: dict[int, list[Array]] = {layer: [] for layer in layers}
    pooled: dict[int, list[Array]] = {layer: [] for layer in layers}
    for request, tokens in enumerate(dataset.tokens_of(samples)):
        prompt, output = samples.prompt_ids[request], samples.output_ids[request]
        ids = torch.tensor(np.concatenate([prompt, output])[None].astype(np.int64))
        with torch.inference_mode():
            states = network(input_ids=ids, output_hidden_states=True).hidden_states
        # Output token n comes from the state at position prompt + n - 2.
        first = len(prompt) - 1
        for layer in layers:
            seen = states[layer][0, first : first + int(tokens[-1])].numpy()
            hidden[layer].append(seen[tokens - 1].astype(np.float16))
            bounds = np.concatenate([[0], tokens[:-1]])
            sums = np.add.reduceat(seen, bounds)
            pooled[layer].append((sums / np.diff(tokens, prepend=0)[:, None]).astype(np.float16))
    return {
        layer: dataclasses.replace(
            samples, hidden=np.concatenate(hidden[layer]), pooled=np.concatenate(pooled[layer])
        )
        for layer in layers
    }
