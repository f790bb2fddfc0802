"""What the router looks after all the time, whatever is switched on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)

EVERY_S = 0.25


class Upkeep:
    """Calls each duty a few times a second; one that fails is logged once and called again.

    Attributes:
        errors: calls that failed.
    """

    def __init__(self, *duties: Callable[[], object]) -> None:
        self.errors = 0
        self._duties = duties
        self._said: set[str] = set()

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            await asyncio.sleep(EVERY_S)
            for duty in self._duties:
                try:
                    duty()
                except Exception as error:
                    self.errors += 1
                    if repr(error) not in self._said:
                        self._said.add(repr(error))
                        logger.exception("the router's upkeep failed; it goes on")
