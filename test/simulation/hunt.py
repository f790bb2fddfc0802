"""One mutated package against histories until one fails; run by ``mutations``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

import sglang_star
from simulation.history import History
from simulation.plan import Allowed, Plan, draw
from simulation.run import quiet
from simulation.shrink import kind

KEPT = Path(__file__).parent / "kept"


class Hangs(BaseException):
    """A history turns in circles; nothing may contain it."""


def main(folder: str, limit: int, hangs_s: float) -> str:
    """Say after how many histories drawn by seed one fails, and which kept ones do."""
    assert str(sglang_star.__file__).startswith(folder), "the mutated package is not the one found"
    quiet()

    def ring(number: int, frame: object) -> None:
        raise Hangs

    def failure_of(plan: Plan) -> str:
        signal.setitimer(signal.ITIMER_REAL, hangs_s)
        try:
            return History(plan).run()
        except Hangs:
            return "it turns in circles"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    signal.signal(signal.SIGALRM, ring)
    for seed in range(limit):
        if failure := failure_of(draw(seed, Allowed())):
            return f"{seed + 1:,} | {kind(failure)}"
    kept = [name for name, plan in _kept() if failure_of(plan)]
    return f"not within {limit:,} | {'kept: ' + ', '.join(kept) if kept else 'nothing'}"


def _kept() -> Iterator[tuple[str, Plan]]:
    for path in sorted(KEPT.glob("*.json")):
        yield path.stem, msgspec.json.decode(path.read_bytes(), type=Plan)


if __name__ == "__main__":
    print(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
