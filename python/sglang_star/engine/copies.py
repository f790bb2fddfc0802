"""Copies of KV between a pool and staging memory, beside decoding.

On a device they run on a stream of their own: the device, and never the scheduler's thread, waits
for what they follow. On a host pool a copy is over when it is begun.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from sglang_star.errors import PeerError
from sglang_star.migration.transport.base import Fetch


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


class Unloading:
    """A piece of KV that comes from a peer; a :class:`~sglang_star.engine.tickets.Copy`.

    Args:
        fetch: of its bytes.
        scatter: begins to copy them to where they belong.
    """

    __slots__ = ("_begun", "_fetch", "_scatter")

    def __init__(self, fetch: Fetch, scatter: Callable[[torch.Tensor], Begun]) -> None:
        self._fetch = fetch
        self._scatter = scatter
        self._begun: Begun | None = None

    def is_over(self) -> bool:
        """See :class:`Copy`."""
        try:
            over = self._advance()
        except PeerError:
            self._fetch.close()
            raise
        if over:
            self._fetch.close()
        return over

    def _advance(self) -> bool:
        if self._begun is None:
            data = self._fetch.arrived()
            if data is None:
                return False
            self._begun = self._scatter(data)
        if not self._begun.is_over():
            return False
        if not self._fetch.intact():
            raise PeerError("the sender has used the slot again")
        return True


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
