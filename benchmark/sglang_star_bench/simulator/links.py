"""Links between instances: prefill's KV and moves share them, segment by segment.

Every decode instance has one link in and one out. What is sent takes the two ends that it needs for
one segment at a time and then queues again, so that two transfers to one instance get half of its
link each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_star_bench.simulator.instance import Instance

SEGMENT_TOKENS = 8192
"""As much KV as one chunk of prefill makes."""

At = Callable[[float, Callable[[Any], None], Any], None]


class Links:
    """Who may send when.

    Args:
        at: schedules a call at a time.
        shared: False gives prefill a link of its own at full speed.
    """

    def __init__(self, at: At, *, shared: bool = True) -> None:
        self._at = at
        self._shared = shared
        self._out_free: dict[int, float] = {}
        self._in_free: dict[int, float] = {}

    def send(
        self,
        source: Instance | None,
        target: Instance,
        tokens: int,
        now_s: float,
        done: Callable[[Any], None],
        argument: Any,
    ) -> None:
        """Send ``tokens`` of KV; ``done(argument)`` is called when they have arrived.

        Args:
            source: None for prefill, whose own links are never the narrow place.
        """
        segment = min(tokens, SEGMENT_TOKENS)
        profile = target.profile
        rate = profile.link_bytes_per_s
        begin = now_s
        if source is not None:
            rate = min(rate, source.profile.link_bytes_per_s)
            begin = max(begin, self._out_free.get(source.row, 0.0))
        apart = source is None and not self._shared
        if not apart:
            begin = max(begin, self._in_free.get(target.row, 0.0))
        end = begin + segment * profile.kv_bytes / rate
        if not apart:
            self._in_free[target.row] = end
        if source is not None:
            self._out_free[source.row] = end
        if tokens > segment:
            rest = (source, target, tokens - segment, end, done, argument)
            self._at(end, self._go_on, rest)
        else:
            self._at(end + profile.link_latency_ms / 1e3, done, argument)

    def _go_on(self, rest: tuple[Any, ...]) -> None:
        self.send(*rest)
