"""Which slots of a region are free."""

from __future__ import annotations


class Slots:
    """Slots ``0 .. count - 1``.

    The same calls in the same order give the same slots: on several ranks a piece of KV lies in
    the same place everywhere. The slot that was given back last is taken first, since it is warm.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._free = list(range(count))[::-1]

    def __len__(self) -> int:
        """How many are free."""
        return len(self._free)

    def take(self) -> int | None:
        """One that is free; None if none is."""
        return self._free.pop() if self._free else None

    def give(self, index: int) -> None:
        """It is free again.

        Raises:
            ValueError: it was, or there is no such slot.
        """
        if index in self._free or not 0 <= index < self._count:
            raise ValueError(f"slot {index} was not taken")
        self._free.append(index)
