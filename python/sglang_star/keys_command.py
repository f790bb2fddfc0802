"""``star keys``: make a fleet key, look at it, exchange it while the fleet runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sglang_star import fleet_key
from sglang_star.errors import ConfigError
from sglang_star.fleet_key import FleetKey

STEPS = """\
exchanging a key while the fleet runs, with FILE the same on every machine after each step:
  1. star keys add FILE    every member accepts the new key from now on, without a restart
  2. star keys use FILE    who starts from now on uses it: restart members one after the other
  3. star keys drop FILE   the old one is worth nothing any more, without a restart
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the subcommands.

    Raises:
        ConfigError: the file is not what it should be.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=STEPS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("action", choices=("new", "show", "add", "use", "drop"))
    parser.add_argument("file", type=Path)
    args = parser.parse_args(argv)
    path: Path = args.file
    key = fleet_key.create(path) if args.action == "new" else FleetKey(path)
    match args.action:
        case "add":
            key.write((*key.secrets, fleet_key.new_secret()))
        case "use":
            if len(key.secrets) < 2:
                raise ConfigError(f"{path} has only one key", hint="first: star keys add FILE")
            *earlier, newest = key.secrets
            key.write((newest, *earlier))
        case "drop":
            key.write(key.secrets[:1])
    for place, name in enumerate(key.ids()):
        print(f"{name}  {'used and accepted' if place == 0 else 'accepted'}")
    return 0
