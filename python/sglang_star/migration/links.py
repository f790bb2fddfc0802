"""Sockets to other instances, on a thread of their own.

The scheduler thread never touches a socket: it appends to an outbox and takes from an inbox, so
that a decode step costs two attribute reads when nothing happens, and heartbeats keep flowing
while a long prefill or a slow step holds the scheduler.

Each instance binds one PULL socket; peers connect PUSH sockets to it. Messages between two
instances therefore arrive in the order they were sent.

A watched peer is lost when its process is gone, which its connection shows within about a second;
when another process answers under its name; or when it is silent for the time-out, be it frozen,
starved or cut off. Heartbeats do not wait for the scheduler, so a busy peer is not silent.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Collection

import zmq

from sglang_star import owned
from sglang_star.errors import ConfigError, PeerError, ProtocolError
from sglang_star.fleet_key import Access
from sglang_star.migration.connection import Connection
from sglang_star.migration.entrance import CROWDED, Entrance
from sglang_star.migration.mailbox import MAX_WAITING, Mailbox, OrderEnvelope, Wake
from sglang_star.migration.post import PeerLost
from sglang_star.migration.pulse import Pulse
from sglang_star.migration.watch import Watch
from sglang_star.protocol import Heartbeat, Message, Peer, decode, encode

logger = logging.getLogger(__name__)

FOLDER_PREFIX = "star-orders-"
"""Of the folder in the temporary directory that holds an instance's order socket."""
MAX_MESSAGE_BYTES = 64 << 20
MAX_SUBSCRIPTION_BYTES = 1 << 16
"""Nobody sends a status socket more than what he wants to hear."""
MAX_PEERS = 256
"""Peers that a way is kept to at the same time; the one used longest ago makes room."""
IDLE_S = 600.0
"""After so long a way that nobody uses is closed."""
MAX_AT_ONCE = 1000
"""Messages taken in before anything else gets its turn."""
MAX_WARNINGS = 100
"""Things that the log warns of, each once; all of them are counted."""


class Links:
    """All traffic of one instance: peers, status subscribers, and its own HTTP process.

    Attributes:
        mail: messages, orders and lost peers, taken by the scheduler thread; pulse: told by it
            of every step boundary.
        peer: how others reach this instance; status_address, order_address: the other endpoints.
        dropped: counts of what was lost here, by reason: bytes that were not understood, by the
            name of the error; messages too many, in or out; whom the entrances refused.
    """

    def __init__(
        self,
        instance_id: str,
        incarnation: int,
        *,
        host: str,
        advertise_host: str,
        migration_port: int,
        status_port: int,
        heartbeat_s: float,
        timeout_s: float,
        stuck_s: float,
        access: Access,
    ) -> None:
        self.mail = Mailbox()
        self.dropped: Counter[str] = Counter()
        self._heartbeat_s = heartbeat_s
        self._timeout_s = timeout_s
        self._context = zmq.Context(io_threads=1)
        self._access = access
        self._guard = access.guard(self._context)
        self._outbox: deque[tuple[str | bytes, bytes]] = deque()
        self._outbox_wake = Wake()
        self._watch = Watch(timeout_s)
        self.pulse = Pulse(stuck_s, time.monotonic())
        self._stuck = False
        self._connections: dict[str, Connection] = {}
        self._blamed: set[str] = set()
        self._entrances: list[Entrance] = []
        self._closing = False
        members = self._enter(
            zmq.PULL, host, migration_port, "--star-migration-port", MAX_MESSAGE_BYTES
        )
        listeners = self._enter(
            zmq.PUB, host, status_port, "--star-status-port", MAX_SUBSCRIPTION_BYTES
        )
        self._pull, self._publisher = members.socket, listeners.socket
        self.peer = Peer(
            instance_id=instance_id,
            incarnation=incarnation,
            address=access.advertise(f"tcp://{advertise_host}:{members.port}"),
        )
        self.status_address = access.advertise(f"tcp://{advertise_host}:{listeners.port}")
        # Only this user may give orders: the socket lies in a folder of mode 0700.
        owned.sweep(tempfile.gettempdir(), FOLDER_PREFIX)
        self._folder, self._folder_lock = owned.make_folder(tempfile.gettempdir(), FOLDER_PREFIX)
        self.order_address = f"ipc://{self._folder}/orders"
        self._orders: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self._orders.setsockopt(zmq.LINGER, 0)
        try:
            self._orders.bind(self.order_address)
        except zmq.ZMQError as error:
            self._remove_folder()
            self._end_context()
            raise ConfigError(
                f"STAR cannot bind its order socket: {error}",
                hint="set TMPDIR to a directory with a shorter name",
            ) from error
        self._thread = threading.Thread(target=self._run, name="star-links", daemon=True)
        self._thread.start()

    def _enter(self, kind: int, host: str, port: int, flag: str, largest: int) -> Entrance:
        try:
            entrance = Entrance(
                self._context, kind, self._access, host=host, port=port, largest=largest
            )
        except (OSError, zmq.ZMQError) as error:
            # A context with an open socket would block the interpreter's exit.
            self._end_context()
            raise ConfigError(
                f"STAR cannot bind tcp://{host}:{port or '*'}: {error}",
                hint=f"choose another {flag} or --star-host; 0 picks a free port",
            ) from error
        self._entrances.append(entrance)
        return entrance

    def _end_context(self) -> None:
        for entrance in self._entrances:
            entrance.close()
        if self._guard is not None:
            self._guard.stop()
        self._context.destroy(linger=0)

    # ------------------------------------------------------------------ scheduler thread

    def send(self, peer: Peer, message: Message) -> None:
        """Queue a message; it is lost silently only if the peer is gone."""
        self._post(peer.address, message)

    def publish(self, message: Message) -> None:
        """Queue a status for all subscribers."""
        self._post("", message)

    def reply(self, order: OrderEnvelope, answer: Message) -> None:
        """Answer an order."""
        self._post(order.sender, answer)

    def _post(self, to: str | bytes, message: Message) -> None:
        if len(self._outbox) < MAX_WAITING:
            self._outbox.append((to, encode(message)))
            self._outbox_wake.set()
        else:
            self.dropped["outbox full"] += 1

    def watch(self, pairs: Collection[tuple[Peer, str]]) -> None:
        """Set whom to exchange heartbeats with: peers, each with a stream that is the reason."""
        for former in self._watch.set(pairs, time.monotonic()):
            self._deliver(PeerLost(former, "it has restarted"))
        self._outbox_wake.set()

    def close(self) -> None:
        """Stop the thread and close every socket."""
        self._closing = True
        self._outbox_wake.set()
        self._thread.join(timeout=2.0)

    # ------------------------------------------------------------------ links thread

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._pull, zmq.POLLIN)
        poller.register(self._orders, zmq.POLLIN)
        poller.register(self._outbox_wake.fd, zmq.POLLIN)
        for entrance in self._entrances:
            poller.register(entrance.events, zmq.POLLIN)
        next_beat = time.monotonic()
        while not self._closing:
            wait = max(0.0, next_beat - time.monotonic()) if self._watch else 1.0
            poller.poll(int(min(wait, 1.0) * 1000))
            self._flush()
            self._receive()
            self._receive_orders()
            self._look_at_entrances()
            if (now := time.monotonic()) >= next_beat:
                self._beat(now - next_beat)
                next_beat = now + self._heartbeat_s
        for connection in self._connections.values():
            connection.close()
        self._orders.close(linger=0)
        self._end_context()
        self._remove_folder()

    def _remove_folder(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._folder_lock)

    def _flush(self) -> None:
        self._outbox_wake.clear()
        while self._outbox:
            to, data = self._outbox.popleft()
            try:
                if isinstance(to, bytes):
                    self._orders.send_multipart([to, data], zmq.NOBLOCK)
                elif to:
                    self._connect(to).send(data)
                else:
                    self._publisher.send(data, zmq.NOBLOCK)
            except zmq.ZMQError:
                self.dropped["send"] += 1
            except PeerError as error:
                self._not_ours(str(to), error)

    def _connect(self, address: str) -> Connection:
        connection = self._connections.get(address)
        if connection is None:
            if len(self._connections) >= MAX_PEERS:
                self._disconnect(
                    min(self._connections, key=lambda one: self._connections[one].used_at)
                )
            connection = Connection(self._context, address, self._access)
            self._connections[address] = connection
        return connection

    def _not_ours(self, address: str, error: PeerError) -> None:
        """Nothing is sent to an address that is not a member's; whoever waits for it is told."""
        self.dropped["not a member"] += 1
        self._warn_once(address, "STAR sends nothing: %s", error)
        for peer in self._watch.drop({address}):
            self._deliver(PeerLost(peer, error.message))

    def _look_at_entrances(self) -> None:
        seen: Counter[str] = Counter()
        for entrance in self._entrances:
            entrance.look(seen)
        if not seen:
            return
        self.dropped.update(seen)
        if seen[CROWDED]:
            self._warn_once(CROWDED, "STAR has too many connections: it lets nobody in for now")
        if seen.total() > seen[CROWDED]:
            self._warn_once("refused", "STAR refused a connection: no key of its fleet")

    def _disconnect(self, address: str) -> None:
        connection = self._connections.pop(address, None)
        if connection is not None:
            connection.close()

    def _receive(self) -> None:
        for _ in range(MAX_AT_ONCE):
            try:
                data = self._pull.recv(zmq.NOBLOCK)
            except zmq.ZMQError:
                break
            try:
                message = decode(data)
            except ProtocolError as error:
                self._drop(error)
                continue
            if isinstance(message, Heartbeat):
                self._hear(message)
            self._deliver(message)

    def _receive_orders(self) -> None:
        for _ in range(MAX_AT_ONCE):
            try:
                sender, *_, data = self._orders.recv_multipart(zmq.NOBLOCK)
            except zmq.ZMQError:
                return
            try:
                order = OrderEnvelope(sender, decode(data))
            except ProtocolError as error:
                self._drop(error)
            else:
                self._deliver(order)

    def _deliver(self, item: Message | OrderEnvelope | PeerLost) -> None:
        if not self.mail.put(item):
            self.dropped["inbox full"] += 1

    def _drop(self, error: ProtocolError) -> None:
        kind = type(error).__name__
        self.dropped[kind] += 1
        self._warn_once(kind, "STAR dropped bytes on its migration socket: %s", error)

    def _warn_once(self, kind: str, text: str, *arguments: object) -> None:
        if kind not in self._blamed and len(self._blamed) < MAX_WARNINGS:
            self._blamed.add(kind)
            logger.warning(text, *arguments)

    def _hear(self, beat: Heartbeat) -> None:
        sender = beat.sender
        if self._watch.hear(sender, time.monotonic()):
            return
        # A peer that believes it has business with us while we do not know of any: an answer
        # shows it our incarnation, so that it notices a restart at once instead of by time-out.
        if beat.live:
            self._outbox.append((sender.address, encode(self._heartbeat(sender, frozenset()))))
            self._flush()
        for peer in self._watch.drop_former(sender):
            self._lost(peer, "it has restarted")

    def _beat(self, late_s: float) -> None:
        """Find out who is lost, and tell the others that we are here; ``late_s`` after its time."""
        gone = self._gone()
        for peer in self._watch.drop(gone):
            self._lost(peer, "its process is gone")
        for address in gone | self._idle():
            self._disconnect(address)
        for peer in self._watch.drop_silent(time.monotonic(), late_s):
            self._lost(peer, f"silent for {self._timeout_s:g} s")
        if not self._is_stuck():
            for one in self._watch.everyone():
                self._outbox.append((one.peer.address, encode(self._heartbeat(one.peer, one.live))))
        self._flush()

    def _is_stuck(self) -> bool:
        """Whether our scheduler is; said once each time."""
        before, self._stuck = self._stuck, self.pulse.is_stuck(time.monotonic())
        if self._stuck and not before:
            logger.error(
                "STAR: the scheduler has not come to a step boundary for too long: no more "
                "heartbeats, so that peers take their requests back"
            )
        return self._stuck

    def _gone(self) -> set[str]:
        """Addresses at which nobody listens any more."""
        for connection in self._connections.values():
            connection.note_events()
        return {address for address, one in self._connections.items() if one.gone}

    def _idle(self) -> set[str]:
        """Addresses that nothing was sent to for long; who is watched is sent heartbeats."""
        before = time.monotonic() - IDLE_S
        return {address for address, one in self._connections.items() if one.used_at < before}

    def _lost(self, peer: Peer, why: str) -> None:
        self._disconnect(peer.address)
        self._deliver(PeerLost(peer, why))

    def _heartbeat(self, to: Peer, live: frozenset[str]) -> Heartbeat:
        return Heartbeat(sender=self.peer, receiver=to.incarnation, live=tuple(live))
