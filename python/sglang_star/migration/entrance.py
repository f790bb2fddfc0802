"""A bound socket as others find it: who is let in, who is refused, and how many may be there.

Connections that have not shown a key yet cost a descriptor each, and an engine without descriptors
ends. So there is a limit, and while it is reached the kernel drops what asks for a connection, as
a busy network would: who is let in already notices nothing, and who is not tries again. (It does
not refuse: a peer whose address refuses connections counts as gone.)
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import resource
import socket
import struct
from collections import Counter
from typing import Any, Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from sglang_star.fleet_key import Access

logger = logging.getLogger(__name__)

HANDSHAKE_MS: Final = 5000
"""Who has not shown a key by then is cut off, so that nobody without one can hold connections."""
LIMIT: Final = 4096
"""Connections that one socket has at most, ..."""
SHARE: Final = 8
"""... and this part of the descriptors that the process may have."""
BACKLOG: Final = 128
EVENTS: Final = 1000
"""Looked at in one go, so that a flood of strangers holds nothing up."""
KEEPALIVE: Final = {
    zmq.TCP_KEEPALIVE: 1, zmq.TCP_KEEPALIVE_IDLE: 60, zmq.TCP_KEEPALIVE_INTVL: 15,
    zmq.TCP_KEEPALIVE_CNT: 4,
}  # fmt: skip
"""Whose machine is gone is cut off after two minutes. Kernels answer, so that a process that is
frozen keeps its connections."""

REFUSED: Final = {
    zmq.Event.HANDSHAKE_FAILED_AUTH: "unknown key",
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL: "no key",
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL: "no key",
}
"""What a socket sees of those that are not members, and the names it is counted under."""
CROWDED: Final = "too many connections"
"""Name under which is counted how often the limit was reached."""

_ATTACH_FILTER, _DETACH_FILTER = 26, 27
_DROP_ALL: Final = struct.pack("HBBI", 0x06, 0, 0, 0)
"""One instruction of a socket filter: keep no byte of what comes."""

_names = itertools.count()


class Entrance:
    """See the module's text; used by one thread.

    Attributes:
        socket: the bound one; events: readable when :meth:`look` has something to see.
        port: where it is bound.

    Raises:
        OSError, zmq.ZMQError: it cannot be bound there.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        kind: int,
        access: Access,
        *,
        host: str,
        port: int,
        largest: int,
    ) -> None:
        """``largest`` is the size of the largest message that is taken in, bytes."""
        self._inside = 0
        self._shut = False
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit = LIMIT if soft == resource.RLIM_INFINITY else max(8, min(LIMIT, soft // SHARE))
        self.socket: zmq.Socket[bytes] = context.socket(kind)
        self.socket.setsockopt(zmq.LINGER, 0)
        access.serve(self.socket)
        # All of these before it is bound: later they would be for nobody.
        self.socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        self.socket.setsockopt(zmq.MAXMSGSIZE, largest)
        for option, value in KEEPALIVE.items():
            self.socket.setsockopt(option, value)
        name = f"inproc://star-entrance-{next(_names)}"
        self.socket.monitor(name, sum(REFUSED) | zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self.events: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        self.events.setsockopt(zmq.LINGER, 0)
        # Without a limit: ZeroMQ's own thread would wait for us when it is reached.
        self.events.setsockopt(zmq.RCVHWM, 0)
        self.events.connect(name)
        self._listening = _listen(host, port)
        self.port: int = self._listening.getsockname()[1]
        self.socket.setsockopt(zmq.USE_FD, self._listening.dup().detach())
        self.socket.bind(f"tcp://127.0.0.1:{self.port}")  # looked at for its form alone

    def look(self, seen: Counter[str]) -> None:
        """Count who was refused since the last look, and let in as many as there is room for."""
        for _ in range(EVENTS):
            if not self.events.poll(0):
                break
            event = parse_monitor_message(self.events.recv_multipart())["event"]
            if event == zmq.EVENT_ACCEPTED:
                self._inside += 1
            elif event == zmq.EVENT_DISCONNECTED:
                self._inside -= 1
            else:
                seen[REFUSED[zmq.Event(event)]] += 1
        if not self._shut and self._inside >= self._limit:
            self._shut = True
            self._shut_out()
            seen[CROWDED] += 1
        elif self._shut and self._inside <= self._limit * 3 // 4:
            self._shut = False
            self._listening.setsockopt(socket.SOL_SOCKET, _DETACH_FILTER, 0)

    def close(self) -> None:
        """Let nobody in any more, and part with who is there."""
        self.socket.disable_monitor()
        self.socket.close(linger=0)
        self.events.close(linger=0)
        self._listening.close()

    def _shut_out(self) -> None:
        instruction = ctypes.create_string_buffer(_DROP_ALL)
        program = struct.pack("HP", 1, ctypes.addressof(instruction))
        try:
            self._listening.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, program)
        except OSError as error:
            self._shut = False
            self._limit *= 2  # not asked again for every one of them
            logger.warning("STAR cannot limit its connections: %s", error)


def _listen(host: str, port: int) -> socket.socket:
    """Listen on the first address of a host, ``*`` for all of IPv4."""
    name = None if host == "*" else host.strip("[]")
    family, kind, protocol, _, address = socket.getaddrinfo(
        name,
        port,
        family=socket.AF_INET if name is None else 0,
        type=socket.SOCK_STREAM,
        flags=socket.AI_PASSIVE,
    )[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening
