"""What the terminal shows while streams run: bars that renew in place, and a line per move."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from sglang_star.demo.client import Stream
from sglang_star.demo.watch import Load, Watcher

RATE_OVER_S = 2.0
_FILE_EVERY_S = 5.0
_TERMINAL_EVERY_S = 0.2
_BLUE, _RED, _OFF = "\033[34m", "\033[31m", "\033[0m"


class Screen:
    """Shows one run; on anything but a terminal, plain lines every few seconds.

    Args:
        total: how many streams there will be.
    """

    def __init__(self, watcher: Watcher, total: int, out: TextIO | None = None) -> None:
        self._watcher = watcher
        self._total = total
        self._out = out or sys.stdout
        self._terminal = self._out.isatty()
        self._next_s = 0.0
        self._drawn = 0
        self._announced: set[str] = set()
        self._tokens: list[tuple[float, int]] = []

    def show(self, streams: Sequence[Stream]) -> None:
        """Announce new moves, and renew the picture if it is time."""
        now = time.monotonic()
        if now < self._next_s or not streams:
            return
        self._next_s = now + (_TERMINAL_EVERY_S if self._terminal else _FILE_EVERY_S)
        self._draw(streams)

    def end(self, streams: Sequence[Stream]) -> None:
        """Draw the last state and leave it there."""
        self._draw(streams)
        self._drawn = 0

    def _draw(self, streams: Sequence[Stream]) -> None:
        lines = self._moves({stream.rid for stream in streams})
        head = self._head(streams)
        loads = self._watcher.latest().values()
        if self._terminal:
            width = shutil.get_terminal_size().columns
            picture = [head[: width - 1], *(bar(load, width) for load in loads)]
            # Back up over the old picture, clear it; moves stay above the new one.
            self._out.write(f"\033[{self._drawn}F\033[J" if self._drawn else "")
            self._drawn = len(picture)
        else:
            picture = [f"{head}; {plain(loads)}"]
        self._out.write("".join(f"{line}\n" for line in [*lines, *picture]))
        self._out.flush()

    def _head(self, streams: Sequence[Stream]) -> str:
        now = time.monotonic()
        done = sum(bool(stream.ended_s) for stream in streams)
        self._tokens.append((now, sum(stream.tokens for stream in streams)))
        while len(self._tokens) > 2 and self._tokens[1][0] < now - RATE_OVER_S:
            self._tokens.pop(0)
        (then, had), (_, has) = self._tokens[0], self._tokens[-1]
        rate = (has - had) / max(now - then, 1e-3) if now > then else 0.0
        began = min(stream.sent_s for stream in streams)
        return (
            f"  {now - began:3.0f} s  {done}/{self._total} answers, "
            f"{len(streams) - done} under way, {rate:.0f} tokens/s"
        )

    def _moves(self, ours: set[str]) -> list[str]:
        lines = []
        for move in reversed(self._watcher.moves):
            name = move["migration_id"] or f"{move['rid']} {move['ordered_at']}"
            if move["rid"] not in ours or move["state"] in ("ordered", "accepted"):
                continue
            if name not in self._announced:
                self._announced.add(name)
                lines.append(move_line(move))
        return lines


def move_line(move: dict[str, Any]) -> str:
    """Say in one line what became of a move."""
    how = f"{move['state']}: {move['detail']}"
    if move["state"] == "moved":
        how = f"{move['context_tokens']} tokens of KV, stall {move['stall_steps']:.1f} steps"
    return f"  > {move['rid']}: {move['source']} to {move['target']}, {how}"


def bar(load: Load, width: int, *, colour: bool = True) -> str:
    """Draw an instance's KV: in use, expected within the horizon, free; ``!`` if it overflows."""
    tail = f" {load.used:5}/{load.capacity} KV {load.running:3} run {load.waiting:2} wait"
    room = max(10, width - len(tail) - len(load.instance) - 7)
    used = min(room, round(room * load.used / load.capacity))
    ahead = min(room, max(used, round(room * load.ahead / load.capacity)))
    over = load.ahead > load.capacity
    full, soon = "█" * used, "▒" * (ahead - used)
    if colour:
        full, soon = f"{_BLUE}{full}{_OFF}", f"{_RED if over else _BLUE}{soon}{_OFF}"
    return f"  {load.instance} {full}{soon}{'·' * (room - ahead)}{'!' if over else '|'}{tail}"


def plain(loads: Iterable[Load]) -> str:
    """Say the same in words, for a log."""
    return "KV " + ", ".join(
        f"{load.instance} {load.used / load.capacity:.0%}"
        f" (expected {load.ahead / load.capacity:.0%})"
        for load in loads
    )
