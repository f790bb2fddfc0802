"""See the package's text."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import time
from typing import Any

from fuzz import engine, router
from fuzz.found import Found, resident_mb
from simulation.run import quiet

GROWTH_MB = 60.0
"""More than that, after a tenth to warm up, and memory is not flat."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="router|engine")
    parser.add_argument("--share", type=float, default=1.0, help="of the messages")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    quiet()
    rows: list[dict[str, Any]] = []
    for part in arguments.parts or ["engine", "router"]:
        found, began = Found(), time.monotonic()
        if part == "router":
            asyncio.run(router.run(arguments.share, arguments.seed, found))
            grown = 0.0  # looked at inside, once per fleet
        else:
            engine.run(arguments.share / 10, arguments.seed, Found())
            gc.collect()
            before = resident_mb()
            engine.run(arguments.share, arguments.seed + 1, found)
            gc.collect()
            grown = resident_mb() - before
            if grown > GROWTH_MB:
                found.note(f"memory: it grew by {grown:.0f} MB", "")
        rows.append(
            {
                "part": part, "sent": found.sent, "taken": found.taken,
                "grown_mb": round(grown, 1), "seconds": round(time.monotonic() - began),
                "found": dict(found.kinds), "examples": found.examples,
            }
        )  # fmt: skip
        print(json.dumps({k: v for k, v in rows[-1].items() if k != "examples"}), flush=True)
        for kind, example in found.examples.items():
            print(f"--- {kind}\n{example}\n", flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)
    return 1 if any(row["found"] for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
