"""The page pool of a simulated engine: private pages, and named ones that later sequences find again.

As in vLLM's block pool, a page that is full gets the hash of its block as its name, a page that nobody uses any more
keeps its name until its memory is needed, and the one that was left first goes first. Below the pool may lie a tier
in DRAM: what is evicted goes there, and is loaded again when it is asked for. No I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmserve.bus.block_hashes import pack_short
from llmserve.bus.messages import KvChange, Tier


class PagePool:
    """``pages`` in all, ``dram_pages`` in the tier. Named pages are known by the short hash of their block."""

    def __init__(self, pages: int, dram_pages: int = 0) -> None:
        self.pages = pages
        self.dram_pages = dram_pages
        self._dram: dict[int, None] = {}
        """In the order of their last use."""
        self._dram_before: dict[int, bool] = {}
        """Whether the tier had them when ``changes`` was called last."""
        self.private = 0
        """Pages in use that have no name."""
        self._uses: dict[int, int] = {}
        """Named pages in use, and by how many sequences."""
        self._idle: dict[int, None] = {}
        """Named pages that nobody uses, in the order in which they were left."""
        self._stored: list[int] = []
        self._removed: list[int] = []

    @property
    def free(self) -> int:
        """Pages that can be had, those of idle names included."""
        return self.pages - self.private - len(self._uses)

    @property
    def named(self) -> int:
        return len(self._uses) + len(self._idle)

    def known(self, hashes: Sequence[int]) -> int:
        """How many of the leading blocks are here."""
        for count, number in enumerate(hashes):
            if number not in self._uses and number not in self._idle:
                return count
        return len(hashes)

    def loadable(self, hashes: Sequence[int]) -> int:
        """How many of the leading blocks the tier has."""
        for count, number in enumerate(hashes):
            if number not in self._dram:
                return count
        return len(hashes)

    def can_take(self, shared: Sequence[int], private: int) -> bool:
        """Whether ``take`` of the same would work."""
        return private + sum(number in self._idle for number in shared) <= self.free

    def take(self, shared: Sequence[int], private: int) -> None:
        """Use named pages, which must be here, and so many without a name."""
        for number in shared:
            self._idle.pop(number, None)
            self._uses[number] = self._uses.get(number, 0) + 1
        self.private += private
        while self.private + len(self._uses) + len(self._idle) > self.pages:
            oldest = next(iter(self._idle))
            del self._idle[oldest]
            self._removed.append(oldest)
            self._demote(oldest)

    def _demote(self, number: int) -> None:
        if not self.dram_pages:
            return
        self._dram_before.setdefault(number, number in self._dram)
        self._dram.pop(number, None)
        self._dram[number] = None
        if len(self._dram) > self.dram_pages:
            oldest = next(iter(self._dram))
            self._dram_before.setdefault(oldest, True)
            del self._dram[oldest]

    def name(self, number: int) -> bool:
        """A private page in use is full: give it its name. False if another page has it, which is used instead."""
        known = number in self._uses or number in self._idle
        self._idle.pop(number, None)
        self._uses[number] = self._uses.get(number, 0) + 1
        self.private -= 1
        if not known:
            self._stored.append(number)
        return not known

    def leave(self, shared: Sequence[int], private: int) -> None:
        """Use them no more. The last blocks are left first, so that a prefix loses its tail first."""
        self.private -= private
        for number in reversed(shared):
            self._uses[number] -= 1
            if not self._uses[number]:
                del self._uses[number]
                self._idle[number] = None

    def changes(self) -> list[KvChange]:
        """What was named and lost its name since the last call."""
        return [*self._gpu_changes(), *self._dram_changes()]

    def _dram_changes(self) -> list[KvChange]:
        before, self._dram_before = self._dram_before, {}
        stored = [number for number, was in before.items() if not was and number in self._dram]
        removed = [number for number, was in before.items() if was and number not in self._dram]
        return [KvChange(Tier.DRAM, pack_short(stored), pack_short(removed))] if stored or removed else []

    def _gpu_changes(self) -> list[KvChange]:
        if not self._stored and not self._removed:
            return []
        # A name may have gone and come back, or the other way round: what is here now decides.
        touched = dict.fromkeys([*self._removed, *self._stored])
        here = [number for number in touched if number in self._uses or number in self._idle]
        gone = [number for number in touched if number not in self._uses and number not in self._idle]
        self._stored, self._removed = [], []
        return [KvChange(Tier.GPU, stored=pack_short(here), removed=pack_short([*gone, *here]))]

    def check(self) -> None:
        """Assert that no page is counted twice."""
        assert not self._uses.keys() & self._idle.keys()
        assert min(self._uses.values(), default=1) > 0
        assert self.private >= 0
        assert self.private + len(self._uses) + len(self._idle) <= self.pages
        assert len(self._dram) <= self.dram_pages
