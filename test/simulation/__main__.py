"""``python -m simulation``: run histories, replay one, keep one as a regression."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import msgspec

from simulation.campaign import campaign
from simulation.history import History
from simulation.plan import Allowed, Plan, draw
from simulation.run import many, quiet
from simulation.shrink import kind, shrink, story


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m simulation", description=__doc__)
    parser.add_argument("--histories", type=int, default=10_000, metavar="N")
    parser.add_argument("--start", type=int, default=0, metavar="SEED", help="the first seed")
    parser.add_argument("--seed", type=int, help="replay this history only")
    parser.add_argument("--plan", type=Path, help="replay this kept history only")
    parser.add_argument(
        "--campaign", type=Path, metavar="FILE", help="keep what they come to there, and go on"
    )
    parser.add_argument("--stop", action="store_true", help="end the campaign at a failure")
    parser.add_argument("--without", default="", help="kinds of faults to leave out: lost,cut,...")
    parser.add_argument("--with", dest="also", default="", help="kinds to add: updated,...")
    parser.add_argument("--whole", action="store_true", help="do not shrink")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keep the shrunk history there")
    parser.add_argument("--lines", type=int, default=60, help="of the trace")
    arguments = parser.parse_args()
    quiet()
    if arguments.stop and not arguments.campaign:
        parser.error("--stop goes with --campaign")
    left_out = [name for name in arguments.without.split(",") if name]
    added = [name for name in arguments.also.split(",") if name]
    allowed = Allowed(**dict.fromkeys(left_out, False), **dict.fromkeys(added, True))
    if arguments.plan:
        return tell(msgspec.json.decode(arguments.plan.read_bytes(), type=Plan), arguments)
    if arguments.seed is not None:
        return tell(draw(arguments.seed, allowed), arguments)
    if arguments.campaign:
        result = campaign(
            arguments.campaign, arguments.start, arguments.histories, allowed, stop=arguments.stop
        )
        ran, lasted, found = result.histories, result.seconds, result.failures
    else:
        began = time.monotonic()
        all_ran = many(arguments.start, arguments.histories, allowed)
        ran, lasted, found = all_ran.histories, time.monotonic() - began, all_ran.found
    print(f"{ran} histories in {lasted:.1f} s, {ran / lasted:.0f} a second; {len(found)} fail")
    kinds = Counter(kind(failure) for _, failure in found)
    for name, count in kinds.most_common(20):
        first = next(seed for seed, failure in found if kind(failure) == name)
        print(f"{count:6}  first --seed {first}: {name}")
    return 1 if found else 0


def tell(plan: Plan, arguments: argparse.Namespace) -> int:
    history = History(plan)
    failure = history.run()
    if failure and not arguments.whole:
        plan = shrink(plan, failure)
        history = History(plan)
        failure = history.run()
    print(story(plan, history, arguments.lines))
    print(failure or "all holds")
    if arguments.keep:
        arguments.keep.write_bytes(msgspec.json.format(msgspec.json.encode(plan), indent=1) + b"\n")
    return 1 if failure else 0


if __name__ == "__main__":
    raise SystemExit(main())
