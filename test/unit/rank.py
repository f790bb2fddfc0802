"""One of two ranks, for the process that it runs in."""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist

from sglang_star.errors import NoTransport, PeerError
from sglang_star.migration.transport.base import Grant
from sglang_star.migration.transport.memory import HostRegion
from sglang_star.migration.transport.shm import SharedMemory
from sglang_star.protocol import Peer
from sglang_star.ranks.group import Group
from sglang_star.ranks.transports import RankTransports

HERE = Peer(instance_id="a", incarnation=1, address="tcp://127.0.0.1:1")


def lacking(*_: Any) -> Any:
    """What only rank 1 cannot do."""
    raise PeerError("no memory")


def member(rank: int, place: str) -> dict[str, Any]:
    """One rank, in a process of its own; what it saw."""
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    ranks = Group(dist.group.WORLD)
    seen: dict[str, Any] = {
        "gathered": [ranks.gather(data) for data in (b"", b"x" * rank, bytes(range(9 - rank)))],
        "least": ranks.least(rank, -rank, 5),
    }
    region = HostRegion(2, 64)
    shm = SharedMemory(region, "cpu")
    both = RankTransports(ranks, [shm], time.monotonic)
    grant = region.grant()
    assert grant is not None
    region.view(grant)[:] = 7 + rank
    offers = both.offers()
    way = both.choose(offers, HERE)
    found = way.reader.fetch(grant, 64, 0).arrived()
    assert found is not None
    seen["read"] = int(found[63])
    seen["offers"] = offers
    for name in ("setup", "open"):
        poor = SharedMemory(region, "cpu")
        if rank == 1:
            setattr(poor, name, lacking)
        lame = RankTransports(ranks, [poor], time.monotonic)
        try:
            lame.offers() if name == "setup" else lame.choose(offers, HERE)
            seen[name] = ""
        except NoTransport as error:
            seen[name] = error.message
    missing = both.choose(offers, HERE).reader.fetch(Grant(9, 1), 64, 0)
    try:
        missing.arrived()
    except PeerError as error:
        seen["missing"] = error.message
    both.close()
    dist.destroy_process_group()
    return seen
