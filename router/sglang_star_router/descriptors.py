"""File descriptors: every stream takes two or three, and without any nothing works any more.

The soft limit is raised at start. A reserve is kept for health checks, statuses and for telling
clients that there is no room; what would need it is answered 503, and no instance is blamed.
Clients are accepted up to half of it, so that there is always one to tell; the others wait.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import resource
import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

logger = logging.getLogger(__name__)

LOCAL_ERRNOS: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL}
)
"""Failures of this machine: no instance can help them."""
RECOUNT_S: Final = 0.25
LEAVE_S: Final = 1.0
"""So long a request waits for clients that were refused to be gone, and ..."""
LOOK_S: Final = 0.02
"""... looks so often."""


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

    A client that has been let in counts, and one that has not does not: it is about to be told
    that there is no room, which is what the reserve is for. Otherwise a burst of clients would
    fill the count before the first of them was served, and all of them would be refused.

    Attributes:
        errors: local failures, by what was short.
        clients: connections of clients that are open or about to be.

    Args:
        reserve: descriptors that requests cannot have.
        upstreams: connections to instances that are open.
    """

    def __init__(self, reserve: int, upstreams: Callable[[], int]) -> None:
        self.errors: Counter[str] = Counter()
        self.clients = 0
        self._reserve = reserve
        self._upstreams = upstreams
        self._admitted = 0
        self._promised = 0
        self._own = 0
        self._counted_at = -math.inf
        self._limit = 0

    async def take(self, wanted: int) -> bool:
        """Let a request in that needs ``wanted`` more; False if they would be the reserve's.

        Who is refused leaves soon: a request that has room waits for that.
        """
        self._count()
        if self._full(wanted):
            self.errors["descriptors"] += 1
            return False
        self._admitted += 1
        self._promised += wanted
        return not self._crowded() or await self._cleared(wanted)

    async def _cleared(self, wanted: int) -> bool:
        """Wait until enough of those who were refused are gone."""
        try:
            async with asyncio.timeout(LEAVE_S):
                while self._crowded():
                    await asyncio.sleep(LOOK_S)
                    self._count()
        except TimeoutError:
            self.give_back(wanted)
            self.errors["descriptors"] += 1
            return False
        except asyncio.CancelledError:
            self.give_back(wanted)
            raise
        return True

    def has_room(self) -> bool:
        """Whether one more client may be accepted."""
        self._count()
        return not self._crowded(1)

    def give_back(self, wanted: int) -> None:
        """End what :meth:`take` let in."""
        self._admitted -= 1
        self._promised -= wanted

    def _connections(self) -> int:
        return max(self._upstreams(), self._promised)

    def _full(self, wanted: int) -> bool:
        taken = self._own + self._admitted + max(self._upstreams(), self._promised + wanted)
        return bool(self._limit) and taken + 1 > self._limit - self._reserve

    def _crowded(self, coming: int = 0) -> bool:
        taken = self._own + self.clients + coming + self._connections()
        return bool(self._limit) and taken > self._limit - self._reserve // 2

    def _count(self) -> None:
        """Count what belongs neither to clients nor to requests, now and then."""
        now = time.monotonic()
        if now - self._counted_at <= RECOUNT_S:
            return
        self._counted_at = now
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit = 0 if limit == resource.RLIM_INFINITY else limit
        try:
            used = len(os.listdir("/dev/fd"))
        except OSError as error:
            if is_local(error):
                used = self._limit
            else:
                return
        self._own = max(0, used - self.clients - self._upstreams())
