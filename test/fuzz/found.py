"""What a part of the fuzzing has found."""

from __future__ import annotations

import logging
import os
import traceback
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Found:
    """Findings by kind, an example of each; ``sent``: messages tried, ``taken``: of these, how
    many were understood, answered well or let in."""

    kinds: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    sent: int = 0
    taken: int = 0

    def note(self, kind: str, example: object) -> None:
        self.kinds[kind] += 1
        self.examples.setdefault(kind, str(example)[:2000])

    def error(self, where: str, error: BaseException, example: object = "") -> None:
        at = traceback.extract_tb(error.__traceback__)[-1:]
        place = f"{os.path.basename(at[0].filename)}:{at[0].name}" if at else ""
        stack = "".join(traceback.format_exception(error))
        self.note(
            f"{where}: {type(error).__name__} at {place}", f"{example!r:.600}\n{stack[-1400:]}"
        )


class Errors(logging.Handler):
    """Takes stacks out of the log: an exception that a server caught last."""

    def __init__(self, found: Found) -> None:
        super().__init__(logging.ERROR)
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self._found.error(f"log of {record.name}", record.exc_info[1], record.getMessage())
        elif record.name.startswith(("aiohttp", "asyncio")):
            self._found.note(f"log of {record.name}", record.getMessage())


def resident_mb() -> float:
    """Memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
