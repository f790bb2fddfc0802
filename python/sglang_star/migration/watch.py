"""The peers that this instance has business with, and when each was last heard."""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass, replace

from sglang_star.protocol import Peer


@dataclass(frozen=True, slots=True)
class Watched:
    """One peer.

    Attributes:
        live: ids of the streams that connect us.
        heard_at: monotonic seconds; when the watch began, if it was not heard since.
    """

    peer: Peer
    live: frozenset[str]
    heard_at: float


class Watch:
    """Watched peers by address; any thread may call.

    Args:
        timeout_s: silence after which a peer is given up.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._watched: dict[str, Watched] = {}

    def __bool__(self) -> bool:
        """Whether anybody is watched."""
        return bool(self._watched)

    def set(self, pairs: Collection[tuple[Peer, str]], now: float) -> list[Peer]:
        """Watch exactly these; who was watched before keeps the time it was heard at.

        Args:
            pairs: a peer, and a stream that connects us.
            now: monotonic seconds.

        Returns:
            Those that are gone for sure: another process answers at their address since.
        """
        latest: dict[str, Peer] = {}
        # In an order of its own: a set of names has another one in every process.
        everyone = sorted(
            {peer for peer, _ in pairs},
            key=lambda one: (one.address, one.incarnation, one.instance_id),
        )
        for peer in everyone:
            latest[peer.address] = peer
        peers: dict[str, tuple[Peer, frozenset[str]]] = {
            address: (peer, frozenset(stream for other, stream in pairs if other == peer))
            for address, peer in latest.items()
        }
        with self._lock:
            before = self._watched
            self._watched = {
                address: Watched(
                    peer,
                    live,
                    before[address].heard_at
                    if address in before and before[address].peer.incarnation == peer.incarnation
                    else now,
                )
                for address, (peer, live) in peers.items()
            }
        return [peer for peer in everyone if latest[peer.address] != peer]

    def hear(self, sender: Peer, now: float) -> bool:
        """A heartbeat came; False if its sender is not watched."""
        with self._lock:
            known = self._watched.get(sender.address)
            if known is None or known.peer != sender:
                return False
            self._watched[sender.address] = replace(known, heard_at=now)
            return True

    def drop_former(self, sender: Peer) -> list[Peer]:
        """Stop watching other incarnations of ``sender``, and return them."""
        with self._lock:
            return self._drop(
                [
                    address
                    for address, one in self._watched.items()
                    if one.peer.instance_id == sender.instance_id
                    and one.peer.incarnation != sender.incarnation
                ]
            )

    def drop(self, addresses: Collection[str]) -> list[Peer]:
        """Stop watching whoever is at these addresses, and return them."""
        with self._lock:
            return self._drop([address for address in addresses if address in self._watched])

    def drop_silent(self, now: float, late_s: float) -> list[Peer]:
        """Stop watching those that were silent too long, and return them.

        Args:
            now: monotonic seconds.
            late_s: of this, how long we ourselves did not listen: nobody was silent then. A
                process that was frozen does not give up everybody when it goes on.
        """
        with self._lock:
            for address, one in self._watched.items():
                heard_at = min(now, one.heard_at + late_s)
                self._watched[address] = replace(one, heard_at=heard_at)
            return self._drop(
                [
                    address
                    for address, one in self._watched.items()
                    if now - one.heard_at > self._timeout_s
                ]
            )

    def everyone(self) -> list[Watched]:
        """Who is watched now."""
        with self._lock:
            return list(self._watched.values())

    def _drop(self, addresses: list[str]) -> list[Peer]:
        return [self._watched.pop(address).peer for address in addresses]
