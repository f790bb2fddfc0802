"""A collection as stretches of text that an encoder reads, and the samples that each one judges."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from sglang_star.predictor import dataset
from sglang_star.predictor.hazard import Array
from sglang_star.predictor.samples import Samples


@dataclass(frozen=True, slots=True)
class View:
    """What is read: the head of the prompt, and of the output so far the latest tokens.

    Attributes:
        prompt: tokens of the prompt at most; output: of the output, at least half as many wherever
            there are so many.
    """

    prompt: int
    output: int

    @property
    def longest(self) -> int:
        """Tokens of a stretch, with a mark before the prompt and one behind it."""
        return self.prompt + self.output + 2


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch.

    Attributes:
        ids: token ids; samples: rows of the collection; places: where in ``ids`` each of them is.
    """

    ids: Array
    samples: Array
    places: Array


def windows(samples: Samples, view: View, marks: tuple[int, int]) -> list[Window]:
    """All stretches of a collection; every sample is in exactly one, in its second half.

    Args:
        samples: the collection; view: what is read; marks: ids before and behind the prompt.
    """
    stride = view.output // 2
    starts = dataset.starts(samples)
    found = []
    for request, tokens in enumerate(dataset.tokens_of(samples)):
        prompt = samples.prompt_ids[request][: view.prompt]
        before = np.concatenate([marks[:1], prompt, marks[1:]]).astype(np.int64)
        # The first stretch judges all its samples, a later one those that the one before ends at.
        number = np.maximum((tokens - 1) // stride - 1, 0)
        for one in np.unique(number):
            mine = np.flatnonzero(number == one)
            begin, end = int(one) * stride, int(tokens[mine[-1]])
            ids = np.concatenate([before, samples.output_ids[request][begin:end]])
            places = len(before) + tokens[mine] - 1 - begin
            found.append(Window(ids, starts[request] + mine, places))
    return found


def batches(
    chosen: list[Window], tokens: int, random: np.random.Generator | None = None
) -> Iterator[list[Window]]:
    """Batches of about so many tokens, of stretches of like length so that little is padding.

    Args:
        chosen: the stretches; tokens: of a batch; random: shuffles them, otherwise by length.
    """
    order = np.argsort([len(one.ids) for one in chosen], kind="stable")
    each = max(1, tokens // max(len(one.ids) for one in chosen))
    parts = np.array_split(order, math.ceil(len(order) / each))
    if random is not None:
        # Neighbours in length share a batch; which ones do is drawn anew every time.
        jitter = random.normal(0.0, 0.1, len(chosen)) + np.log([len(one.ids) for one in chosen])
        parts = np.array_split(np.argsort(jitter), len(parts))
        random.shuffle(parts)
    for part in parts:
        yield [chosen[i] for i in part]


def stacked(batch: list[Window]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Array]:
    """Padded ids ``[n, t]``; of every sample in them the row and place, and the sample."""
    ids = padded([torch.from_numpy(one.ids) for one in batch])
    rows = np.repeat(np.arange(len(batch)), [len(one.samples) for one in batch])
    places = np.concatenate([one.places for one in batch])
    samples = np.concatenate([one.samples for one in batch])
    return ids, torch.from_numpy(rows), torch.from_numpy(places), samples


def padded(texts: list[torch.Tensor]) -> torch.Tensor:
    """Pad on the right, where a causal encoder sees nothing of it."""
    return torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
