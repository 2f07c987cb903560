"""One listing of a tier while the tier's pages come and go. Pure; times are given.

Listings take minutes where there are many pages, so what one shows of a page is older than what was told of it since
the listing began: the latter counts. Taking it in costs microseconds a page, so it goes in slices, between which
others get the event loop.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import TypeVar

import msgspec

from llmserve.kvstore.hotset import HotSets, Page
from llmserve.kvstore.keys import PageKey, parse_path
from llmserve.kvstore.stores.base import Stored

T = TypeVar("T")

SLICE_PAGES = 250
"""Pages that are taken in at once: about a millisecond where all are new."""
_SORT_PAGES = 2000


class Found(msgspec.Struct, gc=False):
    """A page of a listing."""

    path: str
    size_bytes: int
    used_s: float
    """The later of what the listing says and what was known."""
    known: bool
    """The page was known when it was listed."""
    key: PageKey | None = None
    """Of those that were not."""


class Listing:
    """What a tier's store says it holds, batch by batch; ``sort`` it before it is taken in."""

    def __init__(self, tier: int, pages: HotSets[str], now_s: float) -> None:
        self.tier = tier
        self.pages = pages
        self.total = 0
        """Pages that it shows."""
        self.sorted = False
        """Is being taken in: the order of the tier's pages is not right meanwhile."""
        self._began_s = now_s
        self._before = list(pages.keys())
        self._said: dict[str, Found] = {}
        self._told: dict[str, None] = {}
        """Came or went since the listing began."""
        self._used: dict[str, float] = {}
        """When, by path: the page may be one that is still to come in."""
        self._late: set[str] = set()
        """Used since the listing began, as it says itself."""
        self._found: list[Found] = []
        """Those used last first; freed as they are taken in, since freeing all at once takes long."""
        self._missing: list[PageKey] = []

    def add(self, batch: Iterable[Stored]) -> None:
        """A batch from the store."""
        for item in batch:
            known = self.pages.get(item.path)
            used_s = max(item.used_s, known.used_s) if known is not None else item.used_s
            self._said[item.path] = Found(item.path, item.size_bytes, used_s, known is not None)

    def told(self, path: str) -> None:
        """The page came or went."""
        self._told[path] = None

    def used(self, path: str, now_s: float) -> None:
        """The page was used now."""
        self._used[path] = now_s

    def sort(self) -> None:
        """After the last batch; may run in a thread, while the tier's pages change."""
        missing = (parse_path(path) for path in self._before if path not in self._said)
        self._missing = [key for key in missing if key is not None]
        for item in self._said.values():
            if not item.known:
                item.key = parse_path(item.path)
        self._found = _by_use([item for item in self._said.values() if item.known or item.key is not None])
        self.total = len(self._found)
        self._said, self._before = {}, []
        self.sorted = True

    def missing(self) -> Iterator[list[PageKey]]:
        """Slices of the pages that were known and are not there; what was told since is left out."""
        for part in _taken(self._missing):
            yield [key for key in part if key.path not in self._told]

    def found(self) -> Iterator[list[Found]]:
        """Slices of the pages that are there, the coldest first; what was told since is left out."""
        for part in _taken(self._found):
            self._late.update(item.path for item in part if item.used_s >= self._began_s)
            yield [item for item in part if item.path not in self._told]

    def renew(self, item: Found) -> None:
        """Put a page that is there where its last use belongs, behind those that were taken in before."""
        known = self.pages.get(item.path)
        if known is None or known.size_bytes != item.size_bytes or known.used_s < item.used_s:
            space = item.key.space if item.key is not None else item.path.split("/")[3]
            used_s = max(item.used_s, known.used_s) if known is not None else item.used_s
            self.pages.add(item.path, Page(space, item.size_bytes, used_s))
        else:
            self.pages.place_last(item.path)

    def finish(self) -> None:
        """All is taken in: pages that were used while it went on are the last of their spaces."""
        late = self._late | self._told.keys() | self._used.keys()
        for path, used_s in self._used.items():
            if (page := self.pages.get(path)) is not None and page.used_s < used_s:
                self.pages.touch(path, used_s)
        used = [(page.used_s, path) for path in late if (page := self.pages.get(path)) is not None]
        for _, path in sorted(used):
            self.pages.place_last(path)


def _by_use(items: list[Found]) -> list[Found]:
    """Those used last first. Sorting all at once would keep the interpreter from all other threads meanwhile."""
    parts = [items[start : start + _SORT_PAGES] for start in range(0, len(items), _SORT_PAGES)]
    for part in parts:
        part.sort(key=attrgetter("used_s"), reverse=True)
    return list(heapq.merge(*parts, key=attrgetter("used_s"), reverse=True))


def _taken(items: list[T]) -> Iterator[list[T]]:
    """Slices of ``items``, the last ones first, which are not in it any more."""
    while items:
        part = items[: -SLICE_PAGES - 1 : -1]
        del items[-SLICE_PAGES:]
        yield part
