"""Which page follows which in the prefixes of prompts. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from llmserve.kvstore.keys import PageKey, parse_path

_AHEAD = 64
"""Pages whose followers are looked up at once."""


class Prefixes:
    """A tree for each kind of pages and space, as far as it was told."""

    def __init__(self) -> None:
        self._children: dict[tuple[str, str, bytes], set[str]] = {}
        """(fingerprint, space, block) -> paths of the pages that follow it."""
        self._parents: dict[str, tuple[str, str, bytes]] = {}

    def __contains__(self, path: object) -> bool:
        """Whether it is known what the page follows."""
        return path in self._parents

    def __iter__(self) -> Iterator[str]:
        return iter(self._parents)

    def link(self, key: PageKey, parent: bytes) -> None:
        """The page follows the block ``parent``."""
        place, path = (key.fingerprint, key.space, parent), key.path
        self._children.setdefault(place, set()).add(path)
        self._parents[path] = place

    def unlink(self, path: str) -> None:
        """The page is nowhere any more; unknown ones are ignored."""
        place = self._parents.pop(path, None)
        if place is not None:
            self._children[place].discard(path)
            if not self._children[place]:
                del self._children[place]

    def following(self, key: PageKey) -> Iterator[str]:
        """Pages that follow ``key`` in any prefix, the nearest first."""
        nearest = deque([key])
        for _ in range(_AHEAD):
            if not nearest:
                return
            here = nearest.popleft()
            for path in sorted(self._children.get((here.fingerprint, here.space, here.block), ())):
                child = parse_path(path)
                assert child is not None
                nearest.append(child)
                yield path

    def check(self) -> None:
        """Assert that both directions agree."""
        for path, place in self._parents.items():
            assert path in self._children[place]
        assert sum(len(paths) for paths in self._children.values()) == len(self._parents)
