"""The auxiliary-model baseline: a text encoder of its own that reads prompt and output so far.

It gets its best chance: it reads the served model's own tokens, all its layers train, tokens so far
and prompt length come in as numbers, how much of the text it reads and what loss it minimises are
tried, and what does best on validation requests goes on until these stop improving, at a rate that
falls three times. No test request takes part in any of this. The curve of validation error against
work is kept, so that whoever reads the figure sees how far from its end the training was.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final, cast

import numpy as np
import torch
from torch import nn

from sglang_star.predictor import dataset
from sglang_star.predictor.encoders import Encoder, Pretrained, Small, vocabulary
from sglang_star.predictor.hazard import Array
from sglang_star.predictor.samples import Samples
from sglang_star.predictor.windows import View, Window, batches, stacked, windows

VIEWS: Final = (View(128, 128), View(128, 256), View(48, 256))
LOSSES: Final = ("log", "tokens")
RATES: Final = {"pretrained": (1e-4, 3e-5, 1e-5), "small": (1e-3, 3e-4, 1e-4)}
"""Learning rates by encoder, each until validation stops improving."""
PATIENCE: Final = 3
"""Looks at validation without improvement that end a rate."""
BATCH_TOKENS: Final = 6_144
TRIAL_TOKENS: Final = 1_500_000
"""Tokens that a trial of a view or a loss reads."""
LOOK_TOKENS: Final = 1_000_000
"""Tokens between two looks at validation."""
JUDGED: Final = 150
"""Validation requests that a look reads; always the same, whatever the view."""
WARM_UP: Final = 50
"""Batches over which the rate rises."""

Make = Callable[[View], Encoder]


@dataclass(frozen=True, slots=True)
class Look:
    """A point of the learning curve: MAE on validation, tokens, after so much work."""

    tokens: int
    cpu_s: float
    rate: float
    mae: float


class Auxiliary:
    """A trained encoder.

    Args:
        fit: requests to train on; their validation part chooses view, loss, moment and rate.
        seed: of everything random.
        served: path of the served model.
        kind: ``pretrained`` or ``small``, see :mod:`encoders`.
        minutes: processor time after which training stops at its best so far; how far that is from
            the end :attr:`notes` tells.

    Attributes:
        parameters: of encoder and regression together.
        notes: ``curve`` of the training, what was ``tried`` with its error, and whether it
            ``converged`` or ran out of time.

    Raises:
        ConfigError: the served model has no tokenizer. SetupError: the encoder is not installed.
    """

    def __init__(
        self,
        fit: Samples,
        seed: int,
        served: str,
        kind: str = "pretrained",
        minutes: float = math.inf,
    ) -> None:
        self._deadline = time.process_time() + minutes * 60
        fit = dataset.known(fit)
        tokens, decode = vocabulary(served)
        self._marks = (tokens, tokens + 1)
        counts = _counts(fit)
        self._center, self._scale = counts.mean(axis=0), counts.std(axis=0) + 1e-6

        def make(view: View) -> Encoder:
            torch.manual_seed(seed)
            if kind == "small":
                return Small(tokens + 2, view.longest)
            return cast("Encoder", Pretrained(tokens + 2, decode))

        def run(view: View, loss: str) -> _Run:
            return _Run(self, make, fit, view, loss, seed)

        tried: dict[str, float] = {}

        def best(ways: list[_Run]) -> _Run:
            for way in ways:
                if len(way.curve) == 1:
                    way.train(RATES[kind][0], tokens=TRIAL_TOKENS, deadline=self._deadline)
                tried[f"{way.view}, {way.loss}"] = way.best
            return min(ways, key=lambda way: way.best)

        first = best([run(view, LOSSES[0]) for view in VIEWS])
        chosen = best([first, *(run(first.view, loss) for loss in LOSSES[1:])])
        converged = all(chosen.train(rate, deadline=self._deadline) for rate in RATES[kind])
        self._view, self._net = chosen.view, chosen.net
        self.parameters = sum(p.numel() for p in self._net.parameters())
        self.notes = {
            "tried": tried,
            "curve": [asdict(look) for look in chosen.curve],
            "converged": converged,
        }

    def predict(self, samples: Samples) -> Array:
        """Remaining tokens, one pass of the encoder per stretch."""
        x = self.features(samples)
        result = np.zeros(len(samples.tokens))
        self._net.eval()
        for batch in batches(windows(samples, self._view, self._marks), BATCH_TOKENS):
            with torch.no_grad():
                out, rows = self._net(batch, x)
            result[rows] = out.expm1().cpu().numpy()
        return result

    def features(self, samples: Samples) -> torch.Tensor:
        """What the serving engine knows for free, standardised."""
        return torch.tensor((_counts(samples) - self._center) / self._scale, dtype=torch.float32)

    @property
    def marks(self) -> tuple[int, int]:
        """Ids before and behind a prompt."""
        return self._marks


def _counts(samples: Samples) -> Array:
    counts = [
        samples.tokens,
        samples.prompt_tokens[samples.request],
        samples.max_new_tokens[samples.request],
    ]
    return np.log1p(np.stack(counts, axis=1))


class _Net(nn.Module):
    """Encoder, its state at a sample, two layers to ``log(1 + R)``."""

    def __init__(self, encoder: Encoder, features: int, start: float) -> None:
        super().__init__()
        self.encoder = cast("nn.Module", encoder)
        self.top = nn.Sequential(nn.Linear(encoder.width + features, 256), nn.ReLU())
        self.out = nn.Linear(256, 1)
        nn.init.constant_(self.out.bias, start)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.to(self.device)

    def forward(self, batch: list[Window], x: torch.Tensor) -> tuple[torch.Tensor, Array]:
        """Estimates of all samples in the batch, and which samples those are."""
        ids, rows, places, samples = stacked(batch)
        states = self.encoder(ids.to(self.device))[rows, places]
        x = torch.cat([states, x[torch.from_numpy(samples)].to(self.device)], dim=1)
        return self.out(self.top(x))[:, 0].clamp(-1.0, 12.0), samples


class _Run:
    """One training; ``best`` is its lowest validation MAE, tokens, and ``net`` what had it."""

    def __init__(
        self, model: Auxiliary, make: Make, fit: Samples, view: View, loss: str, seed: int
    ) -> None:
        self.view, self.loss = view, loss
        self._x = model.features(fit)
        self._actual = torch.tensor(fit.remaining, dtype=torch.float32)
        self._unit = float(self._actual.mean())
        self._random = np.random.default_rng(seed)
        chooses = dataset.validation(fit)[fit.request]
        found = windows(fit, view, model.marks)
        self._mine = [one for one in found if not chooses[one.samples[0]]]
        judges = np.random.default_rng(seed).permutation(np.unique(fit.request[chooses]))[:JUDGED]
        self._left = [one for one in found if fit.request[one.samples[0]] in judges]
        encoder = make(view)
        self.net = _Net(encoder, self._x.shape[1], float(self._actual.log1p().median()))
        self.best, self.curve = math.inf, [Look(0, 0.0, 0.0, self._error())]
        self._kept: dict[str, Any] = self._weights()
        self._source = self._endless()

    def train(self, rate: float, deadline: float, tokens: float = math.inf) -> bool:
        """Train at one rate until validation stops improving; False if time was up before.

        Args:
            rate: of the encoder; deadline: processor time; tokens: read at most.
        """
        groups = [
            {"params": self.net.encoder.parameters(), "lr": rate},
            {"params": [*self.net.top.parameters(), *self.net.out.parameters()], "lr": rate * 3},
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        rising = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda done: min(1.0, (done + 1) / WARM_UP)
        )
        since = read = 0
        self.net.load_state_dict(self._kept)
        while since < PATIENCE and read < tokens:
            began, done = time.process_time(), 0
            self.net.train()
            while done < min(LOOK_TOKENS, tokens):
                if time.process_time() > deadline:
                    break
                batch = next(self._source)
                optimizer.zero_grad()
                self._loss(batch).backward()
                nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
                optimizer.step()
                rising.step()
                done += sum(len(one.ids) for one in batch)
            read += done
            before = self.curve[-1]
            took = before.cpu_s + time.process_time() - began
            look = Look(before.tokens + done, took, rate, self._error())
            self.curve.append(look)
            print(f"{self.view}, {self.loss}: {look}", file=sys.stderr, flush=True)
            since += 1
            if look.mae < self.best:
                self.best, since, self._kept = look.mae, 0, self._weights()
            if time.process_time() > deadline:
                break
        self.net.load_state_dict(self._kept)
        return time.process_time() <= deadline

    def _weights(self) -> dict[str, Any]:
        return {name: value.clone() for name, value in self.net.state_dict().items()}

    def _endless(self) -> Iterator[list[Window]]:
        while True:
            yield from batches(self._mine, BATCH_TOKENS, self._random)

    def _loss(self, batch: list[Window]) -> torch.Tensor:
        out, rows = self.net(batch, self._x)
        actual = self._actual[torch.from_numpy(rows)].to(out.device)
        if self.loss == "log":
            return (out - actual.log1p()).abs().mean()
        # Divided by the mean length, so that both losses are of the order of one.
        return (out.expm1() - actual).abs().mean() / self._unit

    def _error(self) -> float:
        self.net.eval()
        errors = []
        with torch.no_grad():
            for batch in batches(self._left, BATCH_TOKENS):
                out, rows = self.net(batch, self._x)
                errors.append((out.expm1().cpu() - self._actual[torch.from_numpy(rows)]).abs())
        return float(torch.cat(errors).mean())
