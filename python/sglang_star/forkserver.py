"""Engines as forks of one process that has imported SGLang: the side of who wants them.

Importing SGLang takes a core ten seconds and more, and an engine consists of three processes. On a
CPU nothing speaks against importing once and forking (a GPU's context does not survive a fork).
The other side is :mod:`sglang_star.platform.preloaded`.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from sglang_star.cluster_layout import HERE, Place
from sglang_star.machine import has_gpu

MODULE: Final = "sglang.launch_server"
SERVER = "sglang_star.platform.preloaded"
STAR, PLAIN = "star", "plain"
LOST: Final = 137
"""Exit status of an engine whose supervisor did not live to tell."""


class Forked:
    """A forked engine, seen through its supervisor."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._status: int | None = None

    def poll(self) -> int | None:
        """The engine's exit status once nothing of it is left; None before."""
        if self._status is None and select.select([self._line], [], [], 0)[0]:
            self._status = int(self._line.recv(16) or LOST)
        return self._status

    def ask_to_stop(self) -> None:
        """Begin ending the engine's process group; returns at once."""
        if self._status is None:
            self._line.shutdown(socket.SHUT_WR)

    def wait(self) -> int:
        """Wait for the exit status."""
        while (status := self.poll()) is None:
            select.select([self._line], [], [])
        self._line.close()
        return status


class ForkServer:
    """The process that has SGLang imported; use it as a context manager or call :meth:`stop`.

    Engines that it forked live on when it stops.

    Args:
        log: file for what the imports say.
        environment: variables of it and of every engine, beside those of this process.
        star: whether its engines run with ``--star``; an engine of the other kind is not its.
    """

    def __init__(self, log: Path, environment: Mapping[str, str], *, star: bool = True) -> None:
        self._star = star
        self._began = time.monotonic()
        self._ready = False
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, log.open("wb") as output:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", SERVER),
                    *(str(theirs.fileno()), STAR if star else PLAIN),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, **environment},
            )

    def __enter__(self) -> ForkServer:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop."""
        self.stop()

    def start(
        self, command: Sequence[str], log: Path, grace_s: float, place: Place = HERE
    ) -> Forked:
        """Fork an engine, as soon as the imports are done; returns at once.

        Args:
            command: an engine's command line, see :meth:`suits`.
            log: file for its standard output and error.
            grace_s: seconds between SIGTERM and SIGKILL when it is to end.
            place: where it is to run.
        """
        order = {
            "arguments": list(command[3:]),
            "log": str(log.resolve()),
            "grace_s": grace_s,
            "namespaces": place.namespaces,
            "environment": dict(place.environment),
        }
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._control, [json.dumps(order).encode()], [theirs.fileno()])
            except OSError:  # it died: the engine counts as ended with it
                log.write_text("the fork server is gone; see its own log\n")
        return Forked(ours)

    def imported_after(self) -> float | None:
        """Seconds the imports took, told once, when they are done."""
        if self._ready or not select.select([self._control], [], [], 0)[0]:
            return None
        self._ready = True
        told = self._control.recv(64)
        return float(told) - self._began if told else None

    def stop(self) -> None:
        """End it; engines go on."""
        self._control.close()
        self._process.wait()

    def suits(self, command: Sequence[str]) -> bool:
        """Whether ``command`` starts an engine that this server can fork."""
        return forkable(command) and ("--star" in command) == self._star


def forkable(command: Sequence[str]) -> bool:
    """Whether ``command`` starts an engine that can be a fork."""
    return list(command[1:3]) == ["-m", MODULE] and not has_gpu()
