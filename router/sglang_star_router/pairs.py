"""Whose fault a failed transfer between prefill and decode is: whoever fails with others too."""

from __future__ import annotations

from collections import defaultdict


class Pairs:
    """How each instance last did with each of its partners, by URL."""

    def __init__(self) -> None:
        self._worked: defaultdict[str, dict[str, bool]] = defaultdict(dict)

    def note(self, prefill: str, decode: str, worked: bool) -> None:
        """Note what became of one request of the two."""
        self._worked[prefill][decode] = worked
        self._worked[decode][prefill] = worked

    def guilty(self, prefill: str, decode: str) -> tuple[str, ...]:
        """Who is to blame that the two failed together; both where nothing tells them apart."""
        prefill_works = self._works_without(prefill, decode)
        if prefill_works == self._works_without(decode, prefill):
            return prefill, decode
        return (decode,) if prefill_works else (prefill,)

    def _works_without(self, one: str, partner: str) -> bool:
        return any(worked for other, worked in self._worked[one].items() if other != partner)
