"""A piece of a request's KV that is being copied, or lies in a slot until the target has it."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_star.migration.transport.base import Fetch, Grant, Region


@dataclass(frozen=True, slots=True)
class Loaded:
    """At the source: positions ``[start, end)`` that go into a slot of ``region``.

    Attributes:
        ticket: of the copy.
    """

    ticket: int
    start: int
    end: int
    region: Region
    grant: Grant


@dataclass(frozen=True, slots=True)
class Fetched:
    """At the target: positions that come from a peer's slot of that ``stamp``.

    Attributes:
        ticket: of the copy.
    """

    ticket: int
    stamp: int
    fetch: Fetch
