"""One instance as the router knows it: its latest status, and what was sent to it since."""

from __future__ import annotations

from dataclasses import dataclass, field

from sglang_star.protocol import Advertisement, InstanceStatus
from sglang_star_router.breaker import Breaker
from sglang_star_router.faults import FaultLimits
from sglang_star_router.line import Line
from sglang_star_router.members import Endpoint
from sglang_star_router.policy.snapshot import RESERVE_EACH
from sglang_star_router.table import RequestTable


@dataclass(slots=True, eq=False)
class Dispatch:
    """A request this router has sent to an instance and that has not ended.

    Attributes:
        rid: empty for batches, whose rids the engine makes up.
        prompt_tokens: estimate; sent_s: monotonic seconds.
        seen: the instance's status has shown it, so it no longer needs counting twice.
    """

    rid: str
    prompt_tokens: int
    max_new_tokens: int
    sent_s: float
    seen: bool = False


@dataclass(slots=True, eq=False)
class Instance:
    """One instance and everything known of it.

    Attributes:
        name: what policies and operators call it: its advertised id, or its URL.
        healthy: passes health checks; trouble: why it is excluded, empty when it is not.
        advertisement: None until described, and always for plain SGLang.
        status, status_at: latest status and when it came, monotonic seconds.
        table: the requests of ``status`` as arrays.
        held_back: an operator asked the router to send nothing new here.
        context_limit: longest prompt it takes, tokens; 0 if unknown.
        reserve_each: KV tokens its admission keeps free for every active request; SGLang's
            default for an instance that does not say.
        dispatches: requests sent here that have not ended.
        bootstrap_port: of a prefill instance; reported_port: what it said of it last.
        breaker: how attempts here went; line: what is under way.
    """

    endpoint: Endpoint
    role: str
    bootstrap_port: int | None
    name: str
    healthy: bool = False
    trouble: str = "not contacted yet"
    advertisement: Advertisement | None = None
    described: bool = False
    context_limit: int = 0
    kv_capacity: int = 0
    reserve_each: int = RESERVE_EACH
    status: InstanceStatus | None = None
    status_at: float = 0.0
    table: RequestTable = field(default_factory=RequestTable.empty)
    held_back: bool = False
    failures: int = 0
    successes: int = 0
    restarts: int = 0
    dispatches: set[Dispatch] = field(default_factory=set)
    by_rid: dict[str, Dispatch] = field(default_factory=dict)
    reported_port: int = 0
    breaker: Breaker = field(default_factory=lambda: Breaker(FaultLimits()))
    line: Line = field(default_factory=Line)

    @property
    def guest_reserve(self) -> int:
        """Of :attr:`reserve_each`, what it keeps free when a guest comes."""
        return 0 if self.role == "aggregated" else self.reserve_each

    @property
    def draining(self) -> bool:
        """No new work is wanted, by the engine's own word or by an operator's."""
        return self.held_back or (self.status is not None and self.status.draining)

    def unseen(self) -> list[Dispatch]:
        """Requests sent here that its status does not show yet, in no particular order."""
        if self.advertisement is None:
            return list(self.dispatches)
        return [sent for sent in self.dispatches if not sent.seen]

    def age_s(self, now: float) -> float:
        """Age of the status; infinite if there is none."""
        return now - self.status_at if self.status is not None else float("inf")

    def alive(self, now: float, stale_s: float) -> bool:
        """Whether it is healthy and its status, if it has one, fresh: moves off it can work."""
        return self.healthy and (self.status is None or now - self.status_at <= stale_s)
