"""Device memory of a peer on the same machine: no byte passes through the host.

A slot's stamp lies in device memory as well. It is written on the stream of the copies before
anything of the slot is, and read on the reader's after all of it was.
"""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from sglang_star.errors import PeerError
from sglang_star.migration.transport.base import Grant, Region, Transport, read_setup
from sglang_star.migration.transport.memory import shape


class Setup(msgspec.Struct, array_like=True, frozen=True):
    """A device, what torch opens its memory by, and how that is divided.

    Attributes:
        device: UUID of the GPU, since every process counts them in its own way.
        handle: as ``UntypedStorage._share_cuda_`` gives it, but for the device's number.
    """

    device: str
    handle: tuple[bytes, int, int, bytes, int, bytes, bool]
    slots: int
    slot_bytes: int


class DeviceRegion(Region):
    """Slots on a GPU."""

    def __init__(self, slots: int, slot_bytes: int, device: str) -> None:
        super().__init__(slots, slot_bytes)
        self._start, size = shape(slots, slot_bytes)
        self.tensor = torch.zeros(size, dtype=torch.uint8, device=device)
        self._stamped = self.tensor[: 8 * slots].view(torch.int64)

    def view(self, grant: Grant) -> torch.Tensor:
        """See :class:`Region`."""
        start = self._start + grant.index * self.slot_bytes
        return self.tensor[start : start + self.slot_bytes]

    def checksum(self, grant: Grant, size: int) -> int:
        """Not taken of device memory: 0."""
        return 0

    def _stamp(self, index: int, stamp: int) -> None:
        # On the current stream, which every copy into the slot follows.
        self._stamped[index].fill_(stamp)


class CudaIpc(Transport):
    """See the module's text; the target copies straight from the sender's device memory."""

    name = "cuda_ipc"

    def __init__(self, slots: int, slot_bytes: int, device: str) -> None:
        self._device = torch.device(device)
        self._why = ""
        self.region: DeviceRegion | None = None
        self._setup = b""
        try:
            self.region = DeviceRegion(slots, slot_bytes, device)
            _, *handle = self.region.tensor.untyped_storage()._share_cuda_()
            self._setup = msgspec.msgpack.encode(
                Setup(_uuid(self._device), tuple(handle), slots, slot_bytes)
            )
        except RuntimeError as error:  # out of memory, or memory that cannot be shared
            self._why = f"device memory cannot be shared: {error}"

    def start(self) -> None:
        """See :class:`Transport`: there is nothing to do."""

    def close(self) -> None:
        """See :class:`Transport`: the memory goes with its process."""

    def setup(self) -> bytes:
        """See :class:`Transport`."""
        if self._why:
            raise PeerError(self._why, hint="lower --star-staging-mb, or --star-transport shm")
        return self._setup

    def open(self, setup: bytes) -> Opened:
        """See :class:`Transport`."""
        wanted = read_setup(setup, Setup)
        count = torch.cuda.device_count()
        here = {_uuid(torch.device("cuda", index)): index for index in range(count)}
        if wanted.device not in here:
            raise PeerError(
                "the sender's GPU is not visible here",
                hint="run both engines with the same CUDA_VISIBLE_DEVICES and --base-gpu-id",
            )
        try:
            storage = torch.UntypedStorage._new_shared_cuda(here[wanted.device], *wanted.handle)
        except RuntimeError as error:
            raise PeerError(
                f"the sender's device memory cannot be opened: {error}",
                hint="use --star-transport shm",
            ) from error
        tensor = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        return Opened(tensor, wanted)


class Opened:
    """A peer's region; a :class:`Reader`."""

    def __init__(self, tensor: torch.Tensor, setup: Setup) -> None:
        self._tensor: torch.Tensor | None = tensor
        self._setup = setup

    def fetch(self, grant: Grant, size: int, checksum: int) -> OpenedSlot:
        """See :class:`Reader`."""
        setup = self._setup
        if self._tensor is None or not (
            0 <= grant.index < setup.slots and 0 < size <= setup.slot_bytes
        ):
            raise PeerError(f"no {size} bytes in slot {grant.index}")
        start = shape(setup.slots, setup.slot_bytes)[0] + grant.index * setup.slot_bytes
        stamp = self._tensor[8 * grant.index : 8 * grant.index + 8]
        return OpenedSlot(self._tensor[start : start + size], stamp, grant)

    def close(self) -> None:
        """See :class:`Reader`."""
        self._tensor = None


class OpenedSlot:
    """See :class:`Fetch`: its bytes can be read from the start."""

    def __init__(self, data: torch.Tensor, stamp: torch.Tensor, grant: Grant) -> None:
        self._data = data
        self._stamp = stamp
        self._grant = grant
        self._cancelled = False

    def arrived(self) -> torch.Tensor:
        """See :class:`Fetch`."""
        if self._cancelled:
            raise PeerError("nobody wants it any more")
        return self._data

    def intact(self) -> bool:
        """See :class:`Fetch`; eight bytes over the bus once the copy is over."""
        found: Any = self._stamp.cpu().view(torch.int64).item()
        return bool(found == self._grant.stamp)

    def cancel(self) -> None:
        """See :class:`Fetch`."""
        self._cancelled = True

    def close(self) -> None:
        """See :class:`Fetch`."""


def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)
