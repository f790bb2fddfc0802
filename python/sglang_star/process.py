"""A server process: started under supervision, logged to a file, waited for, ended for certain."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from sglang_star.errors import SetupError

GRACE_S: Final = 5.0
"""Time between SIGTERM and SIGKILL."""


class ServerProcess:
    """One server, its process group and its log file.

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
    ) -> None:
        self.name = name
        self.url = url
        self.log = log
        self._stopping = False
        with log.open("wb") as output:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-m", "sglang_star.supervise", str(GRACE_S), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
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
        if self._supervisor.stdin and not self._supervisor.stdin.closed:
            self._supervisor.stdin.close()

    def stop(self) -> None:
        """End the process group and wait until nothing of it is left."""
        self.ask_to_stop()
        self._supervisor.wait()


def wait_healthy(processes: Sequence[ServerProcess], timeout_s: float) -> list[ServerProcess]:
    """Wait until one or more of ``processes`` are healthy and return those.

    Raises:
        SetupError: one of them ended, or none became healthy within ``timeout_s`` seconds.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
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
