"""Where one attempt at a request goes, and what is counted for it until it ends."""

from __future__ import annotations

from dataclasses import dataclass, field

from sglang_star_router.breaker import Trial
from sglang_star_router.instance import Dispatch, Instance


@dataclass(slots=True)
class Seat:
    """Where one attempt at a request goes.

    Attributes:
        decode: instance that streams to the client; prefill: its partner, None if aggregated.
        tickets: what the cluster counts until the attempt ends.
        trials: what their breakers are to be told, by URL.
        prompt_tokens: estimate.
    """

    decode: Instance
    prefill: Instance | None
    prompt_tokens: int = 0
    tickets: list[tuple[Instance, Dispatch]] = field(default_factory=list)
    trials: dict[str, Trial] = field(default_factory=dict)

    def trial(self, instance: Instance) -> Trial:
        """The trial of one of its instances."""
        return self.trials[instance.endpoint.url]
