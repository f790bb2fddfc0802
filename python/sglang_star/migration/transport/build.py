"""The transports of an engine that serves: what its flags and its machine allow."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from sglang_star.config import StarConfig
from sglang_star.errors import PeerError
from sglang_star.migration.outgoing import SLOTS
from sglang_star.migration.transport import AUTO, NAMES
from sglang_star.migration.transport.base import Transport
from sglang_star.migration.transport.choice import Transports
from sglang_star.migration.transport.memory import HostRegion
from sglang_star.migration.transport.nixl import Nixl
from sglang_star.migration.transport.shm import SharedMemory

logger = logging.getLogger(__name__)

MAX_SLOT: Final = 16 << 20
"""A slot is not larger: a piece in it is copied in one step, and read in one transfer."""


def slot_shape(config: StarConfig, page_bytes: int, pool_bytes: int) -> tuple[int, int]:
    """How many slots an engine's region has, and their size in bytes.

    No more than the pool itself is ever on its way; a slot holds a page at least.
    """
    slots = SLOTS * config.max_moves
    wanted = min(int(config.staging_mb * 1e6), pool_bytes) // slots
    size = max(page_bytes, min(wanted, MAX_SLOT) // page_bytes * page_bytes)
    return slots, -(-size // 64) * 64


def names(config: StarConfig, device: str) -> tuple[str, ...]:
    """The transports that an engine's flags and device allow, the fastest first."""
    allowed = NAMES if device.startswith("cuda") and not config.checksum else NAMES[1:]
    return tuple(name for name in allowed if config.transport in (AUTO, name))


def build(
    config: StarConfig,
    *,
    agent: str,
    device: str,
    page_bytes: int,
    pool_bytes: int,
    moves: bool = True,
    now: Callable[[], float] = time.monotonic,
    made: Callable[[Sequence[Transport], Callable[[], float]], Transports] = Transports,
) -> Transports:
    """Make them; what cannot be had is logged and left out of what is offered.

    Args:
        config: its ``transport``, ``staging_mb``, ``max_moves``.
        agent: a name that no other process has.
        device: of the KV pool.
        page_bytes: size of a KV page; pool_bytes: of all of them.
        moves: whether any request can move from or to here.
        now: monotonic seconds.
        made: of them; several ranks have another class.
    """
    if not moves:
        return made((), now)
    slots, slot_bytes = slot_shape(config, page_bytes, pool_bytes)
    cuda = device.startswith("cuda")
    wanted = names(config, device)
    kinds: list[Transport] = []
    if "cuda_ipc" in wanted:
        from sglang_star.migration.transport.cuda_ipc import CudaIpc

        kinds.append(CudaIpc(slots, slot_bytes, device))
    region: HostRegion | None = None
    if "shm" in wanted or "nixl" in wanted:
        try:
            region = HostRegion(slots, slot_bytes, pinned=cuda)
        except PeerError as error:
            logger.warning("STAR can send no request from here: %s", error)
    if "shm" in wanted:
        kinds.append(SharedMemory(region, device))
    if "nixl" in wanted:
        kinds.append(Nixl(region, agent, slots))
    if config.transport != AUTO:
        for kind in kinds:
            kind.start()
    return made(kinds, now)
