"""The faults of ``star bench chaos``: how each is put to an engine, and how it is lifted."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

from sglang_star.errors import SetupError
from sglang_star.machine import free_ports
from sglang_star_bench.chaos_engine import EngineSpec

START_S = 60.0
FRESH_S = 1.5
"""A status younger than this has come through again."""


class Fleet:
    """Four fake engines, the first of which fails.

    Attributes:
        specs: how each runs now.
    """

    def __init__(self, specs: list[EngineSpec]) -> None:
        self.specs = specs
        self._children = [_start(spec) for spec in specs]
        for spec, child in zip(specs, self._children, strict=True):
            _await(spec, child)

    @property
    def disaggregated(self) -> bool:
        """Prefill and decode apart."""
        return self.specs[0].role == "prefill"

    @property
    def victim(self) -> EngineSpec:
        """The engine that fails."""
        return self.specs[0]

    def of_role(self, role: str) -> list[EngineSpec]:
        """Engines with a role."""
        return [spec for spec in self.specs if spec.role == role]

    def tell(self, fault: str) -> int:
        """Give the victim a fault; return how many requests it drew under the one before."""
        body = json.dumps({"fault": fault}).encode()
        request = urllib.request.Request(self.victim.url + "/chaos", body)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(json.load(answer)["drawn"])

    def signal(self, number: signal.Signals) -> None:
        """Send the victim's process a signal."""
        self._children[0].send_signal(number)

    def restart(self, **changes: Any) -> None:
        """Start the victim again where it was, but for ``changes``."""
        self._children[0].kill()
        self._children[0].wait()
        self.specs[0] = replace(self.victim, **changes)
        self._children[0] = _start(self.victim)
        _await(self.victim, self._children[0])

    def close(self) -> None:
        """End all."""
        for child in self._children:
            child.kill()
            child.wait()


@dataclass(frozen=True)
class Fault:
    """One fault of the victim.

    Attributes:
        begin, end: put it and lift it; ``end`` returns how many requests the victim drew.
        lasts_s: if not as long as the others.
        descriptors: limit of the router's open files, 0 for the usual one.
        only_star: the other router has nothing that it could be put to.
        watched: resolves to the time at which the fault has been got over, beside the streams.
    """

    name: str
    begin: Callable[[Fleet], object]
    end: Callable[[Fleet], int]
    lasts_s: float = 0.0
    descriptors: int = 0
    disaggregated: bool = False
    only_star: bool = False
    watched: Callable[[str, Fleet], Coroutine[Any, Any, float]] | None = None


def _told(name: str, **fields: Any) -> Fault:
    """A fault that the engine has a name for."""
    return Fault(name, lambda fleet: fleet.tell(name), lambda fleet: fleet.tell(""), **fields)


def _nothing(fleet: Fleet) -> int:
    """The fault, if there is one, is in how the router was started."""
    return 0


def _kill(fleet: Fleet) -> None:
    fleet.signal(signal.SIGKILL)


def _start_again(fleet: Fleet) -> int:
    fleet.restart()
    return 0


def _move_bootstrap(fleet: Fleet) -> None:
    fleet.restart(bootstrap_port=free_ports(1)[0])


def _stop(fleet: Fleet) -> None:
    fleet.signal(signal.SIGSTOP)


def _go_on(fleet: Fleet) -> int:
    fleet.signal(signal.SIGCONT)
    return 0


async def _status_fresh(url: str, fleet: Fleet) -> float:
    """Wait until a status of the victim has been missing and has come again."""
    missing = False
    deadline = time.monotonic() + START_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline:
            async with session.get(url + "/star/cluster?requests=0") as answer:
                rows = (await answer.json())["instances"]
            age = next(row["status_age_s"] for row in rows if row["url"] == fleet.victim.url)
            old = age is None or age > FRESH_S
            if missing and not old:
                return time.monotonic()
            missing |= old
            await asyncio.sleep(0.1)
    return float("inf")


FAULTS = (
    # What the machine itself does to the clients, to hold the others against.
    Fault("none", _nothing, _nothing),
    _told("instant 500"),
    _told("error event"),
    _told("hang after connect"),
    _told("hang after head"),
    _told("reset in the middle"),
    _told("slow drip"),
    Fault("SIGSTOP for 10 s", _stop, _go_on, lasts_s=10.0),
    Fault("SIGKILL", _kill, _start_again),
    Fault("restart, same URL", _start_again, _nothing, lasts_s=1.0),
    Fault("descriptors used up", _nothing, _nothing, descriptors=256),
    Fault("bootstrap port moved", _move_bootstrap, _nothing, lasts_s=1.0, disaggregated=True),
    _told("status half open", only_star=True, watched=_status_fresh),
    _told("clock ahead", only_star=True),
    _told("clock behind", only_star=True),
)


@contextlib.contextmanager
def fleet_of(fault: Fault, options: argparse.Namespace) -> Iterator[Fleet]:
    """Run the engines that a fault needs."""
    ports = free_ports(6)
    roles = (
        ["prefill", "prefill", "decode", "decode"] if fault.disaggregated else ["aggregated"] * 4
    )
    specs = [
        EngineSpec(
            f"{role}-{number}", ports[number], role, options.tokens, options.ttft_ms,
            options.itl_ms, ports[4 + number] if role == "prefill" else 0,
        )
        for number, role in enumerate(roles)
    ]  # fmt: skip
    fleet = Fleet(specs)
    try:
        yield fleet
    finally:
        fleet.close()


def _start(spec: EngineSpec) -> subprocess.Popen[bytes]:
    return subprocess.Popen(spec.command())


def _await(spec: EngineSpec, child: subprocess.Popen[bytes]) -> None:
    """Wait until an engine serves.

    Raises:
        SetupError: it ended, or takes too long.
    """
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise SetupError(f"{spec.name} ended with status {child.returncode}")
        with contextlib.suppress(OSError), urllib.request.urlopen(spec.url + "/health", timeout=5):
            return
        time.sleep(0.05)
    raise SetupError(f"{spec.name} did not serve within {START_S:g} s")
