"""Bootstrap rooms of parallel samples, so that ``n > 1`` works in disaggregated serving.

A room pairs one prefill with one decode request. SGLang expands a request with ``n > 1`` on both
sides into a warm-up and n samples, all in the room that the router gave, where they collide.
Both sides send them in the same order, so counting gives each a room of its own; the router
leaves the ``n`` rooms after a request's own unused.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

REMEMBERED = 4096

_sent: OrderedDict[int, int] = OrderedDict()


def send_one_request(manager: Any, tokenized_obj: Any) -> None:
    """BEFORE ``TokenizerManager._send_one_request``: the k-th of a room goes to room + k."""
    room = getattr(tokenized_obj, "bootstrap_room", None)
    if room is None or tokenized_obj.sampling_params.n <= 1:
        return
    earlier = _sent.pop(room, 0)
    _sent[room] = earlier + 1
    while len(_sent) > REMEMBERED:
        _sent.popitem(last=False)
    tokenized_obj.bootstrap_room = room + earlier
