"""``star test``: the style, the types and the tests, in that order and all of them.

Tests without engines run one per core, then those with engines alone: a cluster takes all cores.
So do the histories of the simulation; ``--histories N`` runs so many of them instead of all tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from sglang_star.errors import ConfigError

ROOT: Final = Path(__file__).resolve().parents[2]

CHECKS: Final[dict[str, tuple[str, ...]]] = {
    "ruff check": ("ruff", "check", "."),
    "ruff format": ("ruff", "format", "--check", "."),
    "mypy": ("mypy",),
    "tests without engines": (
        *("pytest", "--numprocesses", "auto", "--maxprocesses", "4"),
        *("test/unit", "test/router", "test/kernel"),
    ),
    "histories": ("pytest", "test/simulation"),
    "tests with engines": ("pytest", "test/engine", "test/e2e"),
}
CHOSEN: Final = "pytest"
"""The check that stands for all tests where the user says which to run."""
HISTORIES: Final = "--histories"
ONE_THREAD: Final = {"OMP_NUM_THREADS": "1"}
"""Every test process has a core of its own, and torch would use them all."""


def main(argv: Sequence[str]) -> int:
    """Run every check even if one fails; return 0 if all passed.

    With arguments one pytest gets them, and runs the tests that they choose.

    Raises:
        ConfigError: STAR was installed without its checkout, so there is nothing to test.
    """
    if not (ROOT / "test").is_dir():
        raise ConfigError(
            "star test needs the checkout, and this is an installed package",
            hint="clone the repository and run ./star test",
        )
    checks = dict(CHECKS)
    environment = {**os.environ, **ONE_THREAD}
    if argv and argv[0] == HISTORIES:
        if len(argv) != 2 or not argv[1].isdecimal():
            raise ConfigError(f"{HISTORIES} takes a number", hint=f"star test {HISTORIES} 100000")
        checks = {"histories": CHECKS["histories"]}
        environment["STAR_HISTORIES"] = argv[1]
    elif argv:
        checks = {name: words for name, words in CHECKS.items() if words[0] != "pytest"}
        checks[CHOSEN] = ("pytest", *argv)
    failed = []
    for name, (module, *arguments) in checks.items():
        print(f"\n===== {name} =====", flush=True)
        began = time.monotonic()
        command = [sys.executable, "-m", module, *arguments]
        if subprocess.run(command, cwd=ROOT, env=environment).returncode:
            failed.append(name)
        print(f"----- {name}: {time.monotonic() - began:.0f} s", flush=True)
    if failed:
        print(f"star test: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0
