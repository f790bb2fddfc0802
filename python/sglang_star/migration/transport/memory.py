"""Host memory that other processes of this machine can map, and that goes with this one.

It has no name in any folder: whoever may look into this process's descriptors maps it through
them. However the process ends, nothing is left behind. Its size is sealed: a process that touches
a mapping whose memory was taken away is ended by the kernel, and nobody who maps it can do that to
the others.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import secrets
import zlib
from typing import Any

import torch

from sglang_star.errors import PeerError
from sglang_star.machine import available_memory
from sglang_star.migration.transport.base import Grant, Region

PAGE = 4096
SHARE = 0.5
"""Of the memory that is available, what a region may take."""
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def shape(slots: int, slot_bytes: int) -> tuple[int, int]:
    """Of a region: where its slots begin, behind their stamps, and its size; in bytes."""
    start = -(-8 * slots // PAGE) * PAGE
    return start, start + slots * slot_bytes


class HostRegion(Region):
    """Slots in one piece of shared memory, all of it there from the start.

    Attributes:
        token: tells this memory from every other; descriptor: open in this process.
        tensor: all of it, uint8; stamps come first.

    Raises:
        PeerError: the machine does not have that much memory.
    """

    def __init__(self, slots: int, slot_bytes: int, *, pinned: bool = False) -> None:
        super().__init__(slots, slot_bytes)
        self._start, self.size = shape(slots, slot_bytes)
        # Looked at first: a kernel that is asked for all it has ends other processes.
        if self.size > (free := available_memory()) * SHARE:
            raise PeerError(
                f"no {self.size / 1e6:.0f} MB of staging memory: {free / 1e6:.0f} MB are available",
                hint="lower --star-staging-mb",
            )
        self.token = secrets.token_hex(8)
        self.descriptor = os.memfd_create(
            name_of(self.token), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        )
        try:
            # Memory that is missing shows here, and not as a signal at the first touch.
            os.posix_fallocate(self.descriptor, 0, self.size)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, SEALS)
            memory = mmap.mmap(self.descriptor, self.size)
        except OSError as error:
            os.close(self.descriptor)
            raise PeerError(
                f"no {self.size / 1e6:.0f} MB of staging memory: {error}",
                hint="lower --star-staging-mb",
            ) from error
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)
        self._stamped = (ctypes.c_int64 * slots).from_buffer(memory)
        if pinned:
            pin(self.tensor)

    def view(self, grant: Grant) -> torch.Tensor:
        """See :class:`Region`."""
        start = self._start + grant.index * self.slot_bytes
        return self.tensor[start : start + self.slot_bytes]

    def checksum(self, grant: Grant, size: int) -> int:
        """See :class:`Region`."""
        return checksum(self.view(grant)[:size])

    def stamped(self, index: int) -> int:
        """What lies in the place of a slot's stamp."""
        return int(self._stamped[index])

    def close(self) -> None:
        """Nobody can map it any more; it goes with its last mapping."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _stamp(self, index: int, stamp: int) -> None:
        self._stamped[index] = stamp


def is_sealed(descriptor: int) -> bool:
    """Whether nobody, its owner included, can take this memory away while it is mapped."""
    try:
        return bool(fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:  # a file that has a name and no seals
        return False


def name_of(token: str) -> str:
    """What the kernel shows of memory that has this token."""
    return f"star-kv-{token}"


def checksum(data: torch.Tensor) -> int:
    """CRC-32 of bytes in host memory, never 0."""
    return zlib.crc32(data.numpy()) or 1


def pin(tensor: torch.Tensor) -> None:
    """Let devices copy from and to this host memory beside everything else.

    Raises:
        PeerError: the driver refuses.
    """
    result: Any = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.numel(), 0)
    if int(result):
        raise PeerError(
            f"CUDA cannot pin {tensor.numel() / 1e6:.0f} MB of staging memory (error {result})",
            hint="lower --star-staging-mb, or raise the limit of locked memory",
        )
