"""Runs one command so that nothing of it outlives the process that wanted it.

``python -m sglang_star.supervise GRACE_S COMMAND ...`` starts COMMAND in a session of its own and
waits. When COMMAND ends, or standard input reaches its end (the owner closed it, or died, even of
SIGKILL), the whole process group is ended, SIGTERM first and SIGKILL after GRACE_S seconds, and
this process exits with COMMAND's status. Standard library only: it starts in milliseconds and
stays small.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time


def main() -> int:
    """Supervise; return the command's exit status, 128 + N if signal N ended it."""
    grace_s, command = float(sys.argv[1]), sys.argv[2:]
    # The terminal's Ctrl-C and a service manager's stop reach the owner, who then tells us.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_default_signals
    )
    _wait_for_end_or_order(child)
    _signal_group(child.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while _group_lives(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    _signal_group(child.pid, signal.SIGKILL)
    status = child.wait()
    return status if status >= 0 else 128 - status


def _default_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _wait_for_end_or_order(child: subprocess.Popen[bytes]) -> None:
    ended = os.pidfd_open(child.pid)
    with selectors.DefaultSelector() as selector:
        selector.register(ended, selectors.EVENT_READ)
        selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
        selector.select()
    os.close(ended)


def _group_lives(child: subprocess.Popen[bytes]) -> bool:
    child.poll()  # reaps it: a zombie would count as a living member
    return _signal_group(child.pid, 0)


def _signal_group(group: int, number: int) -> bool:
    """Signal every member; return whether there was one."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
