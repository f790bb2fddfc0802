"""File descriptors: every stream takes two or three, and without any nothing works any more.

The soft limit is raised at start. A reserve is kept for health checks, statuses and for telling
clients that there is no room; what would need it is answered 503, and no instance is blamed.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import socket
import time
from collections import Counter
from typing import Final

logger = logging.getLogger(__name__)

LOCAL_ERRNOS: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL}
)
"""Failures of this machine: no instance can help them."""
RECOUNT_S: Final = 0.25
RECOUNT_SHORT_S: Final = 0.02
"""Age of the count when there seems to be no room: what has ended meanwhile may have made some."""


def is_local(error: BaseException) -> bool:
    """Whether an error is the router's own and not its peer's."""
    if isinstance(error, socket.gaierror):
        return error.errno in (socket.EAI_SYSTEM, socket.EAI_MEMORY, socket.EAI_AGAIN)
    return isinstance(error, OSError) and error.errno in LOCAL_ERRNOS


def raise_soft_limit() -> int:
    """Raise the soft limit to the hard one; return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        logger.warning("at most %d files can be open: raising that failed: %s", soft, error)
        return soft
    logger.info("at most %d files can be open, instead of %d", hard, soft)
    return hard


class Descriptors:
    """Says whether a request may have its descriptors.

    Attributes:
        errors: local failures, by what was short.
    """

    def __init__(self, reserve: int) -> None:
        self.errors: Counter[str] = Counter()
        self._reserve = reserve
        self._used = 0
        self._counted_at = -1.0
        self._limit = 0

    def short(self, wanted: int) -> bool:
        """Whether ``wanted`` more would take from the reserve; if not, they count as taken."""
        now = time.monotonic()
        age = now - self._counted_at
        if age > RECOUNT_S or (age > RECOUNT_SHORT_S and self._full(wanted)):
            self._count(now)
        if self._full(wanted):
            self.errors["descriptors"] += 1
            return True
        self._used += wanted
        return False

    def _full(self, wanted: int) -> bool:
        return bool(self._limit) and self._used + wanted > self._limit - self._reserve

    def _count(self, now: float) -> None:
        self._counted_at = now
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit = 0 if limit == resource.RLIM_INFINITY else limit
        try:
            self._used = len(os.listdir("/dev/fd"))
        except OSError as error:
            if is_local(error):
                self._used = self._limit
