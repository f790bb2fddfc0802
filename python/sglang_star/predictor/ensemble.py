"""A few small networks trained as one batched product, each on requests of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from sglang_star.predictor.hazard import Array
from sglang_star.predictor.recipe import Recipe


@dataclass(slots=True)
class Curves:
    """Loss per epoch, nats per sample: mean over members, on what they train on and left out."""

    train: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)


def nll(logits: torch.Tensor, exposure: torch.Tensor, event: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of possibly censored remaining lengths.

    Args:
        logits: ``[..., n, bins]`` hazard logits.
        exposure: ``[n, bins]`` fraction of each bin outlived.
        event: ``[n, bins]`` one-hot bin the output ended in; all zero where censored.

    Returns:
        ``[..., n]`` nats, up to a constant.
    """
    rate = functional.softplus(logits)  # integral of the hazard over the bin
    return (exposure * rate - event * torch.log(rate + 1e-12)).sum(dim=-1)


class Ensemble(torch.nn.Module):
    """``members`` two-layer networks evaluated as one batched product."""

    def __init__(self, members: int, inputs: int, prior: Array, recipe: Recipe) -> None:
        super().__init__()
        inner, bins = recipe.inner, len(prior)
        self.w1 = torch.nn.Parameter(torch.randn(members, inputs, inner) * (2 / inputs) ** 0.5)
        self.b1 = torch.nn.Parameter(torch.zeros(members, 1, inner))
        self.w2 = torch.nn.Parameter(torch.randn(members, inner, bins) * 0.01)
        self.b2 = torch.nn.Parameter(torch.tensor(prior, dtype=torch.float32).repeat(members, 1, 1))
        self._recipe = recipe

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, inputs]`` to ``[members, n, bins]``."""
        x = x.expand(self.w1.shape[0], -1, -1)
        x = functional.dropout(x, self._recipe.input_dropout, self.training)
        inner = torch.relu(torch.baddbmm(self.b1, x, self.w1))
        inner = functional.dropout(inner, self._recipe.dropout, self.training)
        return torch.baddbmm(self.b2, inner, self.w2)


Loss = Callable[..., torch.Tensor]
"""(output ``[members, n, outputs]``, targets ``[n, ...]`` or one set per member) to a loss each."""


def train(
    x: Array,
    trains: Array,
    prior: Array,
    loss: Loss,
    targets: tuple[Array, ...],
    recipe: Recipe,
    quiet: bool = False,
) -> tuple[Ensemble, Curves]:
    """Train an ensemble, each member on its samples, and leave each at its best epoch.

    A GPU is used if torch sees one; the model returned is on the CPU.

    Args:
        x: ``[n, inputs]`` float32; trains: ``[members, n]`` who trains on what; the rest judges it.
        prior: ``[outputs]`` what a member starts from.
        loss: given the output and ``targets``, each ``[n, ...]``.
        recipe: hyperparameters and seed.
        quiet: no progress on stderr.
    """
    torch.manual_seed(recipe.seed)
    members, count = trains.shape
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = tuple(torch.tensor(a, device=device) for a in (x, *targets))
    used = torch.tensor(trains, dtype=torch.float32, device=device)
    held = [torch.tensor(np.flatnonzero(~mine), device=device) for mine in trains]
    model = Ensemble(members, x.shape[1], prior, recipe).to(device)
    optimizer = torch.optim.AdamW(
        [
            {"params": [model.w1, model.w2], "weight_decay": recipe.weight_decay},
            {"params": [model.b1, model.b2], "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
    )
    # Falling to nothing by the last epoch: dropout keeps a constant rate from ever settling.
    epochs = recipe.epochs_of(count)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    best = torch.full((members,), float("inf"), device=device)
    since = torch.zeros(members, device=device)
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    curves = Curves()
    for epoch in range(epochs):
        model.train()
        seen = 0.0
        for rows in torch.randperm(count).to(device).split(recipe.batch):
            found = _masked(model, loss, data, rows, used[:, rows]).sum()
            optimizer.zero_grad()
            found.backward()
            optimizer.step()
            seen += float(found.detach()) * len(rows) / count / members
        schedule.step()
        model.eval()
        with torch.no_grad():
            left = _left_out_loss(model, loss, data, held)
        better = left < best
        best = torch.where(better, left, best)
        since = torch.where(better, 0.0, since + 1)
        for name, parameter in model.named_parameters():
            kept[name][better] = parameter.detach()[better]
        curves.train.append(seen)
        curves.held_out.append(float(left.mean()))
        if not quiet:
            print(
                f"\repoch {epoch + 1}: left-out loss {float(best.mean()):.4f}",
                end="",
                file=sys.stderr,
                flush=True,
            )
        if bool((since >= recipe.patience).all()):
            break
    if not quiet:
        print(file=sys.stderr)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(kept[name])
    return model.eval().cpu(), curves


def _left_out_loss(
    model: Ensemble, loss: Loss, data: tuple[Any, ...], held: list[torch.Tensor], rows: int = 2048
) -> torch.Tensor:
    """Mean loss of each member over the rows it left out, ``[members]``, in slices.

    The rows differ between members; each sees only its own, short ones padded with row 0.
    """
    padded = torch.nn.utils.rnn.pad_sequence(held, batch_first=True)
    counts = torch.tensor([len(part) for part in held], device=padded.device)
    real = torch.arange(padded.shape[1], device=padded.device) < counts[:, None]
    total = torch.zeros(len(held), device=padded.device)
    for part, mask in zip(padded.split(rows, dim=1), real.split(rows, dim=1), strict=True):
        x, *targets = (tensor[part] for tensor in data)
        total += (loss(model(x), *targets) * mask).sum(dim=1)
    return total / counts


def _masked(
    model: Ensemble,
    loss: Loss,
    data: tuple[Any, ...],
    rows: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Mean loss of each member over the rows of its mask, ``[members]``."""
    x, *targets = (part[rows] for part in data)
    losses = loss(model(x), *targets)
    return (losses * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)
