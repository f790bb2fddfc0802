"""Keeps every instance's health and description current.

An instance serves once it answers ``/health`` and, where requests are to be moved, once it has
described itself as a STAR instance of our protocol version.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from sglang_star.errors import ConfigError, PeerError, StarError, VersionMismatch
from sglang_star.protocol import PROTOCOL_VERSION, Advertisement
from sglang_star_router.config import RouterConfig
from sglang_star_router.engine import EngineClient
from sglang_star_router.fleet import Fleet
from sglang_star_router.instance import Instance
from sglang_star_router.policy.snapshot import RESERVE_EACH
from sglang_star_router.upstream import OutOfResources

logger = logging.getLogger(__name__)

DEFAULT_BOOTSTRAP_PORT = 8998
DOWN_INTERVAL_S = 1.0
"""What is down, or has just failed a check, is looked at this often, so that it is known soon."""


class Health:
    """Checks instances periodically, and at once when something suspicious happens.

    Attributes:
        errors: checks that failed because of the router itself, by what it was.

    Args:
        described: called after an instance's description has changed.
    """

    def __init__(
        self,
        config: RouterConfig,
        fleet: Fleet,
        engine: EngineClient,
        described: Callable[[Instance], None],
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._engine = engine
        self._described = described
        self._wake: dict[str, asyncio.Event] = {url: asyncio.Event() for url in fleet.instances}
        self._tasks: list[asyncio.Task[None]] = []
        self.errors: Counter[str] = Counter()
        self._silenced: set[str] = set()
        # Early enough that this and a check that times out come to less than two intervals.
        self._quiet_s = config.health_check_interval / 4

    def start(self) -> None:
        """Begin to check."""
        self._tasks = [
            asyncio.create_task(self._watch(one), name=f"health {one.endpoint.url}")
            for one in self._fleet
        ]

    async def close(self) -> None:
        """Stop checking."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def suspect(self, instance: Instance, reason: str = "") -> None:
        """Check an instance without waiting.

        Args:
            reason: it does not even accept connections, for this reason: exclude it until then.
        """
        if reason and instance.healthy:
            self._exclude(instance, reason)
            instance.successes = 0
        self._wake[instance.endpoint.url].set()

    def listen(self) -> None:
        """Check at once what is silent for a while although answers are waited for."""
        for instance in self._fleet:
            if instance.healthy and self._mute(instance):
                self._wake[instance.endpoint.url].set()

    def doubt(self, instance: Instance) -> None:
        """Describe an instance again: it speaks as if it were another one or had restarted."""
        instance.described = False
        self._wake[instance.endpoint.url].set()

    async def check(self, instance: Instance) -> None:
        """Check one instance once; never raises for what an instance does."""
        mute = self._mute(instance)
        try:
            # What was excluded for its silence has to generate before it comes back.
            await self._ask(instance, generate=mute or instance.endpoint.url in self._silenced)
            if not instance.described or not instance.healthy or self._silent(instance):
                await self._describe(instance)
        except OutOfResources as error:
            self._note_own(instance, "descriptors", error)
            return
        except StarError as error:
            instance.successes = 0
            instance.failures += 1
            # A refused instance, unlike a slow one, will not do better at the next check; and
            # one that is silent about its requests has failed them already.
            if mute and not self._mute(instance):
                # It has come to itself; what it was silent about may be lost there.
                mute = False
                self._send_elsewhere(instance, f"it was silent: {error}", self._quiet_s)
            hopeless = mute or isinstance(error, ConfigError | VersionMismatch)
            if hopeless or instance.failures >= self._config.health_failure_threshold:
                if mute:
                    self._silenced.add(instance.endpoint.url)
                self._exclude(instance, str(error))
                self._send_elsewhere(instance, f"it is excluded: {error}")
            return
        self._silenced.discard(instance.endpoint.url)
        instance.failures = 0
        instance.successes += 1
        if not instance.healthy and instance.successes >= self._config.health_success_threshold:
            instance.healthy, instance.trouble = True, ""
            logger.info("%s is healthy", instance.name)
            self._fleet.changed()

    # ------------------------------------------------------------------ inside

    async def _watch(self, instance: Instance) -> None:
        wake = self._wake[instance.endpoint.url]
        interval = self._config.health_check_interval
        while True:
            wake.clear()
            try:
                await self.check(instance)
            except Exception as error:
                # A watcher that ended would leave the instance as it last was, for ever.
                self._note_own(instance, type(error).__name__, error)
            well = instance.healthy and not instance.failures
            try:
                async with asyncio.timeout(interval if well else min(interval, DOWN_INTERVAL_S)):
                    await wake.wait()
                # A status from a new incarnation wakes us for every message: keep a pace.
                await asyncio.sleep(0.05)
            except TimeoutError:
                pass

    async def _ask(self, instance: Instance, *, generate: bool) -> None:
        """Ask for its health, and whether it generates.

        Raises:
            PeerError: it is not well.
        """
        timeout_s = self._config.health_check_timeout
        paths = [self._config.health_check_endpoint]
        if generate:
            paths.append("/health_generate")
        for path in paths:
            status, _ = await self._engine.call(instance, "GET", path, timeout_s=timeout_s)
            if status != 200 and (status, path) != (404, "/health_generate"):
                raise PeerError(f"{path} answered {status}")
        if generate:
            # It has answered for itself: give its requests as long again.
            instance.line.heard_at = time.monotonic()

    def _mute(self, instance: Instance) -> bool:
        return instance.line.silence_s() >= self._quiet_s

    def _send_elsewhere(self, instance: Instance, reason: str, waited_s: float = 0.0) -> None:
        """Try elsewhere what has not begun to be answered, if there is an elsewhere."""
        others = self._fleet.of_role(instance.role)
        if any(one.healthy for one in others if one is not instance):
            count = instance.line.give_up(f"{instance.name} is given up: {reason}", waited_s)
            if count:
                logger.warning("%d requests leave %s unanswered", count, instance.name)

    def _note_own(self, instance: Instance, what: str, error: Exception) -> None:
        """Count a check that failed at this end; the instance is left as it was."""
        self.errors[what] += 1
        if self.errors[what] == 1:
            logger.error("the router's check of %s failed", instance.name, exc_info=error)

    def _silent(self, instance: Instance) -> bool:
        """Whether a STAR instance publishes nothing: it may have restarted on other ports."""
        stale = instance.age_s(time.monotonic()) > self._config.status_stale
        return instance.advertisement is not None and stale

    def _exclude(self, instance: Instance, reason: str) -> None:
        if instance.healthy or instance.trouble != reason:
            logger.warning("%s is excluded: %s", instance.name, reason)
        instance.healthy, instance.trouble = False, reason
        self._fleet.changed()

    async def _describe(self, instance: Instance) -> None:
        """Read ``/server_info``.

        Raises:
            PeerError, ConfigError, VersionMismatch: why the instance cannot serve in this fleet.
        """
        status, info = await self._engine.json(instance, "GET", "/server_info")
        if status != 200 or not isinstance(info, dict):
            raise PeerError(f"/server_info answered {status}", hint="is this an SGLang server?")
        advertisement = self._advertisement(info)
        if advertisement is not None and advertisement.role != instance.role:
            raise ConfigError(
                f"{instance.endpoint.url} is a {advertisement.role} instance",
                hint=f"it was listed as {instance.role}: correct the router's flags",
            )
        instance.context_limit = _number(info.get("max_req_input_len")) or _number(
            info.get("context_length")
        )
        instance.kv_capacity = _number(info.get("max_total_num_tokens"))
        reserve = info.get("num_reserved_decode_tokens")
        instance.reserve_each = reserve if isinstance(reserve, int) else RESERVE_EACH
        if instance.role == "prefill":
            self._bootstrap(instance, _number(info.get("disaggregation_bootstrap_port")))
        self._fleet.describe(instance, advertisement)
        self._described(instance)

    def _bootstrap(self, instance: Instance, reported: int) -> None:
        """Follow a prefill instance to another bootstrap port.

        A port given on the command line holds, for the reported one may lie behind a port mapping,
        until the instance reports another than before.
        """
        moved = instance.reported_port not in (0, reported)
        if instance.bootstrap_port is None or moved:
            now = reported or DEFAULT_BOOTSTRAP_PORT
            if instance.bootstrap_port not in (None, now):
                logger.warning("%s takes part at bootstrap port %d now", instance.name, now)
            instance.bootstrap_port = now
        instance.reported_port = reported

    def _advertisement(self, info: dict[str, Any]) -> Advertisement | None:
        """Return what the instance says of STAR, None for plain SGLang if that is acceptable."""
        rescheduling = self._config.rescheduler != "off"
        raw = info.get("star")
        if raw is None:
            if rescheduling:
                raise ConfigError(
                    "this instance does not advertise STAR, so its requests cannot be moved",
                    hint="start it with --star, or run the router with --rescheduler off",
                )
            return None
        version = raw.get("protocol_version") if isinstance(raw, dict) else None
        if version != PROTOCOL_VERSION:
            if rescheduling:
                raise VersionMismatch(
                    f"this instance speaks STAR protocol {version}, the router {PROTOCOL_VERSION}",
                    hint="run the same sglang-star release on every instance and router",
                )
            return None
        try:
            return msgspec.convert(raw, Advertisement)
        except msgspec.ValidationError as error:
            raise VersionMismatch(
                f"this instance's STAR advertisement is malformed: {error}",
                hint="run the same sglang-star release on every instance and router",
            ) from error


def _number(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
