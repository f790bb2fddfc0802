"""What an instance tells the fleet it belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from sglang_star_bench.simulator.instance import Instance
    from sglang_star_bench.simulator.request import Request


class FleetHooks(Protocol):
    """Called by :class:`Instance`; times in seconds."""

    def wake_instance(self, instance: Instance, when_s: float, version: int) -> None:
        """Call ``instance.wake`` at ``when_s`` unless a later version has been asked for."""
        ...

    def tokens_decoded(self, requests: int, steps: int, seconds: float) -> None:
        """``steps`` steps of ``requests`` requests took ``seconds``."""
        ...

    def prefill(self, request: Request, now_s: float) -> None:
        """The request was admitted: prefill it and send its KV."""
        ...

    def request_entered(self, request: Request, instance: Instance) -> None:
        """The request joined the batch."""
        ...

    def request_left(self, request: Request, tokens: int) -> None:
        """The request left the batch with ``tokens`` output tokens."""
        ...

    def request_retracted(self, request: Request) -> None:
        """Its KV went to host memory."""
        ...

    def request_aborted(self, request: Request) -> None:
        """Neither device nor host had room for its KV; :meth:`request_done` follows."""
        ...

    def request_parked(self, request: Request, now_s: float) -> None:
        """A move reached its park step; the request may have finished or been retracted."""
        ...

    def request_done(self, request: Request) -> None:
        """FINISHED or FAILED."""
        ...

    def gap_seen(self, request: Request, now_s: float, step_s: float) -> None:
        """The request is back in a batch at ``now_s`` after a pause."""
        ...
