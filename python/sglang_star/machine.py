"""What this machine has to offer: memory, ports, a GPU or none."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path
from typing import Final

from sglang_star.errors import SetupError

GIB: Final = 1 << 30

# Measured: 2.8 GB with a model of 25 MB and 3.6 GB with one of 270 MB, both on a CPU.
ENGINE_BASE_BYTES: Final = 2.7 * GIB
ENGINE_BYTES_PER_WEIGHT_BYTE: Final = 3.0

# Below Linux's ephemeral range, so that no outgoing connection takes a port between our choosing
# it and the server's binding it.
_PORTS: Final = range(20000, 32000)


def has_gpu() -> bool:
    """Whether an NVIDIA device is present; asked without importing torch."""
    return os.path.exists("/dev/nvidia0")


def require_memory(count: int, model: str, more: float = 0.0) -> None:
    """Check that ``count`` engines, and ``more`` bytes, fit into this machine's free memory.

    Raises:
        SetupError: they do not.
    """
    weights = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    need = count * (ENGINE_BASE_BYTES + ENGINE_BYTES_PER_WEIGHT_BYTE * weights) + more
    free = available_memory()
    if need > free:
        raise SetupError(
            f"{count} engines need about {need / GIB:.1f} GiB of memory, "
            f"{free / GIB:.1f} GiB are available",
            hint="end other programs, or start fewer engines",
        )


def available_memory() -> int:
    """Return the bytes still to be had: the machine's, or its control group's if that is less."""
    meminfo = Path("/proc/meminfo").read_text()
    fields = dict(line.split(":", 1) for line in meminfo.splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        parts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Page cache counts as used but is given back on demand.
        return min(free, limit - used + int(parts["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no limit reads "max"; version 1 has other files
        return free


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Choose ``count`` different ports that nobody listens on.

    Raises:
        SetupError: there are not that many.
    """
    ports: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        if len(ports) == count:
            break
        if port_is_free(port, host):
            ports.append(port)
    if len(ports) < count:
        raise SetupError(f"no {count} free ports on {host}")
    return ports


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could bind ``port`` now."""
    with socket.socket() as probe:
        # As servers do: a port in TIME_WAIT counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
