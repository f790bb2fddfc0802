"""Where a defect of ours, or input that nobody thought of, costs one thing instead of an engine.

An exception that leaves STAR's code inside a scheduler ends that scheduler with all its streams.
So each message, move, guest and order is handled inside :meth:`Faults.contained`: what it raises
is logged once with its stack, counted, and ends that one thing. Errors that are meant, those of
:mod:`sglang_star.errors`, are answered where they arise and do not get here.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from types import TracebackType

logger = logging.getLogger(__name__)


class Faults:
    """The faults of one engine.

    Attributes:
        counts: since start, by what was being done.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._told: set[tuple[str, str]] = set()

    def contained(self, what: str, end: Callable[[], object] | None = None) -> Contained:
        """Let no exception out of the block.

        Args:
            what: what the block does, for log and count.
            end: ends the thing it happened to; called after an exception, and contained itself.
        """
        return Contained(self, what, end)

    def happened(self, what: str, error: Exception, end: Callable[[], object] | None) -> None:
        """Count a fault, and ``end`` what it happened to."""
        self._note(what, error)
        if end is not None:
            with self.contained(f"ending {what}"):
                end()

    def _note(self, what: str, error: Exception) -> None:
        self.counts[what] += 1
        kind = (what, type(error).__name__)
        if kind in self._told:
            return
        self._told.add(kind)
        logger.error(
            "STAR: a defect while handling %s; it costs that alone and is logged this once",
            what,
            exc_info=error,
        )


class Contained:
    """The block of :meth:`Faults.contained`; a class, since every step enters several."""

    __slots__ = ("_end", "_faults", "_what")

    def __init__(self, faults: Faults, what: str, end: Callable[[], object] | None) -> None:
        self._faults = faults
        self._what = what
        self._end = end

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        self._faults.happened(self._what, error, self._end)
        return True
