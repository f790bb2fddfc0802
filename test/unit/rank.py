"""One of two ranks, for the process that it runs in."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from sglang_star.errors import PeerError
from sglang_star.migration.transport import CARRIERS
from sglang_star.ranks.carriers import of_ranks
from sglang_star.ranks.group import Group


def member(rank: int, place: str) -> dict[str, Any]:
    """One rank, in a process of its own; what it saw."""
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    ranks = Group(dist.group.WORLD)
    seen: dict[str, Any] = {
        "gathered": [ranks.gather(data) for data in (b"", b"x" * rank, bytes(range(9 - rank)))],
        "least": ranks.least(rank, -rank, 5),
    }
    shm = CARRIERS["shm"]
    kind = of_ranks(shm, ranks)
    sender = kind.send(2, 64)
    receiver = kind.receive(sender.setup)
    sender.slot(1)[:] = 7 + rank
    seen["read"] = int(receiver.slot(1)[63])
    seen["setup"] = sender.setup
    sender.close()
    for name in ("send", "receive"):

        class Poor(shm):  # type: ignore[misc, valid-type]
            """Memory that only rank 1 cannot have."""

        def refuse(*_: Any) -> Any:
            raise PeerError("no memory")

        sender = kind.send(2, 64)
        if rank == 1:
            setattr(Poor, name, refuse)
        poor = of_ranks(Poor, ranks)
        try:
            poor.send(2, 64) if name == "send" else poor.receive(sender.setup)
            seen[name] = ""
        except PeerError as error:
            seen[name] = error.message
        sender.close()
    dist.destroy_process_group()
    return seen
