"""``star predictor train``: samples in, a head for `--star-predictor` out."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_star.predictor import dataset, figures, metrics, trials
from sglang_star.predictor.baselines import ByAge
from sglang_star.predictor.fit import fit
from sglang_star.predictor.hazard import Array
from sglang_star.predictor.head import Head, HeadCard
from sglang_star.predictor.prompts import read_prompts
from sglang_star.predictor.recipe import Recipe
from sglang_star.predictor.samples import Samples, describe, load_samples, read_sources
from sglang_star.predictor.store import HeadStore


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Raises:
        ConfigError: the samples are missing, damaged, of two models, or too few.
    """
    args = _parser().parse_args(argv)
    model, manifest = describe(args.samples)
    parts, _ = load_split(args.samples, args.sources, args.hold_out_source)
    recipe, tried = trials.choose(parts.fit, Recipe.of(args))
    weights, curves = fit(parts.fit, recipe)
    card = HeadCard(
        model=args.name or manifest["model"],
        fingerprint=model,
        provenance=manifest
        | volume(parts)
        | {
            "recipe": dataclasses.asdict(recipe),
            "left_out_loss_of_trials": tried,
            "held_out_sources": args.hold_out_source,
        },
        metrics={},
    )
    head = Head(card, weights)
    card.metrics["star"] = metrics.score(predict(head, parts.test), parts.test)
    by_age = ByAge(parts.fit, args.seed).predict(parts.test)
    card.metrics["by_age"] = metrics.score(by_age, parts.test)
    path = keep(head, args.out)
    if args.plot:
        figures.losses(curves.train, curves.held_out, args.plot)
    for name, result in card.metrics.items():
        low, high = result["mae_ci"]
        print(f"{name:8} MAE {result['mae']:7.1f} tokens, 95 % {low:.1f}-{high:.1f}")
    print(f"{path}: {head.parameters} parameters, P10-P90 {card.metrics['star']['coverage']:.1%}")
    return 0


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__)
    result.add_argument("--samples", required=True, type=Path, help="folder made by collect")
    result.add_argument(
        "--out",
        type=Path,
        help="the head, .safetensors [kept for this model; --star-predictor auto takes it then]",
    )
    result.add_argument("--name", help="model name to record [folder name of the model]")
    Recipe.add_flags(result, repeats=2)
    result.add_argument(
        "--hold-out-source",
        nargs="+",
        default=[],
        metavar="NAME",
        help="do not train on prompts from these sources; they give the head's metrics",
    )
    result.add_argument(
        "--sources", type=Path, metavar="FILE", help="prompt file with sources [the collection's]"
    )
    result.add_argument("--plot", type=Path, help="figure of the loss curves")
    return result


def keep(head: Head, out: Path | None) -> Path:
    """Write a head where it is asked for, else into the store; returns its path.

    Raises:
        ConfigError: it cannot be written.
    """
    if out is None:
        return HeadStore().keep(head)
    head.save(out)
    return out


def load_split(
    folder: Path, prompts: Path | None, hold_out: Sequence[str]
) -> tuple[dataset.Split, list[str]]:
    """Read a collection and divide it; also the source of each test request, if any is known.

    Args:
        folder: the collection; prompts: a prompt file that says where its prompts are from, when
            the collection does not.
        hold_out: sources to judge by instead of the ordinary test split.

    Raises:
        ConfigError: the samples are missing, damaged, or too few; a source is not among them.
    """
    sources = (
        {prompt.key: prompt.source for prompt in read_prompts(prompts)}
        if prompts
        else read_sources(folder)
    )
    samples = load_samples(folder)
    held_out = dataset.of_sources(samples, sources, hold_out) if hold_out else None
    parts = dataset.split(samples, held_out)
    return parts, dataset.source_of(parts.test, sources) if sources else []


def volume(parts: dataset.Split) -> dict[str, Any]:
    """How much data there was, for the provenance."""

    def of(samples: Samples) -> dict[str, Any]:
        return {
            "requests": len(samples.rids),
            "prompts": len({rid.partition("#")[0] for rid in samples.rids}),
            "instances": int(samples.instance.max()) + 1,
            "samples": len(samples.tokens),
            "output_tokens": int(samples.output_tokens.sum()),
            "at_limit": int((samples.censored & ~samples.cut).sum()),
            "cut_by_end_of_collection": int(samples.cut.sum()),
        }

    return {"fit": of(parts.fit), "test": of(parts.test)}


def predict(head: Head, samples: Samples) -> Array:
    """Quantiles of every sample as the engine would estimate them, before the limit applies."""
    x = dataset.inputs(samples, head.weights.mean, head.weights.projection)
    return head.quantiles(head.logits(x.now, x.recent, x.mean, x.features))
