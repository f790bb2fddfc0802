"""``star test``: the style, the types and the tests, in that order and all of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from sglang_star.errors import ConfigError

ROOT: Final = Path(__file__).resolve().parents[2]

CHECKS: Final[dict[str, tuple[str, ...]]] = {
    "ruff check": ("ruff", "check", "."),
    "ruff format": ("ruff", "format", "--check", "."),
    "mypy": ("mypy",),
    "pytest": ("pytest",),
}


def main(argv: Sequence[str]) -> int:
    """Run every check even if one fails; ``argv`` goes to pytest. Return 0 if all passed.

    Raises:
        ConfigError: STAR was installed without its checkout, so there is nothing to test.
    """
    if not (ROOT / "test").is_dir():
        raise ConfigError(
            "star test needs the checkout, and this is an installed package",
            hint="clone the repository and run ./star test",
        )
    failed = []
    for name, (module, *arguments) in CHECKS.items():
        print(f"\n===== {name} =====", flush=True)
        extra = argv if name == "pytest" else ()
        if subprocess.run([sys.executable, "-m", module, *arguments, *extra], cwd=ROOT).returncode:
            failed.append(name)
    if failed:
        print(f"star test: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0
