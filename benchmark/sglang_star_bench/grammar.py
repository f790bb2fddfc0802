"""How long a guest's grammar takes to take in its output: SGLang's grammars, no engine.

At once, as when a move ends; and per step, as it follows the KV.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend
from transformers import AutoTokenizer

from sglang_star.engine import replay
from sglang_star.model import default_model

STEP: Final = 1024
"""Tokens that one piece of KV has at most."""
ITEM: Final = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "n": {"type": "integer"}},
    "required": ["name", "n"],
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="sglang_star_bench.grammar", description=__doc__)
    made.add_argument("--tokens", type=int, default=8000, help="output [%(default)s]")
    made.add_argument("--rounds", type=int, default=9, help="each [%(default)s]")
    made.add_argument("--json", type=Path, metavar="FILE", help="write results here")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    args = parser().parse_args(argv)
    rows = [
        measure(name, grammar, output, args.rounds)
        for name, grammar, output in cases(default_model(), args.tokens)
    ]
    for row in rows:
        print(
            f"{row['grammar']}: {row['tokens']} tokens at once {row['at_once_ms']:.1f} ms, "
            f"in the longest step {row['longest_step_ms']:.1f} ms of {row['steps']}, "
            f"at the end {row['at_the_end_ms']:.2f} ms"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def cases(model: Path, tokens: int) -> Iterator[tuple[str, Any, list[int]]]:
    """Name, compiled grammar and an output that it accepts."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    backend = XGrammarGrammarBackend(
        tokenizer, vocab_size=len(tokenizer), model_eos_token_ids=[tokenizer.eos_token_id]
    )
    items = [{"name": f"keeper number {k} of the lighthouse", "n": 7 * k} for k in range(tokens)]
    schema = {"type": "array", "items": ITEM}
    for name, grammar, text in (
        ("JSON schema", backend.dispatch_json(json.dumps(schema)), json.dumps(items)),
        ("regex", backend.dispatch_regex("([a-z]{2} )*"), "ab cd " * tokens),
        ("counting regex", backend.dispatch_regex("([a-z]{2} ){1,40000}"), "ab cd " * tokens),
    ):
        yield name, grammar, tokenizer(text, add_special_tokens=False).input_ids[:tokens]


def measure(name: str, grammar: Any, output: list[int], rounds: int) -> dict[str, Any]:
    """One row: medians over rounds; of the steps of a round the longest."""
    at_once, longest, at_the_end = [], [], []
    for _ in range(rounds):
        at_once.append(timed(replay.finish, guest(grammar, []), output))
        req = guest(grammar, output)
        pieces = [
            timed(replay.follow, req, end) for end in (*range(STEP, len(output), STEP), len(output))
        ]
        longest.append(max(pieces))
        at_the_end.append(timed(replay.finish, req, output))
    return {
        "grammar": name,
        "tokens": len(output),
        "steps": len(pieces),
        "at_once_ms": statistics.median(at_once),
        "longest_step_ms": statistics.median(longest),
        "at_the_end_ms": statistics.median(at_the_end),
    }


def guest(grammar: Any, known: Sequence[int]) -> Any:
    """A request that has just been rebuilt, without a prompt."""
    req = SimpleNamespace(grammar=grammar.copy(), origin_input_ids=())
    replay.begin(req, array("q", known))
    return req


def timed(action: Any, *args: Any) -> float:
    """Milliseconds that a call takes."""
    started = time.perf_counter()
    action(*args)
    return (time.perf_counter() - started) * 1e3


if __name__ == "__main__":
    raise SystemExit(main())
