"""Containment that contains nothing: a defect fails the test that meets it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from sglang_star.faults import Faults


class NoFaults(Faults):
    @contextlib.contextmanager
    def contained(self, what: str, end: Callable[[], object] | None = None) -> Iterator[None]:
        yield
