"""A local cluster: SGLang engines with STAR and their router, as one thing that starts and ends.

Used by ``star cluster``, ``star demo``, the benchmarks and the end-to-end tests. Nothing is
configured that could not be typed: every process is an ordinary command line with a log file.
"""

from __future__ import annotations

import contextlib
import json
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from sglang_star.cluster_layout import (
    CPU_ENVIRONMENT,
    HERE,
    ClusterSpec,
    Engine,
    Place,
    engines,
    router_command,
)
from sglang_star.errors import SetupError
from sglang_star.forkserver import ForkServer, forkable
from sglang_star.machine import free_ports, port_is_free, require_memory
from sglang_star.process import ServerProcess, wait_healthy

Report: TypeAlias = Callable[[str], None]


@dataclass
class Cluster:
    """A running cluster; use it as a context manager, so that it ends with the block.

    Attributes:
        forks: what engines are forked from; without one the cluster makes its own for the time of
            its start, where that is possible and ``fork`` allows it.
        url: the router's address, once started; engines: where the engines are.
    """

    spec: ClusterSpec
    logs: Path
    report: Report = print
    forks: ForkServer | None = None
    fork: bool = True
    url: str = ""
    engines: tuple[Engine, ...] = ()
    _processes: list[ServerProcess] = field(default_factory=list)

    def __enter__(self) -> Cluster:
        """Start everything and wait until it serves.

        Raises:
            SetupError: too little memory, a port taken, or a process that did not come up.
        """
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End every process."""
        self.stop()

    def check(self) -> None:
        """Do nothing while every process lives.

        Raises:
            SetupError: one ended; the message carries the end of its log.
        """
        for process in self._processes:
            process.check()

    def replace_router(self, **changes: Any) -> None:
        """Start another router, with fields of the specification changed, in place of this one.

        The engines keep running; what still streams through the old router breaks off.

        Raises:
            SetupError: the new router did not come up.
        """
        self._processes.pop().stop()
        port = self.spec.port or self._free_port()
        self._start_router(replace(self.spec, **changes), port)
        self._wait(self._processes[-1:], time.monotonic())

    def stop(self) -> None:
        """End every process and wait until none is left; more Ctrl-C does not stop it."""
        for process in self._processes:
            process.ask_to_stop()
        while self._processes:
            try:
                self._processes[-1].stop()
            except KeyboardInterrupt:
                continue
            self._processes.pop()

    def _start(self) -> None:
        spec = self.spec
        self.logs.mkdir(parents=True, exist_ok=True)
        require_memory(len(spec.roles), spec.model)
        if spec.port and not spec.places and not port_is_free(spec.port, spec.host):
            raise SetupError(
                f"port {spec.port} on {spec.host} is taken",
                hint="choose another with --port, or end the program that listens there",
            )
        self.engines = tuple(engines(spec))
        port = spec.port or self._free_port()
        began = time.monotonic()
        self.report(f"starting {len(self.engines)} engines with {spec.model}")
        with contextlib.ExitStack() as stack:
            forks = self.forks or self._fork_server(stack)
            for engine in self.engines:
                self._launch(
                    engine.name, engine.command, engine.url, CPU_ENVIRONMENT, forks, engine.place
                )
            self._start_router(spec, port)
            self._wait(self._processes, began, forks)

    def _free_port(self) -> int:
        """A port for the router; one that is free here is free on another machine as well."""
        return free_ports(1, HERE.address if self.spec.places else self.spec.host)[0]

    def _fork_server(self, stack: contextlib.ExitStack) -> ForkServer | None:
        """Start a fork server of our own, if these engines can be forks."""
        if not self.fork or not all(forkable(engine.command) for engine in self.engines):
            return None
        return stack.enter_context(
            ForkServer(self.logs / "imports.log", CPU_ENVIRONMENT, star=self.spec.star)
        )

    def _start_router(self, spec: ClusterSpec, port: int) -> None:
        self.url = f"http://{spec.router_host}:{port}"
        place = spec.places[-1] if spec.places else HERE
        self._launch("router", router_command(spec, self.engines, port), self.url, {}, None, place)

    def _launch(
        self,
        name: str,
        command: tuple[str, ...],
        url: str,
        environment: dict[str, str],
        forks: ForkServer | None = None,
        place: Place = HERE,
    ) -> None:
        self._processes.append(
            ServerProcess(
                name,
                command,
                url=url,
                log=self.logs / f"{name}.log",
                environment=environment,
                forks=forks,
                place=place,
            )
        )

    def _wait(
        self, processes: list[ServerProcess], began: float, forks: ForkServer | None = None
    ) -> None:
        def tell() -> None:
            if forks and (took := forks.imported_after()):
                self.report(f"SGLang is imported, once for all, after {took:.0f} s")

        waiting = list(processes)
        while waiting:
            left = self.spec.start_timeout_s - (time.monotonic() - began)
            for process in wait_healthy(waiting, left, tell):
                waiting.remove(process)
                self.report(f"{process.name} is ready after {time.monotonic() - began:.0f} s")
            self.check()
        while not self._members_healthy():
            if time.monotonic() - began > self.spec.start_timeout_s:
                raise SetupError(
                    "the router does not accept every engine; the end of its log:\n"
                    + self._processes[-1].tail(),
                    hint=f"the whole log is {self._processes[-1].log}",
                )
            self.check()
            time.sleep(0.1)

    def _members_healthy(self) -> bool:
        """Whether the router sends requests to every engine: it is healthy before it does."""
        asked = urllib.request.Request(f"{self.url}/star/cluster")
        given = self.spec.router_arguments
        for flag in ("--api-key", "--admin-api-key"):
            if flag in given[:-1]:
                key = given[given.index(flag) + 1]
                asked.add_header("Authorization", f"Bearer {key}")
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return all(one["healthy"] for one in json.load(answer)["instances"])
