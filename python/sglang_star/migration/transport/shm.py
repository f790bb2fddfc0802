"""Shared memory: for instances on one machine.

The segment is an unlinked file as soon as both sides have it open, so that nothing is left behind
when either process dies. Until then its sender holds it (:mod:`sglang_star.owned`): what one that
was killed leaves in between, the next start removes.
"""

from __future__ import annotations

import contextlib
import mmap
import os

import msgspec
import torch

from sglang_star import owned
from sglang_star.errors import PeerError
from sglang_star.migration.transport.base import Carrier

_FOLDER = "/dev/shm"
_PREFIX = "star-kv-"
_MAX_BYTES = 1 << 34


class _Setup(msgspec.Struct, array_like=True, frozen=True):
    name: str
    slots: int
    slot_bytes: int


class SharedMemoryCarrier(Carrier):
    """Slots in one mapped file."""

    name = "shm"

    def __init__(self, file: str, descriptor: int, slots: int, slot_bytes: int) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.setup = msgspec.msgpack.encode(_Setup(os.path.basename(file), slots, slot_bytes))
        self._file: str | None = file
        self._map: mmap.mmap | None = mmap.mmap(descriptor, slots * slot_bytes)
        self._tensor: torch.Tensor | None = torch.frombuffer(self._map, dtype=torch.uint8)

    @classmethod
    def send(cls, slots: int, slot_bytes: int) -> SharedMemoryCarrier:
        """Create the segment; see :class:`Carrier`."""
        try:
            file, descriptor = owned.make_file(_FOLDER, _PREFIX)
            try:
                os.posix_fallocate(descriptor, 0, slots * slot_bytes)
                return cls(file, descriptor, slots, slot_bytes)
            except OSError:
                os.unlink(file)
                raise
            finally:
                os.close(descriptor)
        except OSError as error:
            raise PeerError(
                f"no shared memory for {slots * slot_bytes / 1e6:.0f} MB: {error}",
                hint="enlarge /dev/shm, or lower --star-copy-tokens-per-step",
            ) from error

    @classmethod
    def receive(cls, setup: bytes) -> SharedMemoryCarrier:
        """Map the sender's segment; see :class:`Carrier`."""
        try:
            wanted = msgspec.msgpack.decode(setup, type=_Setup)
        except msgspec.MsgspecError as error:
            raise PeerError(f"malformed shared-memory setup: {error}") from error
        size = wanted.slots * wanted.slot_bytes
        if not owned.is_name(wanted.name, _PREFIX) or not 0 < size <= _MAX_BYTES:
            raise PeerError("malformed shared-memory setup")
        file = f"{_FOLDER}/{wanted.name}"
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
        except OSError as error:
            raise PeerError(
                f"the sender's shared memory is not reachable: {error}",
                hint="both instances must run on one machine and share /dev/shm",
            ) from error
        try:
            if os.fstat(descriptor).st_size != size:
                raise PeerError("the sender's shared memory has another size")
            carrier = cls(file, descriptor, wanted.slots, wanted.slot_bytes)
            carrier._file = None
            return carrier
        finally:
            os.close(descriptor)

    @classmethod
    def sweep(cls) -> list[str]:
        """See :class:`Carrier`."""
        return owned.sweep(_FOLDER, _PREFIX)

    def slot(self, index: int) -> torch.Tensor:
        """See :class:`Carrier`."""
        if self._tensor is None or not 0 <= index < self.slots:
            raise PeerError(f"no slot {index}")
        return self._tensor[index * self.slot_bytes : (index + 1) * self.slot_bytes]

    def connected(self) -> None:
        """Remove the name; both mappings stay."""
        if self._file is not None:
            with contextlib.suppress(FileNotFoundError):  # somebody tidied up before us
                os.unlink(self._file)
            self._file = None

    def close(self) -> None:
        """See :class:`Carrier`."""
        self.connected()
        # The mapping goes with the last tensor that views it.
        self._tensor = None
        self._map = None
