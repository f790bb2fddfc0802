"""Transports whose slots hold hashes: one within a machine, one between machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_star.errors import PeerError
from sglang_star.migration.states import Sending
from sglang_star.migration.transport.base import Grant, Region, Transport
from sglang_star.migration.transport.choice import Transports

if TYPE_CHECKING:
    from simulation.node import Node

SLOTS = 6
START_S, REMOTE_S, SILENCE_S = 0.05, 0.02, 0.2


class Staging(Region):
    """Slots of one engine, and the stamp of each."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        super().__init__(slots, slot_bytes)
        self.data: list[list[int]] = [[] for _ in range(slots)]
        self.stamps = [0] * slots

    def view(self, grant: Grant) -> Any:
        return self.data[grant.index]

    def checksum(self, grant: Grant, size: int) -> int:
        return 0

    def _stamp(self, index: int, stamp: int) -> None:
        self.stamps[index] = stamp


class Direct(Transport):
    """As shared memory: what is fetched is the slot itself, also of a process that is gone."""

    name = "shm"

    def __init__(self, node: Node, region: Staging) -> None:
        self.region: Staging = region
        self._node = node

    def start(self) -> None:
        pass

    def close(self) -> None:
        pass

    def setup(self) -> bytes:
        return self._node.label

    def _source(self, setup: bytes) -> Node:
        if (source := self._node.world.labelled.get(setup)) is None:
            raise PeerError("malformed set-up")
        return source

    def open(self, setup: bytes) -> Any:
        source = self._source(setup)
        if source.shape.machine != self._node.shape.machine:
            raise PeerError("the sender's shared memory is not reachable")
        return Reader(self._node, source, remote=False)


class Remote(Direct):
    """As NIXL: slow to start, what is fetched is a copy, and it fails with the link."""

    name = "nixl"

    def __init__(self, node: Node, region: Staging) -> None:
        super().__init__(node, region)
        self._ready_at = 0.0 if node.shape.machine == 0 else float("inf")

    def start(self) -> None:
        self._ready_at = min(self._ready_at, self._node.world.clock.now + START_S)

    def setup(self) -> bytes:
        return self._node.label if self._ready_at <= self._node.world.clock.now else b""

    def open(self, setup: bytes) -> Any:
        return Reader(self._node, self._source(setup), remote=True)


class Reader:
    def __init__(self, here: Node, source: Node, *, remote: bool) -> None:
        self.here = here
        self.source = source
        self.remote = remote

    def fetch(self, grant: Grant, size: int, checksum: int) -> Fetch:
        if not 0 <= grant.index < self.source.staging.slots:
            raise PeerError(f"no slot {grant.index}")
        return Fetch(self, grant)

    def close(self) -> None:
        pass


class Fetch:
    """Bytes of a slot: the slot itself, or a copy that is there later or never."""

    def __init__(self, reader: Reader, grant: Grant) -> None:
        self._reader = reader
        self._grant = grant
        self._cancelled = False
        world = reader.here.world
        self._since = self._due = world.clock.now
        if reader.remote:
            self._due += world.random.uniform(0, REMOTE_S)
        world.fetches.add(self)

    def arrived(self) -> Any:
        if self._cancelled:
            raise PeerError("nobody wants it any more")
        here, source = self._reader.here, self._reader.source
        if not self._reader.remote:
            return source.staging.data[self._grant.index]
        world = here.world
        if (
            world.cut(here.peer.address, source.peer.address)
            or not source.alive
            or (here.name, source.name) in world.blind_pairs
        ):
            if world.clock.now - self._since > SILENCE_S:
                raise PeerError("nothing came from it")
            return None
        if world.clock.now < self._due:
            return None
        if not self.intact():
            raise PeerError("the sender has used the slot again")
        return list(source.staging.data[self._grant.index])

    def intact(self) -> bool:
        source = self._reader.source
        if source.staging.stamps[self._grant.index] == self._grant.stamp:
            return True
        for move in self._reader.here.mover.target.moves.values():
            sent = source.mover.sender.moves.get(move.migration_id)
            if (
                any(piece.fetch is self for piece in move.unloading)
                and source.alive
                and sent is not None
                and sent.machine.state is not Sending.RESUMING
                and source.world.judges(sent.client_rid)
            ):
                source.world.fail(f"{source.name} uses a slot that a move still reads")
        return False

    def cancel(self) -> None:
        self._cancelled = True

    def close(self) -> None:
        self._reader.here.world.fetches.remove(self)


def transports(node: Node, region: Staging) -> Transports:
    kinds = (Direct(node, region), Remote(node, region))
    return Transports(kinds, lambda: node.world.clock.now)
