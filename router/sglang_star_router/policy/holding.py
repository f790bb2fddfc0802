"""In which order the router retries the requests it holds."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_star_router.policy.snapshot import Arrival


def retry_order(held: Sequence[Arrival], now_s: float, deadline_s: float) -> tuple[list[int], int]:
    """Positions in ``held`` in the order to try them, and how many of them are still in time.

    Those that can still meet their TTFT limit come first, oldest first; a request past it no
    longer delays them and takes what is left over, oldest first.

    Args:
        held: oldest first.
        deadline_s: how long a request may wait and still be in time.
    """
    fresh = [k for k, a in enumerate(held) if now_s - a.arrived_s <= deadline_s]
    late = [k for k, a in enumerate(held) if now_s - a.arrived_s > deadline_s]
    return fresh + late, len(fresh)
