"""Runs one command so that nothing of it outlives the process that wanted it.

``python -m sglang_star.supervise GRACE_S COMMAND ...`` starts COMMAND in a session of its own and
waits. When standard input reaches its end (the owner closed it, or died, even of SIGKILL),
COMMAND gets a SIGTERM and GRACE_S seconds to end itself and its children in good order. Once it
has ended, or has not in time, the rest of its process group is killed, and this process exits
with COMMAND's status. Standard library only: it starts in milliseconds and
stays small.

Who forks engines instead of starting commands does the same with :func:`begin`, :func:`guard` and
:func:`default_signals`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time

_OWNERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    """Supervise; return the command's exit status, 128 + N if signal N ended it."""
    grace_s, command = float(sys.argv[1]), sys.argv[2:]
    begin()
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=default_signals
    )
    return guard(child.pid, sys.stdin.fileno(), grace_s)


def begin() -> None:
    """Prepare this process to supervise; call before the child starts."""
    # The terminal's Ctrl-C and a service manager's stop reach the owner, who then tells us.
    for number in _OWNERS:
        signal.signal(number, signal.SIG_IGN)
    _adopt_orphans()


def guard(group: int, owner: int, grace_s: float) -> int:
    """Wait for the child ``group``, a session leader, and end its whole group.

    Args:
        group: process id of the child.
        owner: descriptor that becomes readable, or reaches its end, when the child is to end.
        grace_s: seconds between SIGTERM and SIGKILL.

    Returns:
        The child's exit status, 128 + N if signal N ended it.
    """
    with selectors.DefaultSelector() as selector:
        ended = os.pidfd_open(group)
        selector.register(ended, selectors.EVENT_READ)
        selector.register(owner, selectors.EVENT_READ)
        selector.select()
        # Only the leader is asked: servers take the end of a child for a crash and dwell on it.
        signal.pidfd_send_signal(ended, signal.SIGTERM)
        selector.unregister(owner)
        selector.select(grace_s)
    status = -1
    while _kill(group):
        time.sleep(0.01)
        status = _reap(group, status)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def default_signals() -> None:
    """Undo :func:`begin` in the child: it answers signals as any program does."""
    for number in _OWNERS:
        signal.signal(number, signal.SIG_DFL)


def _adopt_orphans() -> None:
    """Become the parent of whatever the command leaves behind, so that none stays a zombie."""
    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def _reap(group: int, status: int) -> int:
    """Collect all dead children; return the leader's wait status once it is among them."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, its_status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == group:
                status = its_status
    return status


def _kill(group: int) -> bool:
    """Kill every member; return whether there was one, zombies included."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
