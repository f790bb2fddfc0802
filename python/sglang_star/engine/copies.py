"""Copies of KV between a pool and staging memory, beside decoding.

On a device they run on a stream of their own: the device, and never the scheduler's thread, waits
for what they follow. On a host pool a copy is over when it is begun.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Lane:
    """Where copies of one pool run.

    Args:
        device: the pool's.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, copy: Callable[[], None], after: Iterable[Any] = ()) -> Begun:
        """Begin a copy.

        Args:
            copy: queues its work on the current stream.
            after: streams whose work up to now it must follow, beside the current one's.
        """
        if self._stream is None:
            copy()
            return Begun()
        for stream in (torch.cuda.current_stream(self._stream.device), *after):
            self._stream.wait_stream(stream)
        with torch.cuda.stream(self._stream):
            copy()
            event = torch.cuda.Event()
            event.record()
        return Begun(event, copy)


class Begun:
    """A copy that was queued; a :class:`~sglang_star.engine.tickets.Copy`.

    Args:
        event: of its end; None if it is over.
        work: what queued it, with the tensors that it reads: kept until then.
    """

    __slots__ = ("_event", "_work")

    def __init__(
        self, event: torch.cuda.Event | None = None, work: Callable[[], None] | None = None
    ) -> None:
        self._event = event
        self._work = work

    def is_over(self) -> bool:
        """Whether the device has come to its end."""
        if self._event is not None and not self._event.query():
            return False
        self._event = self._work = None
        return True
