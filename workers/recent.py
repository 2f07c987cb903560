"""Things remembered for a while."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """A mapping whose items are forgotten ``keep_s`` after they were last set."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._items: dict[K, tuple[float, V]] = {}
        self._order: deque[tuple[float, K]] = deque()

    def set(self, key: K, value: V, now_s: float) -> None:
        self._forget(now_s)
        until_s = now_s + self._keep_s
        self._items[key] = (until_s, value)
        self._order.append((until_s, key))

    def get(self, key: K, now_s: float) -> V | None:
        self._forget(now_s)
        item = self._items.get(key)
        return None if item is None else item[1]

    def __iter__(self) -> Iterator[K]:
        return iter(list(self._items))

    def __len__(self) -> int:
        return len(self._items)

    def _forget(self, now_s: float) -> None:
        while self._order and self._order[0][0] <= now_s:
            until_s, key = self._order.popleft()
            item = self._items.get(key)
            if item is not None and item[0] == until_s:
                del self._items[key]
