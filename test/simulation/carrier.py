"""Carriers whose slots hold hashes; who opened them and did not close them is known."""

from __future__ import annotations

from typing import Any

from sglang_star.errors import PeerError
from sglang_star.migration.transport import CARRIERS
from sglang_star.migration.transport.base import Carrier

NAME = "simulated"


class Segments:
    """All shared memory of one history.

    Attributes:
        named: segments that can be opened; opened: sides that are open, with who opened them.
    """

    def __init__(self) -> None:
        self.named: dict[bytes, list[list[int]]] = {}
        self.opened: dict[int, Any] = {}
        self.owner: Any = None
        self._count = 0

    def install(self) -> None:
        """Be what moves of this process use from now on."""
        segments = self

        class SimulatedCarrier(_Carrier):
            @classmethod
            def send(cls, slots: int, slot_bytes: int) -> Carrier:
                segments._count += 1
                name = b"%d" % segments._count
                data = segments.named[name] = [[] for _ in range(slots)]
                return cls(segments, name, data, slot_bytes)

            @classmethod
            def receive(cls, setup: bytes) -> Carrier:
                if (data := segments.named.get(setup)) is None:
                    raise PeerError("the sender's shared memory is not reachable")
                return cls(segments, setup, data, 0)

        CARRIERS[NAME] = SimulatedCarrier  # type: ignore[type-abstract]


class _Carrier(Carrier):
    name = NAME

    def __init__(
        self, segments: Segments, setup: bytes, data: list[list[int]], slot_bytes: int
    ) -> None:
        self.setup = setup
        self.slots = len(data)
        self.slot_bytes = slot_bytes
        self._segments = segments
        self._data: list[list[int]] | None = data
        segments.opened[id(self)] = (segments.owner, self)

    def slot(self, index: int) -> Any:
        if self._data is None or not 0 <= index < self.slots:
            raise PeerError(f"no slot {index}")
        return self._data[index]

    def connected(self) -> None:
        self._segments.named.pop(self.setup, None)

    def close(self) -> None:
        if self.slot_bytes:
            self.connected()
        self._segments.opened.pop(id(self), None)
        self._data = None
