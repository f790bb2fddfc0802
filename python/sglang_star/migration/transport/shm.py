"""Shared memory: for instances on one machine that see each other's processes."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import threading

import msgspec
import torch

from sglang_star.errors import PeerError
from sglang_star.migration.transport.base import Grant, Transport, read_setup
from sglang_star.migration.transport.memory import (
    HostRegion,
    checksum,
    is_sealed,
    name_of,
    pin,
    shape,
)

_TOKEN = re.compile(r"[0-9a-f]{16}")
_MAX_BYTES = 1 << 40


class Setup(msgspec.Struct, array_like=True, frozen=True):
    """Where a region is: a descriptor of a process, and the token by which it is known."""

    process: int
    descriptor: int
    token: str
    slots: int
    slot_bytes: int


class SharedMemory(Transport):
    """The target maps the sender's region and copies straight from it.

    Args:
        region: ours; None if there is no memory for one: then we only read.
        device: of the KV pool; on one of CUDA's, memory is pinned.
    """

    name = "shm"

    def __init__(self, region: HostRegion | None, device: str = "cpu") -> None:
        self.region: HostRegion | None = region
        self._pinned = device.startswith("cuda")

    def start(self) -> None:
        """See :class:`Transport`: there is nothing to do."""

    def setup(self) -> bytes:
        """See :class:`Transport`."""
        region = self.region
        if region is None:
            raise PeerError("no staging memory", hint="see the log of the source's start")
        return msgspec.msgpack.encode(
            Setup(os.getpid(), region.descriptor, region.token, region.slots, region.slot_bytes)
        )

    def open(self, setup: bytes) -> Mapped:
        """See :class:`Transport`."""
        wanted = read_setup(setup, Setup)
        _, size = shape(max(wanted.slots, 0), max(wanted.slot_bytes, 0))
        if not (
            _TOKEN.fullmatch(wanted.token)
            and wanted.process > 0
            and wanted.descriptor >= 0
            and wanted.slots > 0
            and wanted.slot_bytes > 0
            and size <= _MAX_BYTES
        ):
            raise PeerError("malformed shared-memory setup")
        path = f"/proc/{wanted.process}/fd/{wanted.descriptor}"
        try:
            # Never opened unless it is what it is said to be.
            if os.readlink(path) != f"/memfd:{name_of(wanted.token)} (deleted)":
                raise OSError("it is another's")
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise PeerError(
                f"the sender's shared memory is not reachable: {error}",
                hint="both instances must run as one user on one machine, and see each other's "
                "processes; else use --star-transport nixl",
            ) from error
        try:
            if not is_sealed(descriptor):
                raise PeerError("the sender's shared memory could be taken away while it is read")
            if os.fstat(descriptor).st_size != size:
                raise PeerError("the sender's shared memory has another size")
            return Mapped(mmap.mmap(descriptor, size), wanted, pinned=self._pinned)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """See :class:`Transport`."""
        if self.region is not None:
            self.region.close()


class Mapped:
    """A peer's region in our own address space; a :class:`Reader`."""

    def __init__(self, memory: mmap.mmap, setup: Setup, *, pinned: bool) -> None:
        self._slots, self._slot_bytes = setup.slots, setup.slot_bytes
        self._start, _ = shape(setup.slots, setup.slot_bytes)
        self._stamps = (ctypes.c_int64 * setup.slots).from_buffer(memory)
        self._tensor = torch.frombuffer(memory, dtype=torch.uint8)
        self._pinning: threading.Thread | None = None
        self._why = ""
        if pinned:
            self._pinning = threading.Thread(target=self._pin, name="star-pin", daemon=True)
            self._pinning.start()

    def fetch(self, grant: Grant, size: int, checksum: int) -> MappedSlot:
        """See :class:`Reader`."""
        if not (0 <= grant.index < self._slots and 0 < size <= self._slot_bytes):
            raise PeerError(f"no {size} bytes in slot {grant.index}")
        start = self._start + grant.index * self._slot_bytes
        return MappedSlot(self, self._tensor[start : start + size], self._stamps, grant, checksum)

    def is_ready(self) -> bool:
        """Whether devices can copy from it.

        Raises:
            PeerError: they never will.
        """
        if self._why:
            raise PeerError(self._why)
        return self._pinning is None or not self._pinning.is_alive()

    def close(self) -> None:
        """The mapping goes with the last fetch that reads it."""
        if self._pinning is not None:
            self._pinning.join()
            self._pinning = None
            torch.cuda.cudart().cudaHostUnregister(self._tensor.data_ptr())

    def _pin(self) -> None:
        try:
            pin(self._tensor)
        except PeerError as error:
            self._why = str(error)


class MappedSlot:
    """See :class:`Fetch`: its bytes are here from the start."""

    __slots__ = ("_cancelled", "_checksum", "_data", "_grant", "_mapped", "_stamps")

    def __init__(
        self,
        mapped: Mapped,
        data: torch.Tensor,
        stamps: ctypes.Array[ctypes.c_int64],
        grant: Grant,
        wanted: int,
    ) -> None:
        self._cancelled = False
        self._mapped = mapped
        self._data = data
        self._stamps = stamps
        self._grant = grant
        self._checksum = wanted

    def arrived(self) -> torch.Tensor | None:
        """See :class:`Fetch`."""
        if self._cancelled:
            raise PeerError("nobody wants it any more")
        if not self._mapped.is_ready():
            return None
        if self._checksum and checksum(self._data) != self._checksum:
            raise PeerError("KV was corrupted on its way: its checksum differs")
        return self._data

    def intact(self) -> bool:
        """See :class:`Fetch`."""
        return bool(self._stamps[self._grant.index] == self._grant.stamp)

    def cancel(self) -> None:
        """See :class:`Fetch`."""
        self._cancelled = True

    def close(self) -> None:
        """See :class:`Fetch`."""
