"""The way to one peer, and whether a process still listens at its end."""

from __future__ import annotations

import time
from typing import Any, Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from sglang_star.errors import PeerError
from sglang_star.fleet_key import Access

SEND_HIGH_WATER_MARK: Final = 100_000
GONE_S: Final = 1.0
"""A peer whose address refuses connections for so long is gone: its kernel closed its sockets.
One that is frozen, starved or cut off still holds its connection, and is only silent."""


class Connection:
    """A PUSH socket that reconnects by itself; used by one thread.

    Attributes:
        used_at: when something was sent last, monotonic seconds.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        access: Access,
    ) -> None:
        """Begin to connect.

        Raises:
            PeerError: ``address`` is no member's.
        """
        self._socket: zmq.Socket[bytes] = context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, SEND_HIGH_WATER_MARK)
        self.used_at = time.monotonic()
        self._refused_since: float | None = None
        # An attempt that fails ends in CLOSED without ever having been CONNECTED.
        self._events: Any = self._socket.get_monitor_socket(zmq.EVENT_CONNECTED | zmq.EVENT_CLOSED)
        try:
            access.connect(self._socket, address)
        except (PeerError, zmq.ZMQError) as error:
            self.close()
            raise PeerError(f"cannot connect to {address}: {error}") from error

    def send(self, data: bytes) -> None:
        """Queue bytes.

        Raises:
            zmq.ZMQError: as many messages wait already as may.
        """
        self.used_at = time.monotonic()
        self._socket.send(data, zmq.NOBLOCK)

    def note_events(self) -> None:
        """Learn what became of the attempts to connect."""
        while self._events.poll(0):
            event = parse_monitor_message(self._events.recv_multipart())["event"]
            if event == zmq.EVENT_CONNECTED:
                self._refused_since = None
            elif self._refused_since is None:
                self._refused_since = time.monotonic()

    @property
    def gone(self) -> bool:
        """Whether nothing has listened at the address for :data:`GONE_S`."""
        since = self._refused_since
        return since is not None and time.monotonic() - since > GONE_S

    def close(self) -> None:
        """Close it; what is still queued is lost."""
        self._socket.disable_monitor()
        self._events.close(linger=0)
        self._socket.close()
