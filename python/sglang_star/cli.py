"""``star``: one command per thing a person does, each imported only when it is asked for."""

from __future__ import annotations

import importlib
import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Final, NoReturn, TypeAlias

from sglang_star import __version__
from sglang_star.errors import ConfigError, StarError


@dataclass(frozen=True, slots=True)
class Command:
    """A leaf of the command tree, run as ``module.main(argv)``."""

    summary: str
    module: str


@dataclass(frozen=True, slots=True)
class Group:
    """An inner node: the next word chooses among ``members``."""

    summary: str
    members: Tree


Tree: TypeAlias = "dict[str, Command | Group]"

STAR: Final = Group(
    "decode-phase rescheduling for LLM serving on SGLang",
    {
        "demo": Command(
            "boot a small cluster here, move live requests, prove that no token changed",
            "sglang_star.demo.run",
        ),
        "cluster": Command("run a local cluster until Ctrl-C", "sglang_star.cluster_command"),
        "router": Command("route to running engines", "sglang_star_router.launch_router"),
        "predictor": Group(
            "make a remaining-length head",
            {
                "collect": Command("prompts to samples", "sglang_star.predictor.collect"),
                "train": Command("samples to a head", "sglang_star.predictor.train"),
                "eval": Command("a head against the baselines", "sglang_star.predictor.evaluate"),
            },
        ),
        "simulate": Command("play a trace on a modelled fleet", "sglang_star_bench.simulate"),
        "bench": Group(
            "measure one part",
            {
                "serving": Command("a cluster under load", "sglang_star_bench.serving"),
                "policy": Command("policies side by side", "sglang_star_bench.policy_bench"),
                "migration": Command("the stall of a move", "sglang_star_bench.migration"),
                "start": Command("a cluster to its first token", "sglang_star_bench.start"),
                "overhead": Command("STAR at rest against SGLang", "sglang_star_bench.overhead"),
                "attention": Command("decode on a CPU", "sglang_star_bench.attention"),
                "kv-copy": Command("copying KV pages", "sglang_star_bench.kv_copy"),
                "predictor": Command("time per step of the head", "sglang_star_bench.predictor"),
                "reasoning": Command(
                    "make and examine the small reasoning model",
                    "sglang_star_bench.reasoning.command",
                ),
                "gemma": Command("a second model to measure on", "sglang_star_bench.gemma"),
                "calibration": Command("the router's correction", "sglang_star_bench.calibration"),
                "router": Command("time per request of the router", "sglang_star_bench.router"),
                "chaos": Command("failing engines behind a router", "sglang_star_bench.chaos"),
            },
        ),
        "keys": Command("the fleet key", "sglang_star.keys_command"),
        "compat": Command("does STAR fit a release of SGLang", "sglang_star.engine.compat"),
        "test": Command("ruff, mypy and every test; arguments go to pytest", "sglang_star.checks"),
    },
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0: done. 2: an error the user can remedy, printed with its hint. 130: Ctrl-C or SIGTERM.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("sglang_star").setLevel(logging.INFO)
    # A plain `kill` unwinds the stack as Ctrl-C does, so that whatever was started is ended.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except StarError as error:
        print(f"star: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"      {error.hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(words: list[str]) -> int:
    node: Command | Group = STAR
    name = "star"
    while isinstance(node, Group):
        if not words or words[0] in ("-h", "--help"):
            print(usage(name, node))
            return 0
        word = words.pop(0)
        if word == "--version" and node is STAR:
            print(f"sglang-star {__version__}")
            return 0
        if word not in node.members:
            raise ConfigError(
                f"{name} has no command {word!r}",
                hint=f"it has {', '.join(node.members)}; {name} --help explains them",
            )
        node, name = node.members[word], f"{name} {word}"
    # argparse takes the program's name from here; without this, help would speak of cli.py.
    sys.argv = [name, *words]
    return _load(node.module, name).main(words) or 0


def _load(module: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{name} needs the package {error.name!r}, which is not installed",
            hint="./star installs everything; with pip: sglang-star[engine,bench]",
        ) from error


def usage(name: str, group: Group) -> str:
    """Return the help text of ``group``, one line per member."""
    width = max(map(len, group.members)) + 2
    lines = [f"usage: {name} COMMAND [ARGUMENT ...]", "", f"{name}: {group.summary}", ""]
    for word, node in group.members.items():
        words = f" ({', '.join(node.members)})" if isinstance(node, Group) else ""
        lines.append(f"  {word:{width}}{node.summary}{words}")
    return "\n".join([*lines, "", f"{name} COMMAND --help explains one of them."])


def _interrupt(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main())
