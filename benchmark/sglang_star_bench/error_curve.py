"""The error curve that the simulator's emulated predictor reads, measured on the packaged head.

``python -m sglang_star_bench.error_curve --samples FOLDER... --prompts SEED COUNT --out FILE``. The
samples are a collection of the packaged reasoning model's answers to ``bench reasoning prompts``;
those about an instance that the head may have been fitted on, in whatever wording, are left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import numpy as np
from tokenizers import Tokenizer

from sglang_star.errors import ConfigError
from sglang_star.model import reasoning_model
from sglang_star.predictor import errorcurve
from sglang_star.predictor.baselines import ByAge
from sglang_star.predictor.hazard import Array
from sglang_star.predictor.head import load
from sglang_star.predictor.samples import Samples, load_samples
from sglang_star.predictor.train import predict
from sglang_star_bench.reasoning.check import held_back
from sglang_star_bench.reasoning.model import encode

HEAD: Final = "reasoning-1.6m.safetensors"
FITTED: Final = (1, 16_000)
"""Seed and count of the prompts that the packaged head was fitted and judged on."""
FEWEST: Final = 200


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Raises:
        ConfigError: too few requests are left to judge by.
    """
    args = _parser().parse_args(argv)
    head = load(args.head or Path(str(files("sglang_star.predictor") / "heads" / HEAD)))
    parts = [_unseen(load_samples(folder), args.prompts, args.fitted) for folder in args.samples]
    ours = np.concatenate([predict(head, part) for part in parts])
    ages = np.concatenate([by_age(part) for part in parts])
    curve = errorcurve.measure(ours, ages, joined(parts), head.card.model)
    args.out.write_text(json.dumps(curve, indent=2) + "\n", encoding="utf-8")
    print(curve["label"])
    return 0


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__)
    result.add_argument("--samples", type=Path, nargs="+", required=True, help="made by collect")
    result.add_argument("--prompts", type=int, nargs=2, required=True, metavar=("SEED", "COUNT"))
    result.add_argument(
        "--fitted",
        type=int,
        nargs=2,
        default=FITTED,
        metavar=("SEED", "COUNT"),
        help="prompts that the head knows [%(default)s]",
    )
    result.add_argument("--head", type=Path, help="[the packaged one]")
    result.add_argument("--out", type=Path, required=True)
    return result


def _unseen(samples: Samples, asked: Sequence[int], fitted: Sequence[int]) -> Samples:
    seed, count = fitted
    known = {(p.family, p.key) for p in itertools.islice(held_back(seed), count)}
    tokenizer = Tokenizer.from_file(str(reasoning_model() / "tokenizer.json"))
    seed, count = asked
    fresh = {
        tuple(encode(tokenizer, p.prompt))
        for p in itertools.islice(held_back(seed), count)
        if (p.family, p.key) not in known
    }
    keep = np.array([tuple(ids.tolist()) in fresh for ids in samples.prompt_ids])
    if keep.sum() < FEWEST:
        raise ConfigError(
            f"{keep.sum()} requests about instances that the head does not know, fewer than "
            f"{FEWEST}",
            hint="collect answers to `bench reasoning prompts` of another seed",
        )
    return samples.select(keep)


def by_age(samples: Samples) -> Array:
    """What age alone says of each half of the requests, learnt on the other, ``[n, 5]``."""
    half = np.arange(len(samples.rids)) % 2 == 0
    found = np.zeros((len(samples.tokens), 5))
    for part in (half, ~half):
        found[part[samples.request]] = ByAge(samples.select(~part), 0).predict(samples.select(part))
    return found


def joined(parts: Sequence[Samples]) -> Samples:
    """One collection of several."""
    offsets = np.cumsum([0, *(len(part.rids) for part in parts)])

    def column(name: str) -> Any:
        return np.concatenate([getattr(part, name) for part in parts])

    return Samples(
        rids=[rid for part in parts for rid in part.rids],
        prompt_ids=[ids for part in parts for ids in part.prompt_ids],
        output_ids=[ids for part in parts for ids in part.output_ids],
        request=np.concatenate([p.request + o for p, o in zip(parts, offsets, strict=False)]),
        **{n: column(n) for n in ("max_new_tokens", "censored", "tokens", "hidden", "pooled")},
    )


if __name__ == "__main__":
    raise SystemExit(main())
