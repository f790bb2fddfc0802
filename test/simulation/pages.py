"""KV pages and the prefix cache; a page belongs to one request, to the cache, or to nobody."""

from __future__ import annotations

from collections.abc import Sequence


class Pages:
    """Pages of one engine.

    A page of the cache holds a whole page of positions and is found by the hash of the prefix that
    ends with it; requests share it, and it can be taken when none of them does.

    Attributes:
        free: that nobody has; idle: of the cache, used by no request, longest unused first, with
            their hashes.
    """

    def __init__(self, count: int, size: int) -> None:
        self.count = count
        self.size = size
        self.free = list(range(count))
        self.idle: dict[int, int] = {}
        self._cached: dict[int, int] = {}
        self._users: dict[int, int] = {}
        self._hash: dict[int, int] = {}

    def available(self) -> int:
        return len(self.free) + len(self.idle)

    def take(self) -> int:
        """A page, evicted from the cache if need be."""
        if self.free:
            return self.free.pop()
        page = next(iter(self.idle))
        del self._cached[self.idle.pop(page)], self._hash[page]
        return page

    def share(self, chain: Sequence[int]) -> list[int]:
        """Slots of the longest cached prefix, all but the last token at most; it is in use now."""
        size = self.size
        slots: list[int] = []
        for end in range(size, len(chain), size):
            page = self._cached.get(chain[end - 1])
            if page is None:
                break
            self.idle.pop(page, None)
            self._users[page] = self._users.get(page, 0) + 1
            slots.extend(range(page * size, page * size + size))
        return slots

    def give(self, slots: Sequence[int], chain: Sequence[int], complete: int) -> None:
        """Take back a request's slots; the cache keeps whole pages of ``complete`` positions."""
        size, users = self.size, self._users
        for at in range(0, len(slots), size):
            page = slots[at] // size
            if page in users:
                users[page] -= 1
                if not users[page]:
                    del users[page]
                    self.idle[page] = self._hash[page]
                continue
            end = at + size
            if end <= complete and chain[end - 1] not in self._cached:
                found = chain[end - 1]
                self._cached[found] = page
                self._hash[page] = self.idle[page] = found
            else:
                self.free.append(page)

    def clear(self, hidden: Sequence[int]) -> None:
        """All are free again but those that others have."""
        self.__init__(self.count, self.size)  # type: ignore[misc]
        gone = set(hidden)
        self.free = [page for page in self.free if page not in gone]

    def all_given_back(self) -> bool:
        return not self._users and sorted([*self.free, *self.idle]) == list(range(self.count))
