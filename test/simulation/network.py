"""Links without sockets: order per connection, heartbeats, and who is lost, as in ``links``.

What ``links`` decides about silence and restarts it asks of :class:`Watch`, and so do we.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sglang_star.config import StarConfig
from sglang_star.migration.connection import GONE_S
from sglang_star.migration.mailbox import URGENT
from sglang_star.migration.post import PeerLost
from sglang_star.migration.pulse import Pulse
from sglang_star.migration.watch import Watch
from sglang_star.protocol import Heartbeat, Peer

if TYPE_CHECKING:
    from simulation.history import History
    from simulation.node import Node


@dataclass(slots=True, eq=False)
class Connection:
    """One way from an instance to an address.

    Attributes:
        last: when the latest message arrives; held: those that wait for the other end.
        refused_since: when nobody listened there first.
    """

    last: float = 0.0
    held: list[Any] = field(default_factory=list)
    refused_since: float | None = None


class Link:
    """The network as one instance sees it; a :class:`~sglang_star.migration.post.Post`.

    Attributes:
        losing: how many of the next messages do not arrive.
    """

    def __init__(self, node: Node, peer: Peer, config: StarConfig) -> None:
        self.peer = peer
        self.losing = 0
        self._node = node
        self._world: History = node.world
        self._connections: dict[str, Connection] = {}
        self._watch = Watch(config.peer_timeout_s)
        self._pulse = Pulse(config.stuck_timeout_s, node.world.clock.now)
        self._watched: frozenset[tuple[Peer, str]] = frozenset()
        self._heartbeat_s = config.heartbeat_s
        self._timeout_s = config.peer_timeout_s
        self._beating = False
        self._next_beat = 0.0

    # ------------------------------------------------------------------ out

    def send(self, peer: Peer, message: Any) -> None:
        if not isinstance(message, Heartbeat):
            self._world.note(self._node.name, "sends", message, peer)
        self._put(peer.address, message)

    def _put(self, address: str, message: Any) -> None:
        connection = self._connections.get(address)
        if connection is None:
            connection = self._connections[address] = Connection()
        world = self._world
        faults = world.weather
        if self.losing or (faults.lose and world.chance(faults.lose)):
            self.losing = max(0, self.losing - 1)
            world.note("network", "loses", message)
            return
        self._carry(address, connection, message)
        if faults.duplicate and world.chance(faults.duplicate):
            world.note("network", "doubles", message)
            self._carry(address, connection, message)
        if faults.garble and world.chance(faults.garble):
            world.garble(address, message)
        if faults.stray and world.chance(faults.stray):
            world.note("network", "repeats", message)
            world.clock.after(
                world.random.uniform(0, faults.stray_s), self._arrive, address, message
            )

    def _carry(self, address: str, connection: Connection, message: Any) -> None:
        world = self._world
        if connection.held or world.cut(self.peer.address, address):
            connection.held.append(message)
            return
        if world.at(address) is None:
            if connection.refused_since is None:
                connection.refused_since = world.clock.now
            connection.held.append(message)
            return
        delay = world.random.uniform(0.0001, 0.002)
        if world.weather.delay and world.chance(world.weather.delay):
            delay = world.random.uniform(0.01, world.weather.delay_s)
        delay += world.late(self.peer.address, address)
        connection.last = max(connection.last, world.clock.now + delay)
        world.clock.at(connection.last, self._arrive, address, message)

    def _arrive(self, address: str, message: Any) -> None:
        node = self._world.at(address)
        if node is not None:
            node.link.deliver(message)

    def healed(self) -> None:
        """Try again what waits."""
        for address, connection in list(self._connections.items()):
            if connection.held and not self._world.cut(self.peer.address, address):
                if self._world.at(address) is None:
                    continue
                connection.refused_since = None
                held, connection.held = connection.held, []
                for message in held:
                    self._carry(address, connection, message)

    # ------------------------------------------------------------------ in

    def deliver(self, message: Any) -> None:
        node = self._node
        if not node.alive:
            return
        if (until := node.frozen_until) > self._world.clock.now:
            self._world.clock.at(until, self.deliver, message)
            return
        if isinstance(message, Heartbeat):
            self._hear(message)
        node.arrived(message, urgent=isinstance(message, URGENT))

    def _hear(self, beat: Heartbeat) -> None:
        sender = beat.sender
        if self._watch.hear(sender, self._world.clock.now):
            return
        if beat.live:
            self._put(sender.address, self._heartbeat(sender, frozenset()))
        for peer in self._watch.drop_former(sender):
            self._lost(peer, "it has restarted")

    # ------------------------------------------------------------------ who is there

    @property
    def watches(self) -> bool:
        """Whether it was told to watch anybody."""
        return bool(self._watched)

    def watch(self, pairs: frozenset[tuple[Peer, str]]) -> None:
        if pairs == self._watched:
            return
        self._watched = pairs
        for former in self._watch.set(pairs, self._world.clock.now):
            # By way of the mailbox: the node is in the middle of a step boundary.
            self._world.clock.after(0.0, self._gone_for_sure, former)
        if pairs and not self._beating:
            self._beating = True
            self._next_beat = max(self._next_beat, self._world.clock.now)
            self._world.clock.at(self._next_beat, self._beat)

    def _gone_for_sure(self, former: Peer) -> None:
        self._node.arrived(PeerLost(former, "it has restarted"), urgent=False)

    def _beat(self) -> None:
        node, now = self._node, self._world.clock.now
        if not node.alive:
            return
        if node.frozen_until > now:
            self._world.clock.at(node.frozen_until, self._beat)
            return
        late_s, self._next_beat = now - self._next_beat, now + self._heartbeat_s
        gone = {
            address
            for address, one in self._connections.items()
            if self._refused(address, one, now)
        }
        for peer in self._watch.drop(sorted(gone)):
            self._lost(peer, "its process is gone")
        for address in sorted(gone):
            self._disconnect(address)
        for peer in self._watch.drop_silent(now, late_s):
            self._lost(peer, f"silent for {self._timeout_s:g} s")
        if node.stuck_until <= now:
            self._pulse.beat(now)  # an idle loop comes to its boundary, too
        if not self._pulse.is_stuck(now):
            for one in self._watch.everyone():
                self._put(one.peer.address, self._heartbeat(one.peer, one.live))
        if self._watch:
            self._world.clock.at(self._next_beat, self._beat)
        else:
            self._beating = False

    def _refused(self, address: str, connection: Connection, now: float) -> bool:
        if self._world.at(address) is not None or self._world.cut(self.peer.address, address):
            return False
        if connection.refused_since is None:
            connection.refused_since = now
        return now - connection.refused_since > GONE_S

    def _disconnect(self, address: str) -> None:
        self._connections.pop(address, None)

    def _lost(self, peer: Peer, why: str) -> None:
        self._disconnect(peer.address)
        self._node.arrived(PeerLost(peer, why), urgent=False)

    def _heartbeat(self, to: Peer, live: frozenset[str]) -> Heartbeat:
        return Heartbeat(
            sender=self.peer,
            receiver=to.incarnation,
            live=tuple(sorted(live)),
        )
