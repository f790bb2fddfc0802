"""Several machines on one: network namespaces joined by a switch, sharing nothing else.

Each machine has a network, processes, a /dev/shm, a /tmp and System V memory of its own; files
elsewhere, such as the installation, are the same on all, as they would be on equal machines. Every
link is held to a rate in both directions and can be cut, alone or between two machines only. Needs
Linux, root, and ``ip``, ``tc``, ``unshare`` and ``nsenter``; leaves nothing behind, even if this
process is killed: the kernel removes the whole with the last process in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from sglang_star.cluster_layout import Place
from sglang_star.errors import SetupError

SPACES: Final = (
    *("--net", "--mount", "--ipc", "--pid"),
    *("--fork", "--propagation", "private"),
)
_NAMES: Final = ("net", "ipc", "pid_for_children", "mnt")
TOOLS: Final = ("ip", "tc", "unshare", "nsenter", "mount")
SUBNET: Final = "198.19.{}.{}"
"""Set aside for measurements between networks (RFC 2544)."""
OURS: Final = 254
QUEUE_S: Final = 2e-3
"""Longest wait in a link's queue; a sender that fills it is told by a lost packet."""
BURST: Final = 128 * 1024
"""Bytes that may leave at once: the kernel hands over up to 64 KiB in one piece."""

# In the namespaces of a machine: memory and temporary files of its own, the kept folders put back.
_PREPARE: Final = """
set -e
mount -t tmpfs -o mode=1777 star /dev/shm
mkdir /dev/shm/tmp
mount -t tmpfs -o mode=1777 star /dev/shm/tmp
for folder; do
    mkdir -p "/dev/shm/tmp/${folder#/tmp/}"
    mount --rbind "$folder" "/dev/shm/tmp/${folder#/tmp/}"
    mount -o remount,bind,ro "/dev/shm/tmp/${folder#/tmp/}"
done
mount --move /dev/shm/tmp /tmp
rmdir /dev/shm/tmp
mount -t proc proc /proc
ip link set lo up
echo ready
# Not by exec: this is process 1, and a shell collects orphans while it waits.
cat
"""


def unavailable() -> str:
    """Why machines cannot be made here; empty if they can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "network namespaces need root"
    for tool in TOOLS:
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    tried = subprocess.run(["unshare", *SPACES, "true"], capture_output=True, text=True)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass(frozen=True, slots=True)
class Machine:
    """One of them.

    Attributes:
        address: on the network.
        place: for :class:`~sglang_star.cluster_layout.ClusterSpec`.
    """

    number: int
    address: str
    place: Place


class Network:
    """The machines and their switch; use it as a context manager.

    Args:
        count: of machines.
        rate: of each link as ``tc`` writes it, such as ``1gbit``; empty: as fast as it goes.
        keep: folders under /tmp that the machines have as well, and cannot write to.

    Attributes:
        address: of this process.
        machines: in order.
    """

    def __init__(self, count: int, rate: str = "", keep: Sequence[Path] = ()) -> None:
        self._count = count
        self._rate = rate
        imported = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        paths = [*keep, Path(sys.prefix), *(Path(entry) for entry in imported if entry)]
        absolute = {path.absolute() for path in paths if path.is_dir()}
        self._keep = sorted(str(path) for path in absolute if path.is_relative_to("/tmp"))
        self._net = os.getpid() % 254
        self.address = SUBNET.format(self._net, OURS)
        self.machines: list[Machine] = []
        self._stack = contextlib.ExitStack()
        self._switch = 0
        self._holders: list[int] = []

    def __enter__(self) -> Network:
        """Make them.

        Raises:
            SetupError: they cannot be made here.
        """
        if reason := unavailable():
            raise SetupError(reason, hint="run this as root on Linux with iproute2 and util-linux")
        with contextlib.ExitStack() as stack:
            self._switch = self._hold(stack, ["unshare", "--net"], "echo ready; exec cat", ())
            self._in_switch("ip", "link", "add", "switch", "type", "bridge")
            self._in_switch("ip", "link", "set", "switch", "up")
            # Our own end has no held link: what we ask and are told is not what is measured.
            ours = f"star{os.getpid()}"
            _run("ip", "link", "add", ours, "type", "veth", "peer", "name", "port0",
                 "netns", str(self._switch))  # fmt: skip
            self._plug(0)
            _run("ip", "address", "add", f"{self.address}/24", "dev", ours)
            _run("ip", "link", "set", ours, "up")
            for number in range(1, self._count + 1):
                self.machines.append(self._machine(stack, number))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Switch them off; what still runs in one keeps it, without the network."""
        self._stack.close()

    def hold(self, rate: str) -> None:
        """Hold every link to another ``rate``; empty: as fast as it goes."""
        self._rate = rate
        for machine in self.machines:
            self._hold_link(machine.number)

    def cut(self, machine: Machine) -> None:
        """Pull a machine's cable: nobody is told."""
        self._in_switch("ip", "link", "set", f"port{machine.number}", "down")

    def mend(self, machine: Machine) -> None:
        """Plug it in again."""
        self._in_switch("ip", "link", "set", f"port{machine.number}", "up")

    def part(self, *machines: Machine) -> None:
        """Let nothing pass between any of ``machines``, while all reach everybody else."""
        self._isolate(machines, "on")

    def rejoin(self, *machines: Machine) -> None:
        """Undo :meth:`part`."""
        self._isolate(machines, "off")

    def carried(self, machine: Machine) -> tuple[int, int]:
        """Bytes that a machine has sent and received so far."""
        told = self._in_switch("ip", "-json", "-stats", "link", "show", f"port{machine.number}")
        port = json.loads(told)[0]["stats64"]
        return int(port["rx"]["bytes"]), int(port["tx"]["bytes"])

    def _machine(self, stack: contextlib.ExitStack, number: int) -> Machine:
        pid = self._hold(stack, ["unshare", *SPACES], _PREPARE, self._keep)
        self._holders.append(pid)
        self._in_switch(
            "ip", "link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0",
            "netns", str(pid),
        )  # fmt: skip
        self._plug(number)
        address = SUBNET.format(self._net, number)
        inside = ("nsenter", "--target", str(pid), "--net")
        _run(*inside, "ip", "address", "add", f"{address}/24", "dev", "eth0")
        _run(*inside, "ip", "link", "set", "eth0", "up")
        _run(*inside, "ip", "route", "add", "default", "via", self.address)
        self._hold_link(number)
        namespaces = tuple(f"/proc/{pid}/ns/{space}" for space in _NAMES)
        # UCX would ask the kernel, which is the same, whether they are on one machine.
        return Machine(number, address, Place(address, namespaces, (("UCX_TLS", "tcp"),)))

    def _hold(
        self, stack: contextlib.ExitStack, spaces: list[str], script: str, folders: Sequence[str]
    ) -> int:
        """Start the process whose namespaces they are; it ends when its input does."""
        holder = subprocess.Popen(
            [*spaces, "sh", "-c", script, "machine", *folders],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        stack.enter_context(holder)
        assert holder.stdin is not None
        assert holder.stdout is not None
        stack.callback(holder.stdin.close)
        if holder.stdout.readline() != "ready\n":
            assert holder.stderr is not None
            raise SetupError(f"no machine could be made: {holder.stderr.read().strip()}")
        return holder.pid

    def _plug(self, number: int) -> None:
        self._in_switch("ip", "link", "set", f"port{number}", "master", "switch")
        self._in_switch("ip", "link", "set", f"port{number}", "up")

    def _hold_link(self, number: int) -> None:
        """Both directions: what the machine sends, and what the switch sends to it."""
        inside = ("nsenter", "--target", str(self._holders[number - 1]), "--net")
        there = ("nsenter", "--target", str(self._switch), "--net")
        for enter, device in ((inside, "eth0"), (there, f"port{number}")):
            if self._rate:
                queue = max(2 * BURST, int(_bits(self._rate) / 8 * QUEUE_S))
                _run(*enter, "tc", "qdisc", "replace", "dev", device, "root", "tbf",
                     "rate", self._rate, "burst", str(BURST), "limit", str(queue))  # fmt: skip
            else:
                _run(*enter, "tc", "qdisc", "replace", "dev", device, "root", "pfifo")

    def _isolate(self, machines: Sequence[Machine], state: str) -> None:
        for machine in machines:
            self._in_switch(
                "ip", "link", "set", f"port{machine.number}", "type", "bridge_slave",
                "isolated", state,
            )  # fmt: skip

    def _in_switch(self, *command: str) -> str:
        return _run("nsenter", "--target", str(self._switch), "--net", *command)


def _bits(rate: str) -> float:
    """Bits per second of a rate in ``tc``'s words."""
    for unit, factor in (("gbit", 1e9), ("mbit", 1e6), ("kbit", 1e3)):
        if rate.endswith(unit):
            return float(rate.removesuffix(unit)) * factor
    raise SetupError(f"{rate!r} is no rate", hint="write it as 10gbit, 1gbit or 500mbit")


def _run(*command: str) -> str:
    """Run a command of the system and return what it says.

    Raises:
        SetupError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SetupError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
