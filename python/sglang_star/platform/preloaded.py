"""The process that imports SGLang once and forks engines; see :mod:`sglang_star.forkserver`.

``python -m sglang_star.platform.preloaded FD star|plain`` imports what the three processes of an
engine need, installs STAR's hooks for engines with ``--star``, and then takes one order per packet
from the socket FD: the engine's arguments, and with them the descriptor on which its owner is told
the exit status and says when it is to end. It ends itself when that socket does. Without arguments
it imports and ends: Python then has everything compiled.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import shlex
import signal
import socket
import sys
import time
import traceback
from typing import Any, Final, NoReturn

import setproctitle

from sglang_star import hooks, supervise
from sglang_star.engine import installed
from sglang_star.forkserver import MODULE, STAR

IMPORTED: Final = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
    "sglang.srt.models.llama",
    "sglang.srt.layers.attention.torch_native_backend",
    "sglang.srt.disaggregation.nixl.conn",
    "nixl._api",
    "sglang_star.endpoints",
    "sglang_star.single",
    "sglang_star.ranks.member",
    "sglang_star.predictor.runner",
    "sglang_star.platform.cpu",
    "sglang_star.platform.attention",
)


def main() -> int:
    """Import, then fork whatever is ordered."""
    for name in IMPORTED:
        importlib.import_module(name)
    if len(sys.argv) == 1:
        return 0
    control = socket.socket(fileno=int(sys.argv[1]))
    _install_hooks(star=sys.argv[2] == STAR)
    # Collecting in a child would touch, and so copy, every page of these objects.
    gc.collect()
    gc.freeze()
    # Supervisors end in their own time, and nobody asks this process how.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    control.send(str(time.monotonic()).encode())
    while True:
        try:
            data, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 1)
        except ConnectionResetError:  # the owner left with our message unread
            return 0
        if not data:
            return 0
        if os.fork() == 0:
            control.close()
            _supervise(json.loads(data), descriptors[0])
        os.close(descriptors[0])


def _install_hooks(*, star: bool) -> None:
    """Install here what every engine would: SGLang looks through all modules for each hook."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    hooks.install(hooks.Scope.FORKED)
    if star:
        installed.known_findings()
        hooks.install(hooks.Scope.SERVER, hooks.Scope.SCHEDULER)


def _supervise(order: dict[str, Any], owner: int) -> NoReturn:
    """In a child: fork the engine itself and see to its end."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        supervise.begin()
        output = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC)
        # Of processes, only children come into another namespace.
        _enter(order["namespaces"])
        grouped, tell = os.pipe()
        engine = os.fork()
        if engine == 0:
            os.setsid()
            os.close(tell)
            os.close(grouped)
            os.close(owner)
            os.environ.update(order["environment"])
            _serve(order["arguments"], output)
        os.close(tell)
        os.read(grouped, 1)  # its group exists from here on
        status = supervise.guard(engine, owner, order["grace_s"])
        os.write(owner, str(status).encode())
    except BrokenPipeError:  # the owner is gone
        pass
    finally:
        os._exit(status)


def _serve(arguments: list[str], output: int) -> NoReturn:
    """In a child's child: become ``python -m sglang.launch_server ARGUMENTS``."""
    status = 1
    try:
        supervise.default_signals()
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = [MODULE, *arguments]
        # What `ps` shows and `pkill -f` finds, as if it had been started by itself.
        setproctitle.setproctitle(shlex.join(["python", "-m", MODULE, *arguments]))
        runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _enter(namespaces: list[str]) -> None:
    """Move this process, which has one thread, into other namespaces."""
    libc = ctypes.CDLL(None, use_errno=True)
    # All are opened first: another mount namespace may have another /proc.
    for space in [os.open(name, os.O_RDONLY | os.O_CLOEXEC) for name in namespaces]:
        if libc.setns(space, 0):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(space)


def fork_processes(_result: None, _server_args: Any) -> None:
    """AFTER ``_set_envs_and_config``: scheduler and detokenizer are forks as well."""
    multiprocessing.set_start_method("fork", force=True)


if __name__ == "__main__":
    sys.exit(main())
