"""A server process: started under supervision, logged to a file, waited for, ended for certain."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

from sglang_star.cluster_layout import HERE, Place
from sglang_star.errors import SetupError
from sglang_star.forkserver import ForkServer

GRACE_S: Final = 5.0
"""Time between SIGTERM and SIGKILL."""


class Supervisor(Protocol):
    """Whoever sees to the end of a server's process group."""

    def poll(self) -> int | None:
        """The server's exit status once nothing of it is left; None before."""

    def ask_to_stop(self) -> None:
        """Begin ending the process group; returns at once."""

    def wait(self) -> int:
        """Wait for the exit status."""


class Spawned:
    """A command started by :mod:`sglang_star.supervise`."""

    def __init__(
        self, command: Sequence[str], log: Path, grace_s: float, environment: Mapping[str, str]
    ) -> None:
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sglang_star.supervise", str(grace_s), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **environment},
            )

    def poll(self) -> int | None:
        """See :class:`Supervisor`."""
        return self._process.poll()

    def ask_to_stop(self) -> None:
        """See :class:`Supervisor`."""
        if self._process.stdin and not self._process.stdin.closed:
            self._process.stdin.close()

    def wait(self) -> int:
        """See :class:`Supervisor`."""
        return self._process.wait()


class ServerProcess:
    """One server, its process group and its log file.

    With ``forks``, a command that can be a fork of that server is one, and ``environment`` is that
    server's. It runs at ``place``.

    Attributes:
        name: what messages call it.
        url: its HTTP root.
        log: file with its standard output and error.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        url: str,
        log: Path,
        environment: Mapping[str, str] | None = None,
        forks: ForkServer | None = None,
        place: Place = HERE,
    ) -> None:
        self.name = name
        self.url = url
        self.log = log
        self._stopping = False
        self._supervisor: Supervisor = (
            forks.start(command, log, GRACE_S, place)
            if forks is not None and forks.suits(command)
            else Spawned((*place.enter, *command), log, GRACE_S, environment or {})
        )

    @property
    def alive(self) -> bool:
        """Whether the command still runs."""
        return self._supervisor.poll() is None

    def check(self) -> None:
        """Do nothing while it lives.

        Raises:
            SetupError: it ended; the message carries the end of its log.
        """
        status = self._supervisor.poll()
        if status is None or self._stopping:
            return
        raise SetupError(
            f"{self.name} ended with status {status}; the end of its log:\n{self.tail()}",
            hint=f"the whole log is {self.log}",
        )

    def healthy(self) -> bool:
        """Whether ``/health`` answers 200 now."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def tail(self, lines: int = 12) -> str:
        """Return the last lines of its log, and before them what STAR itself had to say in it."""
        text = self.log.read_text(errors="replace").splitlines()
        ours = [line for line in text[:-lines] if line.startswith("STAR: ")]
        return "\n".join([*ours, *text[-lines:]])

    def ask_to_stop(self) -> None:
        """Begin ending the process group; returns at once."""
        self._stopping = True
        self._supervisor.ask_to_stop()

    def stop(self) -> None:
        """End the process group and wait until nothing of it is left."""
        self.ask_to_stop()
        self._supervisor.wait()


def wait_healthy(
    processes: Sequence[ServerProcess],
    timeout_s: float,
    meanwhile: Callable[[], None] = lambda: None,
) -> list[ServerProcess]:
    """Wait until one or more of ``processes`` are healthy and return those.

    ``meanwhile`` is called between two looks.

    Raises:
        SetupError: one of them ended, or none became healthy within ``timeout_s`` seconds.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        meanwhile()
        for process in processes:
            process.check()
        if ready := [process for process in processes if process.healthy()]:
            return ready
        time.sleep(0.25)
    slow = processes[0]
    raise SetupError(
        f"{slow.name} was not ready after {timeout_s:.0f} s; the end of its log:\n{slow.tail()}",
        hint=f"the whole log is {slow.log}; other work on this machine may be slowing it down",
    )
