"""Train the reasoning model from scratch on one core: ``... reasoning train``.

Sequences of like length share a batch, each from position 0 as in serving, so that nothing is
spent on padding or on attention across sequences. The run is saved between pools of data and
continues from there.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sglang_star.errors import ConfigError
from sglang_star_bench.reasoning import model as reasoning_model
from sglang_star_bench.reasoning.recipe import MIXES, Recipe
from sglang_star_bench.reasoning.tasks import problems

if TYPE_CHECKING:
    from tokenizers import Tokenizer

POOL_TOKENS: Final = 2**18
TOKENIZER_PROMPTS: Final = 5000
REPORT_EVERY_S: Final = 10.0
LOG: Final = "training.jsonl"
PROVENANCE: Final = "provenance.json"
CHECKPOINT: Final = "checkpoint.pt"
IGNORED: Final = -100


@dataclass(slots=True)
class Sequence:
    """Token ids, of which the first ``prompt`` are given and not learnt."""

    ids: list[int]
    prompt: int


def pool(tokenizer: Tokenizer, seed: int, tokens: int, longest: int, mix: str) -> list[Sequence]:
    """About ``tokens`` tokens of problems that are not held back, none over ``longest``."""
    result: list[Sequence] = []
    size = 0
    for problem in problems(seed, weights=MIXES[mix]):
        if size >= tokens:
            break
        if problem.held_back or len(problem.trace) > longest:
            continue
        prompt = reasoning_model.encode(tokenizer, problem.prompt)
        ids = reasoning_model.encode(tokenizer, problem.prompt, problem.trace)
        if len(ids) <= longest:
            result.append(Sequence(ids, len(prompt)))
            size += len(ids)
    return result


def batches(sequences: list[Sequence], tokens: int, rng: random.Random) -> Iterator[Any]:
    """Padded ``(ids, labels)`` of about ``tokens`` tokens each, like lengths together, shuffled."""
    import torch

    rng.shuffle(sequences)
    sequences.sort(key=lambda sequence: len(sequence.ids))
    groups: list[list[Sequence]] = [[]]
    for sequence in sequences:
        if groups[-1] and (len(groups[-1]) + 1) * len(sequence.ids) > tokens:
            groups.append([])
        groups[-1].append(sequence)
    rng.shuffle(groups)
    for group in groups:
        ids = torch.zeros(len(group), len(group[-1].ids), dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        for row, sequence in enumerate(group):
            own = torch.tensor(sequence.ids)
            ids[row, : len(own)] = own
            labels[row, sequence.prompt : len(own)] = own[sequence.prompt :]
        yield ids, labels


def loss_of(model: Any, ids: Any, labels: Any) -> Any:
    """Summed cross entropy of the learnt tokens, in nats."""
    import torch

    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


class Trainer:
    """One run: model, optimiser, counters and log, in ``folder``."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        import torch

        self.recipe, self.folder = recipe, folder
        folder.mkdir(parents=True, exist_ok=True)
        plain = problems(recipe.seed, weights=MIXES["plain"])
        self.tokenizer = reasoning_model.train_tokenizer(
            problem.prompt for problem in itertools.islice(plain, TOKENIZER_PROMPTS)
        )
        self.model = reasoning_model.new_model(recipe.width, recipe.layers, recipe.seed)
        hidden = [p for p in self.model.model.layers.parameters() if p.ndim == 2]
        others = [p for p in self.model.parameters() if all(p is not one for one in hidden)]
        # Muon needs fewer tokens than AdamW for the matrices; AdamW has the embedding and norms.
        self.optimizers = (
            torch.optim.Muon(
                hidden, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self.tokens = self.steps = self.pools = 0
        self.seconds = 0.0
        self._resume()

    def run(self) -> None:
        """Train to the end of the recipe, then export."""
        while self.tokens < self.recipe.tokens:
            self._pool()
            self._save()
        reasoning_model.export(self.model, self.tokenizer, self.folder)
        provenance = {
            "command": "star bench reasoning train",
            "recipe": asdict(self.recipe),
            "parameters": self.model.num_parameters(),
            **self._counters(),
        }
        (self.folder / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")

    @property
    def done(self) -> float:
        """Share of the recipe's tokens that is behind."""
        return self.tokens / self.recipe.tokens

    def _pool(self) -> None:
        stage = self.recipe.stage(self.done)
        seed = self.recipe.seed + 1 + self.pools
        sequences = pool(self.tokenizer, seed, POOL_TOKENS, stage.longest, stage.mix)
        losses, learnt, reported = 0.0, 0, time.monotonic()
        last = time.monotonic()
        for ids, labels in batches(sequences, self.recipe.batch_tokens, random.Random(seed)):
            losses += self._step(ids, labels)
            learnt += int((labels != IGNORED).sum())
            now = time.monotonic()
            self.seconds, last = self.seconds + now - last, now
            if now - reported >= REPORT_EVERY_S:
                self._report(losses / learnt, stage.longest)
                losses, learnt, reported = 0.0, 0, now
        self.pools += 1

    def _step(self, ids: Any, labels: Any) -> float:
        """Learn from one batch; returns its summed loss, nats."""
        import torch

        rate = self.recipe.rate_at(self.done)
        for optimizer in self.optimizers:
            for part in optimizer.param_groups:
                part["lr"] = rate
        loss = loss_of(self.model, ids, labels)
        (loss / (labels != IGNORED).sum()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.tokens += ids.numel()
        self.steps += 1
        total = float(loss.detach())
        if not math.isfinite(total):
            raise ConfigError("the loss is no number any more", hint="lower the learning rate")
        return total

    def _report(self, loss: float, longest: int) -> None:
        row = {**self._counters(), "loss": round(loss, 5), "longest": longest}
        with (self.folder / LOG).open("a") as log:
            log.write(json.dumps(row) + "\n")
        left = (self.recipe.tokens - self.tokens) * self.seconds / self.tokens / 60
        print(
            f"{self.tokens / 1e6:.2f}/{self.recipe.tokens / 1e6:.1f} M tokens, loss {loss:.4f}, "
            f"{self.tokens / self.seconds:.0f} tok/s, {left:.0f} min left",
            flush=True,
        )

    def _counters(self) -> dict[str, Any]:
        names = ("tokens", "steps", "pools")
        return {name: getattr(self, name) for name in names} | {"seconds": round(self.seconds, 1)}

    def _save(self) -> None:
        import torch

        state = {
            "recipe": asdict(self.recipe),
            "counters": self._counters(),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        path = self.folder / CHECKPOINT
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def _resume(self) -> None:
        import torch

        path = self.folder / CHECKPOINT
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise ConfigError(
                f"{path} belongs to another recipe",
                hint="repeat its options or choose another --out",
            )
        for name, value in state["counters"].items():
            setattr(self, name, value)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
