"""Is the model any good: teacher-forced loss, and what SGLang makes of held-back problems."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sglang_star_bench.reasoning.model import SAMPLING, encode
from sglang_star_bench.reasoning.tasks import FAMILIES, Problem, problems

PROMPT_ROOM: Final = 256
LOSS_BATCH: Final = 8


@dataclass(frozen=True, slots=True)
class Attempt:
    """What the model wrote for a problem; ``tokens`` counts the end token."""

    problem: Problem
    text: str
    tokens: int
    ended: bool

    @property
    def correct(self) -> bool:
        """Whether the last line is the right answer."""
        return self.text.rpartition("\n")[2] == f"={self.problem.answer}"

    @property
    def exact(self) -> bool:
        """Whether every step is right."""
        return self.text == self.problem.trace


def held_back(seed: int, families: Sequence[str] = tuple(FAMILIES)) -> Iterator[Problem]:
    """Endless problems the model was not trained on, no prompt twice."""
    seen: set[str] = set()
    for problem in problems(seed, families):
        if problem.held_back and problem.prompt not in seen:
            seen.add(problem.prompt)
            yield problem


def forced_loss(folder: Path, count: int, seed: int) -> dict[str, float]:
    """Mean loss per trace token, nats, by family and over ``all``, given the true trace so far."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    losses: dict[str, list[float]] = {}
    for problem in itertools.islice(held_back(seed), count):
        prompt = len(encode(tokenizer, problem.prompt))
        ids = torch.tensor(encode(tokenizer, problem.prompt, problem.trace))
        with torch.inference_mode():
            logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0, prompt - 1 :]
            each = torch.nn.functional.cross_entropy(logits, ids[prompt:], reduction="none")
        for name in (problem.family, "all"):
            losses.setdefault(name, []).extend(each.tolist())
    return {name: sum(each) / len(each) for name, each in losses.items()}


def attempt(folder: Path, given: Sequence[Problem], cap: int, concurrency: int) -> list[Attempt]:
    """Answer ``given`` with SGLang at the recommended sampling, at most ``cap`` new tokens each."""
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.server_args import ServerArgs

    from sglang_star.config import PREDICTOR_OFF, StarConfig
    from sglang_star.launch import enable

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    server_args = ServerArgs(
        model_path=str(folder),
        log_level="error",
        max_running_requests=concurrency,
        max_total_tokens=concurrency * (cap + PROMPT_ROOM),
        sleep_on_idle=True,
    )
    engine = Engine(server_args=enable(server_args, StarConfig(predictor=PREDICTOR_OFF)))
    try:
        tokenizer = engine.tokenizer_manager.tokenizer
        results = engine.generate(
            input_ids=[
                tokenizer.encode(f"<user>{problem.prompt}<answer>", add_special_tokens=False)
                for problem in given
            ],
            sampling_params={
                "temperature": SAMPLING["temperature"],
                "top_p": SAMPLING["top_p"],
                "max_new_tokens": cap,
            },
        )
    finally:
        engine.shutdown()
    return [_attempt(problem, result) for problem, result in zip(given, results, strict=True)]


def _attempt(problem: Problem, result: dict[str, Any]) -> Attempt:
    meta = result["meta_info"]
    ended = meta["finish_reason"]["type"] == "stop"
    return Attempt(problem, result["text"], int(meta["completion_tokens"]), ended)


def summary(attempts: Sequence[Attempt]) -> dict[str, dict[str, Any]]:
    """By family and over ``all``: shares ended, correct and exact, and lengths in tokens."""
    import numpy as np

    groups: dict[str, list[Attempt]] = {}
    for one in attempts:
        for name in (one.problem.family, "all"):
            groups.setdefault(name, []).append(one)
    levels = {"p50": 50, "p90": 90, "p99": 99, "max": 100}

    def row(group: Sequence[Attempt]) -> dict[str, Any]:
        lengths = [one.tokens for one in group]
        true = [len(one.problem.trace) + 1 for one in group]
        return {
            "count": len(group),
            "ended": float(np.mean([one.ended for one in group])),
            "correct": float(np.mean([one.correct for one in group])),
            "exact": float(np.mean([one.exact for one in group])),
            "tokens": {name: float(np.percentile(lengths, at)) for name, at in levels.items()},
            "true_tokens": {name: float(np.percentile(true, at)) for name, at in levels.items()},
        }

    return {name: row(groups[name]) for name in (*sorted(groups.keys() - {"all"}), "all")}
