"""The fleet as the router knows it: all instances, and what their statuses tell together.

A status counts only if it comes from the incarnation the instance advertised and is newer than the
one before. One from another incarnation means a restart: the instance is described afresh before
anything it says is believed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial

from sglang_star.errors import ConfigError
from sglang_star.protocol import Advertisement, InstanceStatus, MoveReport
from sglang_star_router.breaker import Breaker
from sglang_star_router.faults import FaultLimits
from sglang_star_router.instance import Dispatch, Instance
from sglang_star_router.lengths import Lengths
from sglang_star_router.members import Member
from sglang_star_router.obstacles import Obstacles
from sglang_star_router.prompt_sizes import PromptSizes
from sglang_star_router.table import RequestTable

logger = logging.getLogger(__name__)

SEND_GRACE_S = 2.0
"""A dispatched batch, whose rids the router does not know, counts as unseen for so long."""


class Verdict(Enum):
    """What became of a status that arrived."""

    TAKEN = "taken"
    STALE = "stale"
    OTHER_INCARNATION = "other_incarnation"
    OTHER_INSTANCE = "other_instance"


class Fleet:
    """All instances, the lengths of what finished, and when each request last moved.

    Attributes:
        version: grows whenever a snapshot taken before would differ.
        lengths: what requests that have ended tell.
        obstacles: between which instances no request can move.
        prompts: what their sizes tell.
    """

    def __init__(
        self,
        members: tuple[Member, ...],
        *,
        calibrate: bool = True,
        limits: FaultLimits | None = None,
    ) -> None:
        self.instances: dict[str, Instance] = {}
        limits = limits or FaultLimits()
        for member in members:
            url = member.endpoint.url
            instance = self.instances[url] = Instance(
                member.endpoint, member.role, member.bootstrap_port, name=url,
                breaker=Breaker(limits),
            )  # fmt: skip
            instance.breaker.others = partial(self._stand_ins, instance)
        self._decoding = self.of_role("decode", "aggregated")
        self.version = 0
        self.lengths = Lengths(calibrate=calibrate)
        self.obstacles = Obstacles()
        self.prompts = PromptSizes()
        self.on_move_report: Callable[[Instance, MoveReport], None] = _ignore_report
        self._settled_s: dict[str, float] = {}
        self._changed: set[Callable[[], None]] = set()

    def __iter__(self) -> Iterator[Instance]:
        return iter(self.instances.values())

    def of_role(self, *roles: str) -> list[Instance]:
        """Instances with one of ``roles``, in the order of the command line."""
        return [instance for instance in self if instance.role in roles]

    def decoding(self) -> list[Instance]:
        """Instances that decode."""
        return self._decoding

    def _stand_ins(self, instance: Instance) -> list[Breaker]:
        """Breakers of the instances that could serve instead of ``instance``."""
        return [
            one.breaker for one in self.of_role(instance.role)
            if one is not instance and one.healthy and not one.draining
        ]  # fmt: skip

    def find(self, name: str) -> Instance | None:
        """Look an instance up by its name or its URL."""
        by_url = self.instances.get(name.rstrip("/"))
        return by_url or next((one for one in self if one.name == name), None)

    def holder(self, rid: str) -> Instance | None:
        """The instance whose KV pool holds ``rid`` now, by its status or our own dispatch."""
        decoding = self.decoding()
        for instance in decoding:
            if instance.table.row(rid) is not None:
                return instance
        return next((one for one in decoding if rid in one.by_rid), None)

    # ------------------------------------------------------------------ what instances tell

    def describe(self, instance: Instance, advertisement: Advertisement | None) -> None:
        """Take in what ``/server_info`` says of STAR.

        Raises:
            ConfigError: its id is another instance's.
        """
        name_before = instance.name
        if advertisement is not None:
            namesake = self.find(advertisement.instance_id)
            if namesake is not None and namesake is not instance:
                raise ConfigError(
                    f"{instance.endpoint.url} and {namesake.endpoint.url} both call themselves "
                    f"{advertisement.instance_id!r}",
                    hint="give each its own --star-instance-id",
                )
            instance.name = advertisement.instance_id
            before = instance.advertisement
            if before is not None and before.incarnation != advertisement.incarnation:
                instance.restarts += 1
                logger.info("%s restarted", instance.name)
                if before.predictor != advertisement.predictor:
                    self.lengths.forget_corrections()
            if before is None or before.incarnation != advertisement.incarnation:
                self._forget_status(instance)
        instance.advertisement = advertisement
        instance.described = True
        self._compare(instance, name_before)
        self.changed()

    def _compare(self, instance: Instance, name_before: str) -> None:
        """Find out with which others it can exchange requests."""
        known = instance.advertisement
        if known is None or instance.name != name_before:
            self.obstacles.forget(name_before)
        if known is not None and instance.role != "prefill":
            others = [(m.name, m.advertisement) for m in self.decoding() if m is not instance]
            self.obstacles.update(instance.name, known, [(n, a) for n, a in others if a])

    def apply(self, instance: Instance, status: InstanceStatus) -> Verdict:
        """Take in a status, unless it is a duplicate, late, or from a ghost."""
        known = instance.advertisement
        if known is None or status.instance_id != known.instance_id:
            return Verdict.OTHER_INSTANCE
        if status.incarnation != known.incarnation:
            return Verdict.OTHER_INCARNATION
        if instance.status is not None and status.sequence <= instance.status.sequence:
            return Verdict.STALE
        now = time.monotonic()
        before = instance.table
        instance.status, instance.status_at = status, now
        instance.table = RequestTable.of(status.requests, self._settled_s, now)
        self._reconcile(instance, before, now)
        for report in status.recent_moves:
            self.on_move_report(instance, report)
        self.changed()
        return Verdict.TAKEN

    def moved(self, rid: str) -> None:
        """Note that a move of ``rid`` has just ended."""
        now = time.monotonic()
        self._settled_s[rid] = now
        for instance in self.decoding():
            row = instance.table.row(rid)
            if row is not None:
                instance.table.settled_s[row] = now

    def _reconcile(self, instance: Instance, before: RequestTable, now: float) -> None:
        """Match the new status with what was dispatched, and learn from what has finished."""
        table = instance.table
        for sent in instance.dispatches:
            if not sent.seen:
                row = table.row(sent.rid) if sent.rid else None
                if row is not None:
                    sent.seen = True
                    self.prompts.learn(sent.rid, int(table.prompt_tokens[row]))
                elif not sent.rid:
                    sent.seen = now - sent.sent_s > SEND_GRACE_S
        for rid in before.rids:
            if table.row(rid) is None and self.holder_in_status(rid) is None:
                row = before.row(rid)
                assert row is not None
                tokens = before.length_at_end(row, table)
                self.lengths.vanished(rid, tokens, in_flight=self._in_flight(rid))
                self._settled_s.pop(rid, None)
        self.lengths.shown(table)

    def _in_flight(self, rid: str) -> bool:
        return any(rid in one.by_rid for one in self)

    def holder_in_status(self, rid: str) -> Instance | None:
        """The instance whose latest status shows ``rid``."""
        return next((one for one in self.decoding() if one.table.row(rid) is not None), None)

    def _forget_status(self, instance: Instance) -> None:
        for rid in instance.table.rids:
            self._settled_s.pop(rid, None)
            self.lengths.lost(rid)
        instance.status = None
        instance.table = RequestTable.empty()

    # ------------------------------------------------------------------ what the router knows

    def sent(
        self, instance: Instance, rid: str, prompt_tokens: int, prompt_bytes: int, max_new: int
    ) -> Dispatch:
        """Record a request sent to ``instance``."""
        dispatch = Dispatch(rid, prompt_tokens, max_new, time.monotonic())
        instance.dispatches.add(dispatch)
        if rid:
            instance.by_rid[rid] = dispatch
            self.prompts.note(rid, prompt_bytes)
        return dispatch

    def ended(self, instance: Instance, dispatch: Dispatch) -> None:
        """Forget a request that has ended, however it ended."""
        instance.dispatches.discard(dispatch)
        if instance.by_rid.get(dispatch.rid) is dispatch:
            del instance.by_rid[dispatch.rid]
        self.prompts.forget(dispatch.rid)
        if self.lengths.awaits(dispatch.rid) and not self._in_flight(dispatch.rid):
            self.lengths.ended(dispatch.rid)
        self.changed()

    # ------------------------------------------------------------------ change

    def watch(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` whenever an instance may have got room."""
        self._changed.add(callback)

    def changed(self) -> None:
        """Note a change that may matter to a decision."""
        self.version += 1
        for callback in self._changed:
            callback()


def _ignore_report(instance: Instance, report: MoveReport) -> None:
    """Stand in for the ledger where nothing is rescheduled."""
