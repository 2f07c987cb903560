"""Who loses a page when there are too many: the order of eviction, for DRAM, disks and object stores alike. Pure.

Pages are kept by space (a tenant, or a group that shares) in order of their last use. The next victim is the coldest
page of the space that is furthest above its hot set, so that a tenant which fills the tier evicts its own pages while
others keep what they were promised. Hot sets that together exceed the capacity shrink in proportion.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from typing import Generic, TypeVar

import msgspec

K = TypeVar("K", bound=Hashable)


class Page(msgspec.Struct, frozen=True, gc=False):
    """One page of a tier. Of these there are many: the garbage collector does not look at each."""

    space: str
    size_bytes: int
    used_s: float


class HotSets(Generic[K]):
    """The pages of one tier."""

    def __init__(self, capacity_bytes: float, hot_bytes: Mapping[str, float]) -> None:
        """``hot_bytes``: promised to each space; none to those that are not in it."""
        promised = sum(hot_bytes.values())
        shrunk = min(1.0, capacity_bytes / promised) if promised else 1.0
        self._hot = {space: size * shrunk for space, size in hot_bytes.items()}
        self._capacity_bytes = capacity_bytes
        self._pages: dict[K, Page] = {}
        self._order: dict[str, OrderedDict[K, None]] = {}
        """By space, the coldest first."""
        self._bytes: dict[str, int] = {}
        self.total_bytes = 0

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, key: object) -> bool:
        return key in self._pages

    def get(self, key: K) -> Page | None:
        return self._pages.get(key)

    def keys(self) -> Iterator[K]:
        return iter(self._pages)

    def bytes_of(self, space: str) -> int:
        return self._bytes.get(space, 0)

    def hot_bytes(self, space: str) -> float:
        """Promised to the space in this tier."""
        return self._hot.get(space, 0.0)

    @property
    def over_bytes(self) -> float:
        """Above the capacity."""
        return self.total_bytes - self._capacity_bytes

    def add(self, key: K, page: Page) -> None:
        """A page that is there now; replaces what was known of it. It counts as the last used of its space: add those
        of a listing in the order of their use."""
        self.remove(key)
        self._pages[key] = page
        order = self._order.setdefault(page.space, OrderedDict())
        order[key] = None
        self._bytes[page.space] = self.bytes_of(page.space) + page.size_bytes
        self.total_bytes += page.size_bytes

    def touch(self, key: K, now_s: float) -> None:
        """The page was used now; unknown ones are ignored."""
        page = self._pages.get(key)
        if page is not None:
            self._pages[key] = Page(page.space, page.size_bytes, now_s)
            self._order[page.space].move_to_end(key)

    def place_last(self, key: K) -> None:
        """The page counts as the last used of its space; unknown ones are ignored. Its time of use stays."""
        page = self._pages.get(key)
        if page is not None:
            self._order[page.space].move_to_end(key)

    def remove(self, key: K) -> None:
        """The page is gone; unknown ones are ignored."""
        page = self._pages.pop(key, None)
        if page is None:
            return
        order = self._order[page.space]
        del order[key]
        self._bytes[page.space] -= page.size_bytes
        self.total_bytes -= page.size_bytes
        if not order:
            del self._order[page.space], self._bytes[page.space]

    def spaces(self) -> list[str]:
        return list(self._order)

    def coldest_first(self, space: str) -> Iterator[tuple[K, Page]]:
        """The pages of a space."""
        for key in self._order.get(space, ()):
            yield key, self._pages[key]

    def victims(
        self,
        going: Collection[K] = (),
        used_before_s: float = math.inf,
        *,
        above_hot_sets: bool = False,
        may_go: Callable[[K], bool] = lambda key: True,
    ) -> Iterator[tuple[K, Page]]:
        """Pages in the order in which they have to go; the caller stops when it has enough, and then removes them.

        ``going``: pages that leave already; they are passed over, and count as gone. ``used_before_s``: pages used
        later are passed over. ``above_hot_sets``: spaces are not taken below their hot sets (by more than a page).
        ``may_go``: those that it refuses are passed over, and stay.
        """
        excess = {space: size - self.hot_bytes(space) for space, size in self._bytes.items()}
        for gone in going:
            if (page := self._pages.get(gone)) is not None:
                excess[page.space] -= page.size_bytes
        queues = {space: iter(order) for space, order in self._order.items()}
        while queues:
            space = max(queues, key=lambda name: (excess[name], name))
            if above_hot_sets and excess[space] <= 0:
                return
            key = next(queues[space], None)
            page = self._pages[key] if key is not None else None
            if key is None or page is None or page.used_s > used_before_s:
                # Those behind it were used later still.
                del queues[space]
            elif key not in going and may_go(key):
                excess[space] -= page.size_bytes
                yield key, page

    def check(self) -> None:
        """Assert that the sums and orders agree."""
        assert self.total_bytes == sum(page.size_bytes for page in self._pages.values())
        assert sum(len(order) for order in self._order.values()) == len(self._pages)
        for space, order in self._order.items():
            assert order, space
            assert self._bytes[space] == sum(self._pages[key].size_bytes for key in order)
            assert all(self._pages[key].space == space for key in order)
