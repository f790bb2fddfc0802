"""All buffers of a KV pool as one table of pointers, which a single launch walks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch

MAX_ROW_BYTES: Final = 1 << 30


class KvBuffers:
    """The buffers of one pool, built once and used for every copy.

    A slot is an index into the first dimension of every buffer; with ``page_size`` it is the index
    of a page, that is of so many neighbouring entries. Buffers may differ in dtype and shape, as
    values and their scales do. The memory must stay where it is, and this object keeps it alive.

    Attributes:
        buffers: the tensors, as given.
        page_size: entries of a buffer that one slot stands for.
        row_bytes: bytes that one slot stands for, per buffer.
        slot_bytes: their sum.
        slots: number of slots, of the buffer that has fewest.
        device: where the buffers lie.
        host_table: int64 ``[buffers, 4]`` on the host: address, stride between rows and bytes of a
            row, bytes of one row of all buffers before.
        rows: the buffers as uint8 ``[slots, row_bytes_i]``, for the torch reference.
    """

    def __init__(self, buffers: Sequence[torch.Tensor], *, page_size: int = 1) -> None:
        """Make the table.

        Args:
            buffers: ``[slots * page_size, ...]`` each, on one device. The entries of the first
                dimension may lie apart, each of them must be contiguous.
            page_size: see above.

        Raises:
            ValueError: the buffers are on several devices, or a row is not one piece of memory.
        """
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}")
        self.buffers = list(buffers)
        self.page_size = page_size
        self.rows = [as_rows(buffer, page_size) for buffer in self.buffers]
        self.row_bytes = [int(row.shape[1]) for row in self.rows]
        self.slot_bytes = sum(self.row_bytes)
        self.slots = min((int(row.shape[0]) for row in self.rows), default=0)
        devices = {buffer.device for buffer in self.buffers} or {torch.device("cpu")}
        if len(devices) > 1:
            raise ValueError(f"the buffers lie on several devices: {sorted(map(str, devices))}")
        (self.device,) = devices
        self.host_table = torch.tensor(self._table(), dtype=torch.int64).view(-1, 4)
        self._tables = {torch.device("cpu"): self.host_table}
        self._pieces = [(r.data_ptr(), r.data_ptr() + _extent(r)) for r in self.rows if r.numel()]
        self.tables(self.device)

    def tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The table on the host and in a device's memory, where its first call copies it."""
        if device not in self._tables:
            self._tables[device] = self.host_table.to(device)
        return self.host_table, self._tables[device]

    def overlaps(self, begin: int, end: int) -> bool:
        """Whether any buffer has a byte in ``[begin, end)``."""
        return any(begin < last and first < end for first, last in self._pieces)

    def _table(self) -> list[list[int]]:
        table, before = [], 0
        for row in self.rows:
            table.append([row.data_ptr(), int(row.stride(0)), int(row.shape[1]), before])
            before += int(row.shape[1])
        return table


def as_rows(buffer: torch.Tensor, page_size: int = 1) -> torch.Tensor:
    """View a buffer ``[slots * page_size, ...]`` as bytes ``[slots, row_bytes]``, without copying.

    Raises:
        ValueError: a row is not one piece of memory, or too long.
    """
    if buffer.dim() == 0:
        raise ValueError("a KV buffer needs a first dimension of slots")
    entry = math.prod(buffer.shape[1:])
    apart = buffer.stride(0) != entry and buffer.shape[0] > 1
    if not buffer[:1].is_contiguous() or (apart and buffer.stride(0) < entry):
        raise ValueError(
            f"the entries of a KV buffer are not contiguous: strides {buffer.stride()}"
        )
    if apart and page_size > 1:
        raise ValueError("the pages of a KV buffer are not contiguous")
    size = buffer.element_size()
    if entry * size * page_size > MAX_ROW_BYTES:
        raise ValueError(f"rows of {entry * size * page_size} bytes are too long")
    slots = buffer.shape[0] // page_size
    flat = buffer.as_strided((slots, page_size * entry), (_stride(buffer, entry) * page_size, 1))
    return flat.view(torch.uint8)


def _stride(buffer: torch.Tensor, entry: int) -> int:
    # What torch says of the stride of a single entry means nothing.
    return int(buffer.stride(0)) if buffer.shape[0] > 1 else entry


def _extent(row: torch.Tensor) -> int:
    return int((row.shape[0] - 1) * row.stride(0) + row.shape[1])
