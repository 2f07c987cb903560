"""Deadlines, and a memory that forgets."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from llmserve.bus.flow.entry import Entry

K = TypeVar("K", bound=Hashable)


class Timers:
    """Deadlines of entries; one that has moved since is no longer due."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int, Entry]] = []
        self._counter = 0
        self._sweep_at = 1024

    def set(self, due_s: float, entry: Entry) -> None:
        """Call for attention at ``due_s`` unless the entry moves before."""
        self._counter += 1
        heapq.heappush(self._heap, (due_s, self._counter, entry.stamp, entry))
        if len(self._heap) >= self._sweep_at:
            self._heap = [timer for timer in self._heap if timer[2] == timer[3].stamp]
            heapq.heapify(self._heap)
            self._sweep_at = max(1024, 2 * len(self._heap))

    def due(self, now_s: float) -> list[Entry]:
        """Take out the entries whose time has come, earliest first."""
        entries = []
        while self._heap and self._heap[0][0] <= now_s:
            _, _, stamp, entry = heapq.heappop(self._heap)
            if stamp == entry.stamp:
                entries.append(entry)
        return entries


class Memory(Generic[K]):
    """Keys that were added less than ``memory_s`` ago."""

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._added_s: OrderedDict[K, float] = OrderedDict()

    def add(self, key: K, now_s: float) -> None:
        self._added_s[key] = now_s
        self._added_s.move_to_end(key)

    def __contains__(self, key: K) -> bool:
        return key in self._added_s

    def forget(self, now_s: float) -> None:
        while self._added_s and next(iter(self._added_s.values())) <= now_s - self._memory_s:
            self._added_s.popitem(last=False)
