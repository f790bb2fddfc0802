"""What the terminal shows while streams run: one moving line, and one line per move."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from sglang_star.demo.client import Stream, Watcher


class Progress:
    """Prints at most ten times a second to a terminal, every ten seconds to a file."""

    def __init__(self, total: int, watcher: Watcher | None = None) -> None:
        self._total = total
        self._watcher = watcher
        self._terminal = sys.stdout.isatty()
        self._interval_s = 0.1 if self._terminal else 10.0
        self._next_s = 0.0
        self._announced: set[str] = set()

    def show(self, streams: Sequence[Stream]) -> None:
        """Announce new moves, and renew the line if it is time."""
        self._announce_moves()
        now = time.monotonic()
        if now >= self._next_s:
            self._next_s = now + self._interval_s
            self._print(self._line(streams))

    def end(self, streams: Sequence[Stream]) -> None:
        """Print the last state and leave it there."""
        self._announce_moves()
        self._print(self._line(streams))
        if self._terminal:
            print(flush=True)

    def _line(self, streams: Sequence[Stream]) -> str:
        done = sum(bool(stream.ended_s) for stream in streams)
        tokens = sum(stream.tokens for stream in streams)
        began = min((stream.sent_s for stream in streams), default=time.monotonic())
        elapsed = max(time.monotonic() - began, 1e-3)
        bar = "#" * round(30 * done / self._total)
        return (
            f"  [{bar:30}] {done}/{self._total} answers, {len(streams) - done} running, "
            f"{tokens} tokens, {tokens / elapsed:.0f}/s"
        )

    def _print(self, line: str) -> None:
        # On a terminal: back to the start of the line, clear it, and stay on it.
        print(f"\r\033[K{line}" if self._terminal else line,
              end="" if self._terminal else "\n", flush=True)  # fmt: skip

    def _announce_moves(self) -> None:
        for move in reversed(self._watcher.migrations if self._watcher else []):
            name = move["migration_id"] or f"{move['rid']} {move['ordered_at']}"
            if move["state"] in ("ordered", "accepted") or name in self._announced:
                continue
            self._announced.add(name)
            how = (
                f"{move['context_tokens']} tokens, stall {move['stall_steps']:.1f} steps"
                if move["state"] == "moved"
                else f"{move['state']}: {move['detail']}"
            )
            line = (
                f"  {move['rid']}: {move['source']} -> {move['target']} ({move['reason']}), {how}"
            )
            print(f"\r\033[K{line}" if self._terminal else line, flush=True)
