"""``star bench reasoning train|prompts|check``."""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from sglang_star.errors import ConfigError
from sglang_star_bench.reasoning.check import attempt, forced_loss, held_back, summary
from sglang_star_bench.reasoning.model import WEIGHTS
from sglang_star_bench.reasoning.recipe import Recipe
from sglang_star_bench.reasoning.tasks import FAMILIES
from sglang_star_bench.reasoning.train import Trainer

NUMBERS = ("seed", "width", "layers", "tokens", "batch_tokens", "rate")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="star bench reasoning")
    commands = result.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="make the model; continues where it stopped")
    train.add_argument("--out", required=True, type=Path, help="folder of the model")
    for name in NUMBERS:
        default = getattr(Recipe(), name)
        option = f"--{name.replace('_', '-')}"
        train.add_argument(option, type=type(default), default=default, help=f"[{default}]")
    prompts = commands.add_parser("prompts", help="write prompts the model was not trained on")
    prompts.add_argument("--count", required=True, type=int)
    prompts.add_argument("--seed", type=int, default=0, help="[0]")
    prompts.add_argument(
        "--out", required=True, type=Path, help="jsonl.gz: id, source, instance, prompt"
    )
    prompts.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    check = commands.add_parser("check", help="loss, and accuracy through SGLang, by family")
    check.add_argument("--model", type=Path, default=WEIGHTS, help="folder [the packaged one]")
    check.add_argument("--count", type=int, default=400, help="problems [400]")
    check.add_argument("--seed", type=int, default=0, help="[0]")
    check.add_argument("--cap", type=int, default=4096, help="max_new_tokens [4096]")
    check.add_argument("--concurrency", type=int, default=32, help="requests at once [32]")
    check.add_argument("--json", type=Path)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    Raises:
        ConfigError: an option is out of range, or the folder holds another run.
    """
    args = parser().parse_args(argv)
    if args.command == "train":
        Trainer(Recipe(**{name: getattr(args, name) for name in NUMBERS}), args.out).run()
    elif args.count < 1:
        raise ConfigError(f"--count {args.count} asks for nothing", hint="give 1 or more")
    elif args.command == "prompts":
        write_prompts(args.out, args.count, args.seed, args.families)
    else:
        report(args)
    return 0


def write_prompts(path: Path, count: int, seed: int, families: Sequence[str]) -> None:
    """Write ``count`` prompts, one JSON object per line; the same seed gives the same bytes.

    A problem has several wordings, and its length whatever the wording: each says its instance, so
    that no wording of a problem judges what another taught.
    """
    rows = (
        {
            "id": f"{seed}-{i}",
            "source": problem.family,
            "instance": f"{problem.family} {problem.key}",
            "prompt": problem.prompt,
        }
        for i, problem in enumerate(itertools.islice(held_back(seed, families), count))
    )
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def report(args: argparse.Namespace) -> None:
    """Print, and write as JSON, loss and accuracy by family."""
    losses = forced_loss(args.model, args.count, args.seed)
    given = list(itertools.islice(held_back(args.seed), args.count))
    families = summary(attempt(args.model, given, args.cap, args.concurrency))
    print(f"{'':9}{'n':>5}{'loss':>9}{'ended':>8}{'correct':>9}{'exact':>8}  tokens P50/P90/P99")
    for name, row in families.items():
        row["loss"] = losses[name]
        lengths = "/".join(f"{row['tokens'][level]:.0f}" for level in ("p50", "p90", "p99"))
        print(
            f"{name:9}{row['count']:5}{row['loss']:9.4f}{row['ended']:8.1%}"
            f"{row['correct']:9.1%}{row['exact']:8.1%}  {lengths}"
        )
    if args.json:
        args.json.write_text(json.dumps(families, indent=2) + "\n")
